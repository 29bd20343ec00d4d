"""What is read of text files: windows, completions, conversations; and what is refused."""

import hashlib
import json
import re

import pytest
import torch

from lowmem import FileError
from lowmem.finetuning.data_files import read_data_files
from lowmem.finetuning.row_kinds import RowOptions
from lowmem.finetuning.text_examples import (
    ALL_MASKED,
    DOUBLE_START,
    IGNORED,
    NO_END,
    Example,
    Texts,
    ToolTokenizer,
    encode_rows,
    read_examples,
)
from tests.finetuning.language import Characters

LETTERS = Characters()


def written(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def counted(example):
    """What an example lets a model predict, and what of it is before."""
    tokens = example.ids.tolist()
    assert [b for a, b in zip(example.targets.tolist(), tokens[1:], strict=False) if a not in (b, IGNORED)] == []
    assert example.targets[-1] == IGNORED
    return [token for token in example.targets.tolist() if token != IGNORED]


def test_a_text_is_cut_into_windows_that_are_all_of_it(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"abcdefghij")
    found = read_examples(path, LETTERS, 4)
    tokens = [1, *LETTERS.encode("abcdefghij", False), 0]
    assert torch.cat([one.ids for one in found.examples]).tolist() == tokens
    assert [counted(one) for one in found.examples] == [tokens[start + 1 : start + 4] for start in (0, 4, 8)]
    assert (found.in_order, found.cut, found.dropped) == (True, 0, 0)
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_lines_count_completions_and_what_the_assistant_says(tmp_path):
    messages = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "r"), ("user", "s"))]
    path = written(
        tmp_path,
        {"text": "abc", "source": "other keys are ignored"},
        "",
        {"prompt": "ab", "completion": "cd"},
        {"messages": [*messages, {"role": "assistant", "content": "t"}]},
    )
    text, completion, conversation = read_examples(path, LETTERS, 100).examples
    assert counted(text) == [*LETTERS.encode("abc", False), 0]
    assert completion.ids.tolist() == [1, *LETTERS.encode("abcd", False), 0]
    assert counted(completion) == [*LETTERS.encode("cd", False), 0]
    assert conversation.ids.tolist() == [*LETTERS.encode("<user>q;<assistant>r;<user>s;<assistant>t;", False)]
    assert counted(conversation) == LETTERS.encode("r;t;", False)


def test_long_lines_are_cut_and_told(tmp_path):
    path = written(
        tmp_path,
        {"text": "abcdefg"},
        {"prompt": "a" * 9, "completion": "b"},
        {"prompt": "a", "completion": "bcdefgh"},
    )
    found = read_examples(path, LETTERS, 5)
    assert [len(one.ids) for one in found.examples] == [5, 4, 5]  # the text in two windows
    assert (found.cut, found.dropped) == (2, 1)


def test_ends_that_are_cut_off_are_counted_and_the_length_that_keeps_them_is_told(tmp_path):
    chats = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\n"}]  # <user>q;<assistant>a\n;
    lines = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 199)]  # ends at 1 + n + 2
    path = written(
        tmp_path, *lines, {"messages": chats}, {"text": "abc" * 99}, {"prompt": "a", "completion": "b" * 999}
    )
    end = len("<user>q;<assistant>a\n;")
    found = read_examples(path, LETTERS, 1100)
    assert (len(found.ends), found.lost_ends, found.cut, found.length_of_ends(0.99)) == (200, 0, 0, 200)
    found = read_examples(path, LETTERS, end)
    assert (len(found.ends), found.lost_ends, found.cut) == (200, 198 + 3 - end + 1, 198 + 3 - end + 1)
    assert read_examples(path, LETTERS, found.length_of_ends(0.99)).lost_ends == 2
    assert read_examples(path, LETTERS, found.length_of_ends(1.0)).lost_ends == 0
    assert read_examples(path, LETTERS, end - 1).lost_ends == 198 + 3 - end + 3


