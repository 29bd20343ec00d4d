"""What is read of text files: windows, completions, conversations; and what is refused."""

import hashlib
import json
import re

import pytest
import torch

from lowmem import FileError
from lowmem.finetuning.text_examples import IGNORED, Example, read_examples
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
        ("a.txt", b"ab\xff", "it is no UTF-8 text, from byte 2"),
        ("a.csv", b"ab", "its name must end in .txt or .jsonl"),
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
