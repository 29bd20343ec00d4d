"""Reads text files for fine-tuning into token sequences, and marks the tokens that the model learns to predict: those
of completions and of the assistant's messages, and all of plain text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import read_text_and_sha256

IGNORED = -100
"""Target of a token whose successor is not to be predicted: ``ignore_index`` of torch's cross entropy."""

KINDS = (".txt", ".jsonl")


class Tokenizer(Protocol):
    """A tokenizer. ``lowmem.integrations.transformers.TextTokenizer`` adapts one of transformers.

    Attributes:
        end: the end-of-text token, or None.
    """

    end: int | None

    def encode(self, text: str, special: bool) -> Sequence[int]:
        """Return the tokens of a text; if ``special``, with the special tokens that start each text."""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, bool]]:
        """Return the pieces of a formatted conversation in order, each with whether its tokens count.

        Raises:
            ValueError: the tokenizer has no chat template, or the template rejects this conversation.
        """


@dataclass(frozen=True, eq=False)
class Example:
    """Tokens that a model sees together.

    Args:
        ids: int32 (tokens,).
        targets: int32 (tokens,): for each token the next one, or ``IGNORED`` if that does not count.
    """

    ids: Tensor
    targets: Tensor

    @classmethod
    def of(cls, tokens: Sequence[int], is_target: Sequence[bool]) -> Example:
        """Make an example from tokens; ``counts`` says of each whether it is to be predicted."""
        ids = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        targets = torch.full_like(ids, IGNORED)
        targets[:-1] = torch.where(torch.tensor(is_target[1:], dtype=torch.bool, device="cpu"), ids[1:], IGNORED)
        return cls(ids, targets)

    @property
    def counted(self) -> int:
        """The number of tokens to be predicted."""
        return int((self.targets != IGNORED).sum())


@dataclass(frozen=True)
class Texts:
    """The examples of a file.

    Args:
        examples: none longer than ``length``.
        digest: SHA-256 of the file, in hex.
        in_order: whether the examples are consecutive parts of one text.
        cut: number of examples that were longer and were truncated.
        dropped: number of texts that were left out, because no token of them counts.
        length: the most tokens of an example.
        ends: for each prompt with a completion and each conversation, the number of tokens up to the one that ends
            the last answer. Where that token is cut off, the model does not learn to end.
        chats: whether there are conversations.
    """

    examples: list[Example]
    digest: str
    in_order: bool
    cut: int = 0
    dropped: int = 0
    length: int = 0
    ends: tuple[int, ...] = ()
    chats: bool = False

    @property
    def lost_ends(self) -> int:
        """The number of ``ends`` that were cut off."""
        return sum(end > self.length for end in self.ends)

    def length_of_ends(self, share: float) -> int:
        """Return the least length that keeps this share of ``ends``, which must not be empty."""
        return sorted(self.ends)[math.ceil(share * len(self.ends)) - 1]

    def split(self, share: float, seed: int) -> tuple[Texts, Texts]:
        """Return the texts to train on, and a held-out share: the end of a single text, or random lines.

        Raises:
            ValueError: one of the two would have no example.
        """
        count = len(self.examples)
        held = round(share * count)
        if not 0 < held < count:
            raise ValueError(
                f"a share of {share:g} of {count} examples is {held}, and both parts need one: take another share, "
                "more text, or a file of its own to evaluate on"
            )
        order = torch.arange(count, dtype=torch.int64, device="cpu")
        if not self.in_order:
            generator = torch.Generator("cpu").manual_seed(seed)
            order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        parts = order[:-held].sort().values, order[-held:].sort().values
        first, second = ([self.examples[number] for number in part.tolist()] for part in parts)
        template = replace(self, examples=[], cut=0, dropped=0, ends=())
        return replace(template, examples=first), replace(template, examples=second)


