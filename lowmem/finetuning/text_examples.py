"""Turns rows of data files into token sequences, and marks the tokens that the model learns to predict: those of
completions and of the assistant's messages, and all of plain text."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem.errors import file_error, short_repr
from lowmem.finetuning.data_files import DataFile, combined_digest, read_data_files
from lowmem.finetuning.row_kinds import Completion, Conversation, PlainText, RowOptions, convert_row

IGNORED = -100
"""Target of a token whose successor is not to be predicted: ``ignore_index`` of torch's cross entropy."""

TEXT_FILE = "text file"
PROMPTS_AS_CHAT = "prompt and completion in the chat template"

ALL_MASKED = "no token counts"
"""The finding of a row of which nothing is learned."""

NO_END = "no special token ends the answer, so that the model does not learn to stop"
DOUBLE_START = "two tokens begin the text, of which the tokenizer or the chat template writes one"


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


@runtime_checkable
class ToolTokenizer(Tokenizer, Protocol):
    """A tokenizer that formats tools, and encodes pieces of a text as they are in the text.

    Attributes:
        special: the special tokens, with those that end a turn.
    """

    special: set[int]

    def encode_pieces(self, pieces: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return the tokens of each piece of a text."""

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Sequence[tuple[str, bool]]:
        """As ``Tokenizer.chat``, with the definitions of tools."""


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
        """Make an example from tokens; ``is_target`` says of each whether it is to be predicted."""
        ids = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        targets = torch.full_like(ids, IGNORED)
        targets[:-1] = torch.where(torch.tensor(is_target[1:], dtype=torch.bool, device="cpu"), ids[1:], IGNORED)
        return cls(ids, targets)

    @property
    def sequences(self) -> dict[str, Example]:
        """What the model sees apart, by names for messages: the example itself."""
        return {"": self}

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
        places: of each example, the row that it is of, as ``line 3``.
        findings: what is wrong with rows, each with their number and the first one's place.
        kinds: the number of rows of each kind.
    """

    examples: list[Example]
    digest: str
    in_order: bool
    cut: int = 0
    dropped: int = 0
    length: int = 0
    ends: tuple[int, ...] = ()
    chats: bool = False
    places: tuple[str, ...] = ()
    findings: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)

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
        template = replace(self, cut=0, dropped=0, ends=(), findings={})
        first, second = (
            replace(
                template,
                examples=[self.examples[number] for number in part.tolist()],
                places=tuple(self.places[number] for number in part.tolist()) if self.places else (),
            )
            for part in parts
        )
        return first, second

    def places_in(self, other: Texts) -> list[str]:
        """Return the places of the examples that ``other`` has, too."""
        others = {example.ids.numpy().tobytes() for example in other.examples}
        return [
            place
            for example, place in zip(self.examples, self.places, strict=True)
            if example.ids.numpy().tobytes() in others
        ]


def read_examples(path: str | os.PathLike[str], tokenizer: Tokenizer, length: int) -> Texts:
    """Read the examples of a file, or of the files of a folder.

    A ``.txt`` file and each ``text`` of a row are cut into windows of ``length`` tokens. A prompt with its
    completion, and messages, are truncated to ``length`` tokens.

    Args:
        path: of a file in UTF-8 (``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv``), a ``.parquet`` file, or a
            folder of such files.
        tokenizer: the model's.
        length: the most tokens of an example, at least 2.

    Raises:
        FileError: the file has another suffix, is empty, is not UTF-8, or has no token to predict; or a row is of no
            known kind: the first one's number is named.
        ValueError: ``length`` is below 2.
        OSError: the file cannot be read.
    """
    check_length(length)
    rows = encode_rows(read_data_files(Path(path)), tokenizer, RowOptions())
    if rows.mistakes:
        place, mistake = rows.mistakes[0]
        others = f"; {len(rows.mistakes) - 1} more rows have mistakes" if len(rows.mistakes) > 1 else ""
        raise file_error(path, f"{place}: {mistake}{others}")
    return rows.texts(length, os.fspath(path))


