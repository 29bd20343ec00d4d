"""What a build is made of, and how its wheel is tagged, with the C kernel and where its C cannot be compiled."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from runpy import run_path

import pytest

from lowmem.version import ADDRESS, __version__

run_setup = pytest.importorskip("setuptools").distutils.core.run_setup
ROOT = Path(__file__).parents[1]


def read_setup(monkeypatch):
    """Read setup.py as a build does, and build nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "315532800")  # setup.py sets it where it is not set
    return run_setup("setup.py", stop_after="init")


def tag_of(distribution):
    """Return the tag that the wheel's name gets: Python, ABI and platform."""
    command = distribution.get_command_obj("bdist_wheel")
    command.ensure_finalized()
    return command.get_tag()


def test_one_binary_serves_every_python(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 0}.get)
    built = read_setup(monkeypatch)
    assert [extension.name for extension in built.ext_modules] == ["lowmem.kernels._native"]
    assert built.get_option_dict("bdist_wheel")["py_limited_api"][1] == "cp311"


@pytest.mark.parametrize(
    ("platform", "free_threaded"), [("win-amd64", 0), ("win-arm64", 0), ("linux-x86_64", 1)], ids=str
)
def test_a_wheel_without_a_compiled_kernel_serves_any_python_of_that_platform(platform, free_threaded, monkeypatch):
    """Not any platform: installed from it, one that has a kernel would get none."""
    monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": free_threaded}.get)
    built = read_setup(monkeypatch)
    assert not built.ext_modules
    assert tag_of(built) == ("py3", "none", re.sub(r"\W", "_", platform))


def test_readme_and_the_log_of_an_installation_say_how_long_it_takes():
    says = r"takes (about a minute) (?:to compile )?on two cores"
    found = [re.findall(says, (ROOT / name).read_text()) for name in ("README.md", "setup.py")]
    assert found == [["about a minute"]] * 2


def test_a_kernel_that_does_not_compile_fails_a_release_and_no_install(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 0}.get)
    for asked, optional in [("", True), ("1", False)]:
        monkeypatch.setenv("LOWMEM_REQUIRE_KERNEL", asked)
        assert [extension.optional for extension in read_setup(monkeypatch).ext_modules] == [optional]


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ("", ["-O3", "-g0"]),
        ("-g -O2 -fstack-protector-strong", ["-O3"]),  # as Debian's and conda's builds ask of every package
        ("-O2 -march=x86-64-generic", ["-O3", "-g0"]),
        ("-O2 -O1", ["-g0"]),
        ("-O1 -g -fsanitize=address", []),
        ("-O0", ["-g0"]),
    ],
)
def test_flags_of_every_package_take_no_optimization_away_and_those_of_a_debugger_do(asked, flags, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 0}.get)
    monkeypatch.setenv("CFLAGS", asked)
    (kernel,) = read_setup(monkeypatch).ext_modules
    assert kernel.extra_compile_args == ["-std=gnu11", "-ffp-contract=off", *flags]


