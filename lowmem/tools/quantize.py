"""``lowmem quantize``: converts a safetensors checkpoint, or a Hugging Face folder, to 4 bits, in bounded memory."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Set
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

from lowmem.io.convert_checkpoint import TensorConversionRow, convert_checkpoint
from lowmem.io.filesystem import check_outside_inputs, exclusive_write_lock
from lowmem.io.formats.gguf.gguf_outlook import LLAMA_CPP, gguf_outlook
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.shards import INDEX
from lowmem.nn.techniques import EMBEDDINGS, Budget, EightBit, FourBit, blockwise_technique
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE, EIGHT_BIT, FORMATS, IMPORTED
from lowmem.quant.scale_encodings import ENCODINGS
from lowmem.tools import quantize_foreign
from lowmem.tools.arguments import (
    add_device_argument,
    add_for_llama_cpp_argument,
    add_verbose_argument,
    option_string,
    parse_byte_size,
    parse_nonempty_path,
    parse_positive_float,
    parse_positive_int,
    select_local_rank_device,
)
from lowmem.tools.compute_argument import COMPUTE, add_compute_argument, print_compute_cost
from lowmem.tools.hub_arguments import add_revision_argument, fetch_model, parse_model_path
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

_TECHNIQUE = ("format", "block_size", "scales", "search")
_CALIBRATION = ("calibrate", "diagonal", "resume")
OPTIONS = (
    *(
        "bits",
        *_TECHNIQUE,
        "embeddings",
        "compute",
        "include",
        "exclude",
        "shard_size",
        "requantize",
        "dtype",
        "device",
    ),
    *("no_tokenizer", "for"),
    *_CALIBRATION,
)
"""Attributes of the parsed arguments that some kinds of input refuse. One that was not given is None, False, []
or "cpu"."""

_NO_MODEL = dict.fromkeys(_CALIBRATION, "only a dense folder can be calibrated: leave it out")
REFUSALS = {
    "a dense file": {
        **_NO_MODEL,
        "embeddings": "a file does not say which tensors are embeddings, and all become 4 bits: leave it out",
        "compute": "a file does not say which tensor is the output layer, whose inputs are not rounded: leave it out",
        "requantize": "a dense file has no quantized tensors: leave it out",
        "dtype": "tensors of a dense file that are not converted are copied as they are: leave it out",
        "no_tokenizer": "a file has no tokenizer: leave it out",
        "for": "a file does not say which model it is: name its folder, or leave it out",
    },
    "a dense folder": {
        "include": "it names tensors of a file: leave it out, and exclude modules of a folder by --exclude",
        "requantize": "a dense folder has no quantized tensors: leave it out",
        "dtype": "a folder gets its dtype from from_pretrained(OUT, dtype=): leave it out",
        "no_tokenizer": "a folder's tokenizer is copied as it is: leave it out",
    },
    "another program's": {
        **_NO_MODEL,
        "bits": "another program's codes are kept as they are: leave it out, or take the dense model",
        "exclude": (
            "another program's codes are kept, and dense tensors too unless --include names them: leave it out"
        ),
        "embeddings": "another program's codes are kept: leave it out",
        "compute": "it is no part of another program's file: leave it out, and use `lowmem generate --compute int8`",
        "device": "another program's file is read on the CPU: leave it out",
        "for": "another program's codes are kept as they are: leave it out, or take the dense model",
    },
}
"""By kind of input: why an option never applies, and the remedy. No option is ignored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        type=parse_model_path,
        metavar="IN",
        help=f"a .safetensors file, a {INDEX} of shards, a Hugging Face folder, a name on the Hub, or "
        "another program's 4-bit file or folder (GGUF, bitsandbytes, GPTQ, AWQ, compressed-tensors, gpt-oss), whose "
        "codes are kept",
    )
    parser.add_argument(
        "target",
        type=parse_nonempty_path,
        metavar="OUT",
        help="the .safetensors file to write, or a folder that does not exist",
    )
    add_revision_argument(parser, "IN")
    parser.add_argument(
        "--format",
        choices=[*FORMATS, *IMPORTED, *EIGHT_BIT],
        help=f"default {DEFAULT} in blocks of {DEFAULT_BLOCK_SIZE}; lowmem export writes q4_0, iq4_nl, uint4 and "
        "q8_0 to GGUF with the same codes",
    )
    add_for_llama_cpp_argument(parser)
    parser.add_argument(
        "--bits",
        type=parse_positive_float,
        metavar="B",
        help="bits per weight on average, such as 4.4: each tensor gets 4 bits in blocks of 64, 32 or 16, or 8 bits, "
        "depending on its loss; IN is read twice",
    )
    parser.add_argument(
        "--block-size", type=parse_positive_int, metavar="N", help="weights per scale (default: the format's)"
    )
    parser.add_argument("--scales", choices=list(ENCODINGS), help="encoding of the scales (default: the format's)")
    parser.add_argument(
        "--search",
        action=argparse.BooleanOptionalAction,
        help="search for the scales with the smallest error (default: the format's)",
    )
    parser.add_argument(
        "--embeddings",
        choices=EMBEDDINGS,
        help="for a folder: how to store embeddings and the output layer (default 8bit); q8_0 is what GGUF holds",
    )
    add_compute_argument(parser)
    parser.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="convert only tensors with such names; of another program's file, the dense tensors with such names, "
        "and those of 8 bits if the format has 4; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="do not convert tensors with such names, or a folder's modules at such paths; may be repeated",
    )
    parser.add_argument(
        "--shard-size", type=parse_byte_size, metavar="SIZE", help="split the output, such as 2GB or 500MiB"
    )
    parser.add_argument(
        "--calibrate",
        type=parse_nonempty_path,
        metavar="self|random|FILE",
        help="for a folder: calibrate on a text (UTF-8), on 4096 tokens that the causal language model generates "
        "itself (seed 0, temperature 1), or on 4096 that are drawn evenly from the vocabulary (seed 0)",
    )
    parser.add_argument(
        "--diagonal",
        action="store_true",
        help="with --calibrate: only weigh columns by their mean square, in one run",
    )
    parser.add_argument(
        "--resume",
        type=parse_nonempty_path,
        metavar="DIR",
        help="with --calibrate: save finished blocks in DIR, and continue from them when the command is run again",
    )
    quantize_foreign.add_foreign_file_arguments(parser)
    add_device_argument(parser, "where weights are quantized, and a model is calibrated")
    add_verbose_argument(parser, "tensors")
    parser.add_argument("--json", action="store_true", help="print JSON with integer bytes")


