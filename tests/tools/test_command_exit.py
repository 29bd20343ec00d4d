"""The command's imports end in one line, whatever stops them; those of a library are left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem
from lowmem.tools import command_exit

BY_MODULE = [sys.executable, "-m", "lowmem"]
BY_SCRIPT = [sys.executable, "{script}"]
SCRIPT = "import sys\nfrom lowmem.__main__ import main\nsys.exit(main())\n"
ROOT = str(Path(lowmem.__file__).parents[1])


@pytest.fixture
def start(tmp_path):
    """Return what starts the command in either way, in a directory with the modules that are given."""

    def start(way, *argv, modules=None, **environment):
        script = tmp_path / "lowmem"
        script.write_text(SCRIPT)
        for name, text in (modules or {}).items():
            (tmp_path / "first" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "first" / name).write_text(text)
        command = [part.format(script=script) for part in way]
        path = os.pathsep.join([str(tmp_path / "first"), ROOT])
        return subprocess.Popen(
            [*command, *argv],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


both_ways = pytest.mark.parametrize("way", [BY_MODULE, BY_SCRIPT], ids=["module", "script"])


@pytest.mark.processes(keep=1)
@both_ways
def test_an_unknown_kernel_is_one_line_and_exit_code_2(start, way):
    process = start(way, "info", LOWMEM_KERNEL="x\x1b" * 1000)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("lowmem: LOWMEM_KERNEL='x\\x1bx")
    assert err.count("\n") == 1
    assert len(err) < 300


@pytest.mark.processes
@both_ways
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ImportError('libtorch.so:\\n  no memory')", "libtorch.so: no memory"),
        ("raise RuntimeError('no\\nkernel')", "RuntimeError: no"),
        ("import sys; sys.missing", "AttributeError: module 'sys' has no attribute 'missing'"),
        ("{}['missing']", "KeyError: 'missing'"),
        ("1 +", "SyntaxError: invalid syntax (torch.py, line 1)"),
        ("len(3)", "object of type 'int' has no len()"),
    ],
)
def test_a_broken_torch_is_one_line_and_exit_code_2(start, way, text, said):
    process = start(way, "info", modules={"torch.py": text})
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (2, f"lowmem: {said}\n")


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
@both_ways
def test_a_failure_that_nobody_reads_ends_it_as_it_ends_other_programs(start, way):
    with start(way, "info", modules={"torch.py": "print('here', flush=True)\ninput()\nraise ImportError"}) as process:
        assert process.stdout.readline() == "here\n"
        process.stderr.close()
        process.stdin.write("go\n")
        process.stdin.close()
        assert process.wait(timeout=300) == -signal.SIGPIPE


@pytest.mark.processes
@both_ways
def test_another_failure_of_an_import_is_one_line_and_exit_code_3(start, way):
    process = start(way, "info", *(["--debug"] if way is BY_MODULE else []), modules={"torch.py": "1 / 0"})
    *trace, line = process.communicate(timeout=300)[1].splitlines()
    assert process.returncode == 3
    assert trace[:1] == (["Traceback (most recent call last):"] if way is BY_MODULE else [])
    assert line.startswith("lowmem: ZeroDivisionError: division by zero; this is a fault of lowmem")


@pytest.mark.processes(keep=1)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process")
@pytest.mark.usefixtures("terminal_signals")
@both_ways
def test_ctrl_c_during_the_imports_is_one_line_and_exit_code_130(start, way):
    """Also where the package that is imported swallows the exception."""
    swallow = "print('here', flush=True)\ntry:\n    input()\nexcept BaseException:\n    pass\n"
    process = start(way, "info", modules={"torch.py": swallow})
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "lowmem: interrupted\n")


@pytest.mark.processes
def test_a_process_that_imports_the_library_keeps_its_own_hooks():
    script = (
        "import signal, sys; before = sys.excepthook, signal.getsignal(signal.SIGINT); import lowmem; "
        "assert before == (sys.excepthook, signal.getsignal(signal.SIGINT))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["-m", "info"], ["python", "-m", "lowmem", "info"], True),
        (["-m"], ["python", "-X", "dev", "-m", "lowmem"], True),
        (["-m", "info"], ["python", "-Imlowmem", "info"], True),
        (["-m", "lowmem"], ["python", "-m", "other", "lowmem"], False),
        (["-m"], ["python", "-m", "xlowmem"], False),
        (["-m"], ["python", "-mlowmem"], True),
        (["-m"], ["python", "-m", "-xlowmem"], False),
        (["-m"], ["python", "-m", "lowmem.tools"], False),
        (["/usr/bin/lowmem", "info"], ["python", "/usr/bin/lowmem", "info"], True),
        (["/usr/bin/pytest"], ["python", "/usr/bin/pytest"], False),
        (["-c"], ["python", "-c", "import lowmem"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_the_command_is_told_from_a_program_that_imports_it(monkeypatch, argv, original, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert command_exit.is_lowmem_command_process() is expected
