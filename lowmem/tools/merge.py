"""``lowmem merge``: merges an adapter into the model that it was trained on, and says what that loses."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from lowmem.errors import one_line
from lowmem.io.adapters import find_adapter, load_adapter
from lowmem.io.atomic import check_free, check_outside, owned, starts_with
from lowmem.io.checkpoint import load, save
from lowmem.io.formats.gguf.container import MAGIC
from lowmem.tools.arguments import DTYPES, file_path, number
from lowmem.tools.models import batch_of, model_factory, user_code
from lowmem.tools.output import print_json, print_saved, print_table, progress, warnings_as_notes
from lowmem.transforms.adapters import adapter_names
from lowmem.transforms.merge import MergeReport, merge
from lowmem.transforms.registry import layer_name
from lowmem.transforms.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "base",
        type=file_path,
        metavar="BASE",
        help="a folder of transformers, a GGUF file, or a model file of lowmem.save",
    )
    parser.add_argument("adapter", type=file_path, metavar="ADAPTER", help="a file of save_adapter, or a PEFT folder")
    parser.add_argument("out", type=file_path, metavar="OUT", help="the folder to write, or the model file")
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
        type=number,
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
    check_outside(arguments.out, {"BASE": arguments.base, "ADAPTER": arguments.adapter})
    inputs = None if arguments.inputs is None else batch_of(arguments.inputs)
    to: Any = "same format" if arguments.to is None else DTYPES[arguments.to]
    run_it = nullcontext() if inputs is None else user_code(f"inputs={arguments.inputs!r}: calling the model failed")
    of_folder = arguments.base.is_dir() or starts_with(arguments.base, MAGIC)
    _check_model(arguments, of_folder)
    adapter = find_adapter(arguments.adapter, arguments.name)
    with owned(arguments.out), progress("merge"):
        if of_folder:
            model, tokenizer = _open_folder(arguments)
        else:
            model = load(arguments.base, model_factory(arguments.model))
        if names := adapter_names(model):
            said = f"BASE={str(arguments.base)!r} has an adapter already, {names[0]!r}, which would be merged, too"
            raise ValueError(f"{said}: name the base without adapters")
        with warnings_as_notes():
            model = load_adapter(model, *adapter)
        with run_it:
            model, report = merge(model, to, inputs=inputs, report=True)
        why = _above(report, arguments.at_most)
        if why is None and of_folder:
            _write_folder(arguments, model, tokenizer)
        elif why is None:
            save(model, arguments.out)
    if arguments.json:
        print_json(_document(report))
    else:
        count = 4 if inputs is None else len(report.columns)
        print_table(report.columns[:count], [cells[:count] for cells in report.cells], text=(0, 1))
    if why is not None:
        remedy = "nothing was written: merge --to bfloat16, or keep the adapter apart"
        print(one_line(f"lowmem merge: {why}, above {arguments.at_most:g}; {remedy}"), file=sys.stderr)
        return 1
    print_saved(arguments.out)
    return 0


def _check_model(arguments: argparse.Namespace, of_folder: bool) -> None:
    """Raise unless --model is given for a file of lowmem, and for nothing else."""
    if of_folder and arguments.model is not None:
        raise ValueError(
            f"--model={arguments.model!r} is for a model file: BASE says what its model is, leave it out"
        )
    if not of_folder and arguments.model is None:
        raise ValueError(
            f"BASE={str(arguments.base)!r} is a model file: name what makes its model, --model module:factory"
        )
    if not of_folder and ":" not in arguments.model:
        raise ValueError(f"--model={arguments.model!r} must be module:factory, as my_models:make")


def _open_folder(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model of a folder or GGUF file, and the tokenizer of a GGUF file."""
    from lowmem.integrations.transformers.config_facts import held_back
    from lowmem.integrations.transformers.folder import load_model
    from lowmem.integrations.transformers.tokenizing import read_tokenizer

    check_free(arguments.out)
    with held_back(), warnings_as_notes():
        tokenizer = None if arguments.base.is_dir() else read_tokenizer(arguments.base)
        return load_model(arguments.base), tokenizer


def _write_folder(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    """Write a merged model's folder, with the other files of a base that is a folder."""
    from lowmem.integrations.transformers.folder import write_model

    if arguments.to is not None:
        model = restore(model, dtype=DTYPES[arguments.to])
    write_model(model, arguments.base if tokenizer is None else None, arguments.out, None, tokenizer)


def _above(report: MergeReport, at_most: float | None) -> str | None:
    """Return a text on the layer, or model, whose error is above ``at_most``; None: no error is."""
    if at_most is None:
        return None
    worst, of_model = report.worst, report.output_after
    if not worst.largest <= at_most:
        return f"{layer_name(worst.path)} has a relative error of {worst.largest:.4g}"
    if of_model is not None and not of_model <= at_most:
        return f"the whole model's outputs have a relative error of {of_model:.4g}"
    return None


def _document(report: MergeReport) -> dict[str, Any]:
    keys = ("path", "adapters", "before", "after", "output_before", "output_after")
    return {
        "layers": [{key: getattr(row, key) for key in keys} for row in report],
        "output_before": report.output_before,
        "output_after": report.output_after,
    }
