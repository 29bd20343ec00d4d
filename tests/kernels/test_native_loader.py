"""How the compiled kernel is loaded, and what who has none reads."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lowmem
from lowmem.kernels import native_loader
from lowmem.version import reinstall_command


@pytest.mark.parametrize(
    ("platform", "remedy"),
    [("linux", "needs a C compiler"), ("darwin", "needs a C compiler"), ("win32", "lowmem has none on Windows")],
)
def test_who_has_no_compiled_kernel_reads_why(platform, remedy):
    assert remedy in native_loader.missing_kernel_reason("No module named lowmem.kernels._native", platform)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """Return a folder that holds the package as a clone does, without a compiled kernel."""
    folder = tmp_path_factory.mktemp("clone")
    left_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(Path(lowmem.__file__).parent, folder / "lowmem", ignore=left_out)
    (folder / "lowmem" / "kernels" / "csrc").mkdir(exist_ok=True)  # a wheel has none
    return folder


@pytest.fixture(scope="module")
def installed_copy(tmp_path_factory):
    """Return a folder that holds the package as a wheel whose kernel did not compile installs it."""
    folder = tmp_path_factory.mktemp("site")
    left_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "csrc")
    shutil.copytree(Path(lowmem.__file__).parent, folder / "lowmem", ignore=left_out)
    return folder


def what_python_says(folder, compiler, kernel=""):
    load = "from lowmem.kernels.native_loader import load_native_module_and_reason as load; load()"
    script = f"import lowmem; {load}; print(lowmem.backend())"
    variables = {**os.environ, "PYTHONPATH": str(folder), "CC": compiler, "LOWMEM_KERNEL": kernel}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("reference: ")
    return run.stderr


@pytest.mark.processes
def test_a_source_tree_whose_kernel_was_not_compiled_warns_once(source_tree):
    said = what_python_says(source_tree, compiler=sys.executable)  # any program will do: it is not run
    assert said.count("compile it with: pip install -e .") == 1


@pytest.mark.processes
def test_an_installed_copy_without_a_kernel_warns_once_and_names_the_remedy(installed_copy):
    """With or without a compiler: who installed it had none that compiled the kernel."""
    said = what_python_says(installed_copy, compiler="no-such-compiler")
    assert said.count("UserWarning") == 1
    assert said.count(f"install a C compiler, and then: {reinstall_command()}") == 1
    assert "--no-cache-dir" in reinstall_command()
    assert "; or set LOWMEM_KERNEL=reference" in said
    assert "No module named 'lowmem.kernels._native'" in said


@pytest.mark.processes
def test_who_asked_for_plain_torch_is_not_warned(installed_copy, source_tree):
    assert what_python_says(installed_copy, compiler=sys.executable, kernel="reference") == ""
    assert what_python_says(source_tree, compiler=sys.executable, kernel="reference") == ""


@pytest.mark.processes
def test_there_is_no_warning_where_nothing_can_be_compiled(source_tree, monkeypatch):
    assert what_python_says(source_tree, compiler="no-such-compiler") == ""
    assert native_loader.missing_kernel_warning_or_none("no kernel", "win32") is None
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get)
    assert native_loader.missing_kernel_warning_or_none("no kernel", "linux") is None


@pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which(native_loader.configured_c_compiler_command()[0]),
    reason="no C compiler",
)
def test_each_header_compiles_by_itself():
    """All of them in one call, each as a file of its own."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").exists():
        pytest.skip("this Python has no headers")
    headers = sorted(native_loader.SOURCES.glob("*.h"))
    assert headers
    command = [
        *native_loader.configured_c_compiler_command(),
        "-std=gnu11",
        "-w",
        "-fsyntax-only",
        f"-I{folder}",
        "-x",
        "c",
        *map(str, headers),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
