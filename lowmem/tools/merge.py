"""``lowmem merge``: merges an adapter into the model that it was trained on, and says what that loses."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from lowmem.errors import truncated_error_line
from lowmem.io.adapter_files import load_adapter, resolve_adapter_path_and_name
from lowmem.io.checkpoint import load, save
from lowmem.io.filesystem import check_not_exists, check_outside_inputs, exclusive_write_lock, has_magic_bytes
from lowmem.io.formats.gguf.gguf_file import MAGIC
from lowmem.tools.arguments import DTYPES, parse_nonempty_path, parse_nonnegative_float
from lowmem.tools.hub_arguments import add_revision_argument, fetch_model, parse_model_path
from lowmem.tools.named_models import exceptions_as_value_error, import_and_call_batch_function, import_model_factory
from lowmem.tools.output import (
    print_json,
    print_saved_path_to_stderr,
    print_table,
    progress_display,
    warnings_printed_as_notes,
)
from lowmem.transforms.merge_adapters import MergeReport, merge
from lowmem.transforms.module_registry import layer_display_name
from lowmem.transforms.named_adapters import adapter_names
from lowmem.transforms.restore_dense import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "base",
        type=parse_model_path,
        metavar="BASE",
        help="a folder of transformers, its name on the Hub, a GGUF file, or a model file of lowmem.save",
    )
    parser.add_argument(
        "adapter",
        type=parse_model_path,
        metavar="ADAPTER",
        help="a file of save_adapter, a PEFT folder, or its name on the Hub",
    )
    add_revision_argument(parser, "BASE")
    parser.add_argument("out", type=parse_nonempty_path, metavar="OUT", help="the folder to write, or the model file")
    parser.add_argument("--adapter", dest="name", metavar="NAME", help="the adapter to merge, of a folder of several")
    parser.add_argument(
        "--model", metavar="MODULE:FACTORY", help="for a model file: a callable that makes the dense model of BASE"
    )
    parser.add_argument(
        "--to",
        choices=list(DTYPES),
        help="of a folder: make the model dense in this dtype, so that transformers alone opens OUT; of a file: make "
        "adapted layers dense, and the factory that loads OUT must make them so (default: the format of BASE)",
    )
    parser.add_argument(
        "--at-most",
        type=parse_nonnegative_float,
        metavar="E",
        help="write nothing and exit with 1 if a relative error after the merge is above E: of a weight, or with "
        "--inputs of the outputs of a layer or the model",
    )
    parser.add_argument(
        "--inputs",
        metavar="MODULE:FUNCTION",
        help="a callable that returns an example batch: also report the errors of the outputs of layers and model",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    inputs = None if arguments.inputs is None else import_and_call_batch_function(arguments.inputs)
    arguments.base = fetch_model(arguments.base, arguments.revision, argument="BASE")
    arguments.adapter = fetch_model(arguments.adapter, argument="ADAPTER")
    check_outside_inputs(arguments.out, {"BASE": arguments.base, "ADAPTER": arguments.adapter})
    to: Any = "same format" if arguments.to is None else DTYPES[arguments.to]
    user_errors = (
        nullcontext()
        if inputs is None
        else exceptions_as_value_error(f"inputs={arguments.inputs!r}: calling the model failed")
    )
    is_folder = arguments.base.is_dir() or has_magic_bytes(arguments.base, MAGIC)
    _check_model_only_for_file(arguments, is_folder)
    adapter = resolve_adapter_path_and_name(arguments.adapter, arguments.name)
    with exclusive_write_lock(arguments.out), progress_display("merge"):
        if is_folder:
            check_not_exists(arguments.out)
            model, tokenizer = _load_base_and_gguf_tokenizer(arguments)
        else:
            model = load(arguments.base, import_model_factory(arguments.model))
        if names := adapter_names(model):
            said = f"BASE={str(arguments.base)!r} has an adapter already, {names[0]!r}, which would be merged, too"
            raise ValueError(f"{said}: name the base without adapters")
        with warnings_printed_as_notes():
            model = load_adapter(model, *adapter)
        with user_errors:
            model, report = merge(model, to, inputs=inputs, report=True)
        why = _excessive_error_text_or_none(report, arguments.at_most)
        if why is None and is_folder:
            _write_merged_folder(arguments, model, tokenizer)
        elif why is None:
            save(model, arguments.out)
    if arguments.json:
        print_json(_merge_report_dict(report))
    else:
        count = 4 if inputs is None else len(report.columns)
        print_table(report.columns[:count], [cells[:count] for cells in report.cells], text_columns=(0, 1))
    if why is not None:
        remedy = "nothing was written: merge --to bfloat16, or keep the adapter apart"
        print(truncated_error_line(f"lowmem merge: {why}, above {arguments.at_most:g}; {remedy}"), file=sys.stderr)
        return 1
    print_saved_path_to_stderr(arguments.out)
    return 0


def _check_model_only_for_file(arguments: argparse.Namespace, is_folder: bool) -> None:
    """Raise unless --model is given for a file of lowmem, and for nothing else."""
    if is_folder and arguments.model is not None:
        raise ValueError(
            f"--model={arguments.model!r} is for a model file: BASE says what its model is, leave it out"
        )
    if not is_folder and arguments.model is None:
        raise ValueError(
            f"BASE={str(arguments.base)!r} is a model file: name what makes its model, --model module:factory"
        )
    if not is_folder and ":" not in arguments.model:
        raise ValueError(f"--model={arguments.model!r} must be module:factory, as my_models:make")


def _load_base_and_gguf_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model of a folder or GGUF file, and the tokenizer of a GGUF file."""
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log
    from lowmem.integrations.transformers.pretrained_folder import load_folder_or_gguf
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    with delayed_transformers_log(), warnings_printed_as_notes():
        tokenizer = None if arguments.base.is_dir() else read_tokenizer(arguments.base)
        return load_folder_or_gguf(arguments.base), tokenizer


def _write_merged_folder(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    """Write a merged model's folder, with the other files of a base that is a folder."""
    from lowmem.integrations.transformers.pretrained_folder import write_model_folder

    if arguments.to is not None:
        model = restore(model, dtype=DTYPES[arguments.to])
    write_model_folder(model, arguments.base if tokenizer is None else None, arguments.out, None, tokenizer)


def _excessive_error_text_or_none(report: MergeReport, max_error: float | None) -> str | None:
    """Return a text on the layer, or model, whose error is above ``max_error``; None: no error is."""
    if max_error is None:
        return None
    worst, of_model = report.worst, report.output_after
    if not worst.largest <= max_error:
        return f"{layer_display_name(worst.path)} has a relative error of {worst.largest:.4g}"
    if of_model is not None and not of_model <= max_error:
        return f"the whole model's outputs have a relative error of {of_model:.4g}"
    return None


def _merge_report_dict(report: MergeReport) -> dict[str, Any]:
    keys = ("path", "adapters", "before", "after", "output_before", "output_after")
    return {
        "layers": [{key: getattr(row, key) for key in keys} for row in report],
        "output_before": report.output_before,
        "output_after": report.output_after,
    }
