"""The tokenizer of a GGUF file, which cuts texts as llama.cpp does: inverse of ``lowmem.io.formats.gguf.tokenizer``.

transformers makes one of the tokens and merges, and leaves out what the metadata say of spaces before words, and the
expressions of some names in ``tokenizer.ggml.pre``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem.errors import show
from lowmem.io.atomic import open_regular
from lowmem.io.formats.gguf.container import read_header
from lowmem.io.formats.gguf.tokenizer import PRE_TOKENIZERS

__all__ = ["tokenizer_of"]

_SPACE = "\u2581"  # what SentencePiece writes for it
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Other names in llama.cpp for the expressions of ``PRE_TOKENIZERS``."""


def tokenizer_of(file: Path) -> Any:
    """Return the tokenizer of a file.

    Raises:
        Exception: transformers, or a library of it, can read none from it.

    Warns:
        UserWarning: the file names an expression that is not known: texts are cut as transformers does it.
    """
    made: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
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
