"""``lowmem merge``: merges an adapter file into the model file that it was trained on, and says what that loses."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from lowmem.errors import one_line
from lowmem.io.adapters import load_adapter
from lowmem.io.checkpoint import load, save
from lowmem.tools.models import check_links, file_path, model_factory, number
from lowmem.tools.output import print_json, print_table, shown
from lowmem.transforms.merge import merge
from lowmem.transforms.registry import layer_name

__all__ = ["add_arguments", "run"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("base", type=file_path, metavar="BASE", help="the model file, which lowmem.save wrote")
    parser.add_argument("adapter", type=file_path, metavar="ADAPTER", help="the file that save_adapter wrote")
    parser.add_argument("out", type=file_path, metavar="OUT", help="the model file to write")
    parser.add_argument("--model", required=True, metavar="MODULE:FACTORY", help="what makes the dense model of BASE")
    parser.add_argument(
        "--to",
        choices=list(DTYPES),
        help="make adapted layers dense in this dtype, which the factory that loads OUT has to give them "
        "(default: as BASE stores them)",
    )
    parser.add_argument(
        "--at-most",
        type=number,
        metavar="E",
        help="write nothing and exit with 1 when a weight's relative error after the merge is above E",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if ":" not in arguments.model:
        raise ValueError(f"--model={arguments.model!r} must be module:factory, as my_models:make")
    for path in (arguments.base, arguments.adapter, arguments.out):
        check_links(path)
    model = load_adapter(load(arguments.base, model_factory(arguments.model)), arguments.adapter)
    to: Any = "same format" if arguments.to is None else DTYPES[arguments.to]
    model, report = merge(model, to, report=True)
    worst = report.worst
    failed = arguments.at_most is not None and worst.after > arguments.at_most
    if not failed:
        save(model, arguments.out)
    if arguments.json:
        keys = ("path", "adapters", "before", "after")
        print_json([{key: getattr(row, key) for key in keys} for row in report])
    else:
        print_table(report.columns[:4], [cells[:4] for cells in report.cells], text=(0, 1))
    if failed:
        why = f"{layer_name(worst.path)} has a relative error of {worst.after:.4g}, above {arguments.at_most:g}"
        remedy = "nothing was written: merge --to bfloat16, or keep the adapter apart"
        print(one_line(f"lowmem merge: {why}; {remedy}"), file=sys.stderr)
        return 1
    print(f"saved {shown(str(arguments.out))}", file=sys.stderr)
    return 0