def read_examples(path: str | os.PathLike[str], tokenizer: Tokenizer, length: int) -> Texts:
    """Read the examples of a ``.txt`` or ``.jsonl`` file.

    A ``.txt`` file and each ``text`` of a ``.jsonl`` file are cut into windows of ``length`` tokens. A prompt with
    its completion, and messages, are truncated to ``length`` tokens.

    Args:
        path: of the file, in UTF-8.
        tokenizer: the model's.
        length: the most tokens of an example, at least 2.

    Raises:
        FileError: the file has another suffix, is empty, is not UTF-8, or has no token to predict; or a line is not
            such an object: its number is named.
        ValueError: ``length`` is below 2.
        OSError: the file cannot be read.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length={short_repr(length)} must be a number of tokens, at least 2")
    path = Path(path)
    if path.suffix not in KINDS:
        raise file_error(path, f"its name must end in {' or '.join(KINDS)}")
    text, digest = read_text_and_sha256(path)
    if not text.strip():
        raise file_error(path, "it is empty; name a file with text")
    in_order = path.suffix == ".txt"
    examples: list[Example] = []
    dropped = 0
    lines = (
        [_LineExamples(_split_into_window_examples(text, tokenizer, length))]
        if in_order
        else [*_iterate_line_examples(path, text, tokenizer, length)]
    )
    for line in lines:
        examples_with_targets = [window for window in line.examples if window.counted]
        examples += examples_with_targets
        dropped += not examples_with_targets
    cut = sum(line.cut for line in lines)
    if not examples:
        why = "one token, which follows nothing" if not cut else f"no token that counts among its first {length}"
        raise file_error(path, f"of all of its texts the model sees {why}; take longer texts, or a larger length")
    ends = tuple(line.end for line in lines if line.end is not None)
    return Texts(examples, digest, in_order, cut, dropped, length, ends, any(line.is_chat for line in lines))


@dataclass(frozen=True)
class _LineExamples:
    """What a line holds, and whether it was truncated; the rest is as in ``Texts``."""

    examples: list[Example]
    cut: bool = False
    end: int | None = None
    is_chat: bool = False


def _iterate_line_examples(path: Path, text: str, tokenizer: Tokenizer, length: int) -> Iterator[_LineExamples]:
    """Yield what each line holds."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _parse_line_examples(line, tokenizer, length)
            except (ValueError, TypeError) as reason:
                raise file_error(path, f"line {number}: {reason}") from reason


def _parse_line_examples(line: str, tokenizer: Tokenizer, length: int) -> _LineExamples:
    record = _parse_json_object(line)
    matching_keys = [
        keys for keys in (("text",), ("prompt", "completion"), ("messages",)) if set(keys) <= record.keys()
    ]
    if len(matching_keys) != 1:
        what = (
            f"keys {', '.join(map(short_repr, record)) or 'of nothing'}"
            if not matching_keys
            else "more than one kind of text"
        )
        raise ValueError(f"it has {what}; give it text, or prompt and completion, or messages")
    for key in matching_keys[0]:
        if key != "messages" and not (isinstance(record[key], str) and record[key]):
            raise ValueError(f"{key}={short_repr(record[key])} must be a text that is not empty")
    if matching_keys[0] == ("text",):
        return _LineExamples(_split_into_window_examples(record["text"], tokenizer, length))
    is_chat = matching_keys[0] == ("messages",)
    tokens, counts, end = (
        _conversation_tokens_mask_and_end(record["messages"], tokenizer)
        if is_chat
        else _completion_tokens_mask_and_end(record["prompt"], record["completion"], tokenizer)
    )
    return _LineExamples([Example.of(tokens[:length], counts[:length])], len(tokens) > length, end, is_chat)


def _parse_json_object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{short_repr(line)} is no JSON object; a .jsonl file has one in each line") from None
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"it has half of a surrogate pair, which is no text: {short_repr(line)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{short_repr(record)} is no JSON object; a .jsonl file has one in each line")
    return record


def _split_into_window_examples(text: str, tokenizer: Tokenizer, length: int) -> list[Example]:
    """Return the windows of a text, all of whose tokens count."""
    tokens = _tokens_with_end_token([*tokenizer.encode(text, True)], tokenizer)
    parts = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [Example.of(part, [True] * len(part)) for part in parts]


def _completion_tokens_mask_and_end(
    prompt: str, completion: str, tokenizer: Tokenizer
) -> tuple[list[int], list[bool], int]:
    """Return the tokens, whether each counts, and how many there are up to the one that ends the completion."""
    before = [*tokenizer.encode(prompt, True)]
    # Some tokenizers append it to each text
    if before and before[-1] == tokenizer.end:
        before.pop()
    after = _tokens_with_end_token([*tokenizer.encode(completion, False)], tokenizer)
    return before + after, [False] * len(before) + [True] * len(after), len(before) + len(after)


def _conversation_tokens_mask_and_end(messages: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool], int]:
    """Return the tokens, whether each counts, and how many there are up to the one that ends the last answer.

    What the template writes behind that token, often a newline, counts, too.
    """
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"messages={short_repr(messages)} must be a list of messages")
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise ValueError(f"{short_repr(message)} is no message: it needs role and content, both texts")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError('it has no message whose role is "assistant", and so nothing to learn')
    tokens: list[int] = []
    counts: list[bool] = []
    end = 0
    for piece, counted in tokenizer.chat(messages):
        piece_tokens = tokenizer.encode(piece, False)
        if counted:
            end = len(tokens) + len(tokenizer.encode(piece.rstrip(), False))
        tokens += piece_tokens
        counts += [counted] * len(piece_tokens)
    return tokens, counts, end


def _tokens_with_end_token(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens if tokenizer.end is None or tokens[-1:] == [tokenizer.end] else [*tokens, tokenizer.end]
