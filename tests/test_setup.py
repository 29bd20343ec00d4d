"""What a build is made of, and how its wheel is tagged, with the C kernel and where its C cannot be compiled."""

import re
import sysconfig
from pathlib import Path

import pytest

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
