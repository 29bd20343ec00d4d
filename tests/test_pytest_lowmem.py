"""The plugin in projects of its users: what fails, what is stored, what the terminal and the exit code say."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import lowmem
from lowmem.testing.gate_verdicts import read_verdict
from lowmem.testing.memory import memory_figures
from lowmem.version import install_command
from tests.selection import covering

pytest_plugins = ["pytester"]

ROOT = Path(lowmem.__file__).parents[1]
INSTALLED = any(point.value == "pytest_lowmem" for point in entry_points(group="pytest11"))
OPTIONS = ["-p", "no:randomly", "-p", "no:cacheprovider", *([] if INSTALLED else ["-p", "pytest_lowmem"])]

MODEL = """
import torch
from torch import nn

def my_model(width=8):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))

example_input = torch.ones(2, 8)
"""

TESTS = """
from model import example_input, my_model

def test_my_model_stays_small(memory_gate):
    memory_gate(my_model(), example_input)
"""

NAME = "test_my_model_stays_small"
BYTES = 4 * (8 * 8 + 8 + 8 * 4 + 4)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import here what gates import: pytester forgets what a project was the first to import, and torch refuses to be
    imported twice.
    """
    for module in ("lowmem.testing.memory_gates", "lowmem.testing.latency"):
        import_module(module)
    memory_figures(nn.Linear(1, 1), torch.ones(1, 1))


@pytest.fixture
def project(pytester, monkeypatch):
    """A user's project with a model and a gate."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(pytester.path)]))
    monkeypatch.syspath_prepend(pytester.path)
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # a file that is rewritten at once would not be compiled again
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("LOWMEM_KERNEL", raising=False)
    pytester.makepyfile(model=MODEL, test_model=TESTS)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    return pytester


@pytest.fixture
def run(project):
    """Return what runs pytest in the project and gives exit code and output."""

    def run(*arguments):
        result = project.runpytest_inprocess(*OPTIONS, *arguments)
        return result.ret, result.stdout.str() + result.stderr.str()

    return run


def baseline(project, directory="memory_baselines"):
    (file,) = (project.path / directory).glob("*.json")
    return json.loads(file.read_text())


def grow(project, width=9):
    project.makepyfile(model=MODEL.replace("width=8", f"width={width}"))


def test_a_gate_is_unknown_then_stored_then_passes_then_fails_then_updated(project, run):
    code, output = run()
    assert code == 1
    assert "no figures are stored for torch" in output
    assert f"    pytest --lowmem-baseline=store test_model.py::{NAME}" in output
    assert not (project.path / "memory_baselines").exists()

    code, output = run("--lowmem-baseline=store")
    assert code == 0
    assert "stored in memory_baselines/" in output
    figures = baseline(project)["figures"][f"test_model.py::{NAME}"]
    assert figures["float32_bytes"] == figures["stored_bytes"] == figures["trainable_bytes"] == BYTES
    assert figures.keys() == {f"{name}_bytes" for name in ("float32", "stored", "trainable", "forward", "step")}

    code, output = run()
    assert code == 0
    assert f"same        {BYTES}" in output

    grow(project)
    grown = 4 * (8 + 1 + 4)
    code, output = run()
    assert code == 1
    assert f"stored_bytes        {BYTES}    {BYTES + grown}         +{grown}" in output
    assert "say why in the commit's message:" in output

    assert run("--lowmem-baseline=store")[0] == 1  # stores what is missing, and judges the rest
    assert baseline(project)["figures"][f"test_model.py::{NAME}"]["stored_bytes"] == BYTES
    assert run("--lowmem-baseline=update")[0] == 0
    assert run()[0] == 0
    grow(project, 8)
    code, output = run()
    assert code == 1
    assert f"-{grown}" in output


INPUTS = """
import torch
from torch import nn

class Model(nn.Linear):
    def forward(self, batch, scale=1.0):
        return {"y": super().forward(batch["x"]) * scale}