def _option_refusal_reason_or_none(input_kind: str, option: str, given_options: Set[str]) -> str | None:
    """Return why an option does not apply to a kind of input beside the other options that were given."""
    if option in REFUSALS[input_kind]:
        return REFUSALS[input_kind][option]
    if input_kind == "another program's" and option in _TECHNIQUE and not given_options & {"include", "requantize"}:
        return (
            "another program's codes are kept as they are: add --requantize or --include to quantize, or leave it out"
        )
    if option in _CALIBRATION and "calibrate" not in given_options:
        return "it is an option of --calibrate: add --calibrate, or leave it out"
    if option == "resume" and "diagonal" in given_options:
        return "--diagonal runs the model once and keeps nothing to resume: use only one of them"
    if option in (*_TECHNIQUE, "embeddings", "bits") and "for" in given_options:
        return "--for llama.cpp chooses it: use only one of them"
    if option in (*_TECHNIQUE, "embeddings") and "bits" in given_options:
        return "--bits chooses it for each tensor: use only one of them"
    return None


def _check_options_applicable(arguments: argparse.Namespace, input_kind: str) -> None:
    """Raise a ValueError that names the first option that does not apply to a kind of input."""
    given_options = {name for name in OPTIONS if getattr(arguments, name) not in (None, False, [], "cpu")}
    if arguments.search is not None:
        # --no-search is False
        given_options.add("search")
    for name in OPTIONS:
        why = _option_refusal_reason_or_none(input_kind, name, given_options) if name in given_options else None
        if why is not None:
            raise ValueError(f"{option_string(name)} does not apply to {arguments.source.name!r}: {why}")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    for option in ("embeddings", "search") if arguments.format in EIGHT_BIT else ():
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option} does not apply to --format {arguments.format}, which has 8 bits: leave it out"
            )
    arguments.source = fetch_model(arguments.source, arguments.revision, argument="IN")
    check_outside_inputs(arguments.target, {"IN": arguments.source})
    if arguments.resume is not None:
        check_outside_inputs(arguments.resume, {"IN": arguments.source, "OUT": arguments.target}, "--resume")
    if quantize_foreign.is_foreign_checkpoint(arguments.source):
        _check_options_applicable(arguments, "another program's")
        return quantize_foreign.run_foreign_import(arguments, _blockwise_technique(arguments))
    is_folder = (arguments.source / "config.json").is_file()
    _check_options_applicable(arguments, "a dense folder" if is_folder else "a dense file")
    if getattr(arguments, "for") is not None:
        _check_and_print_gguf_outlook(arguments.source)
    device = select_local_rank_device(arguments.device)
    technique = _blockwise_technique(arguments) if arguments.bits is None else Budget(arguments.bits)
    if arguments.compute is not None:
        technique = replace(technique, compute_dtype=COMPUTE[arguments.compute])
    with exclusive_write_lock(arguments.target), warnings_printed_as_notes():
        if arguments.calibrate is not None:
            rows = _calibrate_and_quantize_folder(arguments, technique, device)
        else:
            rows = (_quantize_model_folder if is_folder else _quantize_checkpoint_files)(arguments, technique, device)
    if arguments.compute is not None:
        print_compute_cost("quantize", arguments.compute)
    if arguments.json:
        print_json([asdict(row) for row in rows])
        return 0
    if arguments.verbose:
        columns = ["Tensor", "Shape", "Before MiB", "After MiB", "Error"]
        columns += [] if arguments.bits is None else ["Stored", "Chosen because"]
        print_table(columns, [_converted_tensor_cells(row)[: len(columns)] for row in rows], text_columns=(0, 5, 6))
    stored = [row for row in rows if row.converted]
    print(f"converted {len(stored)} of {len(rows)} tensors: {bytes_before_and_after_text(rows)}")
    for form in dict.fromkeys(row.stored for row in stored):
        same = [row for row in stored if row.stored == form]
        worst = max(same, key=lambda row: row.error or 0.0)
        print(
            f"{len(same)} as {form}: a relative error of at most {worst.error:.4f}, of "
            f"{escaped_and_truncated(worst.name)}"
        )
    if arguments.bits is not None:
        bits = 8 * sum(row.after_bytes for row in stored) / sum(math.prod(row.shape) for row in stored)
        print(f"{bits:.4f} bits a weight that is converted, of --bits {arguments.bits:g}")
    print_saved_path_to_stderr(arguments.target)
    return 0


