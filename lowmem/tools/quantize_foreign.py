"""The part of ``lowmem quantize`` for other programs' 4-bit files, whose codes it keeps."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from lowmem.io.atomic import owned
from lowmem.io.formats.exported import ForeignRow
from lowmem.io.formats.recognize import open_foreign
from lowmem.io.import_checkpoint import import_checkpoint
from lowmem.io.model_folder import CONFIG, quantization_of
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.tools.arguments import DTYPES
from lowmem.tools.output import (
    mib,
    print_json,
    print_saved,
    print_table,
    progress,
    shape_text,
    shown,
    shrinkage,
    warnings_as_notes,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that are for other programs' files alone."""
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="for another program's file: quantize weights again that cannot be kept exactly, and print the error",
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="for a GGUF file: write a folder without the tokenizer"
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES, reverse=True),
        help="for another program's file: round dense tensors to this dtype (default: keep their dtype)",
    )


def is_foreign(path: Path) -> bool:
    """Whether a file or folder has 4-bit weights of another program, or is a GGUF file."""
    if path.is_dir() and (path / CONFIG).is_file():
        method = quantization_of(path / CONFIG).get("quant_method")
        if str(method).startswith("lowmem") or not any(path.glob("*.safetensors*")):
            return False
    with open_foreign(path) as file:
        return file.kind != "safetensors"


def run(arguments: argparse.Namespace, technique: FourBit | EightBit) -> int:
    """Import the file; ``technique`` is for what is quantized again, or was asked for by ``--include``."""
    with open_foreign(arguments.source) as file:
        kind, left_out = file.kind, file.left_out
        total = sum(tensor.nbytes for tensor in file.tensors.values())
    if arguments.no_tokenizer and (kind != "gguf" or arguments.target.suffix == ".safetensors"):
        raise ValueError(
            f"--no-tokenizer does not apply to {arguments.source.name!r}: it is for a GGUF file that becomes a "
            "folder: leave it out"
        )
    asked = {
        "requantize": technique if arguments.requantize else None,
        "include": arguments.include or [],
        "technique": technique,
        "dtype": None if arguments.dtype is None else DTYPES[arguments.dtype],
        "shard_bytes": arguments.shard_size,
    }
    with owned(arguments.target), warnings_as_notes():
        if arguments.target.suffix == ".safetensors":  # a file of lowmem's, with the names of the source
            with progress("import", total=total) as update:
                rows = import_checkpoint(
                    arguments.source,
                    arguments.target,
                    **asked,
                    progress=lambda name, nbytes: update(advance=nbytes),
                )
        else:  # a folder that from_pretrained loads
            from lowmem.integrations.transformers.folder import import_folder

            named = arguments.source, arguments.target
            with progress("import"):
                rows = import_folder(*named, **asked, tokenizer=not arguments.no_tokenizer)
    if arguments.json:
        print_json([asdict(row) for row in rows])
        return 0
    if arguments.verbose:
        print_table(
            ["Tensor", "Shape", "From", "To", "After MiB", "Error"], [_cells(row) for row in rows], text=(0, 2, 3)
        )
    changed = [row for row in rows if row.error is not None]
    print(f"{kind}: kept {len(rows) - len(changed)} of {len(rows)} tensors")
    print(shrinkage(rows))
    if changed:
        worst = max(changed, key=lambda row: row.error or 0.0)
        print(f"quantized {len(changed)}, with a relative error of at most {worst.error:.4f}, of {shown(worst.name)}")
    if left_out:
        print(f"left out {len(left_out)} that the model computes: {shown(', '.join(left_out[:3]))}", file=sys.stderr)
    print_saved(arguments.target)
    return 0


def _cells(row: ForeignRow) -> list[str]:
    error = "kept" if row.error is None else f"{row.error:.4f}"
    return [row.name, shape_text(row.shape), row.kind, row.kept, mib(row.after_bytes), error]