def test_inputs(memory_gate):
    model, batch = Model(8, 4), {"x": torch.ones(2, 8)}
    one = memory_gate(model, batch, scale=2.0)
    assert one == memory_gate(model, batch, 2.0, name="positional")
    loss = memory_gate(model, batch, loss=lambda out: out["y"].repeat(100, 1).sum(), name="loss")
    assert loss["step_bytes"] > one["step_bytes"] >= 4 * (8 * 4 + 4)
"""


def test_a_gate_takes_inputs_a_loss_and_a_name(project, run):
    project.makepyfile(test_model=INPUTS)
    assert run("--lowmem-baseline=store")[0] == 0
    assert run()[0] == 0
    names = {f"test_model.py::test_inputs{name}" for name in ("", " | positional", " | loss")}
    assert baseline(project)["figures"].keys() == names


def test_a_gate_of_no_own_name_is_refused(project, run):
    project.makepyfile(
        test_model=TESTS + "    memory_gate(my_model(), example_input)\n"
        "def test_no_name(memory_gate):\n    memory_gate(my_model(), example_input, name=3)\n"
        "def test_two_lines(memory_gate):\n    memory_gate(my_model(), example_input, name='a\\nb')\n"
    )
    code, output = run("--lowmem-baseline=store")
    assert code == 2
    assert "name='': give each memory gate of a test its own name=" in output
    assert "name=3: it must be a string" in output
    assert r"name='a\nb': it must be one printable line, as tables show it" in output


COUNTED = """
from lowmem import measure
import torch
from torch import nn

SIZE = 4

def test_counted(memory_gate):
    threads = []
    def count():
        threads.append(torch.get_num_threads())
        return {"peak_bytes": measure.peak_bytes(lambda: torch.zeros(SIZE)), "file_bytes": 7}
    found = memory_gate.counted(count)
    assert (found, threads) == ({"peak_bytes": 4 * SIZE, "file_bytes": 7}, [2])
    memory_gate.counted(lambda: {"file_bytes": 8}, name="other")

def test_nothing(memory_gate):
    memory_gate.counted(dict)

def test_no_bytes(memory_gate):
    memory_gate.counted(lambda: {"peak_bytes": 1.5})

def test_no_name(memory_gate):
    memory_gate.counted(lambda: {"peak": 1})
"""


def test_figures_that_a_function_counts_are_compared_as_those_of_a_model(project, run):
    project.makepyfile(test_model=COUNTED)
    assert run("--lowmem-baseline=store", "-k", "counted")[0] == 0
    assert baseline(project)["figures"] == {
        "test_model.py::test_counted": {"peak_bytes": 16, "file_bytes": 7},
        "test_model.py::test_counted | other": {"file_bytes": 8},
    }
    assert run("-k", "counted")[0] == 0
    project.makepyfile(test_model=COUNTED.replace("SIZE = 4", "SIZE = 5"))
    code, output = run("-k", "counted")
    assert code == 1
    assert "peak_bytes      16     20          +4" in output
    code, output = run("-k", "not counted")
    assert code == 2
    for found in ("{}", "{'peak': 1}"):
        assert f"figures={found}: return one or more, each with a name such as peak_bytes" in output
    assert "'peak_bytes' is 1.5 and must be a number of bytes" in output


CEILING = """
from model import example_input, my_model

AT_MOST = None

def test_my_model_stays_small(memory_gate):
    memory_gate(my_model(), example_input, at_most=AT_MOST)

def test_counted(memory_gate):
    memory_gate.counted(lambda: {"peak_bytes": 100, "file_bytes": 1024}, at_most=AT_MOST)
