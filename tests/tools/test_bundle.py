"""A bundle runs, verifies, and has bytes that the names and contents of its files alone decide."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lowmem
from lowmem.__main__ import main
from lowmem.tools.bundle import COMMENT, MANIFEST

PACKAGE = Path(lowmem.__file__).parent
TOY = {"__init__.py": b"", "__main__.py": b"import sys\nprint(__name__, __file__, sys.argv)\n"}
PROJECT = {"README.md": b"# Toy\n"} | {f"toy/{name}": content for name, content in TOY.items()}


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def read_zip(path: Path | str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def bundled(directory: Path | str, name: str = "out") -> dict[str, bytes]:
    """Bundle with the command and return the files without the manifest, which is checked."""
    assert main(["bundle", str(directory), name]) == 0
    files = read_zip(f"{name}.zip")
    assert list(files) == sorted(files)
    manifest = files.pop(MANIFEST).decode()
    assert manifest == "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in files)
    return files


def run_zip(path: Path, *arguments: str, flags: tuple[str, ...] = ("-I",), **options: object):
    command = [sys.executable, *flags, path.name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=300, **options)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty directory of its own."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def project(tmp_path):
    return write_tree(tmp_path / "project", PROJECT)


@pytest.fixture
def refused(refused, here):
    """Bundle a directory that must be refused: return the one line that says why; nothing is written."""

    def run(directory: Path | str, name: str = "out") -> str:
        before = sorted(here.rglob("*"))
        told = refused("bundle", directory, name)
        assert sorted(here.rglob("*")) == before
        return told

    return run


def test_the_bytes_are_pinned_for_every_python_and_platform(project):
    write_tree(project, {"data/é.bin": bytes(range(256)), "empty": b""})
    bundled(project)
    digest = hashlib.sha256(Path("out.zip").read_bytes()).hexdigest()
    assert digest == "478e9576922f98e1ac49c6f56ec4000fe7d5e922d039a41c5253fc00b5dbd7af"


segments = st.from_regex("[abc_é ]{0,2}[abc_é]", fullmatch=True)
names = st.lists(segments, min_size=1, max_size=3).map(lambda parts: "/".join(parts) + ".txt")
trees = st.dictionaries(names, st.binary(max_size=40), max_size=8)


@given(trees, st.randoms(use_true_random=False))
@example({"a.txt": b"", "a/a.txt": b"\r\n", "a b/é.txt": b"\0"}, random.Random(0))
def test_files_come_out_as_they_went_in_for_any_order_time_and_mode(tree, shuffle):
    tree = {**tree, "__main__.py": b"print('hello')\n"}
    with tempfile.TemporaryDirectory() as directory:
        for copy in ("first", "second"):
            root = Path(directory, copy)
            order = shuffle.sample(list(tree), len(tree))
            write_tree(root, {name: tree[name] for name in order})
            for path in root.rglob("*"):
                os.utime(path, (0, shuffle.randrange(2**32)))
                path.chmod(0o700 if path.is_dir() else shuffle.choice([0o600, 0o644, 0o755]))
            assert bundled(root, f"{directory}/{copy}") == tree
        assert Path(directory, "first.zip").read_bytes() == Path(directory, "second.zip").read_bytes()


@pytest.mark.parametrize(("zone", "umask", "mode"), [("Asia/Kathmandu", 0o000, 0o666), ("XXX+11", 0o027, 0o640)])
def test_time_zone_and_umask_change_no_byte_and_the_umask_sets_the_mode(project, zone, umask, mode):
    bundled(project, "plain")
    old = os.umask(umask)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            bundled(project, "other")
    finally:
        os.umask(old)
        time.tzset()
    assert Path("other.zip").read_bytes() == Path("plain.zip").read_bytes()
    assert Path("other.zip").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", ".", "../{1}", "{0}/toy/..", "{2}"])
def test_the_spelling_of_the_directory_changes_nothing(project, tmp_path, monkeypatch, spelling):
    link = tmp_path / "link"
    link.symlink_to(project)
    expected = bundled(project)
    monkeypatch.chdir(project)
    assert bundled(spelling.format(project, project.name, link), "../out") == expected


def test_an_unzipped_bundle_bundles_to_the_same_bytes(project):
    bundled(project)
    shutil.unpack_archive("out.zip", "unzipped")
    bundled("unzipped", "again")
    assert Path("again.zip").read_bytes() == Path("out.zip").read_bytes()


def test_a_bundle_never_holds_an_earlier_one_but_other_zips_stay(project, monkeypatch):
    monkeypatch.chdir(project)
    with zipfile.ZipFile("data.zip", "w") as archive:
        archive.writestr("a", b"a")
    assert sorted(bundled(".", "first")) == [
        "README.md",
        "__main__.py",
        "data.zip",
        "toy/__init__.py",
        "toy/__main__.py",
    ]
    bundled(".", "second")
    assert Path("second.zip").read_bytes() == Path("first.zip").read_bytes()
    assert Path("first.zip").read_bytes().endswith(COMMENT)


MADE = [
    "toy/__pycache__/a.py",
    "toy/a.pyc",
    "toy/a.pyo",
    ".git/HEAD",
    ".hg/a",
    ".svn/a",
    ".tox/py/a",
    ".nox/a",
    ".venv/a",
    "venv/a",
    "env/pyvenv.cfg",
    "tools/mine/pyvenv.cfg",
    "build/lib/toy/__init__.py",
    "dist/toy.whl",
    "toy.egg-info/PKG-INFO",
    ".mypy_cache/a",
    ".pytest_cache/a",
    ".ruff_cache/a",
    ".hypothesis/a",
    ".benchmarks/a",
    ".coverage",
    ".coverage.host.1",
    "htmlcov/index.html",
    "web/node_modules/a.js",
    "toy/a.so",
    "toy/a.so.1",
    "toy/a.cpython-312-darwin.so",
    "toy/a.pyd",
    "toy/a.o",
    "toy/a.a",
    "toy/a.dylib",
    "toy/.DS_Store",
    ".lowmem-0123456789abcdef.partial",
]


def test_caches_and_build_products_are_left_out(project):
    write_tree(project, dict.fromkeys(MADE, b"made"))
    assert bundled(project).keys() == {"__main__.py", *PROJECT}


@pytest.mark.parametrize(
    "name",
    [
        ".coveragerc",
        ".github/workflows/ci.yml",
        ".gitignore",
        "benchmarks/a.py",
        "build",
        "build/__init__.py",
        "docs/build/a.py",
        "toy/dist/a.py",
        "toy/csrc/a.c",
    ],
)
def test_names_like_those_of_caches_stay(project, name):
    write_tree(project, {name: b"written"})
    assert bundled(project)[name] == b"written"


def test_a_package_goes_under_its_own_name_with_a_main_beside_it(tmp_path):
    toy = write_tree(tmp_path / "toy", {**TOY, "build/a.py": b"", "sub/MANIFEST.sha256": b"its own"})
    files = bundled(toy)
    assert files.pop("__main__.py").startswith(b'"""')
    assert files == {f"toy/{name}": content for name, content in TOY.items()} | {
        "toy/build/a.py": b"",
        "toy/sub/MANIFEST.sha256": b"its own",
    }


