"""``lowmem serve``: starts the server of transformers, which can then load what lowmem has stored."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points
from pathlib import Path

from lowmem.io.folder_code import unasked
from lowmem.io.formats.peft.reading import refuse_adapters
from lowmem.tools.arguments import file_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=file_path, metavar="FOLDER", help="a folder of a model, dense or stored")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="options of `transformers serve`, as --port 8000: see `transformers serve --help`",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command, until the server is stopped."""
    folder: Path = arguments.folder
    from transformers.utils.import_utils import is_serve_available

    from lowmem.integrations.transformers.folder import check, class_of, empty_model

    refuse_adapters(folder, "serve")
    config, _ = check(folder, "serve")
    empty_model(folder, class_of(folder, config))
    if not is_serve_available():
        raise ImportError("lowmem serve needs the server of transformers: pip install 'transformers[serving]'")
    (script,) = entry_points(group="console_scripts", name="transformers")
    given, sys.argv = sys.argv, ["transformers", "serve", str(folder.resolve()), *arguments.options]
    try:
        with unasked():  # the server makes models in models, too
            script.load()()
    except SystemExit as stop:  # Ctrl-C, or an option that the server refuses
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = given
    return 0