def test_what_a_template_writes_behind_the_end_is_no_end(tmp_path):
    class Lines(Characters):
        def chat(self, messages):
            return [(piece + "\n" * counts, counts) for piece, counts in super().chat(messages)]

    messages = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "r"), ("user", "s"))]
    path, end = written(tmp_path, {"messages": messages}), len("<user>q;<assistant>r;")
    (example,) = read_examples(path, Lines(), 100).examples
    assert counted(example) == LETTERS.encode("r;\n", False)  # but it is trained
    for length, cut, lost in ((100, 0, 0), (end + 1, 1, 0), (end, 1, 0), (end - 1, 1, 1)):
        found = read_examples(path, Lines(), length)
        assert (found.cut, found.lost_ends, found.length_of_ends(0.99)) == (cut, lost, end)


def test_a_tokenizer_that_ends_texts_itself_ends_no_prompt(tmp_path):
    class Ends(Characters):
        def encode(self, text, special):
            return [*super().encode(text, special), *[0] * special]

    path = written(tmp_path, {"text": "a"}, {"prompt": "a", "completion": "b"})
    text, completion = read_examples(path, Ends(), 9).examples
    assert text.ids.tolist() == [1, *LETTERS.encode("a", False), 0]
    assert completion.ids.tolist() == [1, *LETTERS.encode("ab", False), 0]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is no JSON object"),
        ([1], "is no JSON object"),
        ('{"text": "a\\ud800"}', "it has half of a surrogate pair"),
        ({"prompt": "a", "txt": "b"}, "it has keys 'prompt', 'txt'; give it text"),
        ({}, "it has keys of nothing"),
        ({"text": "a", "messages": []}, "more than one kind of text"),
        ({"text": 3}, "text=3 must be a text that is not empty"),
        ({"prompt": "a", "completion": ""}, "completion='' must be"),
        ({"messages": []}, "messages=[] must be a list of messages"),
        ({"messages": [{"content": "a"}]}, "is no message: it needs role and content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_by_its_number(line, why, tmp_path):
    path = written(tmp_path, {"text": "abc"}, "", line)
    with pytest.raises(FileError, match=f"^cannot read '{path}': line 3: .*{re.escape(why)}"):
        read_examples(path, LETTERS, 8)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"", "it is empty"),
        ("a.jsonl", b" \n\n", "it is empty"),
        ("a.txt", b"ab\xff", "it is no UTF-8 text, from byte 2; save it in UTF-8"),
        ("a.doc", b"ab", "its name must end in .txt, .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.jsonl", b'{"prompt": "aaaaaaaa", "completion": "b"}', "no token that counts among its first 4"),
    ],
)
def test_a_file_without_text_is_refused(name, content, why, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=why):
        read_examples(tmp_path / name, LETTERS, 4)


def test_a_missing_file_and_a_bad_length_are_refused(tmp_path):
    with pytest.raises(OSError, match="cannot read"):
        read_examples(tmp_path / "missing.txt", LETTERS, 4)
    for length in (1, True, "8"):
        with pytest.raises(ValueError, match="must be a number of tokens, at least 2"):
            read_examples(tmp_path / "missing.txt", LETTERS, length)


