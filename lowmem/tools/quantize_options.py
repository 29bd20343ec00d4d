"""Which options of ``lowmem quantize`` mean something for which input; any other is an error, and none is ignored."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import MappingProxyType

__all__ = ["KINDS", "OPTIONS", "check_options"]

OPTIONS = MappingProxyType(
    {
        "bits": "--bits",
        "format": "--format",
        "block_size": "--block-size",
        "scales": "--scales",
        "search": "--search",
        "embeddings": "--embeddings",
        "include": "--include",
        "exclude": "--exclude",
        "shard_size": "--shard-size",
        "requantize": "--requantize",
        "dtype": "--dtype",
        "calibrate": "--calibrate",
        "diagonal": "--diagonal",
        "resume": "--resume",
    }
)
"""Attribute of the parsed arguments -> the option. One that was not given is None, False or empty."""

_TECHNIQUE = ("format", "block_size", "scales", "search")
_CALIBRATION = ("calibrate", "diagonal", "resume")
_NO_MODEL = "only a dense folder can be calibrated: leave it out"


def _of_budget(option: str, given: frozenset[str]) -> str | None:
    if option in (*_TECHNIQUE, "embeddings") and "bits" in given:
        return "--bits chooses it for each tensor: use only one of them"
    return None


def _of_dense_file(option: str, given: frozenset[str]) -> str | None:
    if option == "embeddings":
        return "a file does not say which tensors are embeddings, and all become 4 bits: leave it out"
    if option in _CALIBRATION:
        return _NO_MODEL
    if option == "requantize":
        return "a dense file has no quantized tensors: leave it out"
    if option == "dtype":
        return "tensors of a dense file that are not converted are copied as they are: leave it out"
    return _of_budget(option, given)


def _of_dense_folder(option: str, given: frozenset[str]) -> str | None:
    if option == "include":
        return "it names tensors of a file: leave it out, and exclude modules of a folder by --exclude"
    if option == "requantize":
        return "a dense folder has no quantized tensors: leave it out"
    if option == "dtype":
        return "a folder gets its dtype from from_pretrained(OUT, dtype=): leave it out"
    if option in _CALIBRATION and "calibrate" not in given:
        return "it is an option of --calibrate: add --calibrate, or leave it out"
    if option == "resume" and "diagonal" in given:
        return "--diagonal runs the model once and keeps nothing to resume: use only one of them"
    return _of_budget(option, given)


def _of_kept(option: str, given: frozenset[str]) -> str | None:
    if option in _CALIBRATION:
        return _NO_MODEL
    if option == "bits":
        return "another program's codes are kept as they are: leave it out, or take the dense model"
    if option == "exclude":
        return "another program's codes are kept, and dense tensors too unless --include names them: leave it out"
    if option == "embeddings":
        return "another program's codes are kept: leave it out"
    if option in _TECHNIQUE and not given & {"include", "requantize"}:
        return (
            "another program's codes are kept as they are: add --requantize or --include to quantize, or leave it out"
        )
    return None


KINDS: MappingProxyType[str, Callable[[str, frozenset[str]], str | None]] = MappingProxyType(
    {
        "a dense file": _of_dense_file,
        "a dense folder": _of_dense_folder,
        "another program's": _of_kept,
    }
)
"""By kind of input: a function of an option and all given options that returns why the option does not apply, and the
remedy; None if it applies."""


def check_options(arguments: argparse.Namespace, kind: str) -> None:
    """Raise a ValueError that names the first option that does not apply to a kind of input, a key of ``KINDS``."""
    given = frozenset(name for name in OPTIONS if getattr(arguments, name) not in (None, False, []))
    if arguments.search is not None:
        given |= {"search"}  # --no-search is False
    for name, option in OPTIONS.items():
        why = KINDS[kind](name, given) if name in given else None
        if why is not None:
            raise ValueError(f"{option} does not apply to {arguments.source.name!r}: {why}")