"""


def test_a_ceiling_holds_in_every_mode_whatever_the_baseline_says(project, run):
    """One byte below what the model takes fails in every mode, and nothing of it is stored."""
    project.makepyfile(test_model=CEILING)
    assert run("--lowmem-baseline=store")[0] == 0
    figures = baseline(project)["figures"][f"test_model.py::{NAME}"]
    takes = figures["stored_bytes"] + max(figures["forward_bytes"], figures["step_bytes"])
    assert takes < 1024
    for at_most, passes in ((takes, False), (1023, False), (1024, True), ("1 KiB", True), ("1 GiB", True)):
        project.makepyfile(test_model=CEILING.replace("None", repr(at_most)))
        assert run()[0] == (0 if passes else 1), at_most
    project.makepyfile(test_model=CEILING.replace("None", str(takes - 1)))
    grow(project)
    grown = 4 * (8 + 1 + 4)
    for mode in ("compare", "store", "update"):
        code, output = run(f"--lowmem-baseline={mode}", "-k", NAME, "--lowmem-json=out.json")
        assert code == 1
        assert (
            f"test_model.py::{NAME} takes {takes + 2 * grown + 8:,} bytes, and at_most={takes - 1} allows "
            f"{takes - 1:,}: {2 * grown + 9:,} too many"
        ) in output
        assert re.search(rf"^over +{BYTES + grown} .*::{NAME}$", output, re.MULTILINE)
        assert baseline(project)["figures"][f"test_model.py::{NAME}"] == figures
        found = read_verdict(project.path / "out.json")
        (row,) = (row for row in found.rows if row.figure == "at_most")
        assert (row.base, row.head, row.verdict) == (takes - 1, takes + 2 * grown + 8, "grew")
        assert found.outcome == "failed"


def test_a_ceiling_of_counted_figures_holds_the_largest(project, run):
    project.makepyfile(test_model=CEILING.replace("None", repr("1023")))
    code, output = run("--lowmem-baseline=store", "-k", "counted")
    assert code == 1
    assert "test_model.py::test_counted takes 1,024 bytes, and at_most='1023' allows 1,023: 1 too many" in output
    assert not (project.path / "memory_baselines").exists()


@pytest.mark.parametrize("bad", ["2 elephants", "", "-1 GiB", "nan", 0, -1, 2.5, True, ["1 GiB"]])
def test_a_ceiling_that_is_no_size_is_one_line_and_exit_code_2(project, run, bad):
    project.makepyfile(test_model=CEILING.replace("None", repr(bad)))
    code, output = run("--lowmem-baseline=store")
    assert code == 2
    assert f"at_most={bad!r} must be a" in output
    assert "such as 2GB or 500MiB" in output
    assert not (project.path / "memory_baselines").exists()


def test_the_verdict_is_written_as_json(project, run):
    run("--lowmem-baseline=store", "--lowmem-json=new/out.json")
    path = project.path / "new" / "out.json"
    stored = read_verdict(path)
    assert stored.passed
    assert {row.verdict for row in stored.rows} == {"same"}
    grow(project)
    assert run(f"--lowmem-json={path}")[0] == 1
    found = read_verdict(path)
    assert (found.gate, found.outcome, len(found.rows)) == ("memory", "failed", len(stored.rows))
    (row,) = (row for row in found.rows if row.figure == "stored_bytes")
    assert (row.name, row.base, row.head, row.verdict) == (f"test_model.py::{NAME}", BYTES, BYTES + 4 * 13, "grew")
    code, output = run("--lowmem-json=test_model.py/out.json")
    assert code == 2
    assert "--lowmem-json=test_model.py/out.json: " in output


@covering(
    1,
    mode=["compare", "store", "update"],
    bad=[
        ("{", "the JSON is broken at character 1"),
        (
            '{"version": 1, "backend": "x", "torch": "1.0", "threads": 2, "figures": {}}',
            "its figures are of backend='x', torch='1.0'",
        ),
    ],
)
def test_a_bad_baseline_is_one_line_exit_code_2_and_stays(project, run, mode, bad):
    content, said = bad
    run("--lowmem-baseline=store")
    (file,) = (project.path / "memory_baselines").glob("*.json")
    file.write_text(content)
    code, output = run(f"--lowmem-baseline={mode}")
    assert code == 2
    assert file.read_text() == content
    lines = [line for line in output.splitlines() if said in line]
    assert lines == 2 * [lines[0]]  # as the test's failure, and as the session's
    assert lines[0].startswith(f"cannot read '{file}'")


def test_a_baseline_that_cannot_be_written_is_one_line_and_exit_code_2(project, run):
    (project.path / "memory_baselines").write_text("a file")
    code, output = run("--lowmem-baseline=store")
    assert code == 2
    assert "choose another directory" in output
    assert (project.path / "memory_baselines").read_text() == "a file"


def test_where_a_gate_cannot_judge_it_says_why_and_nothing_is_stored_of_the_others(project, run):
    assert run("--lowmem-baseline=store")[0] == 0
    (stored,) = (project.path / "memory_baselines").iterdir()
    before = stored.read_bytes()
    project.makepyfile(
        test_model=TESTS.replace("my_model(),", "my_model(16),")
        + "def test_fails(memory_gate):\n    memory_gate(my_model(), example_input[:, :1])\n"
    )
    code, output = run("--lowmem-baseline=update")
    assert code == 2
    assert "the forward of Sequential fails on the example input: RuntimeError: " in output
    assert "nothing is stored" in output
    assert stored.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lowmem-baseline=overwrite"], "invalid choice: 'overwrite'"),
        (["-o", "lowmem_undecided=maybe"], "lowmem_undecided='maybe': choose skip or fail"),
    ],
)
def test_an_option_that_does_not_exist_is_a_usage_error(run, options, said):
    code, output = run(*options)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert said in output


def test_the_directory_of_the_baselines_can_be_set(project, run):
    project.makeini("[pytest]\nlowmem_baselines = gates/memory\n")
    assert run("--lowmem-baseline=store")[0] == 0
    assert baseline(project, "gates/memory")["figures"]


def test_a_stored_gate_that_vanished_fails_until_it_is_removed_or_brought_back(project, run):
    two = TESTS + "    memory_gate(my_model(9), example_input, name='wide')\n"
    renamed = "def test_other(memory_gate):\n    memory_gate(my_model(), example_input)\n"
    project.makepyfile(test_model=two + renamed, test_more=TESTS)
    assert run("--lowmem-baseline=store")[0] == 0
    name, wide = f"test_model.py::{NAME}", f"test_model.py::{NAME} | wide"

    project.makepyfile(test_model=TESTS.partition("def")[0] + renamed)
    code, output = run("--lowmem-json=out.json")
    assert code == 1
    assert "2 passed" in output
    for vanished in (name, wide):
        said = f"holds {vanished}, which no test measures: bring its test back, or remove its figures"
        assert re.search(f"^FAILED memory_baselines/.*{re.escape(said)}", output, re.MULTILINE)
    verdict = read_verdict(project.path / "out.json")
    assert not verdict.passed
    assert [row.name for row in verdict.rows if row.verdict == "missing"] == [name, wide]
    assert run("-k", "other")[0] == 1  # which leaves no test out that measures them
    for part in (["test_model.py::test_other"], ["test_more.py"], ["-p", "no:randomly", "test_more.py"]):
        code, output = run(*part)
        assert (code, "which no test measures" in output) == (0, False)
    assert run("--lowmem-baseline=store")[0] == 1
    project.makepyfile(test_model=two + renamed)
    assert run()[0] == 0

    project.makepyfile(
        test_model=two.replace("    memory_gate(my_model(9)", "    assert False\n    memory_gate(my_model(9)")
    )
    assert f"holds {wide}" not in run()[1]  # a test that stops before its second gate may have it still
    project.makepyfile(test_model=TESTS)
    assert f"holds {wide}, which no test measures" in run()[1]
    assert run("--lowmem-baseline=update")[0] == 0
    assert baseline(project)["figures"].keys() == {name, f"test_more.py::{NAME}"}


def test_a_gate_that_the_run_leaves_out_or_skips_has_not_vanished(project, run):
    module = "import pytest\npytest.importorskip('no_such_module')\n"
    project.makepyfile(test_model=TESTS, test_more=TESTS, test_last=TESTS)
    assert run("--lowmem-baseline=store")[0] == 0
    for part in (
        *(["-k", "more"], ["-m", "not slow", "test_more.py"], [f"--deselect=test_last.py::{NAME}"]),
        *(["test_more.py"], ["--ignore=test_last.py"], [f"test_model.py::{NAME}"]),
    ):
        code, output = run(*part)
        assert (code, "which no test measures" in output) == (0, False), part
    skipped = TESTS.replace("def", "import pytest\n@pytest.mark.skip\ndef")
    project.makepyfile(test_more=module + TESTS, test_last=skipped)
    assert run()[0] == 0
    (project.path / "test_last.py").unlink()
    assert run("test_model.py")[0] == 0
    code, output = run()
    assert code == 1
    assert f"holds test_last.py::{NAME}, which no test measures" in output
    assert f"test_more.py::{NAME}, which" not in output
    project.makepyfile(test_more="")  # collected, and empty
    assert f"holds test_more.py::{NAME}, which no test measures" in run()[1]


def test_the_figures_that_the_last_gate_leaves_fail_and_are_named(project, run):
    run("--lowmem-baseline=store")
    (stored,) = (project.path / "memory_baselines").iterdir()
    said = f"no gate was measured: memory_baselines/{stored.name} stays; remove it where no test uses memory_gate"
    project.makepyfile(test_model="def test_nothing():\n    pass\n")
    assert said in run("--lowmem-baseline=update")[1]
    code, output = run()
    assert code == 1
    assert f"FAILED memory_baselines/{stored.name} holds test_model.py::{NAME}, which no test measures" in output
    (project.path / "test_more.py").write_text("def test_nothing():\n    pass\n")
    assert run("test_more.py")[0] == run("--collect-only")[0] == 0
    assert stored.exists()
    stored.unlink()
    assert "no gate was measured" not in run("--lowmem-baseline=update")[1]


LATENCY = """
import pytest
from lowmem.testing import latency
from lowmem.testing.latency import Speedup
from lowmem.testing.ratios import Ratio
from model import example_input, my_model

