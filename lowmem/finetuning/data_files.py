"""Reads files of examples, folders of them and data sets of the Hub into rows, each with its place for messages."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

from lowmem.errors import error_type_and_first_line, file_error, quoted_path, short_repr
from lowmem.io.filesystem import open_regular_file, read_errors_with_path, read_text_and_sha256
from lowmem.io.hub_names import HUB_SECONDS, hub_failure_text, is_hub_name
from lowmem.version import install_command

_Reader: TypeAlias = "Callable[[Path], tuple[list[Row], str]]"


@dataclass(frozen=True)
class Row:
    """What a file holds at a place.

    Args:
        place: as ``line 3``.
        content: a text, of a ``.txt`` file; a JSON object; or any other value, which is a mistake.
        mistake: why there is no content.
    """

    place: str
    content: Any = None
    mistake: str | None = None


@dataclass(frozen=True)
class DataFile:
    """The rows of a file or data set.

    Args:
        name: for messages: its path, or its name on the Hub.
        digest: SHA-256 of the file, or of the rows of a data set.
    """

    name: str
    rows: list[Row]
    digest: str


def is_hub_data_set_name(name: str) -> bool:
    """Whether a name is a data set's on the Hub, ``owner/name``, ``owner/name:split`` or ``owner/name:split:config``,
    and no path that exists, and no name of a file."""
    repository, *parts = name.split(":")
    return (
        is_hub_name(repository)
        and len(parts) <= 2
        and all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in parts)
        and not Path(name).exists()
    )


def read_data_files(path: str | Path) -> list[DataFile]:
    """Read a file, the files of a folder in the order of their names, or a data set of the Hub.

    Raises:
        FileError: a file has another suffix, is empty, is damaged, or is not UTF-8; or a folder has no file to read.
        OSError: a file cannot be read.
        ImportError: a package is missing that reads it.
    """
    if is_hub_data_set_name(str(path)):
        return [_read_hub_data_set(str(path))]
    path = Path(path)
    if not path.is_dir():
        return [_read_data_file(path)]
    with read_errors_with_path(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS and file.name[0] != ".")
    if not files:
        raise file_error(path, f"it has no file whose name ends in {_SUFFIXES}")
    return [_read_data_file(file) for file in files]


def check_data_path(path: str | Path) -> None:
    """Raise an error for a path that ``read_data_files`` cannot read whatever the file holds.

    Raises:
        FileError: the name of a file has another suffix.
        OSError: nothing is there.
    """
    if not is_hub_data_set_name(str(path)):
        with read_errors_with_path(Path(path)):
            if not Path(path).is_dir():
                _reader_by_suffix(Path(path))
                Path(path).stat()


def combined_digest(files: Iterable[DataFile]) -> str:
    """Return the digest of a file, or of several together."""
    digests = [file.digest for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _reader_by_suffix(path: Path) -> _Reader:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        why = "" if path.exists() else "there is no such file here, and files of its kind are not read: "
        raise file_error(path, f"{why}its name must end in {_SUFFIXES}")
    return reader


def _read_data_file(path: Path) -> DataFile:
    rows, digest = _reader_by_suffix(path)(path)
    if not rows:
        raise file_error(path, "it is empty; name a file with text")
    return DataFile(str(path), rows, digest)


def _rows_of_text(rows_of: Callable[[Path, str], Iterator[Row]]) -> _Reader:
    """Return the reader of files in UTF-8 whose text ``rows_of`` divides into rows."""

    def read(path: Path) -> tuple[list[Row], str]:
        text, digest = read_text_and_sha256(path)
        return [*rows_of(path, text)] if text.strip() else [], digest

    return read


def _text_rows(path: Path, text: str) -> Iterator[Row]:
    yield Row("its text", text)


def _json_line_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                mistake = f"{short_repr(line)} is no JSON object; a .jsonl file has one in each line, a .json a list"
                yield Row(f"line {number}", mistake=mistake)
            else:
                yield _json_row(f"line {number}", item)


def _json_row(place: str, item: Any) -> Row:
    """Return a row of a JSON file; a text without a key is a mistake, since only files of ``.txt`` are one text."""
    if isinstance(item, str):
        return Row(place, mistake=f'{short_repr(item)} is a text without a key: write it as {{"text": ...}}')
    return Row(place, item)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as reason:
        remedy = "; a file with an object in each line is named .jsonl"
        raise file_error(path, f"it is no JSON: {error_type_and_first_line(reason)}{remedy}") from None
    items = document.get("data") if isinstance(document, dict) else document
    if not isinstance(items, list):
        raise file_error(path, 'it must be a list of objects, or {"data": [...]}')
    for number, item in enumerate(items, 1):
        yield _json_row(f"row {number}", item)


def _table_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the rows of a table: as Python's csv writes it, or with tabs."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Cells may hold whole conversations: the default limit is 128 KiB, for all readers of the process
    start = 1
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        lines = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = next(cells for cells in lines if cells)
        if len(columns) == 1 and re.search("[;\t,]", columns[0]):
            between = "commas" if delimiter == "," else "tabs"
            why = f"its first line is one column, {short_repr(columns[0])}: save it with {between} between columns"
            raise file_error(path, why)
        if len({*columns}) < len(columns):
            raise file_error(path, f"its first line names a column twice: {short_repr(columns)}")
        start = lines.line_num + 1
        for cells in lines:
            place, start = f"line {start}", lines.line_num + 1
            if cells and len(cells) != len(columns):
                yield Row(place, mistake=f"it has {len(cells)} cells, and the first line has {len(columns)}")
            elif cells:
                yield Row(place, dict(zip(columns, cells, strict=True)))
    except csv.Error as reason:
        raise file_error(path, f"line {start}: {reason}; write cells with quotes as Python's csv") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> tuple[list[Row], str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as reason:
        raise ImportError(f"{quoted_path(path)} needs pyarrow: {install_command('data')}") from reason
    with open_regular_file(path) as file, read_errors_with_path(path):
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            items = read_table(file).to_pylist()
        except (ArrowException, OSError) as reason:
            raise file_error(path, f"it is no whole parquet file: {error_type_and_first_line(reason)}") from reason
    return _arrow_rows(items), digest


def _read_hub_data_set(name: str) -> DataFile:
    """Return the rows of a data set of the Hub, which ``datasets`` downloads; if the Hub gives none, of its cache."""
    try:
        from datasets import DownloadConfig, load_dataset
        from datasets import config as settings
        from datasets.exceptions import DatasetGenerationError, DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as reason:
        needed = "a data set of the Hub needs the package datasets"
        raise ImportError(f"{name!r}: {needed}: {install_command('data')}") from reason
    repository, _, rest = name.partition(":")
    split, _, config = rest.partition(":")
    refusal, is_offline = _hub_refusal_or_none(repository), settings.HF_HUB_OFFLINE
    try:
        # Otherwise the Hub is asked for half a minute before the cache is
        settings.HF_HUB_OFFLINE = is_offline or refusal is not None
        items = load_dataset(
            repository, config or None, split=split or "train", download_config=DownloadConfig(max_retries=1)
        ).to_list()
    # Of huggingface_hub's error, one base is that of the HTTP library, which depends on the version
    except (DatasetsError, *HfHubHTTPError.__bases__, ValueError, RuntimeError) as reason:
        # Of any error while rows are read, datasets makes one that does not say what is wrong
        cause = (isinstance(reason, DatasetGenerationError) and reason.__cause__) or reason
        if isinstance(cause, MemoryError):
            raise cause from None
        why = f"and the Hub's data set cannot be loaded: {error_type_and_first_line(cause)}"
        if refusal is not None and isinstance(cause, ConnectionError):
            names = f"{repository!r}, {config!r}" if config else repr(repository)
            why = (
                f"the cache {quoted_path(settings.HF_DATASETS_CACHE)} lacks it, and {refusal}; "
                f'`python -c "from datasets import load_dataset; load_dataset({names})"` fetches it'
            )
        raise file_error(name, f"there is no such file or folder here, {why}") from reason
    finally:
        settings.HF_HUB_OFFLINE = is_offline
    rows = _arrow_rows(items)
    if not rows:
        raise file_error(name, "it is empty; name a data set with text")
    digest = hashlib.sha256(json.dumps(items, sort_keys=True, default=str).encode()).hexdigest()
    return DataFile(name, rows, digest)


def _hub_refusal_or_none(repository: str) -> str | None:
    """Ask the Hub once for a data set; return why it gives none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except (*HfHubHTTPError.__bases__, ValueError) as reason:
        return hub_failure_text(repository, "main", reason, "data set")
    return None


def _arrow_rows(items: list[dict[str, Any]]) -> list[Row]:
    return [
        Row(f"row {number}", {key: _without_filled_nulls(value) for key, value in item.items()})
        for number, item in enumerate(items, 1)
    ]


def _without_filled_nulls(value: Any) -> Any:
    """Return a value of Arrow without the nulls that it puts for keys that other rows have."""
    if isinstance(value, list):
        return [_without_filled_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_filled_nulls(item) for key, item in value.items() if item is not None}
    return value


READERS: dict[str, _Reader] = {
    ".txt": _rows_of_text(_text_rows),
    ".jsonl": _rows_of_text(_json_line_rows),
    ".json": _rows_of_text(_json_rows),
    ".csv": _rows_of_text(_table_rows),
    ".tsv": _rows_of_text(_table_rows),
    ".parquet": _read_parquet,
}
"""The reader of each kind of file, by its suffix: its rows, and the SHA-256 of the file."""

_SUFFIXES = ", ".join(READERS)
