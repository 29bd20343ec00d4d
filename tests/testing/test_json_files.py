"""JSON files are read whole, or refused in one line."""

import pytest

from lowmem import FileError
from lowmem.testing import json_files


def read(path, content):
    path.write_bytes(content)
    return json_files.read_json(path)


def test_a_document_is_read(tmp_path):
    assert read(tmp_path / "a.json", b'{"rows": [1, null]}') == {"rows": [1, None]}


DAMAGED = {"empty": b"", "cut": b'{"a": 1', "not text": b"\xff\xfe", "nested too deeply": b"[" * 100_000}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_refused_with_the_remedy(tmp_path, content):
    with pytest.raises(FileError, match=r"a\.json.*write it again with the gate or the benchmarks") as found:
        read(tmp_path / "a.json", content)
    assert "\n" not in str(found.value)


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MOST_BYTES", 2**20)
    with pytest.raises(FileError, match="it takes more than 1048576 bytes, which no run and no verdict does"):
        read(tmp_path / "a.json", b"[" + b" " * 2**20 + b"]")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        json_files.read_json(tmp_path / "none.json")