@pytest.mark.parametrize(("low", "high"), [(1.6, 1.8), (1.2, 1.4), (1.4, 1.6)])
def test_latency(latency_gate, monkeypatch, low, high):
    def measure(candidate, reference, *inputs, at_least, seconds):
        assert (candidate, reference, inputs, at_least, seconds) == (len, max, ([1],), 1.5, 3)
        return Speedup(Ratio((low + high) / 2, low, high, 0.5, 16), at_least)

    monkeypatch.setattr(latency, "measure_speedup", measure)
    assert latency_gate(len, max, [1], at_least=1.5, seconds=3).verdict == "faster"

def test_failing(latency_gate):
    latency_gate(my_model(), my_model(), example_input[:, :1])

def test_asking_for_nothing(latency_gate):
    latency_gate(my_model(), my_model(), example_input, at_least=0)
"""


def test_a_latency_gate_passes_fails_and_says_what_it_saw(project, run):
    project.makepyfile(test_model=LATENCY)
    code, output = run()
    assert code == 2
    assert "3 failed, 1 passed, 1 skipped" in output
    assert (
        "the candidate is 1.30 times as fast as the reference (99% interval 1.20 to 1.40, 16 pairs of times), and"
        in output
    )
    assert "test_model.py::test_latency[1.6-1.8]: 1.70 times as fast" in output
    assert re.search("the candidate fails on the example input: RuntimeError: .*mat1 and mat2 shapes cannot", output)
    assert "at_least=0 must be a positive, finite number" in output


@pytest.mark.parametrize(
    ("configured", "code", "counted"),
    [((), 0, "1 passed, 1 skipped"), (("-o", "lowmem_undecided=fail"), 2, "1 failed, 1 passed")],
)
def test_an_undecided_latency_gate_skips_its_test_or_fails_it_where_that_is_set(
    project, run, configured, code, counted
):
    project.makepyfile(test_model=LATENCY)
    found, output = run("-rs", "-k", "1.6-1.8 or 1.4-1.6", *configured)
    assert found == code
    assert counted in output
    assert "undecided (3 s allowed): the candidate is 1.50 times as fast" in output
    assert "measure on a quieter machine, or ask for less" in output
    assert "test_model.py::test_latency[1.4-1.6]: 1.50 times as fast" in output


def test_without_scipy_the_memory_gate_works_and_the_other_says_what_to_install(project, run, monkeypatch):
    project.makepyfile(
        test_model=TESTS + "def test_fast(latency_gate):\n    latency_gate(my_model(), my_model(), example_input)\n"
    )
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "scipy" or name.startswith("lowmem.testing")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(lowmem, "testing", lowmem.testing)  # which the session below imports again
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, output = run("--lowmem-baseline=store")
    assert code == 2
    assert f"latency_gate needs scipy: {install_command('testing')}" in output
    assert "1 failed, 1 passed" in output


BESIDE = """
def test_other():
    pass

