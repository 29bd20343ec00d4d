"""The benchmark gate fails on a single byte and on a benchmark that went missing, and never passes in silence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate
from benchmarks.results import Result, read_results, regressions, table

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]

CONFTEST = """
from benchmarks.gate import pytest_addoption, pytest_configure

def pytest_benchmark_generate_machine_info():
    return {"torch": "1.0"}
"""

BENCHMARKS = """
import pytest

@pytest.mark.parametrize("variant", ["dense", "small"])
def test_{0}(benchmark, variant):
    benchmark.extra_info.update(theoretical_bytes=1000, forward_bytes=4096, reference_seconds=1e-6)
    benchmark.pedantic(lambda: None, rounds=2)
"""

FIRST = "benchmarks/test_first.py::test_first[dense]"


@pytest.fixture
def project(pytester):
    """A small project of two benchmark files, under this one's configuration, with a run stored."""
    pytester.makeconftest(CONFTEST)
    directory = pytester.mkdir("benchmarks")
    (directory / "baselines").mkdir()
    for name in ("first", "second"):
        (directory / f"test_{name}.py").write_text(BENCHMARKS.format(name))
    shutil.copy(ROOT / "pyproject.toml", pytester.path)
    assert pytester.runpytest(*gate.STORE.split()[1:]).ret == 0
    return pytester


@pytest.fixture
def compare(project):
    """Return a function that runs ``pytest benchmarks --benchmark-compare`` and gives exit code and output."""

    def compare(*arguments):
        result = project.runpytest(*(arguments or ("benchmarks",)), "--benchmark-compare")
        return result.ret, result.stdout.str() + result.stderr.str()

    return compare


@pytest.fixture
def edit(project):
    """Return a function that hands over the stored run to change."""
    stored = project.path / "benchmarks/baselines/0001_baseline.json"

    def edit(change):
        run = json.loads(stored.read_text())
        change(run)
        stored.write_text(json.dumps(run))

    return edit


def named(run, name=FIRST):
    """Return one benchmark of a stored run, wherever in it: tests may have run in any order."""
    (bench,) = (bench for bench in run["benchmarks"] if bench["fullname"] == name)
    return bench


def change_memory(**figures):
    return lambda run: named(run)["extra_info"].update(figures)


def test_the_same_figures_pass_beside_the_latency(compare):
    code, output = compare()
    assert code == 0
    assert "4 of the 4 stored benchmarks compared: no memory grew" in output
    header, row = (line.split() for line in output.splitlines() if line.startswith(("benchmark  ", "first[dense]  ")))
    assert header == ["benchmark", "min", "ms", "ratio", "stored", "theoretical", "forward"]
    assert len(row) == len(header) - 1


def test_the_table_is_there_without_a_comparison_too(project):
    result = project.runpytest("benchmarks")
    assert result.ret == 0
    assert "stored" not in result.stdout.str()
    result.stdout.fnmatch_lines(["benchmark * ratio * forward*", "first*dense* *"])


def test_one_byte_more_fails_and_is_named(compare, edit):
    edit(change_memory(forward_bytes=4095))
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST}: forward_bytes grew by 1 byte, from 4,095 to 4,096" in output
    assert "(+1)" in output
    assert "no memory grew" not in output


def test_one_byte_more_fails_a_process(project, edit, monkeypatch):
    edit(change_memory(forward_bytes=4095))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-compare"]
    run = subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "forward_bytes grew by 1 byte" in run.stdout


def test_one_byte_less_passes_and_calls_the_stored_run_stale(compare, edit):
    edit(change_memory(forward_bytes=4097))
    code, output = compare()
    assert code == 0
    assert f"{FIRST}: forward_bytes shrank by 1 byte\n" in output
    assert f"The stored run is stale. To store a new one: {gate.STORE}" in output


def test_a_figure_that_went_missing_fails(compare, edit):
    edit(change_memory(backward_bytes=1))
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST}: backward_bytes went missing" in output
    assert "no memory grew" not in output


def test_a_benchmark_and_a_figure_that_are_new_pass(compare, edit):
    def forget(run):
        run["benchmarks"] = [named(run)]
        del named(run)["extra_info"]["forward_bytes"]

    edit(forget)
    code, output = compare()
    assert code == 0
    assert f"{FIRST}: forward_bytes is new" in output
    assert "benchmarks/test_second.py::test_second[dense] is new" in output


def test_a_benchmark_that_went_missing_fails(compare, edit):
    edit(lambda run: named(run).update(fullname="benchmarks/test_first.py::test_first[gone]"))
    code, output = compare()
    assert code == 1
    assert "FAILED benchmarks/test_first.py::test_first[gone] went missing" in output
    assert "no memory grew" not in output


