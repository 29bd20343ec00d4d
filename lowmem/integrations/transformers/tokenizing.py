"""Tokenizers of transformers: what counts of a conversation, by their own templates, and batches of paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from lowmem.errors import describe, refusal, show
from lowmem.io.model_folder import check_regular
from lowmem.transforms.calibration.generated import LEAST_SHARE

__all__ = [
    "TextTokenizer",
    "load_tokenizer",
    "padded_batches",
    "paragraphs_of",
    "read_tokenizer",
    "tokenizer_errors",
    "tokenizer_in",
]


class TextTokenizer:
    """A tokenizer of transformers as ``lowmem.read_examples`` takes it.

    Args:
        tokenizer: as ``AutoTokenizer.from_pretrained`` returns it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id

    def encode(self, text: str, special: bool) -> Sequence[int]:
        """Return the tokens of a text; with what the tokenizer puts before each text, if ``special``."""
        tokens: Sequence[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return tokens

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, bool]]:
        """Return the pieces of a conversation's text in their order, and whether the assistant says them.

        A message of the assistant begins where the template's prompt for it ends, and its last token ends its turn.

        Raises:
            ValueError: there is no template, it refuses the messages, or a message cannot be found in what it makes.
        """
        text = self._text(messages)
        pieces: list[tuple[str, bool]] = []
        done = 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start, stop = self._place(text, messages[: number + 1], number, done)
                pieces += [(text[done:start], False), (text[start:stop], True)]
                done = stop
        return [(piece, counts) for piece, counts in [*pieces, (text[done:], False)] if piece]

    def _place(self, text: str, until: Sequence[Mapping[str, Any]], number: int, done: int) -> tuple[int, int]:
        """Return where the last message of ``until`` begins and ends in the text of all."""
        content = until[-1]["content"].strip()
        before, prompt = (self._text(until[:-1], prompt=one) if number else "" for one in (False, True))
        has_prompt = prompt != before and text.startswith(prompt)
        start = len(prompt) if has_prompt else text.find(content, max(done, len(before)))
        whole = self._text(until)
        if text.startswith(whole):
            stop = len(whole)
        else:  # a template may write an answer otherwise when another message follows
            end = content + whole[whole.rfind(content) + len(content) :]
            stop = start + len(end) if text.startswith(end, start) else -1
        if not done <= start < stop:
            raise ValueError(
                f"message {number + 1} cannot be found in what the tokenizer's chat template makes of the messages: "
                "give prompt and completion"
            )
        return start, stop

    def _text(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template for messages: give prompt and completion, or text")
        try:
            made: str = self._tokenizer.apply_chat_template(
                [dict(one) for one in messages], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as reason:  # templates are programs, which raise anything
            raise ValueError(f"the tokenizer's chat template refuses the messages: {describe(reason)}") from reason
        return made


def load_tokenizer(folder: Path, vocabulary: int) -> TextTokenizer:
    """Return the tokenizer of a folder for fine-tuning: see ``read_tokenizer``."""
    return TextTokenizer(read_tokenizer(folder, vocabulary))


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Return the tokenizer of a folder.

    Args:
        folder: as ``save_pretrained`` writes it; no code of it is run.
        vocabulary: how many tokens its model knows.

    Raises:
        FileError: it has no tokenizer that transformers can load, or one of another vocabulary.
    """
    tokenizer = tokenizer_in(folder)
    size = len(tokenizer)
    if not LEAST_SHARE * vocabulary <= size <= vocabulary:
        raise refusal(
            folder,
            f"its tokenizer has {show(size)} tokens, and its model {show(vocabulary)}: they are not of one "
            "vocabulary; get the files of the tokenizer again",
        )
    return tokenizer


def tokenizer_in(folder: Path) -> Any:
    """Return the tokenizer of a folder, of any vocabulary.

    Raises:
        FileError: it has none that transformers can load.
        OSError: a file of it is no regular file, or cannot be read.
    """
    check_regular(folder)
    with tokenizer_errors(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        len(tokenizer)
    return tokenizer


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """Turn an error of a tokenizer into one that names the folder: the library tokenizers raises plain Exceptions."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as reason:
        raise refusal(folder, f"it has no tokenizer that transformers can load: {describe(reason)}") from reason


def paragraphs_of(text: str) -> list[str]:
    """Return the paragraphs of a text, which an empty line ends, with single spaces between words."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def padded_batches(tokenizer: Any, paragraphs: Sequence[str], length: int, count: int) -> list[dict[str, Tensor]]:
    """Return batches of at most ``count`` paragraphs, the shortest first so that little is padded, with their masks.

    Args:
        tokenizer: as ``AutoTokenizer.from_pretrained`` returns it; one without a token to pad with gets one.
        paragraphs: any texts.
        length: the most tokens of each; it is cut there.
        count: of a batch.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    ordered = sorted(paragraphs, key=len)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(ordered[at : at + count], **options)) for at in range(0, len(ordered), count)]
