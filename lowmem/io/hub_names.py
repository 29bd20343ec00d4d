"""Names of models on the Hugging Face Hub, ``owner/name``, and the folders of its cache that hold them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lowmem.io.model_folder import WEIGHT_FILE_ENDINGS

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(str):
    """The name of a model on the Hub, which is not here as a file or folder."""


def is_hub_name(text: str) -> bool:
    """Whether a text is exactly ``owner/name``, names nothing here, and does not end as files of weights do."""
    return (
        _NAME.fullmatch(text) is not None
        and not text.endswith(WEIGHT_FILE_ENDINGS)
        # A dangling link is a path, too
        and not os.path.lexists(text)
    )


def hub_name_and_commit_or_none(path: str | Path) -> tuple[str, str] | None:
    """Return which model of the Hub, and which commit of it, a folder of the cache holds; None for other folders."""
    *_, repository, snapshots, commit = ("", "", "", *Path(path).parts)
    match = _CACHED.fullmatch(repository)
    if match is None or snapshots != "snapshots" or not _COMMIT.fullmatch(commit):
        return None
    return f"{match[1]}/{match[2]}", commit


def displayed_model_name(name: str | Path) -> str:
    """Return a model's name for people: of a folder of the cache, its name on the Hub."""
    cached = hub_name_and_commit_or_none(name)
    return str(name) if cached is None else cached[0]
