"""Arguments that name a model: a path, or a name of the Hugging Face Hub, which is fetched with a bar."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from lowmem.errors import quoted_path
from lowmem.io.filesystem import read_errors_with_path
from lowmem.io.hub_names import MODEL_KINDS, HubName, is_hub_name
from lowmem.tools.arguments import parse_nonempty_path
from lowmem.tools.output import progress_display, warnings_printed_as_notes


def add_revision_argument(parser: argparse._ActionsContainer, argument_name: str = "MODEL") -> None:
    """Add ``--revision``, of the argument that may be a name of the Hub."""
    parser.add_argument(
        "--revision",
        metavar="REV",
        help=f"branch, tag or commit of {argument_name}, if it is a name on the Hub, owner/name (default main)",
    )


def parse_model_path(text: str) -> Path | HubName:
    """Parse the path of a model, or its name on the Hub; what is here as a file or folder wins."""
    return HubName(text) if is_hub_name(text) else parse_nonempty_path(text)


def fetch_model(
    model: str | Path,
    revision: str | None = None,
    *,
    weights: bool = True,
    argument: str = "MODEL",
    kinds: str = f"{MODEL_KINDS}, or a safetensors file",
) -> Path:
    """Return a path as it is, and for a name of the Hub the folder in its cache, which is fetched with a bar.

    Args:
        model: a path, or a ``HubName``.
        revision: of a name of the Hub.
        weights: whether to fetch them, too.
        argument: the argument or option that names the model, for errors.
        kinds: what it may name, for errors.

    Raises:
        ValueError: as ``download_model``, ``revision`` of a path, or a path of nothing.
        OSError: the system cannot tell whether the path exists.
    """
    if not isinstance(model, HubName):
        if revision is not None:
            raise ValueError(
                f"--revision={revision!r} applies to a name on the Hub, owner/name, and {str(model)!r} is a path: "
                "leave it out"
            )
        path = Path(model)
        with read_errors_with_path(path):
            is_here = path.exists()
        if not is_here:
            raise ValueError(f"{argument}={quoted_path(path)} is no file or folder here: name {kinds}")
        return path
    from lowmem.integrations.transformers.hub_models import download_model

    columns = DownloadColumn, TimeRemainingColumn
    with (
        warnings_printed_as_notes(),
        progress_display(model, *columns, wide_terminal_columns=[TransferSpeedColumn]) as update,
    ):
        return download_model(
            model,
            revision,
            weights=weights,
            progress=lambda done, total: update(completed=done, total=total),
        )


def fetch_named_model(model_name: str, revision: str | None = None, *, weights: bool = True) -> str:
    """Return the name of a model of any kind, with the folder in the cache in place of a name of the Hub."""
    if not is_hub_name(model_name):
        return model_name
    return str(fetch_model(HubName(model_name), revision, weights=weights))


def check_revision_applicable(revision: str | None, model_names: Iterable[str]) -> None:
    """Raise a ValueError if there is a revision, and none of the models is a name of the Hub."""
    if revision is not None and not any(map(is_hub_name, model_names)):
        raise ValueError(
            f"--revision={revision!r} applies to a name on the Hub, owner/name, and no MODEL is one: leave it out"
        )


def fetch_base(name: str, revision: str | None) -> Path:
    """Return the folder in the cache of the base that an adapter names on the Hub, which is fetched with a bar."""
    return fetch_model(HubName(name), revision)
