"""``lowmem quantize``: converts a safetensors checkpoint, or a Hugging Face folder, to 4 bits, in bounded memory."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict

from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

from lowmem.io.atomic import owned
from lowmem.io.convert_checkpoint import Row, convert_checkpoint
from lowmem.io.shards import INDEX
from lowmem.io.source import Source
from lowmem.nn.budget import Budget
from lowmem.nn.eightbit import EightBit, blockwise
from lowmem.nn.fourbit import FourBit
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE, EIGHT_BIT, FORMATS, IMPORTED
from lowmem.quant.scales import ENCODINGS
from lowmem.tools import import_file
from lowmem.tools.models import MIB, check_links, file_path, positive_float, positive_int, size
from lowmem.tools.output import print_json, print_table, progress, shape_text, shown, uncut_column, warnings_as_notes
from lowmem.tools.quantize_options import check_options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        type=file_path,
        metavar="IN",
        help=f"a .safetensors file, a {INDEX} of shards, a Hugging Face folder, or another program's 4-bit file or "
        "folder (GGUF, bitsandbytes, GPTQ, AWQ, compressed-tensors, gpt-oss), whose codes are kept",
    )
    parser.add_argument(
        "target",
        type=file_path,
        metavar="OUT",
        help="the .safetensors file to write, or a folder that does not exist",
    )
    parser.add_argument(
        "--format",
        choices=[*FORMATS, *IMPORTED, *EIGHT_BIT],
        help=f"default {DEFAULT} in blocks of {DEFAULT_BLOCK_SIZE}; lowmem export writes q4_0, iq4_nl and uint4 to "
        "GGUF with the same codes",
    )
    parser.add_argument(
        "--bits",
        type=positive_float,
        metavar="B",
        help="bits per weight on average, such as 4.4: each tensor gets 4 bits in blocks of 64, 32 or 16, or 8 bits, "
        "depending on its loss; IN is read twice",
    )
    parser.add_argument(
        "--block-size", type=positive_int, metavar="N", help="weights per scale (default: the format's)"
    )
    parser.add_argument("--scales", choices=list(ENCODINGS), help="encoding of the scales (default: the format's)")
    parser.add_argument(
        "--search",
        action=argparse.BooleanOptionalAction,
        help="search for the scales with the smallest error (default: the format's)",
    )
    parser.add_argument(
        "--embeddings",
        choices=["8bit", "4bit"],
        help="for a folder: how to store embeddings and the output layer (default 8bit)",
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="convert only tensors with such names; of another program's file, the dense tensors with such names; "
        "may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="do not convert tensors with such names, or a folder's modules at such paths; may be repeated",
    )
    parser.add_argument("--shard-size", type=size, metavar="SIZE", help="split the output, such as 2GB or 500MiB")
    parser.add_argument(
        "--calibrate",
        type=file_path,
        metavar="self|FILE",
        help="for a folder: calibrate on a text (UTF-8), or on 4096 tokens that the causal language model generates "
        "itself (seed 0, temperature 1)",
    )
    parser.add_argument(
        "--diagonal",
        action="store_true",
        help="with --calibrate: only weigh columns by their mean square, in one run",
    )
    parser.add_argument(
        "--resume",
        type=file_path,
        metavar="DIR",
        help="with --calibrate: save finished blocks in DIR, and continue from them when the command is run again",
    )
    import_file.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON with integer bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    for option in ("embeddings", "search") if arguments.format in EIGHT_BIT else ():
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option} does not apply to --format {arguments.format}, which has 8 bits: leave it out"
            )
    for path in (arguments.source, arguments.target):
        check_links(path)
    if import_file.is_foreign(arguments.source):
        return import_file.run(arguments, _blockwise(arguments))
    is_folder = (arguments.source / "config.json").is_file()
    check_options(arguments, "a dense folder" if is_folder else "a dense file")
    technique = _blockwise(arguments) if arguments.bits is None else Budget(arguments.bits)
    with owned(arguments.target), warnings_as_notes():
        if arguments.calibrate is not None:
            rows = _calibrated_folder(arguments, technique)
        else:
            rows = (_folder if is_folder else _checkpoint)(arguments, technique)
    if arguments.json:
        print_json([asdict(row) for row in rows])
        return 0
    columns = ["Tensor", "Shape", "Before MiB", "After MiB", "Error"]
    if arguments.bits is None:
        print_table(columns, [_cells(row) for row in rows])
    else:
        cells = [[*_cells(row), row.stored, row.chosen_because] for row in rows]
        print_table([*columns, "Stored", "Chosen because"], cells)
    before, after = (sum(getattr(row, part) for row in rows) for part in ("before_bytes", "after_bytes"))
    count = sum(row.converted for row in rows)
    print(f"converted {count} of {len(rows)} tensors: {before / MIB:.2f} MiB became {after / MIB:.2f} MiB")
    if arguments.bits is not None:
        stored = [row for row in rows if row.converted]
        bits = 8 * sum(row.after_bytes for row in stored) / sum(math.prod(row.shape) for row in stored)
        print(f"{bits:.4f} bits a weight that is converted, of --bits {arguments.bits:g}")
    print(f"saved {shown(str(arguments.target))}", file=sys.stderr)
    return 0


def _blockwise(arguments: argparse.Namespace) -> FourBit | EightBit:
    """Return the technique that the options name."""
    return blockwise(
        arguments.format,
        arguments.block_size,
        arguments.scales,
        search=arguments.search,
        embeddings=arguments.embeddings or "8bit",
    )


def _checkpoint(arguments: argparse.Namespace, technique: FourBit | EightBit | Budget) -> list[Row]:
    """Convert a file, or the files of an index."""
    with Source(arguments.source) as source:
        total = sum(spec.nbytes for spec in source.specs.values())
    if isinstance(technique, Budget):
        total *= 2  # at most: what is copied is read once
    with progress(
        DownloadColumn(binary_units=True, table_column=uncut_column()),
        TimeRemainingColumn(table_column=uncut_column()),
        roomy=[TransferSpeedColumn(table_column=uncut_column())],
    ) as bar:
        task = bar.add_task("quantize", total=total)

        def advance(name: str, nbytes: int) -> None:
            bar.update(task, advance=nbytes)

        return convert_checkpoint(
            arguments.source,
            arguments.target,
            technique,
            include=arguments.include or ["*"],
            exclude=arguments.exclude,
            shard_bytes=arguments.shard_size,
            progress=advance,
        )


def _folder(arguments: argparse.Namespace, technique: FourBit | EightBit | Budget) -> list[Row]:
    """Convert a folder, which transformers loads.

    Raises:
        ImportError: transformers is missing, or too old.
    """
    from lowmem.integrations.transformers.folder import quantize_folder

    return quantize_folder(
        arguments.source, arguments.target, technique, skip=arguments.exclude, shard_bytes=arguments.shard_size
    )


def _calibrated_folder(arguments: argparse.Namespace, technique: FourBit | EightBit | Budget) -> list[Row]:
    """Calibrate the model of a folder, which transformers loads.

    Raises:
        ImportError: transformers is missing, or too old.
        ValueError: codes of 8 bits, which are not calibrated.
    """
    if isinstance(technique, EightBit):
        raise ValueError("--calibrate chooses codes of 4 bits, and --format says 8: use only one of them")
    text = None if str(arguments.calibrate) == "self" else arguments.calibrate
    if text is not None and not text.is_file():
        raise ValueError(f"--calibrate={shown(str(text))!r} is no file: name a text, or self")

    from lowmem.integrations.transformers.calibrating import calibrate_folder

    with progress(
        MofNCompleteColumn(table_column=uncut_column()), TimeRemainingColumn(table_column=uncut_column())
    ) as bar:
        task = bar.add_task("calibrate", total=None)

        def advance(done: int, total: int, left: float) -> None:
            bar.update(task, completed=done, total=total)

        return calibrate_folder(
            arguments.source,
            arguments.target,
            technique,
            text,
            skip=arguments.exclude,
            shard_bytes=arguments.shard_size,
            diagonal=arguments.diagonal,
            resume=arguments.resume,
            progress=advance,
        )


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        shape_text(row.shape),
        f"{row.before_bytes / MIB:.2f}",
        f"{row.after_bytes / MIB:.2f}",
        "copied" if row.error is None else f"{row.error:.4f}",
    ]