def _check_and_print_gguf_outlook(folder: Path) -> None:
    """Raise an error unless GGUF will hold the model of a dense folder exactly; else print that it does."""
    from lowmem.integrations.transformers.pretrained_folder import check_folder_is_dense

    check_folder_is_dense(folder)
    outlook = gguf_outlook(folder, LLAMA_CPP)
    outlook.check_exact(folder, "quantize")
    print(f"lowmem quantize: {outlook.description()}", file=sys.stderr)


def _blockwise_technique(arguments: argparse.Namespace) -> FourBit | EightBit:
    """Return the technique that the options name."""
    if getattr(arguments, "for") is not None:
        return LLAMA_CPP
    return blockwise_technique(
        arguments.format,
        arguments.block_size,
        arguments.scales,
        search=arguments.search,
        embeddings=arguments.embeddings or "8bit",
    )


def _quantize_checkpoint_files(
    arguments: argparse.Namespace, technique: FourBit | EightBit | Budget, device: torch.device
) -> list[TensorConversionRow]:
    """Convert a file, or the files of an index."""
    with SafetensorsCheckpoint(arguments.source) as source:
        total = sum(spec.nbytes for spec in source.specs.values())
    if isinstance(technique, Budget):
        # At most: what is copied is read once
        total *= 2
    size = partial(DownloadColumn, binary_units=True)
    speed = [TransferSpeedColumn]
    with progress_display("quantize", size, TimeRemainingColumn, wide_terminal_columns=speed, total=total) as update:
        return convert_checkpoint(
            arguments.source,
            arguments.target,
            technique,
            include=arguments.include or ["*"],
            exclude=arguments.exclude,
            shard_bytes=arguments.shard_size,
            device=device,
            progress=lambda name, nbytes: update(advance=nbytes),
        )


def _quantize_model_folder(
    arguments: argparse.Namespace, technique: FourBit | EightBit | Budget, device: torch.device
) -> list[TensorConversionRow]:
    """Convert a folder, which transformers loads."""
    from lowmem.integrations.transformers.folder_calibration import self_calibration_hint_or_none
    from lowmem.integrations.transformers.pretrained_folder import quantize_folder

    with progress_display("quantize"):
        rows = quantize_folder(
            arguments.source,
            arguments.target,
            technique,
            skip=arguments.exclude,
            shard_bytes=arguments.shard_size,
            device=device,
        )
    count = sum(math.prod(row.shape) for row in rows if row.converted)
    hint = None if isinstance(technique, EightBit) else self_calibration_hint_or_none(arguments.source, count)
    if hint is not None:
        print(f"lowmem quantize: {hint}", file=sys.stderr)
    return rows


def _calibrate_and_quantize_folder(
    arguments: argparse.Namespace, technique: FourBit | EightBit | Budget, device: torch.device
) -> list[TensorConversionRow]:
    """Calibrate the model of a folder, which transformers loads."""
    if isinstance(technique, EightBit):
        raise ValueError("--calibrate chooses codes of 4 bits, and --format says 8: use only one of them")

    from lowmem.integrations.transformers.folder_calibration import load_calibrate_and_write_folder
    from lowmem.transforms.calibration.calibrate import WITHOUT_TEXT

    text = str(arguments.calibrate) if str(arguments.calibrate) in WITHOUT_TEXT else arguments.calibrate
    if isinstance(text, Path) and not text.is_file():
        raise ValueError(f"--calibrate={escaped_and_truncated(str(text))!r} is no file: name a text, self or random")
    with progress_display("calibrate", MofNCompleteColumn, TimeRemainingColumn) as update:
        return load_calibrate_and_write_folder(
            arguments.source,
            arguments.target,
            technique,
            text,
            skip=arguments.exclude,
            shard_bytes=arguments.shard_size,
            device=device,
            diagonal=arguments.diagonal,
            resume=arguments.resume,
            progress=lambda done, total, left: update(completed=done, total=total),
        )


def _converted_tensor_cells(row: TensorConversionRow) -> list[str]:
    error = "copied" if row.error is None else f"{row.error:.4f}"
    bytes_ = mib_text(row.before_bytes), mib_text(row.after_bytes)
    return [row.name, shape_text(row.shape), *bytes_, error, row.stored, row.chosen_because]
