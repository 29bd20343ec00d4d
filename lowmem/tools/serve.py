"""``lowmem serve``: starts the server of transformers, which can then load what lowmem has stored, with limits."""

from __future__ import annotations

import argparse
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

from lowmem.io.formats.peft.peft_reader import check_not_adapters_only
from lowmem.io.remote_code import empty_stdin
from lowmem.tools.arguments import parse_nonempty_path
from lowmem.tools.serve_limits import LimitsMiddleware


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folder", type=parse_nonempty_path, metavar="FOLDER", help="a folder of a model, dense or stored"
    )
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

    from lowmem.integrations.transformers.pretrained_folder import (
        architecture_class,
        checked_config_and_tensor_bytes,
        empty_model_on_meta,
    )

    check_not_adapters_only(folder, "serve")
    config, _ = checked_config_and_tensor_bytes(folder, "serve")
    empty_model_on_meta(folder, architecture_class(folder, config))
    if not is_serve_available():
        raise ImportError("lowmem serve needs the server of transformers: pip install 'transformers[serving]'")
    import typer

    command = typer.Typer(add_completion=False)
    command.command()(_limited_server_class(folder.resolve()))
    try:
        # The server makes models in models, too
        with empty_stdin():
            command(args=[str(folder.resolve()), *arguments.options, "--non-blocking"], prog_name="lowmem serve")
    except SystemExit as stop:
        # Ctrl-C, or an option that the server refuses
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _limited_server_class(folder: Path) -> type:
    """Return the class of transformers' server with limits and their options."""
    import typer
    from transformers.cli.serve import Serve

    from lowmem.integrations.transformers.pretrained_folder import quiet_load_with_file_errors
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    class ServerWithLimits(Serve):  # type: ignore[misc]
        __doc__ = Serve.__doc__

        def __init__(self, *, max_tokens: int, max_body: int, host: str, enable_cors: bool, **options: Any) -> None:
            self.limits = folder.name, host, max_tokens, max_body * 2**20, enable_cors
            # The server's own errors do not say what is wrong with it
            read_tokenizer(folder)
            with quiet_load_with_file_errors(folder):
                super().__init__(host=host, enable_cors=enable_cors, **options)

        def start_server(self) -> None:
            """Serve in this thread, behind the limits."""
            config = self.server.config
            config.app = LimitsMiddleware(config.app, str(folder), *self.limits)
            self.server.run()

    def int_option_parameter(name: str, default: int, help_text: str) -> Parameter:
        kind = Annotated[int, typer.Option(help=help_text, min=1)]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    limit_options = (
        int_option_parameter("max_tokens", 4096, "The most new tokens of a request."),
        int_option_parameter("max_body", 8, "The most MiB of a request's body."),
    )
    server_options = dict(signature(Serve).parameters)
    # No command runs code of a folder
    del server_options["trust_remote_code"]
    ServerWithLimits.__signature__ = Signature([*server_options.values(), *limit_options])
    return ServerWithLimits