def test_bench(benchmark):
    benchmark(len, [])
"""


@pytest.mark.thorough(keep=1)
@pytest.mark.skipif(not find_spec("pytest_benchmark"), reason="pytest-benchmark is not installed")
@pytest.mark.parametrize(
    ("options", "skipped"),
    [
        (("--benchmark-only",), 1),  # test_other
        (("--benchmark-skip",), 1),  # test_bench
        (("--benchmark-disable",), 0),
        (("-p", "no:benchmark"), 0),
        ((), 0),
    ],
)
def test_gates_run_with_and_without_pytest_benchmark(project, run, options, skipped):
    plugin = "-p" not in options
    project.makepyfile(test_model=TESTS, test_beside=BESIDE if plugin else "")
    options = (*options, *["--benchmark-max-time=0", "--benchmark-min-rounds=1"] * plugin)
    assert run("--lowmem-baseline=store", *options)[0] == 0
    code, output = run(*options)
    assert code == 0
    assert f"same        {BYTES}" in output
    assert f"{skipped} skipped" in output or not skipped
    grow(project)
    assert run(*options)[0] == 1


PARALLEL = """
import os
import pytest
from model import example_input, my_model

@pytest.mark.parametrize("n", range(3))
def test_each(memory_gate, n):
    memory_gate(my_model(), example_input)

