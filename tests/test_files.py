"""A file is written whole or not at all."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowmem.files import (
    atomic_file,
    check_free,
    check_writable,
    open_regular,
    printable,
    write_atomically,
    write_errors,
)


def test_it_writes_and_overwrites_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"content"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a device or a pipe"):
        check_writable(tmp_path / "pipe")


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch, overwrite, failure):
    path = tmp_path / ("file" if overwrite else "other")
    (tmp_path / "file").write_bytes(b"before")

    def fail(_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure), match="No space left|^$"):
        write_atomically(path, b"after", overwrite=overwrite)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_without_overwrite_nothing_is_lost(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError, match="exists; remove it"):
        write_atomically(path, b"after", overwrite=False)
    with pytest.raises(FileExistsError, match="exists; remove it"):
        check_free(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_what_cannot_be_written_is_named(tmp_path):
    check_writable(tmp_path / "fine")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError, match="is a directory; name a file in it"):
        check_writable(tmp_path)
    for function in (check_writable, lambda path: write_atomically(path, b"")):
        with pytest.raises(OSError, match=r"cannot write '.*missing/file': No such file or directory; choose"):
            function(tmp_path / "missing" / "file")


def test_a_new_file_can_be_read_back_and_changed_before_it_gets_its_name(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with atomic_file(path) as file:
        file.write(b"after")
        file.seek(0)
        assert file.read() == b"after"
        file.seek(0)
        file.write(b"A")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"After"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), ValueError("bad"), OSError(5, "Input/output error", "source")]
)
def test_what_the_block_raises_is_passed_on(tmp_path, failure):
    def write():
        with atomic_file(tmp_path / "file") as file:
            file.write(b"half")
            raise failure

    with pytest.raises(type(failure)) as caught:
        write()
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_at_the_end_is_an_error_too(tmp_path):
    with pytest.raises(OSError, match="cannot write .*full.*: No space left on device; choose"), write_errors("full"):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="Is a directory|cannot write"), atomic_file(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def next_descriptor():
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def test_only_a_regular_file_is_opened(tmp_path):
    before = next_descriptor()
    with pytest.raises(OSError, match=r"cannot read '.*missing': No such file or directory; name a file that can"):
        open_regular(tmp_path / "missing")
    refused = [tmp_path, os.devnull]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused.append(tmp_path / "pipe")
    for path in refused:
        with pytest.raises(OSError, match="it is a directory, a device or a pipe; name a regular file"):
            open_regular(path)
    assert next_descriptor() == before
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


@given(st.text(st.characters()), st.integers(10, 300))
@example("\x1b[2J" * 10**6, 200)
def test_printable_text_is_one_short_line_without_control_characters(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    assert printable(shown, limit) == shown
    if text.isprintable() and len(text) <= limit:
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("Größe_重み_🗝 [red]", "Größe_重み_🗝 [red]"),
        ("\x1b[2Ja\nb\r\t\0\x7f\x9b", r"\x1b[2Ja\nb\r\t\x00\x7f\x9b"),
        ("\u202egnp\u2066\u200f\ufeff", r"\u202egnp\u2066\u200f\ufeff"),
        ("\u2028\x85\ud800\U000e0041", r"\u2028\x85\ud800\U000e0041"),
        ("a" * 150 + "b" * 150, "a" * 98 + "..." + "b" * 99),
    ],
)
def test_only_what_a_terminal_may_obey_or_hide_is_escaped(text, shown):
    assert printable(text) == shown
