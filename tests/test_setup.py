"""What a build is made of, and how its wheel is tagged, with the C kernel and where its C cannot be compiled."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lowmem
from lowmem.kernels import cpu
from tests.selection import rows_in_one_case

run_setup = pytest.importorskip("setuptools").distutils.core.run_setup
ROOT = Path(__file__).parents[1]


def read_setup(monkeypatch):
    """Read setup.py as a build does, and build nothing."""
    monkeypatch.chdir(ROOT)
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
def test_where_the_kernel_cannot_be_compiled_a_wheel_serves_any_python_of_that_platform(
    platform, free_threaded, monkeypatch
):
    """Not any platform: installed from it, one that has a kernel would get none."""
    monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": free_threaded}.get)
    built = read_setup(monkeypatch)
    assert not built.ext_modules
    assert tag_of(built) == ("py3", "none", re.sub(r"\W", "_", platform))


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which(cpu.compiler()[0]), reason="no C compiler")
def test_each_header_compiles_by_itself():
    """All of them in one call, each as a file of its own."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").exists():
        pytest.skip("this Python has no headers")
    headers = sorted(cpu.SOURCES.glob("*.h"))
    assert headers
    command = [*cpu.compiler(), "-std=gnu11", "-w", "-fsyntax-only", f"-I{folder}", "-x", "c", *map(str, headers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_does_not_compile_fails_a_release_and_no_install(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 0}.get)
    for asked, optional in [("", True), ("1", False)]:
        monkeypatch.setenv("LOWMEM_REQUIRE_KERNEL", asked)
        assert [extension.optional for extension in read_setup(monkeypatch).ext_modules] == [optional]


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


@rows_in_one_case(
    ("platform", "remedy"),
    [("linux", "needs a C compiler"), ("darwin", "needs a C compiler"), ("win32", "lowmem has none on Windows")],
)
def test_who_has_no_compiled_kernel_reads_why(platform, remedy):
    assert remedy in cpu.without_kernel("No module named lowmem.kernels._native", platform)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """Return a folder that holds the package as a clone does, without a compiled kernel."""
    folder = tmp_path_factory.mktemp("clone")
    left_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(Path(lowmem.__file__).parent, folder / "lowmem", ignore=left_out)
    (folder / "lowmem" / "kernels" / "csrc").mkdir(exist_ok=True)  # a wheel has none
    return folder


def what_python_says(folder, compiler):
    script = "import lowmem; from lowmem.kernels import cpu; cpu.load(); print(lowmem.backend())"
    variables = {**os.environ, "PYTHONPATH": str(folder), "CC": compiler, "LOWMEM_KERNEL": ""}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("reference: ")
    return run.stderr


@pytest.mark.processes
def test_a_source_tree_whose_kernel_was_not_compiled_warns_once(source_tree):
    said = what_python_says(source_tree, compiler=sys.executable)  # any program will do: it is not run
    assert said.count("compile it with: pip install -e .") == 1


@pytest.mark.processes
def test_without_a_compiler_or_sources_there_is_nothing_to_warn_of(source_tree, tmp_path):
    assert what_python_says(source_tree, compiler="no-such-compiler") == ""
    assert not cpu.is_forgotten("linux", csrc=tmp_path / "csrc")
    assert not cpu.is_forgotten("win32")