def check_length(length: int) -> None:
    """Raise a ValueError unless ``length`` is a number of tokens, at least 2."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length={short_repr(length)} must be a number of tokens, at least 2")


@dataclass(frozen=True)
class EncodedRow:
    """The tokens of a row, and whether each counts; the rest is as in ``Texts``.

    Args:
        is_windowed: whether it is a text that is cut into windows, and not truncated.
        findings: what is wrong with it.
    """

    place: str
    kind: str
    tokens: array[int]
    counts: bytes
    end: int | None = None
    is_windowed: bool = False
    is_chat: bool = False
    findings: tuple[str, ...] = ()

    @property
    def token_count(self) -> int:
        """The number of tokens that the model would see together."""
        return len(self.tokens)

    def examples(self, length: int) -> Sequence[Example]:
        """Return its windows, or the one example that it is cut to."""
        starts = range(0, len(self.tokens), length) if self.is_windowed else (0,)
        parts = (slice(start, start + length) for start in starts)
        return [Example.of(self.tokens[part], [*map(bool, self.counts[part])]) for part in parts]


@dataclass(frozen=True)
class EncodedRows:
    """The rows of all files.

    Args:
        mistakes: the place and the mistake of each row that cannot be read.
        is_one_text: whether they are one ``.txt`` file.
    """

    rows: list[EncodedRow]
    mistakes: list[tuple[str, str]]
    digest: str
    is_one_text: bool

    def default_length(self, quantile: float = 0.99, step: int = 64, window: int = 512) -> int:
        """Return the length that keeps this share of the rows, in steps, and windows of ``.txt`` files."""
        lengths = sorted(row.token_count for row in self.rows if row.kind != TEXT_FILE)
        needed = math.ceil(lengths[math.ceil(quantile * len(lengths)) - 1] / step) * step if lengths else 0
        return max(needed, window if len(lengths) < len(self.rows) else step)

    def texts(self, length: int, name: str, window: int | None = None) -> Texts:
        """Return the examples of at most ``length`` tokens; of ``.txt`` files of at most ``window``.

        Raises:
            FileError: no token counts.
        """
        examples: list[Example] = []
        places: list[str] = []
        findings = [(finding, row.place) for row in self.rows for finding in row.findings]
        for row in self.rows:
            counted = [
                example
                for example in row.examples(min(window or length, length) if row.kind == TEXT_FILE else length)
                if example.counted
            ]
            examples += counted
            places += [row.place] * len(counted)
            if not counted:
                findings.append((ALL_MASKED, row.place))
        cut = sum(row.token_count > length and not row.is_windowed for row in self.rows)
        if not examples:
            why = "one token, which follows nothing" if not cut else f"no token that counts among its first {length}"
            raise file_error(name, f"of all of its texts the model sees {why}; take longer texts, or a larger length")
        counts = Counter(finding for finding, _ in findings)
        # The first place of each stands
        firsts = dict(reversed(findings))
        return Texts(
            examples,
            self.digest,
            self.is_one_text,
            cut,
            counts[ALL_MASKED],
            length,
            tuple(row.end for row in self.rows if row.end is not None),
            any(row.is_chat for row in self.rows),
            tuple(places),
            {finding: (number, firsts[finding]) for finding, number in counts.items()},
            Counter(row.kind for row in self.rows),
        )


def encode_row(place: str, content: Any, tokenizer: Tokenizer, options: RowOptions, start: list[int]) -> EncodedRow:
    """Return the tokens of a row; ``start``: the special tokens with which the tokenizer begins each text."""
    kind, row = convert_row(content, options)
    return encode_converted_row(place, TEXT_FILE if isinstance(content, str) else kind, row, tokenizer, start)


def encode_rows(
    files: Sequence[DataFile],
    tokenizer: Tokenizer,
    options: RowOptions,
    encode: Callable[..., EncodedRow] = encode_row,
) -> EncodedRows:
    """Return the tokens of all rows of files, and the mistakes of those that cannot be read; ``encode`` is as
    ``encode_row``."""
    start = [token for token in tokenizer.encode("", True) if token != tokenizer.end]
    encoded: list[EncodedRow] = []
    mistakes: list[tuple[str, str]] = []
    for file in files:
        for row in file.rows:
            place = row.place if len(files) == 1 else f"{row.place} of {file.name}"
            try:
                if row.mistake is not None:
                    raise ValueError(row.mistake)
                encoded.append(encode(place, row.content, tokenizer, options, start))
            except (ValueError, TypeError) as reason:
                mistakes.append((place, str(reason)))
    is_one_text = len(files) == 1 and [row.kind for row in encoded] == [TEXT_FILE]
    return EncodedRows(encoded, mistakes, combined_digest(files), is_one_text)


def encode_converted_row(place: str, kind: str, row: Any, tokenizer: Tokenizer, start: list[int]) -> EncodedRow:
    """Return the tokens of a plain text, a completion or a conversation; the rest is as for ``encode_row``."""
    end: int | None = None
    findings: tuple[str, ...] = ()
    if isinstance(row, PlainText):
        tokens = _tokens_with_end_token([*tokenizer.encode(row.text, True)], tokenizer)
        counts = [True] * len(tokens)
    elif isinstance(row, Completion):
        tokens, counts, end = _completion_tokens_mask_and_end(row.prompt, row.completion, tokenizer)
        findings = () if tokenizer.end is not None else (NO_END,)
        kind = f"{kind} as plain text"
    else:
        tokens, counts, end, findings = _conversation_tokens_mask_end_and_findings(row, tokenizer)
        kind = PROMPTS_AS_CHAT if row.prompt_messages else kind
    if start and tokens[: 2 * len(start)] == 2 * start:
        findings = (DOUBLE_START, *findings)
    return EncodedRow(
        place,
        kind,
        array("i", tokens),
        bytes(counts),
        end,
        is_windowed=isinstance(row, PlainText),
        is_chat=isinstance(row, Conversation),
        findings=findings,
    )


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


def _conversation_tokens_mask_end_and_findings(
    conversation: Conversation, tokenizer: Tokenizer
) -> tuple[list[int], list[bool], int, tuple[str, ...]]:
    """Return the tokens, whether each counts, how many there are up to the one that ends the last answer, and what
    the template does not write.

    What the template writes behind that token, often a newline, counts, too.
    """
    messages, tools = conversation.messages, conversation.tools
    if isinstance(tokenizer, ToolTokenizer):
        pieces = [*tokenizer.chat(messages, tools)]
    elif tools or any(message["content"] is None for message in messages):
        raise ValueError(f"{type(tokenizer).__name__} formats no tools: take a ToolTokenizer, as TextTokenizer is")
    else:
        pieces = [*tokenizer.chat(messages)]
    answers = [number for number, (_, counted) in enumerate(pieces) if counted]
    context = sum(message["role"] == "assistant" for message in messages[: conversation.prompt_messages])
    learned = {*answers[context:]}
    if not learned:
        raise ValueError(f"{type(tokenizer).__name__} marks nothing of it as the assistant's")
    last = answers[-1]
    answer = pieces[last][0].rstrip()
    if isinstance(tokenizer, ToolTokenizer):
        # What follows the token that ends the answer is a piece of its own
        pieces[last : last + 1] = [(answer, True), (pieces[last][0][len(answer) :], True)]
        learned.add(last + 1)
        encoded = tokenizer.encode_pieces([piece for piece, _ in pieces])
        end = sum(map(len, encoded[: last + 1]))
    else:
        encoded = [tokenizer.encode(piece, False) for piece, _ in pieces]
        end = sum(map(len, encoded[:last])) + len(tokenizer.encode(answer, False))
    tokens = [token for piece_tokens in encoded for token in piece_tokens]
    counts = [number in learned for number, piece_tokens in enumerate(encoded) for _ in piece_tokens]
    text = "".join(piece for piece, _ in pieces)
    findings = [
        f"the chat template leaves out the message of the {message['role']}"
        for message in messages
        if message["role"] != "assistant" and not _is_written(message["content"], text)
    ]
    if isinstance(tokenizer, ToolTokenizer) and tokens[end - 1] not in tokenizer.special:
        findings.append(NO_END)
    return tokens, counts, end, tuple(dict.fromkeys(findings))


def _is_written(content: str | None, text: str) -> bool:
    """Whether a message stands in the text of its conversation, unchanged or as JSON."""
    content = (content or "").strip()
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _tokens_with_end_token(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens if tokenizer.end is None or tokens[-1:] == [tokenizer.end] else [*tokens, tokenizer.end]