def built(tree, **variables):
    """Build the wheel of a tree, and return its name, and what was said."""
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "dist"]
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "LOWMEM_REQUIRE_KERNEL")}
    done = subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True)
    return done.returncode, [path.name for path in (tree / "dist").glob("*.whl")], done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path):
    """A tree whose kernel is one small function."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "pytest_lowmem.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("__init__.py", "version.py", "py.typed", "kernels/__init__.py"):
        (tmp_path / "lowmem" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "lowmem" / name, tmp_path / "lowmem" / name)
    source = tmp_path / "lowmem/kernels/csrc/portable.c"
    source.parent.mkdir()
    source.write_text("int one(void) { return 1; }\n")
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED"), reason="has no kernel")
def test_a_wheel_whose_kernel_did_not_compile_does_not_claim_to_have_one(tree):
    """pip keeps wheels: one of the same name would be taken for the one with the kernel."""
    code, names, said = built(tree, CC="no-such-compiler")
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert code == 0, said
    assert [name for name in names if re.search(rf"-py3-none-{platform}\.whl$", name)] == names != []
    assert "lowmem: the kernel was not compiled" in said
    assert "no-such-compiler" in said.partition("lowmem: the kernel was not compiled")[2]
    assert "--no-cache-dir" in said
    code, _, said = built(tree, CC="no-such-compiler", LOWMEM_REQUIRE_KERNEL="1")
    assert code != 0


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("cc"), reason="no C compiler")
def test_a_wheel_whose_kernel_did_not_compile_has_no_kernel_of_an_earlier_build(tree):
    code, names, said = built(tree)
    assert code == 0, said
    assert re.search(r"-cp311-abi3-", *names)
    source = tree / "lowmem/kernels/csrc/portable.c"
    source.write_text("#error does not compile\n")
    shutil.rmtree(tree / "dist")
    code, (name,), said = built(tree)
    assert "-py3-none-" in name
    assert "portable.c" in said.partition("lowmem: the kernel was not compiled")[2]
    assert not [file for file in zipfile.ZipFile(tree / "dist" / name).namelist() if "_native" in file]


def test_the_source_distribution_holds_what_its_tests_need(monkeypatch):
    command = read_setup(monkeypatch).get_command_obj("sdist")
    command.ensure_finalized()
    command.filelist = pytest.importorskip("setuptools.command.egg_info").FileList()
    command.read_template()
    held = {Path(name) for name in command.filelist.files}
    needed = {Path("conftest.py"), Path("tox.ini"), Path("CONTRIBUTING.md")}
    for folder in ("tests", "benchmarks", "docs", "examples", ".ci", ".github"):
        files = {file for kind in ("py", "toml", "md", "yml", "json") for file in Path(folder).rglob(f"*.{kind}")}
        assert files, folder
        needed |= files
    assert needed - held == set()


def sdist(tree):
    """Build the source distribution of a tree, and return it."""
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (tree / "dist").glob("*.tar.gz")
    return found


def test_a_tree_gives_the_same_bytes_whenever_and_by_whom_it_is_built(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "tree"
    shutil.copytree(tree, other)
    for number, path in enumerate(sorted(other.rglob("*"), reverse=True)):
        os.utime(path, (10**9 + number, 10**9 + 7 * number))
    for one in (tree, other):
        assert built(one, CC="no-such-compiler")[0] == 0
    first, second = (next((one / "dist").glob("*.whl")) for one in (tree, other))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    for path in other.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o600)
    first, second = sdist(tree), sdist(other)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in archive} == {(0, 0, "", "")}
        assert f"{first.name.removesuffix('.tar.gz')}/lowmem/kernels/csrc/portable.c" in archive.getnames()


def metadata(dist):
    with zipfile.ZipFile(dist) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return archive.read(name).decode()


def test_what_is_built_says_where_the_project_is_once_that_is_known(tree):
    """Links and pictures of README.md lead there, so that they work on the package index."""
    assert built(tree, CC="no-such-compiler")[0] == 0
    (wheel,) = (tree / "dist").glob("*.whl")
    unknown = metadata(wheel)
    assert "Author: The lowmem developers\n" in unknown
    assert "\nKeywords: pytorch," in unknown
    assert ("Project-URL" in unknown) == bool(ADDRESS)
    version = tree / "lowmem/version.py"
    version.write_text(re.sub('ADDRESS = ".*"', 'ADDRESS = "https://example.org/lowmem"', version.read_text()))
    assert built(tree, CC="no-such-compiler")[0] == 0
    known, tag = metadata(wheel), f"v{__version__}"
    assert "Project-URL: Source, https://example.org/lowmem\n" in known
    assert f'src="https://example.org/lowmem/raw/{tag}/docs/images/sizes-light.svg"' in known
    assert f"(https://example.org/lowmem/blob/{tag}/docs/kernels.md#on-a-gpu)" in known
    release = run_path(ROOT / ".ci/release.py")
    (tree / "docs").symlink_to(ROOT / "docs")
    (tree / "examples").symlink_to(ROOT / "examples")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree / name)
    assert release["dead_links"](tree, tag, wheel) == []
    assert release["dead_links"](tree, tag, sdist(tree)) == []
