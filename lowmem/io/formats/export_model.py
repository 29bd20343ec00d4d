"""Writes a model that lowmem stored as a file or folder of another program."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem.errors import is_one_of, short_repr
from lowmem.io.filesystem import check_not_exists, check_outside_inputs
from lowmem.io.formats.export_results import Exported
from lowmem.io.formats.foreign_format import ExportTarget
from lowmem.io.formats.format_registry import FOREIGN_FORMATS


def export_targets_by_format_name() -> dict[str, ExportTarget]:
    """Return how each format is written, by the name that ``--format`` takes."""
    return {name: format.target for name, format in FOREIGN_FORMATS.items() if format.target is not None}


def checked_or_inferred_export_format(out: Path, format: str | None) -> str:
    """Return ``format`` if it is a key of ``targets()``; None: the key that the name of a file tells."""
    known = ", ".join(export_targets_by_format_name())
    if format is None:
        for name, target in export_targets_by_format_name().items():
            if target.ending is not None and out.name.endswith(target.ending):
                return name
        raise ValueError(f"the name {short_repr(out.name)} does not tell the format: give one of {known}")
    if not is_one_of(format, export_targets_by_format_name()):
        raise ValueError(f"format={short_repr(format)} is none of {known}")
    return format


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    requantize: bool = False,
    like: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Exported]:
    """Write a model that lowmem stored as another program's file or folder, its codes as they are.

    Args:
        source: a folder that ``lowmem quantize`` or ``save_pretrained`` wrote; or a file of lowmem's.
        out: where nothing is yet.
        format: "gguf", or a folder in that of "bitsandbytes" or "compressed-tensors", which is made of a folder of
            transformers and takes transformers; None tells it by the ending of ``out``.
        requantize: whether to quantize again what the target cannot hold exactly; else it is refused.
        like: of "gguf": an existing GGUF file of the model, whose metadata and tokenizer are copied.
        dtype: of "gguf": ``torch.float32``, ``float16`` or ``bfloat16``: write every weight dense, in this dtype.
        progress: called with the name of each finished weight and its bytes in the source.

    Returns:
        A row for each weight, sorted by name: what it became, and the error that this added.

    Raises:
        ValueError: what the target cannot hold, by name, an option that it does not take, or an ``out`` in the folder
            ``source``. Nothing was written.
        FileError: the source, or ``like``, is damaged or of another kind.
        FileExistsError: something is at ``out``.
        OSError: a file cannot be read or written.
        ImportError: a folder is to be written, and transformers is missing.
    """
    source, out = Path(source), Path(out)
    name = checked_or_inferred_export_format(out, format)
    target = export_targets_by_format_name()[name]
    options = {"like": like, "dtype": dtype}
    given_options = {option: value for option, value in options.items() if value is not None}
    for option in given_options:
        if option not in target.options:
            raise ValueError(f"{option}={short_repr(given_options[option])} is no option of {name}; leave it out")
    check_not_exists(out)
    check_outside_inputs(out, {"source": source}, "out")
    return target.write(source, out, requantize=requantize, progress=progress, **given_options)
