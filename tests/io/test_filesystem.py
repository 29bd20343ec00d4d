"""A file is written whole or not at all."""

import errno
import os
import platform
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import filelock
import pytest
from safetensors import SafetensorError

from lowmem.errors import FileError, WriteError
from lowmem.io import filesystem
from lowmem.io.filesystem import (
    PARTIAL_GLOB,
    atomic_file,
    atomic_folder,
    check_not_exists,
    check_outside_inputs,
    check_writable,
    exclusive_write_lock,
    has_magic_bytes,
    open_regular_file,
    read_exactly_into,
    scratch_folder,
    write_atomically,
    write_errors_with_path,
)


def test_a_place_to_write_is_neither_an_input_nor_in_one_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base", "inner").mkdir(parents=True)
    Path("base", "file").write_text("")
    Path("file").write_text("")
    Path("same").hardlink_to("file")
    Path("link").symlink_to("base", target_is_directory=True)
    Path("into").symlink_to("base/later")  # dangling
    for out in ("base/out", "base/inner/a/b", "link/out", "./file/../base/out", "link/inner/../out", "into"):
        for base in ("base", "link", str(tmp_path / "base"), "other/../base/inner/.."):
            if base.startswith("other"):
                Path("other").mkdir(exist_ok=True)
            told = re.escape(f"OUT='{Path(out)}' lies in BASE='{Path(base)}', which it would change: name a place")
            with pytest.raises(ValueError, match=f"^{told}"):
                check_outside_inputs(Path(out), {"BASE": Path(base)})
    for out in ("base", "link", "./base/"):
        with pytest.raises(ValueError, match="is BASE, which would be lost: name another place"):
            check_outside_inputs(Path(out), {"ADAPTER": None, "BASE": Path("base")})
    with pytest.raises(ValueError, match="^OUT='same' is IN, which would be lost"):
        check_outside_inputs(Path("same"), {"IN": Path("file")})
    with pytest.raises(ValueError, match="lies in OUT='later'"):
        check_outside_inputs(Path("later/done"), {"OUT": Path("later")}, "--resume")  # nothing is there yet
    for out in ("based", "base-out/model", "other/base", "file2"):
        check_outside_inputs(Path(out), {"BASE": Path("base"), "IN": Path("file"), "ADAPTER": Path("missing")})
    check_outside_inputs(Path("base/out"), {"IN": Path("base/file")})  # beside an input that is a file
    if os.path.exists("BASE"):  # a file system that ignores case
        with pytest.raises(ValueError, match="lies in IN='base'"):
            check_outside_inputs(Path("BASE/out"), {"IN": Path("base")})


def test_a_file_or_the_target_of_a_link_is_written_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "link").symlink_to("file")
    for name, content in (("file", b"one"), ("file", b"two"), ("link", b"three")):
        write_atomically(tmp_path / name, content)
        assert path.read_bytes() == content
    assert (tmp_path / "link").is_symlink()
    assert set(tmp_path.iterdir()) == {path, tmp_path / "link"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask_and_a_private_file_is_always_private(tmp_path, umask, mode):
    (tmp_path / "private").touch(0o600)
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"")
        with atomic_file(tmp_path / "private") as file:
            assert os.fstat(file.fileno()).st_mode & 0o077 == 0
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(0o4000 | mode)  # what is written has not earned the right to run as its owner
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"after")
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o7777 == mode


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