@pytest.mark.processes
def test_a_main_at_the_top_is_kept_and_decides(project):
    main_file = b"print('mine')\n"
    write_tree(project, {"__main__.py": main_file, "other/__init__.py": b"", "other/__main__.py": b""})
    assert bundled(project)["__main__.py"] == main_file
    assert run_zip(Path("out.zip").absolute()).stdout == "mine\n"


def test_a_link_to_a_file_inside_is_stored_as_its_content(project):
    (project / "COPY.md").symlink_to("README.md")
    (project / "toy" / "deep").symlink_to(project / "README.md")
    files = bundled(project)
    assert files["COPY.md"] == files["toy/deep"] == PROJECT["README.md"]


@pytest.mark.parametrize("link", ["node_modules", "build", ".venv", "toy/a.so", "toy/__pycache__"])
def test_links_that_are_left_out_are_not_looked_into(project, link):
    (project / link).symlink_to("/")
    assert bundled(project).keys() == {"__main__.py", *PROJECT}


@pytest.mark.processes(keep=1)
@pytest.mark.parametrize("flags", [("-I",), ("-I", "-S"), ()], ids=" ".join)
def test_the_bundle_of_a_project_runs_its_package(project, here, flags):
    bundled(project)
    done = run_zip(Path("out.zip").absolute(), "a", "-b", flags=flags)
    program = here / "out.zip" / "toy" / "__main__.py"
    assert (done.stdout, done.stderr) == (f"__main__ {program} ['out.zip', 'a', '-b']\n", "")


