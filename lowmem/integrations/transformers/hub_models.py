"""Models of the Hugging Face Hub: the files that lowmem reads, fetched into the cache of huggingface_hub, which knows
mirrors, tokens and whether the network may be used."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Collection
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import tqdm

from lowmem.errors import file_error, printable_line, quoted_path, short_repr
from lowmem.io.formats.peft.peft_reader import CONFIG as ADAPTER_CONFIG
from lowmem.io.formats.peft.peft_reader import WEIGHTS as ADAPTER_WEIGHTS
from lowmem.io.hub_names import HUB_SECONDS, hub_failure_text
from lowmem.io.model_folder import CONFIG, WEIGHT_FILE_ENDINGS, WEIGHTS, is_config_or_tokenizer_file
from lowmem.io.shards import INDEX, read_weight_map

_WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}{INDEX}", ADAPTER_WEIGHTS)
"""The first of these that a repository has is fetched."""

_PROGRESS: ContextVar[Callable[[int, int], None]] = ContextVar("progress")
"""What is called with the bytes of a download."""


def download_model(
    name: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Return the folder in the cache of a model, or an adapter, of the Hub; what it lacks is fetched.

    These are the configs, the tokenizer's files and the weights in safetensors; nothing in inner folders, no pickles
    and no code. A commit that is in the cache takes no network. If the Hub does not answer, or refuses, a model in
    the cache is taken as it is.

    Args:
        name: ``owner/name``.
        revision: a branch, a tag or a commit; None: the main branch.
        weights: whether weights are needed, too.
        progress: called with the bytes that were fetched, and of all that are known to be needed.

    Raises:
        ValueError: the Hub has no such model or revision, refuses it, or cannot be reached, and it is not in the
            cache, which the message names, with the command that fetches it; or it has no weights in safetensors.

    Warns:
        UserWarning: the Hub does not answer, and the model in the cache is taken.
    """
    asked = revision or constants.DEFAULT_REVISION
    cached, missing = _cached_folder_and_missing_file(name, asked, weights)
    if cached is not None and missing is None and cached.name == asked:
        return cached
    try:
        info = HfApi().model_info(name, revision=asked, timeout=HUB_SECONDS)
    except MemoryError:
        raise
    # The HTTP library of huggingface_hub, and its errors, depend on its version
    except Exception as reason:
        why = hub_failure_text(name, asked, reason)
        if cached is None or missing is not None or isinstance(reason, RevisionNotFoundError | HFValidationError):
            raise _download_error(name, revision, missing, why) from reason
        if not isinstance(reason, OfflineModeIsEnabled):
            text = f"{why}: commit {cached.name[:12]} of {name} in the cache is taken"
            warnings.warn(text, UserWarning, stacklevel=2)
        return cached
    names = [sibling.rfilename for sibling in info.siblings or ()]
    weight_file = next((file for file in _WEIGHT_FILES if file in names), None)
    if weights and weight_file is None:
        raise ValueError(_no_weights_text(name, names))
    if CONFIG not in names and ADAPTER_CONFIG not in names:
        raise ValueError(f"model={name!r} has no {CONFIG}: name a model of transformers; nothing was fetched")
    try:
        files = [file for file in names if "/" not in file and is_config_or_tokenizer_file(file)]
        if weights and weight_file is not None:
            files += _weight_files(name, info.sha, weight_file)
        patterns = [glob.escape(file) for file in files]
        token = _PROGRESS.set(progress)
        try:
            return Path(snapshot_download(name, revision=asked, allow_patterns=patterns, tqdm_class=_ReportingBar))
        finally:
            _PROGRESS.reset(token)
    except (ValueError, MemoryError):
        raise
    except Exception as reason:
        missing = _cached_folder_and_missing_file(name, asked, weights)[1]
        raise _download_error(name, revision, missing, hub_failure_text(name, asked, reason)) from reason


def _weight_files(name: str, commit: str | None, weight_file: str) -> list[str]:
    if not weight_file.endswith(INDEX):
        return [weight_file]
    index = Path(hf_hub_download(name, weight_file, revision=commit))
    shards = sorted(set(read_weight_map(index).values()))
    other = next((shard for shard in shards if not shard.endswith(".safetensors")), None)
    if other is not None:
        raise file_error(index, f"it names {short_repr(other)}, which is no file of safetensors, and was not fetched")
    return [weight_file, *shards]


def _no_weights_text(name: str, files: Collection[str]) -> str:
    other = next((file for file in sorted(files) if file.endswith(WEIGHT_FILE_ENDINGS)), None)
    has = "none at all" if other is None else printable_line(other, 60)
    remedy = "name a model in safetensors; nothing was fetched"
    if other is not None and other.endswith(".gguf"):
        remedy = f"`hf download {name} {has} --local-dir .` fetches a file of GGUF, whose path is a MODEL, too"
    return f"model={name!r} has no weights in safetensors, but {has}: {remedy}"


def _cached_folder_and_missing_file(name: str, revision: str, weights: bool) -> tuple[Path | None, str | None]:
    """Return the folder of a revision in the cache, and the first file that is needed and not in it."""
    for config in (CONFIG, ADAPTER_CONFIG):
        found = try_to_load_from_cache(name, config, revision=revision)
        if isinstance(found, str):
            return Path(found).parent, _missing_file_or_none(Path(found).parent) if weights else None
    return None, CONFIG


def _missing_file_or_none(folder: Path) -> str | None:
    if (folder / WEIGHTS).exists() or (folder / ADAPTER_WEIGHTS).exists():
        return None
    index = folder / f"{WEIGHTS}{INDEX}"
    if not index.exists():
        return WEIGHTS
    files = sorted(set(read_weight_map(index).values()))
    return next((file for file in files if not (folder / file).exists()), None)


def _download_error(name: str, revision: str | None, missing: str | None, why: str) -> ValueError:
    option = "" if revision is None else f" --revision {printable_line(revision, 60)}"
    lacks = "lacks it" if missing in (None, CONFIG) else f"lacks its {missing}"
    return ValueError(
        f"model={name!r} is no file or folder here, the cache {quoted_path(constants.HF_HUB_CACHE)} {lacks}, "
        f"and {why}; `hf download {name}{option}` fetches it"
    )


class _ReportingBar(tqdm):  # type: ignore[misc]
    """A bar of huggingface_hub that draws nothing, and reports the bytes of all files to ``_PROGRESS``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Another bar counts what is received, which compression makes less
        is_of_files = options.get("unit") == "B" and "transfer" not in str(options.get("name"))
        # Here: threads that fetch a file have other contexts
        self._report = _PROGRESS.get() if is_of_files else None
        super().__init__(*arguments, **options | {"disable": True})

    def update(self, n: float | None = 1) -> None:
        """Count more bytes."""
        if self._report is not None:
            self.n += n or 0
            self._report(int(self.n), int(self.total or 0))