def test_a_file_that_went_missing_fails(project, compare):
    (project.path / "benchmarks/test_first.py").unlink()
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST} went missing" in output
    assert "test_second[dense] went missing" not in output


@pytest.mark.parametrize(
    "mark", ["@pytest.mark.skip", "@pytest.mark.skipif(True, reason='slow')", "@pytest.mark.xfail(run=False)"]
)
def test_a_benchmark_that_is_skipped_went_missing(project, compare, mark):
    file = project.path / "benchmarks/test_first.py"
    file.write_text(file.read_text().replace("def test", f"{mark}\ndef test"))
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST} went missing" in output


@pytest.mark.parametrize("option", ["--benchmark-disable", "--benchmark-skip"])
def test_benchmarks_that_are_switched_off_went_missing(compare, option):
    code, output = compare("benchmarks", option)
    assert code == 1
    assert f"FAILED {FIRST} went missing" in output


@pytest.mark.parametrize(
    "selection",
    [
        ["benchmarks/test_second.py"],
        ["benchmarks/test_second.py::test_second"],
        ["benchmarks/test_second.py::test_second[dense]"],
        ["benchmarks", "-k", "second"],
        ["benchmarks", "--deselect", "benchmarks/test_first.py"],
        ["benchmarks", "--ignore", "benchmarks/test_first.py"],
    ],
    ids=["file", "function", "id", "k", "deselect", "ignore"],
)
def test_what_the_user_left_out_is_not_missing(compare, selection):
    code, output = compare(*selection)
    assert code == 0
    assert "FAILED" not in output


def test_what_the_last_run_did_not_fail_is_not_missing(project, compare):
    file = project.path / "benchmarks/test_first.py"
    sound = file.read_text()
    file.write_text(f"{sound}    assert variant != 'dense'\n")
    assert project.runpytest("benchmarks").ret == 1
    file.write_text(sound)
    code, output = compare("benchmarks", "--lf")
    assert code == 0
    assert "1 of the 4 stored benchmarks compared" in output


def test_a_part_that_was_asked_for_can_go_missing(compare, edit):
    second = "benchmarks/test_second.py::test_second"
    edit(lambda run: named(run, f"{second}[dense]").update(fullname=f"{second}[gone]"))
    assert compare("benchmarks/test_first.py")[0] == 0
    for part in ("benchmarks/test_second.py", "benchmarks/test_second.py::test_second"):
        code, output = compare(part)
        assert code == 1
        assert "FAILED benchmarks/test_second.py::test_second[gone] went missing" in output


def test_a_run_that_stops_early_names_no_missing_benchmarks(project, compare):
    file = project.path / "benchmarks/test_first.py"
    file.write_text(f"{file.read_text()}    assert False\n")
    code, output = compare("benchmarks", "-x")
    assert code == 1
    assert "went missing" not in output


def test_a_comparison_without_benchmarks_fails(project, compare):
    (project.path / "test_other.py").write_text("def test_other(): pass\n")
    code, output = compare("test_other.py")
    assert code == 1
    assert "FAILED no benchmark ran" in output


def test_nothing_runs_and_nothing_is_judged_when_tests_are_only_listed(compare):
    assert compare("benchmarks", "--collect-only")[0] == 0


def test_without_a_stored_run_it_stops_with_one_line(project, compare):
    (project.path / "benchmarks/baselines/0001_baseline.json").unlink()
    code, output = compare()
    assert code == pytest.ExitCode.USAGE_ERROR
    assert [line for line in output.splitlines() if line] == [
        "ERROR: --benchmark-compare found no stored run in file://benchmarks/baselines; "
        f"store one: {gate.STORE}"
    ]  # fmt: skip


def test_a_stored_run_that_is_not_there_stops_it(project):
    result = project.runpytest("benchmarks", "--benchmark-compare=0002")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --benchmark-compare=0002 found no stored run*"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"benchmarks": [',
        "[]",
        "{}",
        '{"machine_info": {}, "benchmarks": []}',
        '{"machine_info": {}, "benchmarks": [{"fullname": "a"}]}',
        '{"machine_info": {}, "benchmarks": [{"fullname": "a", "stats": {"min": 1}, "extra_info": {"_bytes": 1.5}}]}',
        '{"machine_info": {}, "benchmarks": [{"fullname": "a", "extra_info": {}, "stats": {"min": null}}]}',
    ],
    ids=["empty", "cut", "list", "object", "no benchmarks", "no figures", "float bytes", "no time"],
)
def test_a_corrupt_stored_run_stops_it_with_one_line(project, compare, text):
    stored = Path("benchmarks/baselines/0001_baseline.json")
    (project.path / stored).write_text(text)
    code, output = compare()
    assert code == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in output.splitlines() if line)
    assert line.startswith(f"ERROR: {stored} is not a stored run: ")