@pytest.fixture(scope="session")
def lowmem_zip(tmp_path_factory):
    """The bundle of the package that is tested, next to nothing else."""
    directory = tmp_path_factory.mktemp("real")
    assert main(["bundle", str(PACKAGE), str(directory / "project_bundle")]) == 0
    return directory / "project_bundle.zip"


@pytest.mark.processes
def test_the_bundle_of_lowmem_imports_itself_and_not_the_installed_one(lowmem_zip, tmp_path):
    poison = write_tree(tmp_path / "poison", {"lowmem/__init__.py": b"raise SystemExit('the wrong one')\n"})
    # No extension module loads from a zip file, which is told unless plain torch is asked for
    environment = {**os.environ, "PYTHONPATH": str(poison), "LOWMEM_KERNEL": "reference"}
    done = run_zip(lowmem_zip, "info", "--json", flags=(), env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads(done.stdout)
    assert info["lowmem"] == lowmem.__version__
    assert info["location"] == str(lowmem_zip / "lowmem")


def test_one_line_on_stderr_says_what_was_written(project, capsys):
    bundled(project)
    payload = Path("out.zip").read_bytes()
    line = f"out.zip: 5 files, {len(payload)} bytes, sha256 {hashlib.sha256(payload).hexdigest()}\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    ("name", "written"), [("a.zip", "a.zip"), ("b.ZIP", "b.ZIP"), ("c.tar", "c.tar.zip"), (".d", ".d.zip")]
)
def test_the_name_gets_one_suffix(project, here, name, written):
    assert main(["bundle", str(project), name]) == 0
    assert [path.name for path in here.iterdir()] == [written]


@pytest.mark.parametrize("name", ["", ".", "..", ".zip", "a/", "a/.."])
def test_a_name_without_a_file_name_is_refused(project, refused, name):
    assert f"name={name!r} must end in a file name" in refused(project, name)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "is no directory"),
        ({}, "has no files"),
        ({".git/HEAD": b"", "a.pyc": b""}, "has no files"),
        ({"README.md": b""}, "has nothing to run"),
        ({"a/__init__.py": b""}, "has nothing to run"),
        ({"a/__main__.py": b""}, "has nothing to run"),
        ({"src/a/__init__.py": b"", "src/a/__main__.py": b""}, "has nothing to run"),
        ({"a-b/__init__.py": b"", "a-b/__main__.py": b""}, "has nothing to run"),
        ({"__init__.py": b""}, "has nothing to run"),
        ({f"{a}/{b}": b"" for a in ("two", "one") for b in TOY}, "has several packages to run: one, two"),
    ],
)
def test_a_directory_without_one_thing_to_run_is_refused(tmp_path, refused, files, reason):
    directory = tmp_path / "given"
    if files is not None:
        directory.mkdir()
        write_tree(directory, files)
    assert f"directory={str(directory)!r} {reason}" in refused(directory)


def test_a_file_a_link_that_loops_and_no_name_are_no_directory(project, refused):
    (project / "loop").symlink_to("loop")
    for directory in ("", project / "README.md", project / "loop"):
        assert f"directory={str(directory)!r} is no directory" in refused(directory)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("toy", "points to a directory"),
        ("/", "points to a directory"),
        ("nowhere", "points nowhere"),
        ("link", "points nowhere"),
        ("../outside", "points outside"),
    ],
)
def test_other_links_are_refused(project, tmp_path, refused, target, reason):
    (tmp_path / "outside").write_bytes(b"secret")
    link = project / "link"
    link.symlink_to(target)
    err = refused(project)
    assert f"link={str(link)!r} {reason}" in err
    assert "replace it by a copy" in err


