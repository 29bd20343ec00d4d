"""Names on the Hugging Face Hub, ``owner/name``, the folders of its cache that hold models, and why it gives none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lowmem.errors import error_type_and_first_line, printable_line
from lowmem.io.model_folder import WEIGHT_FILE_ENDINGS

MODEL_KINDS = "a folder, a GGUF file, owner/name of the Hub"
"""What names a language model, for errors."""

HUB_SECONDS = 10
"""To wait for the Hub's first answer."""

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


_FILE_SUFFIXES = {
    *(".txt", ".md", ".rst", ".rtf", ".log", ".doc", ".docx", ".odt", ".pdf", ".tex", ".htm", ".html", ".xml"),
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".feather"),
    *(".yaml", ".yml", ".toml", ".sql", ".db", ".sqlite", ".py", ".ipynb", ".npy", ".npz", ".pkl", ".pickle"),
    *(".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".png", ".jpg", ".jpeg"),
}
"""Ends of names of files, which no name of the Hub has, whatever folders are here."""

_FILE_SUFFIX = re.compile(r"\.[a-z]\w{0,7}", re.IGNORECASE | re.ASCII)
"""What may be the suffix of a file in a folder that is here; numbers of versions are none."""


class HubName(str):
    """The name of a model on the Hub, which is not here as a file or folder."""


def is_hub_name(text: str) -> bool:
    """Whether a text is exactly ``owner/name``, names nothing here, and does not end as files do."""
    suffix = os.path.splitext(text)[1]
    return (
        _NAME.fullmatch(text) is not None
        and not text.endswith(WEIGHT_FILE_ENDINGS)
        and suffix.lower() not in _FILE_SUFFIXES
        and not (_FILE_SUFFIX.fullmatch(suffix) and os.path.isdir(os.path.dirname(text)))
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


def hub_failure_text(name: str, revision: str, reason: Exception, kind: str = "model") -> str:
    """Return why the Hub has not given a model, or a ``"data set"``; ``reason`` is of huggingface_hub."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(reason, errors.OfflineModeIsEnabled):
        return "the network is off (HF_HUB_OFFLINE)"
    if isinstance(reason, errors.RevisionNotFoundError):
        return f"{hub} has no revision {printable_line(revision, 60)!r} of it"
    if isinstance(reason, errors.GatedRepoError):
        page = f"{hub}/{name}" if kind == "model" else f"{hub}/datasets/{name}"
        return f"it is gated: accept its terms at {page}, and log in by `hf auth login`"
    if isinstance(reason, errors.RepositoryNotFoundError):
        return f"{hub} has no such {kind}, or it is private: check the name, or log in by `hf auth login`"
    if isinstance(reason, errors.HFValidationError):
        return "it is no name of the Hub, which are owner/name"
    if isinstance(reason, errors.HfHubHTTPError):
        return f"{hub} answers with status {reason.response.status_code}"
    return f"{hub} cannot be reached ({error_type_and_first_line(reason)})"
