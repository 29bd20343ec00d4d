"""Rows are recognized by their keys, and become texts, completions and conversations; mistakes are named."""

import json
import re

import pytest

from lowmem.finetuning.row_kinds import Completion, Conversation, PlainText, RowOptions, convert_row

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}
CALLS = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ANSWER]


def converted(record, **options):
    return convert_row(record, RowOptions(**options))


@pytest.mark.parametrize(
    ("kind", "record", "expected"),
    [
        ("text", "a whole file", PlainText("a whole file")),
        ("text", {"text": "a", "source": 3}, PlainText("a")),
        ("prompt and completion", {"prompt": "p", "completion": "c"}, Completion("p", "c")),
        ("prompt and completion", {"prompt": [USER], "completion": [ANSWER]}, Conversation([USER, ANSWER], None, 1)),
        ("prompt and completion", {"prompt": "q", "completion": [ANSWER]}, Conversation([USER, ANSWER], None, 1)),
        (
            "prompt and completion",
            {"prompt": [USER, ANSWER, USER], "completion": "a"},
            Conversation([USER, ANSWER, USER, ANSWER], None, 3),
        ),
        (
            "prompt and completion",
            {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},  # cells of a table
            Conversation([USER, ANSWER], None, 1),
        ),
        ("prompt and completion", {"prompt": "[{1}]", "completion": '[{"a": 1}]'}, Completion("[{1}]", '[{"a": 1}]')),
        ("messages", {"messages": [USER, ANSWER]}, Conversation([USER, ANSWER])),
        ("messages", {"messages": CALLS, "tools": [TOOL]}, Conversation(CALLS, [TOOL])),
        ("messages", {"messages": [USER, ANSWER], "text": None}, Conversation([USER, ANSWER])),
        (
            "messages",
            {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
            Conversation([USER, ANSWER]),
        ),
        ("Alpaca", {"instruction": "q", "input": "", "output": "a"}, Conversation([USER, ANSWER])),
        (
            "Alpaca",
            {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
            Conversation([{"role": "system", "content": "s"}, USER, ANSWER, {**USER, "content": "q\ni"}, ANSWER]),
        ),
        (
            "ShareGPT",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Conversation([{"role": "system", "content": "s"}, USER, ANSWER]),
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Paris"}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "look", "description": "d", "parameters": {}}]',
            },
            Conversation(CALLS, [TOOL]),
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "q"},
                    {"from": "tool", "value": "3"},
                    {"from": "assistant", "value": "a"},
                ]
            },
            Conversation([{"role": "system", "content": "s"}, USER, {"role": "tool", "content": "3"}, ANSWER]),
        ),
        ("ShareGPT", {"conversations": [USER, ANSWER]}, Conversation([USER, ANSWER])),
    ],
)
def test_each_kind_is_recognized_and_converted(kind, record, expected):
    assert converted(record) == (kind, expected)


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
@pytest.mark.parametrize("is_bare", [False, True])
def test_calls_of_tools_have_one_form_however_they_are_written(arguments, is_bare):
    call = {"name": "look", "arguments": arguments}
    call = call if is_bare else {"id": "7", "function": call}
    _, made = converted({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert made.messages[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL if is_bare else {"id": "7", **CALL}],
    }


def test_prompts_become_messages_where_a_template_is_there():
    record = {"prompt": "q", "completion": "a"}
    assert converted(record, prompts_as_chat=True)[1] == Conversation([USER, ANSWER], None, 1)
    reserved = frozenset(["<|im_start|>", "[INST]"])
    for key, text in (("prompt", "<|im_start|>user"), ("completion", "[INST]")):
        with pytest.raises(ValueError, match=rf"^{key} holds '.*', which .* writes itself: .* --chat-template none$"):
            converted(record | {key: text}, prompts_as_chat=True, reserved=reserved)
        assert converted(record | {key: text}, reserved=reserved)[1] == Completion(**record | {key: text})


def test_a_system_message_is_added_where_there_is_none():
    system, own = ({"role": "system", "content": text} for text in ("be kind", "own"))
    assert converted({"messages": [USER, ANSWER]}, system="be kind")[1].messages == [system, USER, ANSWER]
    assert converted({"messages": [own, USER, ANSWER]}, system="be kind")[1].messages == [own, USER, ANSWER]
    _, made = converted({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, system="be kind")
    assert made == Conversation([system, USER, ANSWER, USER, ANSWER], None, 4)


def test_columns_stand_for_keys_and_other_rows_are_recognized_by_their_own():
    columns = {"prompt": "question", "completion": "text"}
    assert converted({"question": "q", "text": "a"}, columns=columns)[1] == Completion("q", "a")
    assert converted({"messages": [USER, ANSWER]}, columns=columns)[1] == Conversation([USER, ANSWER])
    record = {"chat": CALLS, "tools": [TOOL], "text": "x"}
    assert converted(record, columns={"messages": "chat"})[1] == Conversation(CALLS, [TOOL])
    with pytest.raises(
        ValueError, match="it has keys 'q', 'a', and --columns names 'question', 'text': name columns"
    ):
        converted({"q": "q", "a": "a"}, columns=columns)


@pytest.mark.parametrize(
    ("record", "suggestion"),
    [
        ({"Question": "q", "Answer": "a"}, "prompt=Question completion=Answer"),
        ({"id": 1, "query": "q", "response": "a"}, "prompt=query completion=response"),
        ({"instruction": "q", "response": "a"}, "prompt=instruction completion=response"),
        ({"question": "q", "a": "a"}, "prompt=question completion=a"),
        ({"dialog": []}, "messages=dialog"),
        ({"document": "a"}, "text=document"),
    ],
)
def test_columns_are_suggested_by_the_keys_that_are_there(record, suggestion):
    with pytest.raises(ValueError, match=f"; or name its columns with --columns {suggestion}$"):
        converted(record)
    with pytest.raises(ValueError, match="give it text, or prompt and completion, or messages$"):
        converted({"x": 1})


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ([1], "[1] is no JSON object"),
        (
            {"text": "a", "messages": []},
            "more than one kind of text, text and messages: --columns text=text or --columns messages=messages takes",
        ),
        ({"prompt": "p", "completion": None}, "completion=None must be a text that is not empty"),
        ({"prompt": "", "completion": "c"}, "prompt='' must be a text that is not empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "it needs role and content, both texts"),
        ({"messages": "{"}, "messages='{' must be a list, or its JSON text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "{} is no call of a tool: it needs function"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f"}]}, "tool_calls='f' must be a list"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "of a message of the assistant"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "3"}]}]},
            "arguments=3 must be a JSON object, or its JSON text",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{'a'}"}]}]},
            "must be a JSON object, or its JSON text",
        ),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "must be a list of definitions of functions"),
        ({"messages": [USER, ANSWER], "tools": [{"nme": "f"}]}, "is no definition of a tool"),
        ({"messages": [USER]}, "nothing to learn"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "nothing to learn"),
        ({"instruction": "q", "output": ""}, "output='' must be a text"),
        ({"instruction": "q", "output": "a", "input": 3}, "input=3 must be a text"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "must be a list of pairs"),
        ({"conversations": []}, "must be a list of from and value"),
        ({"conversations": [{"from": "human"}]}, "it needs from and value, both texts"),
        ({"conversations": [{"from": "me", "value": "q"}]}, "from='me' must be one of human, user, gpt"),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "value='f()' must be a call, or its JSON text",
        ),
    ],
)
def test_a_row_with_a_mistake_is_refused_with_the_reason(record, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        converted(record)