def test_a_file_that_is_not_regular_is_refused(project, refused):
    os.mkfifo(project / "pipe")
    assert f"file={str(project / 'pipe')!r} is neither a file nor a directory" in refused(project)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x7f", "a\x1b[31m", b"\xff".decode("utf-8", "surrogateescape")])
def test_a_name_that_a_manifest_would_escape_is_refused(project, tmp_path, refused, name):
    try:
        (project / name).write_bytes(b"")
    except OSError:
        pytest.skip(f"this file system has no file named {name!r}")
    assert f"file={str(project / name)!r}" in refused(project)
    (project / name).unlink()
    write_tree(project, {f"{name}/a": b""})
    assert f"file={str(project / name / 'a')!r}" in refused(project)
    package = write_tree(tmp_path / name, TOY)
    assert f"file={str(package / '__init__.py')!r}" in refused(package)


SECRETS = [".env", ".netrc", ".aws/credentials", "toy/server.pem", "toy/deep/private.key", "id_rsa", "id_ed25519"]


def test_files_with_the_usual_names_of_secrets_are_left_out_unread(project, monkeypatch):
    write_tree(project, dict.fromkeys(SECRETS, b"hush") | {"toy/credentials.py": b"", "tokenizer.json": b"{}"})
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    assert bundled(project).keys() == {"__main__.py", "toy/credentials.py", "tokenizer.json", *PROJECT}
    assert not {Path(name).name for name in SECRETS} & set(read)


@pytest.mark.parametrize(("name", "method"), [("README.md", "read_bytes"), ("toy", "iterdir"), (".", "iterdir")])
def test_an_unreadable_file_or_folder_is_refused(project, refused, monkeypatch, name, method):
    secret = project / name
    secret.chmod(0)
    if os.access(secret, os.R_OK):  # the superuser reads anything
        allowed = getattr(Path, method)

        def deny(path: Path) -> object:
            if path == secret:
                raise PermissionError(13, "Permission denied", str(path))
            return allowed(path)

        monkeypatch.setattr(Path, method, deny)
    assert f"cannot read {str(secret)!r}: Permission denied; make it readable" in refused(project)


def test_a_file_that_fails_while_it_is_read_is_named(project, refused, monkeypatch):
    error = OSError(5, "Input/output error")  # as read() raises it: without the file's name
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(error))
    assert f"cannot read {str(project / 'README.md')!r}: Input/output error" in refused(project)


@pytest.mark.parametrize(
    "make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["file", "dir", "link"]
)
def test_an_existing_destination_is_refused(project, refused, make):
    make(Path("out.zip"))
    for directory in (project, "nowhere"):  # it is noticed before anything is read
        assert "'out.zip' exists; remove it or choose another name" in refused(directory)


def test_an_unwritable_destination_is_refused(project, refused):
    Path("loop").symlink_to("loop")
    for name in ("nowhere/out", "loop/out"):
        assert f"cannot write '{name}.zip': " in refused(project, name)


@pytest.mark.parametrize("appears_at", ["fsync", "link", None])
def test_a_file_that_appears_meanwhile_is_not_overwritten(project, here, monkeypatch, appears_at):
    """Also on a file system without hard links, which the two last cases have."""

    def acting(name, action):
        def act(*given):
            if name == appears_at:
                Path("out.zip").write_bytes(b"theirs")
            if name == "link" and appears_at != "fsync":
                raise PermissionError(1, "Operation not permitted")
            return action(*given)

        return act

    for name in ("fsync", "link"):
        monkeypatch.setattr(os, name, acting(name, getattr(os, name)))
    assert main(["bundle", str(project), "out"]) == (2 if appears_at else 0)
    assert [path.name for path in here.iterdir()] == ["out.zip"]
    assert Path("out.zip").read_bytes().endswith(b"theirs" if appears_at else COMMENT)
