"""Tokenizers: of folders and GGUF files, what counts of a conversation by their templates, batches of paragraphs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_gguf_available

from lowmem.errors import error_type_and_first_line, file_error, quoted_path, short_repr
from lowmem.integrations.transformers.chat_template import ChatTemplate
from lowmem.io.filesystem import open_regular_file
from lowmem.io.formats.gguf.gguf_file import read_gguf_header
from lowmem.io.formats.gguf.gguf_tokenizer_fields import PRE_TOKENIZERS
from lowmem.io.model_folder import check_config_files_are_regular
from lowmem.io.remote_code import NEEDS_CODE, empty_stdin, has_trust_remote_code_in_text
from lowmem.transforms.calibration.self_generated_text import are_of_one_vocabulary

# What SentencePiece writes for it
_SPACE = "\u2581"
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Other names in llama.cpp for the expressions of ``PRE_TOKENIZERS``."""


class TextTokenizer:
    """A tokenizer of transformers as ``lowmem.read_examples`` takes it.

    Args:
        tokenizer: as ``AutoTokenizer.from_pretrained`` returns it.
        template_kwargs: variables of its chat template, as ``enable_thinking``.

    Attributes:
        special: the special tokens, with those that end a turn.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self._template = ChatTemplate(tokenizer, template_kwargs)

    def encode(self, text: str, special: bool) -> Sequence[int]:
        """Return the tokens of a text; with what the tokenizer puts before each text, if ``special``."""
        tokens: Sequence[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return tokens

    def encode_pieces(self, pieces: Sequence[str]) -> list[Sequence[int]]:
        """Return the tokens of each piece of a text, as they are in the whole text.

        Alone, a piece may get a space that it has not in the text. Where a piece changes the tokens of those before
        it, the text is cut: a prompt has the tokens that it has without its answer.
        """
        encoded: list[Sequence[int]] = []
        text, before = "", list[int]()
        for piece in pieces:
            tokens = [*self.encode(text + piece, False)]
            if tokens[: len(before)] != before:
                text, before, tokens = "", [], [*self.encode(piece, False)]
            encoded.append(tokens[len(before) :])
            text, before = text + piece, tokens
        return encoded

    def reserved_texts(self) -> frozenset[str]:
        """Return the special tokens, and marks in capitals, as ``[INST]``, that the chat template writes."""
        if not getattr(self.tokenizer, "chat_template", None):
            return frozenset()
        marks = re.findall(r"\[/?[A-Z_]{2,}\]", str(self.tokenizer.chat_template))
        return frozenset([*self.tokenizer.convert_ids_to_tokens(sorted(self.special)), *marks])

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Sequence[tuple[str, bool]]:
        """Return the pieces of a conversation's text in their order, and whether the assistant says them.

        A message of the assistant begins where the template's prompt for it ends, and its last token ends its turn.

        Args:
            messages: with ``role``, ``content`` and maybe ``tool_calls``.
            tools: the definitions of tools, as JSON.

        Raises:
            ValueError: there is no template, it refuses the messages, or it does not write what they hold.
        """
        return self._template.pieces(messages, tools)

    def chat_template_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return what the tokenizer's chat template makes of messages; ``add_generation_prompt``: with the start of
        an answer.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        return self._template.text(messages, add_generation_prompt=add_generation_prompt)


def read_tokenizer(path: Path, vocabulary_size: int | None = None) -> Any:
    """Return the tokenizer of a folder or a GGUF file; no code of it is run.

    Args:
        path: as ``save_pretrained`` writes it, or the file.
        vocabulary_size: how many tokens its model knows; None: any number.

    Raises:
        FileError: it has no tokenizer that transformers can load, or one of another vocabulary.
        OSError: a file of it is no regular file, or cannot be read.
        ImportError: it is a GGUF file, and the package gguf is missing.
    """
    if path.is_dir():
        check_config_files_are_regular(path)
    else:
        check_gguf_installed(path)
    with tokenizer_errors_as_file_errors(path):
        tokenizer: Any = (
            gguf_tokenizer(path)
            if path.is_file()
            else AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        )
        size = len(tokenizer)
        # Transformers adds tokens that a GGUF file has not
        if vocabulary_size is not None and path.is_file():
            size -= sum(token >= vocabulary_size for token in tokenizer.get_added_vocab().values())
    if vocabulary_size is not None and not are_of_one_vocabulary(size, vocabulary_size):
        raise file_error(
            path,
            f"its tokenizer has {short_repr(size)} tokens, and its model {short_repr(vocabulary_size)}: they are not "
            "of one vocabulary; get the files of the tokenizer again",
        )
    return tokenizer


@contextmanager
def tokenizer_errors_as_file_errors(path: Path) -> Iterator[None]:
    """Turn an error of a tokenizer into one that names the folder: the library tokenizers raises plain Exceptions."""
    try:
        with empty_stdin():
            yield
    except MemoryError:
        raise
    except Exception as reason:
        if has_trust_remote_code_in_text(reason):
            beside = path if path.is_dir() else path.parent
            raise file_error(beside / "tokenizer_config.json", NEEDS_CODE) from reason
        raise file_error(
            path, f"it has no tokenizer that transformers can load: {error_type_and_first_line(reason)}"
        ) from reason


def split_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text, which an empty line ends, with single spaces between words."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def padded_batches(
    tokenizer: Any, paragraphs: Sequence[str], max_tokens: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Return batches of at most ``batch_size`` paragraphs, the shortest first so that little is padded, with their
    masks.

    Paragraphs are cut to ``max_tokens`` tokens. A copy of a tokenizer without a token to pad with gets one.
    """
    if tokenizer.pad_token is None:
        tokenizer = deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    ordered = sorted(paragraphs, key=len)
    options = {"padding": True, "truncation": True, "max_length": max_tokens, "return_tensors": "pt"}
    return [dict(tokenizer(ordered[at : at + batch_size], **options)) for at in range(0, len(ordered), batch_size)]


