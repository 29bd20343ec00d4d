"""``lowmem serve``: starts the server of transformers, which can then load what lowmem has stored, with limits."""

from __future__ import annotations

import argparse
from inspect import Parameter, Signature, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from lowmem.io.formats.peft.peft_reader import adapter_folders_without_model, check_not_adapters_only
from lowmem.io.hub_names import hub_name_and_commit_or_none
from lowmem.io.remote_code import empty_stdin
from lowmem.io.training_record import RECORD_FILE, kept_base_or_none
from lowmem.tools.chat_arguments import read_recorded_chat_settings, template_with_settings
from lowmem.tools.hub_arguments import add_revision_argument, fetch_model, parse_model_path
from lowmem.tools.serve_limits import LimitsMiddleware


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folder",
        type=parse_model_path,
        metavar="FOLDER",
        help="a folder of a model, dense or stored, its name on the Hub, or an adapter's folder with its base "
        "(lowmem fit --keep-base)",
    )
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="--revision of a name on the Hub, options of `transformers serve`, as --port 8000, and limits: "
        "see `lowmem serve FOLDER --help`",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command, until the server is stopped."""
    of_name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_revision_argument(of_name, "FOLDER")
    named, options = of_name.parse_known_args(arguments.options)
    kinds = "a folder or owner/name of the Hub"
    folder = fetch_model(arguments.folder, named.revision, argument="FOLDER", kinds=kinds)
    cached = hub_name_and_commit_or_none(folder.resolve())
    name = folder.resolve().name if cached is None else cached[0]
    from transformers.utils.import_utils import is_serve_available

    from lowmem.integrations.transformers.adapted_folder import write_base_with_adapter
    from lowmem.integrations.transformers.pretrained_folder import (
        architecture_class,
        checked_config_and_tensor_bytes,
        empty_model_on_meta,
    )
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    kept_base = kept_base_or_none(folder) if list(adapter_folders_without_model(folder)) == ["default"] else None
    if kept_base is None:
        check_not_adapters_only(folder, "serve")
    model_folder = kept_base or folder
    config, _ = checked_config_and_tensor_bytes(model_folder, "serve")
    empty_model_on_meta(model_folder, architecture_class(model_folder, config))
    if not is_serve_available():
        raise ImportError("lowmem serve needs the server of transformers: pip install 'transformers[serving]'")
    if kept_base is None:
        return _serve_folder(folder.resolve(), name, options)
    with TemporaryDirectory(prefix="lowmem-") as scratch:
        served = Path(scratch, "model").resolve()
        write_base_with_adapter(kept_base, folder, served)
        template = read_tokenizer(served).chat_template
        if isinstance(template, str):
            settings = read_recorded_chat_settings(folder, RECORD_FILE)
            (served / "chat_template.jinja").write_text(template_with_settings(template, settings), encoding="utf8")
        return _serve_folder(served, name, options)


def _serve_folder(folder: Path, name: str, options: list[str]) -> int:
    """Serve a folder under a name with options of the server, until it is stopped; return the exit code."""
    import typer

    command = typer.Typer(add_completion=False)
    command.command()(_limited_server_class(folder, name))
    try:
        # The server makes models in models, too
        with empty_stdin():
            command(args=[str(folder), *options, "--non-blocking"], prog_name="lowmem serve")
    except SystemExit as stop:
        # Ctrl-C, or an option that the server refuses
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _limited_server_class(folder: Path, name: str) -> type:
    """Return the class of transformers' server with limits and their options; the model's name is ``name``."""
    import typer
    from transformers.cli.serve import Serve

    from lowmem.integrations.transformers.pretrained_folder import quiet_load_with_file_errors
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    class ServerWithLimits(Serve):  # type: ignore[misc]
        __doc__ = Serve.__doc__

        def __init__(self, *, max_tokens: int, max_body: int, host: str, enable_cors: bool, **options: Any) -> None:
            self.limits = name, host, max_tokens, max_body * 2**20, enable_cors
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