def test_another_machine_is_said_and_still_gated(compare, edit):
    edit(lambda run: run["machine_info"].update(torch="0.9"))
    code, output = compare()
    assert code == 0
    assert "torch 0.9 stored, 1.0 now" in output
    edit(change_memory(forward_bytes=1))
    assert compare()[0] == 1


def test_the_ratio_is_gated_on_demand_only(compare, edit):
    edit(change_memory(reference_seconds=1e6))
    assert compare()[0] == 0
    code, output = compare("benchmarks", "--ratio-tolerance=1.5")
    assert code == 1
    assert f"FAILED {FIRST}: the ratio to float32 grew from 0.00 to" in output
    assert compare("benchmarks", "--ratio-tolerance=1e20")[0] == 0


@pytest.mark.parametrize("value", ["0.5", "nan", "inf", "much"])
def test_a_bad_tolerance_is_refused(compare, value):
    code, output = compare("benchmarks", f"--ratio-tolerance={value}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "must be a number of at least 1" in output


def test_a_tolerance_needs_a_comparison(project):
    result = project.runpytest("benchmarks", "--ratio-tolerance=2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --ratio-tolerance needs --benchmark-compare"])


def result(seconds=1.0, reference=1.0, **memory):
    return Result(seconds, reference, memory)


def test_a_ratio_and_not_a_time_is_compared():
    stored, slower_machine = {"a": result(1.0, 2.0)}, {"a": result(10.0, 20.0)}
    assert regressions(stored, slower_machine, tolerance=1.0) == []
    assert regressions(stored, {"a": result(1.0, 1.0)}, tolerance=1.9) == [
        "a: the ratio to float32 grew from 0.50 to 1.00, by more than the factor 1.9"
    ]
    assert regressions(stored, {"a": result(1.0, None)}, tolerance=2.0) == ["a: the ratio to float32 went missing"]


def test_a_figure_that_a_benchmark_does_not_have_is_a_dash_in_its_own_column():
    now = {"t.py::test_a": result(x_bytes=2**20), "t.py::test_b": result(y_bytes=2**21)}
    stored = {"t.py::test_a": result(x_bytes=2**20 - 1, y_bytes=5), "t.py::test_c": result()}
    assert [line.split() for line in table(now, stored)] == [
        ["benchmark", "min", "ms", "ratio", "stored", "x", "y"],
        ["a", "1000.00", "1.00", "1.00", "1.00", "(+1)", "-"],
        ["b", "1000.00", "1.00", "-", "-", "2.00"],
    ]
    assert len({len(line) for line in table(now, stored)}) == 1  # every column is as wide in each line
    assert [line.split() for line in table(now, None)][1:] == [
        ["a", "1000.00", "1.00", "1.00", "-"],
        ["b", "1000.00", "1.00", "-", "2.00"],
    ]


@pytest.mark.parametrize("value", [1.5, 1.0, True, "1", None])
def test_a_memory_figure_that_is_no_integer_is_refused_and_named(value):
    bench = {"fullname": "t.py::test_a", "extra_info": {"x_bytes": 1}, "stats": {"min": 1.0}}
    assert read_results([bench])["t.py::test_a"].memory == {"x_bytes": 1}
    bench["extra_info"]["y_bytes"] = value
    with pytest.raises(ValueError, match=f"t.py::test_a: y_bytes={value!r} must be an integer"):
        read_results([bench])


@pytest.mark.parametrize(("size", "said"), [(9, []), (10, []), (11, ["a: x_bytes grew by 1 byte, from 10 to 11"])])
def test_only_growth_is_a_regression(size, said):
    assert regressions({"a": result(x_bytes=10)}, {"a": result(x_bytes=size)}) == said


@pytest.mark.parametrize(
    ("argument", "covered"),
    [
        (".", True),
        ("b", True),
        ("b/test_a.py", True),
        ("b/test_a.py::test_a", True),
        ("b/test_a.py::test_a[x]", True),
        ("b/test_a.py::test_a[y]", False),
        ("b/test_a.py::test", False),
        ("b/test_ab.py", False),
        ("c", False),
        ("/root/b", True),
        ("/elsewhere", False),
    ],
)
def test_an_argument_covers_what_lies_under_it(argument, covered):
    assert gate.covers(argument, "b/test_a.py::test_a[x]", Path("/root"), Path("/root")) == covered


def test_an_argument_counts_from_where_pytest_was_started():
    assert gate.covers(".", "b/test_a.py::test_a", Path("/root/b"), Path("/root"))
    assert gate.covers("test_a.py", "b/test_a.py::test_a", Path("/root/b"), Path("/root"))
    assert not gate.covers(".", "b/test_a.py::test_a", Path("/root/c"), Path("/root"))
