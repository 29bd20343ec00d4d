"""The command line: one line and exit code 2 for bad input, nothing on stdout but results."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lowmem
from lowmem import __version__
from lowmem.__main__ import main
from lowmem.tools import COMMANDS
from tests.io.formats.folders import fourbit, weights_of, write_folder
from tests.selection import covering


def run(*argv):
    """Return the exit code, whether main returns it or argparse exits with it."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"lowmem {__version__}\n"
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert run() == 0
    assert capsys.readouterr().out == shown
    for command in COMMANDS:
        assert run(command, "--help") == 0
        shown = capsys.readouterr().out
        assert f"usage: lowmem {command}" in shown
        assert "--debug" in shown


BAD_USAGE = [
    ["unknown"],
    ["stats", "--unknown"],
    ["stats", "--\x1b[31m"],
    ["stats", "\x1b[31m\u202e\n"],
    ["stats", "x" * 10_000],
    ["stats", "--json", "--markdown"],
    *(["stats", "bignet", "--batch", text] for text in ("two", "9999999999999")),
    *(["stats", "bignet", "--input-shape", text] for text in ("3,-1", "9" * 14, "9," * 999 + "9")),
    ["compare", "--tolerance", "nan"],
    ["compare", "bignet"],
    ["fit"],
    *(["fit", "lora", "--rank", text] for text in ("0", "999999999999")),
    ["fit", "low_precision", "--rank", "4"],
    *(["fit", "lora", "--data", text] for text in ("", "\0.npz", "mnist", "missing.npz")),
    *(["fit", "lora", "--save", text] for text in ("", "\0")),
]


def test_bad_usage_is_one_line_and_exit_code_2(refused):
    for argv in BAD_USAGE:
        told = refused(*argv)
        assert not any(word in told for word in (".cpp", ".h:", "c10::", "Exception raised"))