def test_a_share_is_held_out_of_the_end_of_a_text_and_of_any_lines(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    found = read_examples(tmp_path / "a.txt", LETTERS, 3)
    first, second = found.split(0.3, 0)
    assert first.examples + second.examples == found.examples
    assert len(second.examples) == round(0.3 * len(found.examples))
    lines = read_examples(written(tmp_path, *({"text": chr(97 + n)} for n in range(20))), LETTERS, 3)
    halves = lines.split(0.5, 1)
    assert sorted(map(id, halves[0].examples + halves[1].examples)) == sorted(map(id, lines.examples))
    assert halves[1].examples != lines.examples[10:]
    assert [one.examples for one in lines.split(0.5, 1)] == [one.examples for one in halves]
    for share in (0.01, 0.99):
        with pytest.raises(ValueError, match="both parts need one"):
            lines.split(share, 0)


def test_the_first_token_is_predicted_by_none():
    example = Example.of([5, 6, 7], [True, False, True])
    assert example.targets.tolist() == [IGNORED, 7, IGNORED]
    assert example.counted == 1


class Tools(Characters):
    """Writes tools and their calls, and knows that 0 and ``;`` end a turn."""

    special = frozenset([0, *Characters().encode(";", False)])

    def encode_pieces(self, pieces):
        return [self.encode(piece, False) for piece in pieces]

    def chat(self, messages, tools=None):
        yield f"[{','.join(tool['function']['name'] for tool in tools or ())}]", False
        for message in messages:
            calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            yield f"<{message['role']}>", False
            yield f"{message['content'] or calls[0]};", message["role"] == "assistant"


def encoded(tokenizer, *paths, **options):
    return encode_rows([file for path in paths for file in read_data_files(path)], tokenizer, RowOptions(**options))


def test_tools_and_their_calls_are_given_to_the_template(tmp_path):
    assert isinstance(Tools(), ToolTokenizer)
    call = {"name": "look", "arguments": {}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = written(tmp_path, {"messages": messages, "tools": [{"name": "look"}]})
    (example,) = read_examples(path, Tools(), 100).examples
    assert example.ids.tolist() == LETTERS.encode("[look]<user>q;<assistant>look;", False)
    assert counted(example) == LETTERS.encode("look;", False)
    with pytest.raises(FileError, match="line 1: Characters formats no tools: take a ToolTokenizer"):
        read_examples(path, LETTERS, 100)


def test_answers_of_a_prompt_are_not_learned(tmp_path):
    messages = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "r"), ("user", "s"))]
    path = written(tmp_path, {"prompt": messages, "completion": "t"})
    (example,) = read_examples(path, LETTERS, 100).examples
    assert example.ids.tolist() == LETTERS.encode("<user>q;<assistant>r;<user>s;<assistant>t;", False)
    assert counted(example) == LETTERS.encode("t;", False)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_the_same_rows_of_each_kind_of_file_are_the_same_examples(name, tmp_path):
    path = tmp_path / name
    content = {
        "a.csv": "instruction,input,output\nab,c,d\n",
        "a.json": '[{"instruction": "ab", "input": "c", "output": "d"}]',
        "a.jsonl": '{"conversations": [{"from": "human", "value": "ab\\nc"}, {"from": "gpt", "value": "d"}]}',
    }
    path.write_text(content[name])
    found = read_examples(path, LETTERS, 100)
    assert found.examples[0].ids.tolist() == LETTERS.encode("<user>ab\nc;<assistant>d;", False)
    assert (found.kinds, found.chats) == ({"ShareGPT" if name == "a.jsonl" else "Alpaca": 1}, True)


def test_files_are_mixed_and_each_row_is_named_with_its_file(tmp_path):
    (tmp_path / "b.txt").write_text("abcdef")
    lines = written(tmp_path, {"text": "g"}, {"txt": "h"}, name="a.jsonl")
    rows = encoded(LETTERS, tmp_path)
    assert [(place, mistake[:12]) for place, mistake in rows.mistakes] == [(f"line 2 of {lines}", "it has keys ")]
    texts = rows.texts(4, "x")
    assert texts.places == (f"line 1 of {lines}", *[f"its text of {tmp_path / 'b.txt'}"] * 2)
    assert (texts.in_order, texts.kinds) == (False, {"text": 1, "text file": 1})


