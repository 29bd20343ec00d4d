"""``lowmem export``: writes a model that lowmem stored for another program, its codes as they are."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lowmem.io.filesystem import check_outside_inputs, exclusive_write_lock
from lowmem.io.formats.export_model import checked_or_inferred_export_format, export, export_targets_by_format_name
from lowmem.io.formats.export_results import Exported, combined_relative_rms_error
from lowmem.io.formats.lazy_model import open_lazy_model
from lowmem.io.shards import INDEX
from lowmem.tools.arguments import DTYPES, add_verbose_argument, parse_nonempty_path
from lowmem.tools.output import (
    bytes_before_and_after_text,
    mib_text,
    print_json,
    print_saved_path_to_stderr,
    print_table,
    progress_display,
    shape_text,
    warnings_printed_as_notes,
)

DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        type=parse_nonempty_path,
        metavar="IN",
        help="a folder of lowmem quantize or save_pretrained, or a .safetensors file of lowmem",
    )
    parser.add_argument("out", type=parse_nonempty_path, metavar="OUT", help="OUT.gguf, or a folder; must not exist")
    parser.add_argument(
        "--format", choices=list(export_targets_by_format_name()), help="default: by the ending of OUT"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize weights again that the format cannot hold exactly, and print the error",
    )
    parser.add_argument("--dtype", choices=list(DTYPE_NAMES), help="for gguf: write all weights dense, in this dtype")
    parser.add_argument(
        "--like",
        type=parse_nonempty_path,
        metavar="GGUF",
        help="for gguf: copy metadata and tokenizer from this file of the same model",
    )
    add_verbose_argument(parser, "weights")
    parser.add_argument("--json", action="store_true", help="print JSON with integer bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    name = checked_or_inferred_export_format(arguments.out, arguments.format)
    check_outside_inputs(arguments.out, {"IN": arguments.source})
    size = _source_weight_bytes(arguments.source)
    with (
        exclusive_write_lock(arguments.out),
        warnings_printed_as_notes(),
        progress_display("export", total=size) as update,
    ):
        rows = export(
            arguments.source,
            arguments.out,
            format=name,
            requantize=arguments.requantize,
            like=arguments.like,
            dtype=None if arguments.dtype is None else DTYPES[DTYPE_NAMES[arguments.dtype]],
            progress=lambda name, nbytes: update(advance=nbytes),
        )
    if arguments.json:
        print_json([asdict(row) for row in rows])
        return 0
    if arguments.verbose:
        print_table(
            ["Weight", "Shape", "From", "To", "After MiB", "Error"],
            [_exported_weight_cells(row) for row in rows],
            text_columns=(0, 2, 3),
        )
    _print_export_totals(name, rows)
    print_saved_path_to_stderr(arguments.out)
    return 0


def _source_weight_bytes(source: Path) -> int:
    """Return the bytes of the weights of a folder or index, or those of a file: opening it would verify it twice."""
    if source.is_file() and not source.name.endswith(INDEX):
        return source.stat().st_size
    with open_lazy_model(source) as model:
        return sum(weight.nbytes for weight in model.weights.values())


def _print_export_totals(format_name: str, rows: list[Exported]) -> None:
    changed = [row for row in rows if row.error is not None]
    print(f"{format_name}: {len(rows) - len(changed)} of {len(rows)} weights as they were")
    print(bytes_before_and_after_text(rows))
    for change in dict.fromkeys((row.kept, row.kind) for row in changed):
        same = [row for row in changed if (row.kept, row.kind) == change]
        error = combined_relative_rms_error(same)
        print(f"{len(same)} from {change[0]} to {change[1]}: an error of {error:.4g} was added (rms)")
    if changed:
        print(f"over all weights: {combined_relative_rms_error(rows):.4g}")


def _exported_weight_cells(row: Exported) -> list[str]:
    error = "same" if row.error is None else f"{row.error:.4g}"
    return [row.name, shape_text(row.shape), row.kept, row.kind, mib_text(row.after_bytes), error]