def failing(monkeypatch, error):
    """Let ``lowmem stats`` raise an error, deep in the library."""

    def fail(arguments):
        raise error

    monkeypatch.setattr("lowmem.tools.stats.run", fail)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what was not finished is not there: run it again\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, None),  # the shell's code for a closed pipe
        *(
            (kind("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), 2, "out of memory; free")
            for kind in (MemoryError, RuntimeError, RecursionError, NotImplementedError)
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_is_no_fault_is_one_line(error, code, told, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert run("stats") == code
    err = capsys.readouterr().err
    assert err.startswith(f"lowmem stats: {told}") if told else err == ""


def test_an_error_of_no_reader_is_one_line_that_asks_to_report_it_and_exit_code_3(monkeypatch, capsys):
    for error in (
        KeyError("a\x1bb"),
        AttributeError("x" * 500),
        TypeError("t"),
        RuntimeError("r"),
        ZeroDivisionError(),
    ):
        failing(monkeypatch, error)
        assert run("stats") == 3
        shown = capsys.readouterr().err
        assert shown.startswith(f"lowmem stats: {type(error).__name__}")
        assert shown.endswith("; this is a fault of lowmem: please report it with what --debug prints\n")
        assert shown[:-1].isprintable()
        assert len(shown) < 300


@pytest.mark.parametrize(("error", "code"), [(KeyError("a"), 3), (ValueError("bad"), 2), (OSError(2, "gone"), 2)])
def test_debug_prints_the_traceback_before_the_line(error, code, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert run("stats", "--debug") == code
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert any("in fail" in one for one in trace)
    assert line.startswith("lowmem stats: ")
    assert run("stats") == code
    assert capsys.readouterr().err.splitlines() == [line]


def run_program(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    """Run the command as a program of its own; return its exit code, and what it writes to both."""
    command = [sys.executable, "-m", "lowmem", *argv]
    environment = {**os.environ, "PYTHONPATH": str(Path(lowmem.__file__).parents[1])}
    done = subprocess.run(command, text=True, env=environment, stdout=stdout, stderr=stderr, timeout=300)
    return done.returncode, done.stdout, done.stderr


@contextmanager
def closed_pipe():
    """Yield the end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


USER_MODEL = """
import os, sys
from torch import nn
print("imported")

class Model(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
        print("made")
    def forward(self, x):
        print("called")
        os.write(1, b"written to 1\\n")
        os.system("echo from another program")
        return super().forward(x)

class Exits(Model):
    def forward(self, x):
        sys.exit()

def exits():
    sys.exit("no model today")

class StateExits(Model):
    def named_parameters(self, *args, **options):
        sys.exit(0)
"""


@pytest.fixture
def user_models(user_module):
    user_module("main_models", USER_MODEL)


@pytest.mark.processes
@pytest.mark.parametrize(
    "argv",
    [
        ["stats", "main_models:Model"],
        ["compare", "main_models:Model", "main_models:Model"],
        ["fit", "main_models:Model", "--epochs", "1"],
    ],
    ids=lambda argv: argv[0],
)
@pytest.mark.usefixtures("user_models")
def test_with_json_all_that_a_model_prints_goes_to_stderr(argv):
    Path("main_models.py").write_text(f"import atexit\natexit.register(print, 'at the end')\n{USER_MODEL}")
    code, out, err = run_program(*argv, "--json")
    assert code == 0
    assert json.loads(out)
    for text in ("imported", "made", "called", "written to 1", "from another program", "at the end"):
        assert text in err.splitlines()


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        *((name, argv) for name in ("Exits", "exits") for argv in (["stats"], ["compare", "bignet"], ["fit"])),
        ("StateExits", ["stats"]),
    ],
)
@pytest.mark.usefixtures("user_models")
def test_a_model_that_calls_sys_exit_is_bad_input(name, argv, capsys):
    assert run(*argv, f"main_models:{name}") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "SystemExit" in err


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.mark.processes
@posix
@pytest.mark.parametrize(
    "argv", [["stats", "bignet"], ["stats", "bignet", "--json"], ["info"], ["compare", "--help"]]
)
def test_a_closed_pipe_ends_it_as_it_ends_other_programs(argv):
    with closed_pipe() as writer:
        assert run_program(*argv, stdout=writer) == (-signal.SIGPIPE, None, "")  # a shell shows 128 + 13 = 141


@pytest.mark.processes
@posix
@covering(
    1,
    argv=[("stats",), ("stats", "--json"), ("compare", "bignet"), ("fit", "--epochs", "1")],
    place=["forward", "module", "factory"],
)
@pytest.mark.usefixtures("user_models")
def test_a_closed_pipe_that_the_user_s_model_writes_to_ends_it_likewise(argv, place):
    prints = dict.fromkeys(("module", "factory", "forward"), "pass") | {place: "print('x' * 100, flush=True)"}
    Path("main_prints.py").write_text(
        f"from torch import nn\n{prints['module']}\nclass Model(nn.Linear):\n"
        f"    def __init__(self):\n        super().__init__(1024, 4)\n        {prints['factory']}\n"
        f"    def forward(self, x):\n        {prints['forward']}\n        return super().forward(x)\n"
    )
    with closed_pipe() as writer:
        code, _, err = run_program(*argv, "main_prints:Model", stdout=writer)
    assert set(err) <= {"x", "\n"} if "--json" in argv else err == ""  # with --json it is only the results' pipe
    assert code == -signal.SIGPIPE


@pytest.mark.processes
@posix
@pytest.mark.usefixtures("user_models")
def test_a_pipe_of_the_model_s_own_that_is_closed_is_bad_input():
    Path("main_own.py").write_text(
        "import os\ndef make():\n    reader, writer = os.pipe()\n    os.close(reader)\n    os.write(writer, b'x')\n"
    )
    said = "lowmem stats: model='main_own:make': calling it failed: BrokenPipeError: [Errno 32] Broken pipe\n"
    assert run_program("stats", "main_own:make") == (2, "", said)


@pytest.mark.processes
@posix
@covering(1, argv=[("stats", "q4"), ("stats", "--unknown"), ("unknown",)], both=[False, True])
def test_an_error_that_nobody_reads_ends_it_likewise(argv, both):
    with closed_pipe() as writer:
        code, out, _ = run_program(*argv, stdout=writer if both else subprocess.PIPE, stderr=writer)
    assert (code, out) == (-signal.SIGPIPE, None if both else "")


@pytest.mark.processes
@posix
def test_results_are_whole_where_nobody_reads_the_notes(tmp_path):
    safetensors.torch.save_file({"a.weight": torch.ones(2, 8)}, tmp_path / "in")
    with closed_pipe() as writer, open(tmp_path / "table", "w") as table:
        code, *_ = run_program("quantize", str(tmp_path / "in"), str(tmp_path / "out"), stdout=table, stderr=writer)
    assert code == -signal.SIGPIPE
    assert "converted 1 of 1 tensors" in (tmp_path / "table").read_text()


CLOSES = [
    "sys.stdout.close()",
    "sys.stdout = None",
    "sys.stdout = sys.stderr = io.StringIO()",
    "sys.stdout = io.TextIOWrapper(sys.stdout.buffer)",
    "sys.stdout = io.TextIOWrapper(sys.stdout.detach())",
    "sys.__stdout__.close(); sys.stdout = sys.stderr = None",
]


@pytest.mark.processes
@covering(
    1,
    does=CLOSES,
    argv=[("stats",), ("stats", "--json"), ("compare", "main_closes:make"), ("fit", "--epochs", "1")],
)
@pytest.mark.usefixtures("user_models")
def test_results_are_printed_whatever_a_factory_does_to_stdout(does, argv):
    text = f"import io, sys\nfrom torch import nn\ndef make():\n    {does}\n    return nn.Linear(1024, 4)\n"
    Path("main_closes.py").write_text(text)
    code, out, err = run_program(*argv, "main_closes:make")
    assert (code, err) == (0, "")
    if "--json" in argv:
        assert json.loads(out)[0]["model"] == "main_closes:make"
    else:
        assert {"stats": "main_closes:make", "compare": "Relative error", "fit": "time of a step"}[argv[0]] in out


@pytest.mark.processes
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@covering(1, argv=[("info",), ("info", "--json")], unbuffered=["", "1"])
def test_a_full_disk_is_one_line(argv, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        said = "lowmem info: [Errno 28] No space left on device\n"
        assert run_program(*argv, stdout=full) == (2, None, said)
        assert run_program("stats", "q4", stderr=full) == (2, "", None)


@pytest.mark.processes
@posix
@pytest.mark.parametrize("closed", [1, 2])
def test_without_stdout_or_stderr_it_does_its_work(closed, tmp_path):
    script = f"exec {sys.executable} -m lowmem info --json >{tmp_path}/out 2>{tmp_path}/err {closed}>&-"
    environment = {**os.environ, "PYTHONPATH": str(Path(lowmem.__file__).parents[1])}
    assert subprocess.run(["sh", "-c", script], env=environment, timeout=300).returncode == 0
    assert (tmp_path / "err").read_text() == ""
    out = (tmp_path / "out").read_text()
    assert out == "" if closed == 1 else json.loads(out)["lowmem"] == __version__


@pytest.mark.processes
def test_a_name_that_stdout_cannot_encode_is_escaped(tmp_path, monkeypatch):
    safetensors.torch.save_file({"é語.weight": torch.ones(2, 8)}, tmp_path / "in")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err = run_program("quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--verbose")
    assert (code, err) == (0, f"saved {tmp_path / 'out'}\n")
    assert "\\xe9\\u8a9e.weight" in out


@posix
def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    handlers = []

    def note(arguments):
        handlers.extend(signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM))
        return 0

    monkeypatch.setattr("lowmem.tools.stats.run", note)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("stats") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handlers[0] == signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        handlers[1](signal.SIGTERM, None)


INTERRUPTING = """
import signal
from torch import nn

class Model(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
    def forward(self, x):
        signal.raise_signal(signal.SIGINT)
        return super().forward(x)

def dense():
    return nn.Linear(64, 64)

def narrow():
    return nn.Linear(1024, 4)
"""
INTERRUPTED = {
    "stats": ["interrupting:Model"],
    "compare": ["interrupting:Model", "interrupting:Model"],
    "fit": ["interrupting:Model", "--save", "out.safetensors"],
    "fit, while it saves": ["interrupting:narrow", "--epochs", "1", "--save", "out.safetensors"],
    "quantize": ["dense.safetensors", "out.safetensors"],
    "quantize, shards": ["dense.safetensors", "out", "--shard-size", "3KiB"],
    "merge": ["base.safetensors", "adapter.safetensors", "out.safetensors", "--model", "interrupting:dense"],
    "export": ["folder", "out.gguf"],
    "report": ["interrupting:Model", "out.html"],
    "bundle": ["package", "out"],
    "info": [],
}


@pytest.fixture
def interruptible(user_module, monkeypatch):
    """What the commands of ``INTERRUPTED`` read, and Ctrl-C where one writes a file, or reads the processor's."""
    user_module("interrupting", INTERRUPTING)
    base = lowmem.convert(torch.nn.Linear(64, 64), lowmem.FourBit())
    lowmem.save(base, "base.safetensors")
    lowmem.save_adapter(lowmem.add_adapter(base, "default", lowmem.LoRA(4)), "adapter.safetensors")
    safetensors.torch.save_file({f"{name}.weight": torch.randn(64, 64) for name in "ab"}, "dense.safetensors")
    write_folder(Path("folder"), weights_of(fourbit("q4_0")))
    Path("package").mkdir()
    Path("package", "__main__.py").write_text("print()")

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupt)
    monkeypatch.setattr("lowmem.tools.info.environment_info", interrupt)


def files_here():
    """Return what is in this folder, without Python's caches of compiled code."""
    return sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("case", INTERRUPTED)
@pytest.mark.usefixtures("interruptible", "terminal_signals")
def test_ctrl_c_ends_each_command_with_130_and_leaves_nothing_half_written(case, capsys):
    if case == "report":
        pytest.importorskip("altair", reason="the report needs the extra: pip install '.[report]'")
        pytest.importorskip("vl_convert", reason="the report needs the extra: pip install '.[report]'")
    command = case.partition(",")[0]
    before = files_here()
    assert run(command, *INTERRUPTED[case]) == 130
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"lowmem {command}: interrupted; what was not finished is not there: run it again"
    assert files_here() == before


def test_each_command_is_interrupted_somewhere():
    """Those that need transformers are in tests/tools."""
    assert {case.partition(",")[0] for case in INTERRUPTED} | {"generate", "serve"} == set(COMMANDS)


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("error", [None, RuntimeError("a library's own")], ids=["swallowed", "replaced"])
@pytest.mark.usefixtures("terminal_signals")
def test_an_interrupt_that_a_library_catches_ends_it_likewise(name, code, error, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)

    def swallow(arguments):
        try:
            signal.raise_signal(getattr(signal, name))
        except KeyboardInterrupt:
            if error is not None:
                raise error from None
        return 0

    monkeypatch.setattr("lowmem.tools.stats.run", swallow)
    monkeypatch.setattr(sys, "argv", ["lowmem", "stats"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowmem.tools.command_exit.flush_or_discard_output", lambda: None)
        patch.setattr("lowmem.__main__._open_and_escape_standard_streams", lambda: None)
        patch.setattr(sys, "excepthook", sys.excepthook)
        assert main() == code
    assert ("interrupted" in capsys.readouterr().err) == (error is not None)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_option_that_is_abbreviated_is_an_error(refused):
    for command, abbreviation in (
        ("stats", "--verb"),
        ("fit", "--epoch"),
        ("compare", "--toler"),
        ("generate", "--chat-"),
    ):
        assert abbreviation in refused(command, "lora", abbreviation, "1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "model", "--epoch", "2"], "lowmem fit: unrecognized arguments: --epoch 2; did you mean --epochs?"),
        (["fit", "model", "--epoch=2"], "lowmem fit: unrecognized arguments: --epoch=2; did you mean --epochs?"),
        (["info", "more"], "lowmem info: unrecognized arguments: more"),
        (["info", "--zzz"], "lowmem info: unrecognized arguments: --zzz"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest_one_of_its_command(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    command = " ".join(expected.split()[:2]).rstrip(":")
    assert capsys.readouterr().err == f"{expected} (see {command} --help)\n"
