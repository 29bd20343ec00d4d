"""``lowmem export``: writes a model that lowmem stored for another program, its codes as they are."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lowmem.io.atomic import check_outside, owned
from lowmem.io.formats.export import export, target_of, targets
from lowmem.io.formats.exported import Exported, total_error
from lowmem.io.formats.stored_model import open_stored
from lowmem.io.shards import INDEX
from lowmem.tools.arguments import DTYPES, add_verbose_argument, file_path
from lowmem.tools.output import (
    mib,
    print_json,
    print_saved,
    print_table,
    progress,
    shape_text,
    shrinkage,
    warnings_as_notes,
)

SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        type=file_path,
        metavar="IN",
        help="a folder of lowmem quantize or save_pretrained, or a .safetensors file of lowmem",
    )
    parser.add_argument("out", type=file_path, metavar="OUT", help="OUT.gguf, or a folder; must not exist")
    parser.add_argument("--format", choices=list(targets()), help="default: by the ending of OUT")
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize weights again that the format cannot hold exactly, and print the error",
    )
    parser.add_argument("--dtype", choices=list(SHORT), help="for gguf: write all weights dense, in this dtype")
    parser.add_argument(
        "--like",
        type=file_path,
        metavar="GGUF",
        help="for gguf: copy metadata and tokenizer from this file of the same model",
    )
    add_verbose_argument(parser, "weights")
    parser.add_argument("--json", action="store_true", help="print JSON with integer bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    name = target_of(arguments.out, arguments.format)
    check_outside(arguments.out, {"IN": arguments.source})
    size = _size(arguments.source)
    with owned(arguments.out), warnings_as_notes(), progress("export", total=size) as update:
        rows = export(
            arguments.source,
            arguments.out,
            format=name,
            requantize=arguments.requantize,
            like=arguments.like,
            dtype=None if arguments.dtype is None else DTYPES[SHORT[arguments.dtype]],
            progress=lambda name, nbytes: update(advance=nbytes),
        )
    if arguments.json:
        print_json([asdict(row) for row in rows])
        return 0
    if arguments.verbose:
        print_table(
            ["Weight", "Shape", "From", "To", "After MiB", "Error"], [_cells(row) for row in rows], text=(0, 2, 3)
        )
    _print_totals(name, rows)
    print_saved(arguments.out)
    return 0


def _size(source: Path) -> int:
    """Return the bytes of the weights of a folder or index, or those of a file: opening it would verify it twice."""
    if source.is_file() and not source.name.endswith(INDEX):
        return source.stat().st_size
    with open_stored(source) as model:
        return sum(weight.nbytes for weight in model.weights.values())


def _print_totals(name: str, rows: list[Exported]) -> None:
    changed = [row for row in rows if row.error is not None]
    print(f"{name}: {len(rows) - len(changed)} of {len(rows)} weights as they were")
    print(shrinkage(rows))
    for change in dict.fromkeys((row.kept, row.kind) for row in changed):
        same = [row for row in changed if (row.kept, row.kind) == change]
        print(f"{len(same)} from {change[0]} to {change[1]}: an error of {total_error(same):.4g} was added (rms)")
    if changed:
        print(f"over all weights: {total_error(rows):.4g}")


def _cells(row: Exported) -> list[str]:
    error = "same" if row.error is None else f"{row.error:.4g}"
    return [row.name, shape_text(row.shape), row.kept, row.kind, mib(row.after_bytes), error]