def check_gguf_installed(file: Path, remedy: str = "") -> None:
    """Raise an ImportError unless the package gguf is there; ``remedy`` is another remedy."""
    if not is_gguf_available():
        raise ImportError(f"the tokenizer of {quoted_path(file)} takes the package gguf: pip install gguf{remedy}")


def gguf_tokenizer(file: Path) -> Any:
    """Return the tokenizer of a GGUF file, which cuts texts as llama.cpp does.

    transformers makes one of the tokens and merges, and leaves out what the metadata say of spaces before words, and
    the expressions of some names in ``tokenizer.ggml.pre``. An expression that is not known is a UserWarning.
    """
    made: Any = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    with open_regular_file(file) as opened:
        metadata = read_gguf_header(file, opened).metadata
    content = json.loads(made.backend_tokenizer.to_str())
    kind, name = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "llama":
        backend = _sentencepiece_backend_tokenizer(
            content, metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
        )
    elif kind == "gpt2":
        known = {value: key for key, value in PRE_TOKENIZERS.items()}.get(_ALIASES.get(str(name), str(name)))
        if known is None:
            warnings.warn(
                f"tokenizer.ggml.pre={short_repr(name)} of {short_repr(file.name)} names an expression that lowmem "
                "does not "
                "know, and its tokenizer may cut texts otherwise: put the model's own tokenizer files into the "
                "folder",
                UserWarning,
                stacklevel=3,
            )
            return made
        backend = _byte_level_tokenizer(content, known[:-1], bool(known[-1]))
    else:
        return made
    special = {f"{key}_token": getattr(made, f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
    special = {key: str(token) for key, token in special.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=made.chat_template, **special)


def _sentencepiece_backend_tokenizer(tokenizer_json: dict[str, Any], add_prefix_space: bool) -> Tokenizer:
    """Return a tokenizer of SentencePiece's pieces, of the tokens and merges of another one's JSON."""
    made = Tokenizer.from_str(json.dumps(tokenizer_json))
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if add_prefix_space else spaces
    made.pre_tokenizer = None
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix_space else steps)
    return made


def _byte_level_tokenizer(
    tokenizer_json: dict[str, Any], split_patterns: tuple[str | bool, ...], ignore_merges: bool
) -> Tokenizer:
    """Return a tokenizer of bytes; ``ignore_merges``: whether a word that is a token is taken as it is."""
    model = {**tokenizer_json["model"], "ignore_merges": ignore_merges}
    made = Tokenizer.from_str(json.dumps({**tokenizer_json, "model": model}))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if cut == "digits"
        else pre_tokenizers.Split(Regex(str(cut)), "isolated")
        for cut in split_patterns
    ]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made