@pytest.mark.xdist_group("one")
def test_grouped(memory_gate):
    memory_gate(my_model(), example_input)

@pytest.mark.skipif("BROKEN" not in os.environ, reason="it fails")
def test_broken(memory_gate):
    memory_gate(my_model(), example_input[:, :1])
"""


@pytest.mark.processes
@pytest.mark.skipif(not find_spec("xdist"), reason="pytest-xdist is not installed")
def test_with_two_workers_the_controller_writes_once_and_shows_all(project, monkeypatch):
    project.makepyfile(test_model=PARALLEL)
    options = [*OPTIONS, "-p", "no:benchmark", "-n2", "--dist=loadgroup"]
    result = project.runpytest_subprocess(*options, "--lowmem-baseline=store")
    assert result.ret == 0
    assert result.stdout.str().count("stored in memory_baselines/") == 1
    names = {f"test_model.py::test_each[{n}]" for n in range(3)} | {"test_model.py::test_grouped"}
    assert baseline(project)["figures"].keys() == names  # whatever group xdist appends
    (file,) = (project.path / "memory_baselines").glob("*.json")
    before = file.read_bytes()

    grow(project)
    monkeypatch.setenv("BROKEN", "1")
    result = project.runpytest_subprocess(*options)
    assert result.ret == 2
    assert len([line for line in result.outlines if line.startswith("changed ")]) == 4
    assert "the forward of Sequential fails on the example input" in result.stdout.str()
    assert file.read_bytes() == before


def test_the_plugin_imports_nothing_that_is_heavy():
    script = (
        "import sys, pytest; before = set(sys.modules); import pytest_lowmem; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} & "
        "{'lowmem', 'torch', 'numpy', 'scipy', 'rich', 'safetensors'}))"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_project_without_gates_is_left_alone(project):
    project.makepyfile(
        test_model="import sys\ndef test_plain():\n    assert not {'torch', 'lowmem'} & set(sys.modules)\n"
    )
    result = project.runpytest_subprocess(*OPTIONS, "--lowmem-baseline=update")
    assert result.ret == 0
    assert "memory gates" not in result.stdout.str()
    assert not (project.path / "memory_baselines").exists()


def test_an_interrupted_session_stores_nothing(project, run):
    project.makepyfile(test_model="import pytest\n" + TESTS + "\ndef test_stop():\n    pytest.exit('that is all')\n")
    code, _ = run("--lowmem-baseline=store")
    assert code == pytest.ExitCode.INTERRUPTED
    assert not (project.path / "memory_baselines").exists()
