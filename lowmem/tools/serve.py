"""``lowmem serve``: starts the server of transformers, which can then load what lowmem has stored, with limits."""

from __future__ import annotations

import argparse
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

from lowmem.io.folder_code import unasked
from lowmem.io.formats.peft.reading import refuse_adapters
from lowmem.tools.arguments import file_path
from lowmem.tools.serve_limits import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=file_path, metavar="FOLDER", help="a folder of a model, dense or stored")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="options of `transformers serve`, as --port 8000, and limits: see `lowmem serve FOLDER --help`",
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
    import typer

    command = typer.Typer(add_completion=False)
    command.command()(_server(folder.resolve()))
    try:
        with unasked():  # the server makes models in models, too
            command(args=[str(folder.resolve()), *arguments.options, "--non-blocking"], prog_name="lowmem serve")
    except SystemExit as stop:  # Ctrl-C, or an option that the server refuses
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _server(folder: Path) -> type:
    """Return the class of transformers' server with limits and their options."""
    import typer
    from transformers.cli.serve import Serve

    from lowmem.integrations.transformers.folder import load_errors
    from lowmem.integrations.transformers.tokenizing import read_tokenizer

    class Limited(Serve):  # type: ignore[misc]
        __doc__ = Serve.__doc__

        def __init__(self, *, max_tokens: int, max_body: int, host: str, enable_cors: bool, **options: Any) -> None:
            self.limits = folder.name, host, max_tokens, max_body * 2**20, enable_cors
            read_tokenizer(folder)  # the server's own errors do not say what is wrong with it
            with load_errors(folder):
                super().__init__(host=host, enable_cors=enable_cors, **options)

        def start_server(self) -> None:
            """Serve in this thread, behind the limits."""
            config = self.server.config
            config.app = Limits(config.app, str(folder), *self.limits)
            self.server.run()

    def option(name: str, default: int, text: str) -> Parameter:
        kind = Annotated[int, typer.Option(help=text, min=1)]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    own = (
        option("max_tokens", 4096, "The most new tokens of a request."),
        option("max_body", 8, "The most MiB of a request's body."),
    )
    taken = dict(signature(Serve).parameters)
    del taken["trust_remote_code"]  # no command runs code of a folder
    Limited.__signature__ = Signature([*taken.values(), *own])
    return Limited