def test_what_exists_is_not_overwritten_unless_asked(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match="exists; remove it"):
            write_atomically(tmp_path / name, b"after", overwrite=False)
        with pytest.raises(FileExistsError, match="exists; remove it"):
            check_not_exists(tmp_path / name)
    check_not_exists(tmp_path / "free")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_cannot_be_written_is_named(tmp_path):
    check_writable(tmp_path / "fine")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError, match="is a directory; name a file in it"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match="it is a device or a pipe"):
        check_writable(Path(os.devnull))
    for function in (check_writable, lambda path: write_atomically(path, b"")):
        with pytest.raises(OSError, match=r"cannot write '.*missing/file': No such file or directory; choose"):
            function(tmp_path / "missing" / "file")
    says = "^cannot write 'full': No space left on device; make room on its disk, or choose another one$"
    with pytest.raises(WriteError, match=says), write_errors_with_path("full"):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="Is a directory|cannot write"), atomic_file(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


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


PACKAGE = str(Path(filesystem.__file__).parents[1])
KILLED = """
import os, signal, sys, types
from pathlib import Path

package = types.ModuleType("lowmem")  # without what its __init__ imports, which takes a while
package.__path__ = [sys.argv[1]]
sys.modules["lowmem"] = package
from lowmem.io.filesystem import atomic_file, atomic_folder, exclusive_write_lock, scratch_folder

with atomic_file(Path(sys.argv[2])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
FILE = "atomic_file(Path(sys.argv[2])) as file"
WRITERS = {
    "file": FILE,
    "new file": FILE.replace("))", "), overwrite=False)"),
    "folder": "atomic_folder(Path(sys.argv[2])) as partial",
    "scratch": "scratch_folder(Path(sys.argv[2]).parent) as partial",
    "folder within": "atomic_folder(Path(sys.argv[2], 'out'), Path(sys.argv[2]).parent) as partial",
}


def kill_a_save(path, writer=FILE):
    """Return the partial file or folder that a killed process leaves of ``path``."""
    script = KILLED.replace(FILE, writer)
    if "partial" in writer:
        script = script.replace("file.write", "(partial / 'within').write_bytes").replace("    file.flush()\n", "")
    before = set(path.parent.iterdir())
    killed = subprocess.run([sys.executable, "-c", script, PACKAGE, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = set(path.parent.iterdir()) - before - {path}
    (partial,) = left - {path.parent / f".{one.name.split('.')[1]}-lock.partial" for one in left}
    assert len(left) == 2
    assert (partial / "within" if partial.is_dir() else partial).read_bytes() == b"half"
    return partial


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills by other means")
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_a_killed_process_left_is_removed_by_the_next_write_into_the_folder(tmp_path, writer):
    left = kill_a_save(tmp_path / "file", writer)
    names = (".lowmem-mine.partial", f".lowmem-{'a' * 16}-{'b' * 16}.partial", "file.partial", f"{left.name}.bak")
    own = {tmp_path / name for name in names}
    for mine in own:
        mine.mkdir() if left.is_dir() else mine.write_bytes(b"mine")
    link = tmp_path / f"{left.name[:-24]}{0:016}-lock.partial"
    link.symlink_to(tmp_path / names[0])
    leftovers(tmp_path)
    if left.is_dir():
        with scratch_folder(tmp_path) as outer, atomic_folder(tmp_path / "new"):
            assert outer.is_dir()  # another that is being written stays
            assert not left.exists()
    else:
        write_atomically(tmp_path / "new", b"")
    assert set(tmp_path.iterdir()) == {*own, link, tmp_path / "new"}


def leftovers(folder):
    """Make what a killed fit leaves of an output: who owned it, and a folder that was not complete."""
    owner, partial = (folder / f".lowmem-{'e' * 16}-{end * 16}" for end in "0f")
    for path in (owner, partial):
        Path(f"{path}-lock.partial").touch()
    Path(f"{owner}-owner.partial").write_text("process 1 of nowhere")
    Path(f"{partial}.partial", "within").mkdir(parents=True)
    return Path(f"{owner}-owner.partial"), Path(f"{partial}.partial")


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    """By another process, by this one, and by one that has written everything and only renames."""
    path = tmp_path / "file"
    with atomic_file(path) as outer:
        outer.write(b"outer")
        for content in (b"inner", b"again"):
            write_atomically(path, content)
            assert path.read_bytes() == content
    assert path.read_bytes() == b"outer"
    waits = "import sys; sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", waits)
    with subprocess.Popen(
        [sys.executable, "-c", script, PACKAGE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1) == b"x"
        write_atomically(path, b"mine")
        assert path.read_bytes() == b"mine"
        process.stdin.close()
    assert process.returncode == 0
    assert path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]


def write_file(path):
    write_atomically(path, b"content")


def write_folder(path):
    with atomic_folder(path) as partial:
        (partial / "a").write_text("a")


@pytest.mark.parametrize(("write", "call"), [(write_file, "replace"), (write_folder, "rename")])
def test_what_is_written_is_locked_until_it_has_its_name(tmp_path, monkeypatch, write, call):
    rename, during = getattr(os, call), []

    def interrupted(partial, target):
        if not during:
            during.append(target)
            write(tmp_path / "meanwhile")
        rename(partial, target)

    monkeypatch.setattr(os, call, interrupted)
    write(tmp_path / "new")
    assert during == [tmp_path / "new"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["meanwhile", "new"]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_another_process_removed_before_it_was_locked_is_locked_again(tmp_path, monkeypatch, write):
    acquire, seen = filelock.FileLock.acquire, []

    def late(lock, *args, **kwargs):
        if not seen:
            seen.append(lock.lock_file)
            Path(lock.lock_file).touch()
            filesystem._remove_unlocked_leftovers(tmp_path)
            assert list(tmp_path.iterdir()) == []
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    write(tmp_path / "new")
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_many_savers_of_one_name_all_succeed(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        for saved in [pool.submit(write_atomically, path, bytes([number % 8]) * 1000) for number in range(400)]:
            saved.result()
    content = path.read_bytes()
    assert content == content[:1] * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_files_and_folders_of_such_names_are_removed(tmp_path):
    path, (left, _) = tmp_path / "file", leftovers(tmp_path)
    (tmp_path / "mine").mkdir()
    for make in (lambda: os.mkfifo(left), lambda: left.symlink_to("mine")):
        left.unlink()
        make()
        write_atomically(path, b"")
        assert os.path.lexists(left)
    assert (tmp_path / "mine").is_dir()


def lowest_descriptor():
    """Return the number that the next file would have: a file that stays open takes it."""
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


def test_only_a_regular_file_is_opened(tmp_path):
    with pytest.raises(OSError, match=r"cannot read '.*missing': No such file or directory; name a file that can"):
        open_regular_file(tmp_path / "missing")
    refused = [tmp_path, os.devnull]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused.append(tmp_path / "pipe")
    before = lowest_descriptor()
    for path in refused:
        with pytest.raises(OSError, match="it is a directory, a device or a pipe; name a regular file"):
            open_regular_file(path)
        assert lowest_descriptor() == before
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular_file(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_bytes_are_read_whole_and_the_start_of_a_file_tells_its_kind(tmp_path):
    path, out = tmp_path / "file", memoryview(bytearray(4))
    path.write_bytes(b"content")
    assert has_magic_bytes(path, b"con")
    assert not has_magic_bytes(path, b"content of more")
    with open_regular_file(path) as file:
        read_exactly_into(path, file, 3, out)
        assert out == b"tent"
        with pytest.raises(FileError, match=r"'.*file': it was cut after it was opened, in tensor 'a'; get it again"):
            read_exactly_into(path, file, 4, out, ", in tensor 'a'")


def test_a_folder_appears_when_it_is_complete_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("a")
        assert not target.exists()
        assert fnmatchcase(partial.name, PARTIAL_GLOB)
    assert (target / "a").read_text() == "a"
    with pytest.raises(FileExistsError, match="folder"), atomic_folder(target):
        raise AssertionError("what exists is refused before the block")
    with pytest.raises(FileNotFoundError, match="a/b"), atomic_folder(tmp_path / "other"):
        (tmp_path / "a" / "b").write_text("b")
    with pytest.raises(FileExistsError, match="late"), atomic_folder(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    with pytest.raises(OSError, match=r"missing.*choose"), atomic_folder(tmp_path / "missing" / "folder"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "late"]


def disk_is_full(folder):
    raise OSError(errno.ENOSPC, "No space left on device")


def file_in_it(folder):
    (folder / "missing" / "file").touch()


def folder_in_it(folder):
    with atomic_folder(folder / "inner") as inner:
        write_atomically(inner / "missing" / "file", b"")


def file_of_safetensors(folder):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (disk_is_full, "No space left on device; make room on its disk, or choose another one"),
        (file_of_safetensors, ".*No space left on device .*; make room on its disk, or choose another one"),
        (file_in_it, "No such file or directory; choose a directory that can be written"),
        (folder_in_it, "No such file or directory; choose a directory that can be written"),
    ],
)
def test_an_error_of_writing_in_a_folder_names_what_it_was_to_become(tmp_path, monkeypatch, write, says):
    target = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriteError, match=f"^cannot write 'out': {says}$"), atomic_folder(Path("out")) as partial:
        write(partial)
    for made in (atomic_folder(target), atomic_folder(target, tmp_path), scratch_folder(tmp_path, target)):
        with pytest.raises(WriteError, match=f"^cannot write '{target}': {says}$"), made as partial:
            write(partial)
    with pytest.raises(WriteError, match=f"^cannot write '{tmp_path}': {says}$"), scratch_folder(tmp_path) as partial:
        write(partial)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_is_not_said_of_a_folder(tmp_path):
    for error in (
        OSError("cannot read 'source'"),
        PermissionError(errno.EACCES, "denied", "source"),
        ValueError("x"),
    ):
        with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "out"):
            raise error
        assert caught.value is error


def test_a_scratch_folder_is_gone_after_the_block(tmp_path):
    for error in (None, KeyboardInterrupt):
        try:
            with scratch_folder(tmp_path) as partial:
                assert fnmatchcase(partial.name, PARTIAL_GLOB)
                (partial / "a").write_text("a")
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        assert [*tmp_path.iterdir()] == []
    with pytest.raises(OSError, match=r"missing.*choose"), scratch_folder(tmp_path / "missing"):
        pass


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def without_locks(request, monkeypatch):
    """Return the context of a file system without locks."""

    def fail(lock, *args, **kwargs):
        Path(lock.lock_file).touch()
        raise OSError(request.param, os.strerror(request.param))

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(filelock.FileLock, "acquire", fail)
            yield

    return context


def test_where_nothing_can_be_locked_a_warning_says_so_and_a_name_has_many_owners(tmp_path, without_locks):
    left = kill_a_save(tmp_path / "file")
    says = f"files in '{tmp_path}' cannot be locked .*: nothing keeps two runs from writing one file"
    before = set(tmp_path.iterdir())
    with without_locks():
        with pytest.warns(UserWarning, match=says) as caught:
            write_file(tmp_path / "write_gguf_file")
        assert len(caught) == 1
        write_folder(tmp_path / "export_quantized_folder")  # it warns once of a folder
        with exclusive_write_lock(tmp_path / "out"), exclusive_write_lock(tmp_path / "out"):
            pass
    assert set(tmp_path.iterdir()) == before | {tmp_path / "write_gguf_file", tmp_path / "export_quantized_folder"}
    assert left in before


@pytest.mark.filterwarnings("ignore:files in .* cannot be locked")
def test_what_cannot_be_locked_is_not_taken_for_a_leftover_by_a_process_that_locks(tmp_path, without_locks):
    with ExitStack() as stack:
        with without_locks():
            file = stack.enter_context(atomic_file(tmp_path / "file"))
            folder = stack.enter_context(scratch_folder(tmp_path))
        before = set(tmp_path.iterdir())
        assert len(before) == 2
        write_file(tmp_path / "other")
        assert set(tmp_path.iterdir()) == before | {tmp_path / "other"}
        assert folder.is_dir()
        file.write(b"content")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "other"]


def test_a_full_disk_is_named_where_a_name_is_owned(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(platform, "node", full)  # while the owner is written
    with (
        pytest.raises(OSError, match=r"cannot write .*out.*No space left on device"),
        exclusive_write_lock(tmp_path / "out"),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_a_name_has_one_owner_who_is_named_and_a_dead_one_does_not_count(tmp_path):
    path, other = tmp_path / "out", tmp_path / "other"
    (tmp_path / "link").symlink_to(path)
    script = KILLED.split("\nwith")[0] + (
        "\nwith exclusive_write_lock(Path(sys.argv[2])):\n    print(flush=True)\n    sys.stdin.read()\n"
        "    os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, PACKAGE, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        locks = set(tmp_path.iterdir()) - {tmp_path / "link"}
        (owner,) = (one for one in locks if one.name.endswith("-owner.partial"))
        before = owner.read_bytes()
        for name in ("out", "link"):
            with (
                pytest.raises(
                    BlockingIOError, match=rf"/{name}' is being written by process {process.pid} of .*; wait for"
                ),
                exclusive_write_lock(tmp_path / name),
            ):
                raise AssertionError
        assert owner.read_bytes() == before
        with exclusive_write_lock(other):
            write_atomically(path, b"")  # removes no lock
        process.stdin.close()
    assert all(one.exists() for one in locks)
    leftovers(tmp_path)
    with (
        exclusive_write_lock(path),
        pytest.raises(BlockingIOError, match=f"by process {os.getpid()} of "),
        exclusive_write_lock(path),
    ):
        raise AssertionError
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "out"]
    with (
        pytest.raises(OSError, match=r"cannot write '.*/out': No such file"),
        exclusive_write_lock(tmp_path / "missing" / "out"),
    ):
        raise AssertionError


def test_the_record_of_an_owner_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with exclusive_write_lock(tmp_path / "out"):
        (owner,) = tmp_path.glob("*-owner.partial")
    owner.symlink_to("mine")
    with exclusive_write_lock(tmp_path / "out"):
        assert owner.read_text().startswith(f"process {os.getpid()} of ")
    assert [*tmp_path.iterdir()] == [tmp_path / "mine"]
    assert (tmp_path / "mine").read_text() == "mine"