def test_what_is_wrong_with_rows_is_found_with_the_first_ones_place(tmp_path):
    class Drops(Tools):
        def chat(self, messages, tools=None):
            return super().chat([message for message in messages if message["role"] != "system"], tools)

    class Endless(Tools):
        special = frozenset([0])

    system, user, answer = ({"role": role, "content": "abc"} for role in ("system", "user", "assistant"))
    path = written(
        tmp_path,
        {"messages": [user, answer]},
        {"messages": [{**system, "content": "x"}, user, answer]},
        {"messages": [{**system, "content": "y"}, user, answer]},
        {"prompt": "a" * 40, "completion": "b"},
    )
    dropped = "the chat template leaves out the message of the system"
    texts = encoded(Drops(), path).texts(40, "x")
    assert texts.findings == {dropped: (2, "line 2"), ALL_MASKED: (1, "line 4")}
    assert texts.dropped == 1
    assert encoded(Endless(), path).texts(90, "x").findings == {NO_END: (3, "line 1")}
    assert encoded(Tools(), path).texts(90, "x").findings == {}

    class Endings(Characters):
        end = None

    path = written(tmp_path, {"text": "a"}, {"prompt": "a", "completion": "b"})
    assert encoded(Endings(), path).texts(90, "x").findings == {NO_END: (1, "line 2")}


def test_a_second_token_that_begins_a_text_is_found(tmp_path):
    class Begins(Characters):
        def encode(self, text, special):
            return [1] * special + [1 if letter == "^" else 2 + ord(letter) % 62 for letter in text]

    path = written(
        tmp_path,
        {"text": "ab^"},
        {"text": "^ab"},
        {"prompt": "^a", "completion": "b"},
        {"messages": [{"role": "user", "content": "^a"}, {"role": "assistant", "content": "b"}]},
    )
    assert encoded(Begins(), path).texts(90, "x").findings == {DOUBLE_START: (2, "line 2")}


def test_the_default_length_is_that_of_nearly_all_rows_and_windows_stay(tmp_path):
    lines = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 201)]  # of n + 3 tokens
    path = written(tmp_path, *lines)
    assert encoded(LETTERS, path).default_length() == 256  # 198 + 3 tokens, in steps of 64
    assert encoded(LETTERS, written(tmp_path, *lines[:61])).default_length() == 64
    (tmp_path / "b.txt").write_text("a" * 2000)
    assert encoded(LETTERS, tmp_path / "b.txt").default_length() == 512
    rows = encoded(LETTERS, path, tmp_path / "b.txt")
    assert rows.default_length() == 512
    lengths = [len(example.ids) for example in rows.texts(1024, "x", window=512).examples]
    assert lengths[-4:] == [512, 512, 512, 2002 - 3 * 512]


def test_rows_that_are_held_out_and_trained_are_found(tmp_path):
    texts = read_examples(written(tmp_path, *({"text": letter} for letter in "abcab")), LETTERS, 9)
    others = read_examples(written(tmp_path, *({"text": letter} for letter in "xbya"), name="b.jsonl"), LETTERS, 9)
    assert others.places_in(texts) == ["line 2", "line 4"]
    first, second = texts.split(0.4, 0)
    assert sorted([*first.places, *second.places]) == [f"line {number}" for number in range(1, 6)]


def test_an_end_token_that_is_the_padding_token_is_learned(tmp_path):
    """The end counts by its place, whatever else its number stands for."""
    found = read_examples(written(tmp_path, {"prompt": "a", "completion": "b"}), LETTERS, 9)
    assert found.examples[0].targets.tolist()[-2] == LETTERS.end


def test_all_rows_with_mistakes_are_counted_and_the_first_is_named(tmp_path):
    path = written(tmp_path, {"text": "a"}, "{", {"txt": 1}, {"text": ""})
    with pytest.raises(FileError, match=r"line 2: '\{' is no JSON object.*; 2 more rows have mistakes$"):
        read_examples(path, LETTERS, 9)
    assert [place for place, _ in encoded(LETTERS, path).mistakes] == ["line 2", "line 3", "line 4"]


def test_texts_that_a_user_makes_without_places_are_split():
    examples = [Example.of([number, 1, 2], [True] * 3) for number in range(4)]
    first, second = Texts(examples, "digest", False).split(0.5, 0)
    assert [len(part.examples) for part in (first, second)] == [2, 2]
    assert first.places == second.places == ()
