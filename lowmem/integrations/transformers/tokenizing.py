"""Tokenizers: of folders and GGUF files, what counts of a conversation by their templates, batches of paragraphs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_gguf_available

from lowmem.errors import describe, quoted, refusal, show
from lowmem.io.atomic import open_regular
from lowmem.io.folder_code import NEEDS_CODE, is_about_code, unasked
from lowmem.io.formats.gguf.container import read_header
from lowmem.io.formats.gguf.tokenizer import PRE_TOKENIZERS
from lowmem.io.model_folder import check_regular
from lowmem.transforms.calibration.generated import LEAST_SHARE

_SPACE = "\u2581"  # what SentencePiece writes for it
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Other names in llama.cpp for the expressions of ``PRE_TOKENIZERS``."""


class TextTokenizer:
    """A tokenizer of transformers as ``lowmem.read_examples`` takes it.

    Args:
        tokenizer: as ``AutoTokenizer.from_pretrained`` returns it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id

    def encode(self, text: str, special: bool) -> Sequence[int]:
        """Return the tokens of a text; with what the tokenizer puts before each text, if ``special``."""
        tokens: Sequence[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return tokens

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, bool]]:
        """Return the pieces of a conversation's text in their order, and whether the assistant says them.

        A message of the assistant begins where the template's prompt for it ends, and its last token ends its turn.

        Raises:
            ValueError: there is no template, it refuses the messages, or a message cannot be found in what it makes.
        """
        text = self.text_of(messages)
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
        before, prompt = (self.text_of(until[:-1], prompt=one) if number else "" for one in (False, True))
        has_prompt = prompt != before and text.startswith(prompt)
        start = len(prompt) if has_prompt else text.find(content, max(done, len(before)))
        whole = self.text_of(until)
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

    def text_of(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """Return what the tokenizer's chat template makes of messages; ``prompt``: with the start of an answer.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template for messages: give prompt and completion, or text")
        try:
            made: str = self.tokenizer.apply_chat_template(
                [dict(one) for one in messages], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as reason:  # templates are programs, which raise anything
            raise ValueError(f"the tokenizer's chat template refuses the messages: {describe(reason)}") from reason
        return made


def read_tokenizer(folder: Path, vocabulary: int | None = None) -> Any:
    """Return the tokenizer of a folder or a GGUF file; no code of it is run.

    Args:
        folder: as ``save_pretrained`` writes it, or the file.
        vocabulary: how many tokens its model knows; None: any number.

    Raises:
        FileError: it has no tokenizer that transformers can load, or one of another vocabulary.
        OSError: a file of it is no regular file, or cannot be read.
        ImportError: it is a GGUF file, and the package gguf is missing.
    """
    if folder.is_dir():
        check_regular(folder)
    else:
        check_gguf(folder)
    with tokenizer_errors(folder):
        tokenizer: Any = (
            tokenizer_of(folder)
            if folder.is_file()
            else AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
        size = len(tokenizer)
        if vocabulary is not None and folder.is_file():  # transformers adds tokens that a GGUF file has not
            size -= sum(token >= vocabulary for token in tokenizer.get_added_vocab().values())
    if vocabulary is not None and not LEAST_SHARE * vocabulary <= size <= vocabulary:
        raise refusal(
            folder,
            f"its tokenizer has {show(size)} tokens, and its model {show(vocabulary)}: they are not of one "
            "vocabulary; get the files of the tokenizer again",
        )
    return tokenizer


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """Turn an error of a tokenizer into one that names the folder: the library tokenizers raises plain Exceptions."""
    try:
        with unasked():
            yield
    except MemoryError:
        raise
    except Exception as reason:
        if is_about_code(reason):
            beside = folder if folder.is_dir() else folder.parent
            raise refusal(beside / "tokenizer_config.json", NEEDS_CODE) from reason
        raise refusal(folder, f"it has no tokenizer that transformers can load: {describe(reason)}") from reason


def paragraphs_of(text: str) -> list[str]:
    """Return the paragraphs of a text, which an empty line ends, with single spaces between words."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def padded_batches(tokenizer: Any, paragraphs: Sequence[str], length: int, count: int) -> list[dict[str, Tensor]]:
    """Return batches of at most ``count`` paragraphs, the shortest first so that little is padded, with their masks.

    Paragraphs are cut to ``length`` tokens. A tokenizer without a token to pad with gets one.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    ordered = sorted(paragraphs, key=len)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(ordered[at : at + count], **options)) for at in range(0, len(ordered), count)]


def check_gguf(file: Path, otherwise: str = "") -> None:
    """Raise an ImportError unless the package gguf is there; ``otherwise`` is another remedy."""
    if not is_gguf_available():
        raise ImportError(f"the tokenizer of {quoted(file)} takes the package gguf: pip install gguf{otherwise}")


def tokenizer_of(file: Path) -> Any:
    """Return the tokenizer of a GGUF file, which cuts texts as llama.cpp does.

    transformers makes one of the tokens and merges, and leaves out what the metadata say of spaces before words, and
    the expressions of some names in ``tokenizer.ggml.pre``. An expression that is not known is a UserWarning.
    """
    made: Any = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    with open_regular(file) as opened:
        metadata = read_header(file, opened).metadata
    content = json.loads(made.backend_tokenizer.to_str())
    kind, name = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "llama":
        backend = _of_pieces(content, metadata.get("tokenizer.ggml.add_space_prefix", True) is not False)
    elif kind == "gpt2":
        known = {value: key for key, value in PRE_TOKENIZERS.items()}.get(_ALIASES.get(str(name), str(name)))
        if known is None:
            warnings.warn(
                f"tokenizer.ggml.pre={show(name)} of {show(file.name)} names an expression that lowmem does not "
                "know, and its tokenizer may cut texts otherwise: put the model's own tokenizer files into the "
                "folder",
                UserWarning,
                stacklevel=3,
            )
            return made
        backend = _of_bytes(content, known[:-1], bool(known[-1]))
    else:
        return made
    special = {f"{key}_token": getattr(made, f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
    special = {key: str(token) for key, token in special.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=made.chat_template, **special)


def _of_pieces(content: dict[str, Any], prefix: bool) -> Tokenizer:
    """Return a tokenizer of SentencePiece's pieces, of the tokens and merges of another one's JSON."""
    made = Tokenizer.from_str(json.dumps(content))
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    made.pre_tokenizer = None
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return made


def _of_bytes(content: dict[str, Any], cuts: tuple[str | bool, ...], whole: bool) -> Tokenizer:
    """Return a tokenizer of bytes; ``whole``: whether a word that is a token is taken as it is."""
    content["model"]["ignore_merges"] = whole
    made = Tokenizer.from_str(json.dumps(content))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if cut == "digits"
        else pre_tokenizers.Split(Regex(str(cut)), "isolated")
        for cut in cuts
    ]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made
