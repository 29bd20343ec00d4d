"""The part of ``lowmem quantize`` for other programs' 4-bit files, whose codes it keeps."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from lowmem.io.filesystem import exclusive_write_lock
from lowmem.io.formats.export_results import ForeignWeightResult
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.io.model_folder import CONFIG, read_quantization_config
from lowmem.nn.techniques import EightBit, FourBit
from lowmem.tools.arguments import DTYPES
from lowmem.tools.output import (
    bytes_before_and_after_text,
    escaped_and_truncated,
    mib_text,
    print_json,
    print_saved_path_to_stderr,
    print_table,
    progress_display,
    shape_text,
    warnings_printed_as_notes,
)


def add_foreign_file_arguments(parser: argparse.ArgumentParser) -> None:
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


def is_foreign_checkpoint(path: Path) -> bool:
    """Whether a file or folder has 4-bit weights of another program, or is a GGUF file."""
    if path.is_dir() and (path / CONFIG).is_file():
        method = read_quantization_config(path / CONFIG).get("quant_method")
        if str(method).startswith("lowmem") or not any(path.glob("*.safetensors*")):
            return False
    with open_foreign_checkpoint(path) as file:
        return file.kind != "safetensors"


def run_foreign_import(arguments: argparse.Namespace, technique: FourBit | EightBit) -> int:
    """Import the file; ``technique`` is for what is quantized again, or was asked for by ``--include``."""
    with open_foreign_checkpoint(arguments.source) as file:
        kind, left_out = file.kind, file.left_out
        total = sum(tensor.nbytes for tensor in file.tensors.values())
    if arguments.no_tokenizer and (kind != "gguf" or arguments.target.suffix == ".safetensors"):
        raise ValueError(
            f"--no-tokenizer does not apply to {arguments.source.name!r}: it is for a GGUF file that becomes a "
            "folder: leave it out"
        )
    import_options = {
        "requantize": technique if arguments.requantize else None,
        "include": arguments.include or [],
        "technique": technique,
        "dtype": None if arguments.dtype is None else DTYPES[arguments.dtype],
        "shard_bytes": arguments.shard_size,
    }
    with exclusive_write_lock(arguments.target), warnings_printed_as_notes():
        # A file of lowmem's, with the names of the source
        if arguments.target.suffix == ".safetensors":
            with progress_display("import", total=total) as update:
                rows = import_foreign_checkpoint(
                    arguments.source,
                    arguments.target,
                    **import_options,
                    progress=lambda name, nbytes: update(advance=nbytes),
                )
        else:
            # A folder that from_pretrained loads
            from lowmem.integrations.transformers.pretrained_folder import import_foreign_folder

            named = arguments.source, arguments.target
            with progress_display("import"):
                rows = import_foreign_folder(*named, **import_options, tokenizer=not arguments.no_tokenizer)
    if arguments.json:
        print_json([asdict(row) for row in rows])
        return 0
    if arguments.verbose:
        print_table(
            ["Tensor", "Shape", "From", "To", "After MiB", "Error"],
            [_imported_tensor_cells(row) for row in rows],
            text_columns=(0, 2, 3),
        )
    changed = [row for row in rows if row.error is not None]
    print(f"{kind}: kept {len(rows) - len(changed)} of {len(rows)} tensors")
    print(bytes_before_and_after_text(rows))
    if changed:
        worst = max(changed, key=lambda row: row.error or 0.0)
        print(
            f"quantized {len(changed)}, with a relative error of at most {worst.error:.4f}, of "
            f"{escaped_and_truncated(worst.name)}"
        )
    if left_out:
        print(
            f"left out {len(left_out)} that the model computes: {escaped_and_truncated(', '.join(left_out[:3]))}",
            file=sys.stderr,
        )
    print_saved_path_to_stderr(arguments.target)
    return 0


def _imported_tensor_cells(row: ForeignWeightResult) -> list[str]:
    error = "kept" if row.error is None else f"{row.error:.4f}"
    return [row.name, shape_text(row.shape), row.kind, row.kept, mib_text(row.after_bytes), error]
