"""The memory gate fails on a byte more and a byte less, on what is new or missing, and never passes in silence."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import gate, memory
from benchmarks.results import Result, read_results, read_run, table
from lowmem.testing.baseline import Key
from tests.selection import rows_in_one_case

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]

CONFTEST = """
from benchmarks.gate import pytest_addoption, pytest_configure

def pytest_benchmark_generate_machine_info():
    return {"torch": "1.0"}
"""

BENCHMARKS = """
import pytest

@pytest.mark.parametrize("variant", ["dense", "small"])
def test_{0}(benchmark, variant):
    benchmark.extra_info.update(theoretical_bytes=1000, forward_bytes=4101, reference_seconds=1e-6)
    benchmark.pedantic(lambda: None, rounds=2)
"""

FIRST = "benchmarks/test_first.py::test_first[dense]"
SECOND = "benchmarks/test_second.py::test_second[dense]"
KEY = memory.current_key()
STORED = f"benchmarks/memory/{KEY.name}.json"
STORE = memory.store_command()


@pytest.fixture
def project(pytester, monkeypatch):
    """A small project of two benchmark files, under this one's configuration, with a baseline stored."""
    # It has no run for pytest-benchmark to compare with, which warns of that.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-W ignore::pytest_benchmark.logger.PytestBenchmarkWarning")
    # A file that is rewritten at once, with as many characters, would not be compiled again.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    pytester.makeconftest(CONFTEST)
    directory = pytester.mkdir("benchmarks")
    for name in ("first", "second"):
        (directory / f"test_{name}.py").write_text(BENCHMARKS.format(name))
    shutil.copy(ROOT / "pyproject.toml", pytester.path)
    assert pytester.runpytest("benchmarks", "--benchmark-disable", "--store-memory").ret == 0
    return pytester


@pytest.fixture
def compare(project):
    """Return a function that runs ``pytest benchmarks --benchmark-compare`` and gives exit code and output."""

    def compare(*arguments):
        command = [*(arguments or ("benchmarks",)), "--benchmark-disable", "--benchmark-compare"]
        result = project.runpytest(*command)
        return result.ret, result.stdout.str() + result.stderr.str()

    return compare


@pytest.fixture
def edit(project):
    """Return a function that hands over the baseline to change."""
    stored = project.path / STORED

    def edit(change):
        document = json.loads(stored.read_text())
        change(document)
        stored.write_text(json.dumps(document))

    return edit


def change_memory(name=FIRST, **figures):
    return lambda document: document["figures"][name].update(figures)


def usage_error(project, *options):
    """Return the one line of a run that ends before it begins."""
    result = project.runpytest(*options, no_reraise_ctrlc=True)  # pytest.exit counts as one
    assert result.ret == 2
    assert not result.stdout.str().strip()
    (line,) = (line for line in result.stderr.str().splitlines() if line)
    assert line.startswith("Exit: ")
    assert len(line) < 300
    return line.removeprefix("Exit: ")


def test_the_same_figures_pass(compare):
    code, output = compare()
    assert code == 0
    assert f"4 of the 4 benchmarks in {STORED} compared: the same to the byte" in output
    assert f"memory baseline: {STORED}\n" in output
    assert "FAILED" not in output
    assert "To store" not in output


def test_the_table_shows_latency_beside_memory(project):
    project.runpytest("benchmarks", "--benchmark-save=run")
    output = project.runpytest("benchmarks", "--benchmark-compare").stdout.str()
    header, row = (line.split() for line in output.splitlines() if line.startswith(("benchmark  ", "first[dense]  ")))
    assert header == ["benchmark", "min", "ms", "ratio", "stored", "theoretical", "forward"]
    assert len(row) == len(header) - 1
    assert "-" not in row


def test_the_table_is_there_without_a_comparison_too(project):
    result = project.runpytest("benchmarks")
    assert result.ret == 0
    assert "stored" not in result.stdout.str()
    assert "memory baseline" not in result.stdout.str()
    result.stdout.fnmatch_lines(["benchmark * ratio * forward*", "first*dense* *"])


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (4100, "forward_bytes grew by 1 byte, from 4,100 to 4,101"),
        (4102, "forward_bytes shrank by 1 byte, from 4,102 to 4,101"),
        (4101 - 2048, "forward_bytes grew by 2,048 bytes, from 2,053 to 4,101"),
    ],
    ids=["more", "less", "much more"],
)
def test_a_byte_more_or_less_fails_and_is_named(compare, edit, stored, said):
    edit(change_memory(forward_bytes=stored))
    code, output = compare()
    assert code == 1
    lines = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert lines == [f"FAILED {FIRST}: {said}"]
    assert f"({4101 - stored:+,})" in output
    assert f"To store the new figures: {STORE}\nand say in the commit's message why they moved.\n" in output
    assert "the same to the byte" not in output


def test_every_figure_that_moved_is_listed(compare, edit):
    edit(change_memory(FIRST, theoretical_bytes=1, forward_bytes=2))
    edit(change_memory(SECOND, forward_bytes=3))
    lines = [line for line in compare()[1].splitlines() if line.startswith("FAILED")]
    assert [line.split(" ")[1:3] for line in lines] == [
        [f"{FIRST}:", "forward_bytes"],
        [f"{FIRST}:", "theoretical_bytes"],
        [f"{SECOND}:", "forward_bytes"],
    ]


def in_process(project, *options):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-compare", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=False, env=environment)


def test_one_byte_more_fails_a_process(project, edit):
    edit(change_memory(forward_bytes=4100))
    run = in_process(project)
    assert run.returncode == 1
    assert f"FAILED {FIRST}: forward_bytes grew by 1 byte" in run.stdout


def test_with_xdist_the_one_process_judges_what_the_others_measured(project, edit):
    pytest.importorskip("xdist")
    gone = FIRST.replace("dense", "gone")
    edit(lambda document: document["figures"].update({gone: {}}))
    edit(change_memory(forward_bytes=4100))
    run = in_process(project, "-n", "1", "--deselect", SECOND)
    assert run.returncode == 1
    lines = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    assert lines[0].startswith(f"FAILED {FIRST}: forward_bytes grew by 1 byte")
    assert lines[1:] == [f"FAILED {gone} is missing: it is in the baseline"]


def test_a_figure_that_is_missing_fails(compare, edit):
    edit(change_memory(backward_bytes=1))
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST}: backward_bytes is missing, 1 byte\n" in output


def test_a_benchmark_and_a_figure_that_are_new_fail(compare, edit):
    def forget(document):
        del document["figures"][FIRST]["forward_bytes"]
        del document["figures"][SECOND]

    edit(forget)
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST}: forward_bytes is new, 4,101 bytes\n" in output
    assert f"FAILED {SECOND} is new: the baseline has no figures of it\n" in output
    assert STORE in output


def test_a_benchmark_without_figures_is_missed_too(project, compare):
    file = project.path / "benchmarks/test_third.py"
    file.write_text("def test_third(benchmark): benchmark.pedantic(lambda: None)")
    code, output = compare()
    assert code == 1
    assert "FAILED benchmarks/test_third.py::test_third is new" in output
    assert project.runpytest("benchmarks", "--store-memory").ret == 0
    assert compare()[0] == 0
    file.unlink()
    code, output = compare()
    assert code == 1
    assert "FAILED benchmarks/test_third.py::test_third is missing: it is in the baseline\n" in output
    assert STORE in output


def test_a_benchmark_that_was_renamed_fails_with_both_names(compare, edit):
    gone = "benchmarks/test_first.py::test_first[gone]"
    edit(lambda document: document["figures"].update({gone: document["figures"].pop(FIRST)}))
    code, output = compare()
    assert code == 1
    assert f"FAILED {gone} is missing: it is in the baseline; renamed? {FIRST} is new" in output
    assert f"FAILED {FIRST} is new" in output


@pytest.mark.parametrize("ignored", [[], ["--ignore=benchmarks/test_other.py"]], ids=["nothing", "another"])
def test_a_file_that_went_missing_fails(project, compare, ignored):
    (project.path / "benchmarks/test_first.py").unlink()
    code, output = compare("benchmarks", *ignored)
    assert code == 1
    assert f"FAILED {FIRST} is missing" in output
    assert "test_second[dense] is missing" not in output


def test_a_file_that_a_conftest_leaves_out_is_missing(project, compare):
    (project.path / "benchmarks/conftest.py").write_text("collect_ignore = ['test_first.py']\n")
    code, output = compare()
    assert code == 1
    assert f"FAILED {FIRST} is missing" in output
    assert "test_second[dense] is missing" not in output


@pytest.mark.parametrize(
    ("mark", "why"),
    [
        ("@pytest.mark.skip", "unconditional skip"),
        ("@pytest.mark.skipif(True, reason='slow')", "slow"),
        ("@pytest.mark.xfail(run=False)", "xfail"),
    ],
)
def test_a_benchmark_that_is_skipped_fails(project, compare, mark, why):
    file = project.path / "benchmarks/test_first.py"
    file.write_text(file.read_text().replace("def test", f"{mark}\ndef test"))
    code, output = compare()
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith(f"FAILED {FIRST} was skipped"))
    assert why in line
    assert line.endswith("run it, or mark it ungated")


def test_benchmarks_that_are_switched_off_fail(compare):
    code, output = compare("benchmarks", "--benchmark-skip")
    assert code == 1
    assert f"FAILED {FIRST} was skipped" in output


def test_an_ungated_benchmark_is_neither_stored_nor_compared(project, compare):
    file = project.path / "benchmarks/test_second.py"
    file.write_text(file.read_text().replace("def test", "@pytest.mark.ungated\ndef test"))
    code, output = compare()
    assert code == 1
    assert f"FAILED {SECOND} is missing" in output  # it was gated when the baseline was stored
    assert project.runpytest("benchmarks", "--store-memory").ret == 0
    assert SECOND not in json.loads((project.path / STORED).read_text())["figures"]
    code, output = compare()
    assert code == 0
    assert "2 of the 2 benchmarks" in output


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
    assert "of the 4 benchmarks" in output


def test_what_the_last_run_did_not_fail_is_not_missing(project, compare):
    file = project.path / "benchmarks/test_first.py"
    sound = file.read_text()
    file.write_text(f"{sound}    assert variant != 'dense'\n")
    assert project.runpytest("benchmarks").ret == 1
    file.write_text(sound)
    code, output = compare("benchmarks", "--lf")
    assert code == 0
    assert "1 of the 4 benchmarks" in output


def test_a_part_that_was_asked_for_can_go_missing(compare, edit):
    second = "benchmarks/test_second.py::test_second"
    edit(lambda document: document["figures"].update({f"{second}[gone]": {"x_bytes": 1}}))
    assert compare("benchmarks/test_first.py")[0] == 0
    for part in ("benchmarks/test_second.py", second):
        code, output = compare(part)
        assert code == 1
        assert f"FAILED {second}[gone] is missing" in output


def test_a_benchmark_that_fails_is_not_missing(project, compare):
    file = project.path / "benchmarks/test_first.py"
    file.write_text(f"{file.read_text()}    assert False\n")
    code, output = compare()
    assert code == 1
    assert "is missing" not in output


def test_a_benchmark_whose_teardown_fails_is_not_compared(project, compare, edit):
    fixture = "import pytest\n@pytest.fixture(autouse=True)\ndef broken():\n    yield\n    assert False\n"
    file = project.path / "benchmarks/test_first.py"
    file.write_text(fixture + file.read_text())
    edit(change_memory(forward_bytes=1))
    code, output = compare()
    assert code == 1
    assert "forward_bytes" not in output
    assert "is missing" not in output


def test_a_run_that_stops_early_names_no_missing_benchmarks(project, compare):
    file = project.path / "benchmarks/test_first.py"
    file.write_text(f"{file.read_text()}    assert False\n")
    code, output = compare("benchmarks", "-x")
    assert code == 1
    assert "is missing" not in output


def test_a_comparison_without_benchmarks_fails(project, compare):
    (project.path / "test_other.py").write_text("def test_other(): pass\n")
    code, output = compare("test_other.py")
    assert code == 1
    assert "FAILED no benchmark ran" in output
    (project.path / "test_other.py").write_text("")
    assert compare("test_other.py")[0] == 1


def test_nothing_runs_and_nothing_is_judged_when_tests_are_only_listed(project, compare):
    (project.path / STORED).unlink()
    assert compare("benchmarks", "--collect-only")[0] == 0
    assert project.runpytest("benchmarks", "--collect-only", "--store-memory").ret == 0
    assert not (project.path / STORED).exists()


def test_a_key_without_a_baseline_fails_and_names_the_flag(project, compare):
    (project.path / STORED).unlink()
    code, output = compare()
    assert code == 1
    assert f"memory baseline: {STORED} (there is none: this run will fail)" in output
    lines = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert lines == [f"FAILED there is no memory baseline of {KEY.name} in {STORED}"]
    assert f"To store the new figures: {STORE}" in output
    assert not (project.path / STORED).exists()


def test_another_key_has_another_baseline(project, compare, monkeypatch):
    monkeypatch.setattr(memory, "current_key", lambda: Key("other", "2.99", 2))
    assert compare()[0] == 1
    assert project.runpytest("benchmarks", "--store-memory").ret == 0
    assert compare()[0] == 0
    assert sorted(file.name for file in (project.path / "benchmarks/memory").iterdir()) == sorted(
        [f"{KEY.name}.json", "other-torch2.99.json"]
    )


def test_the_key_is_the_kernel_and_the_minor_version_of_torch(monkeypatch):
    monkeypatch.setattr("lowmem.backend", lambda: "avx2: compiled C, on torch's threads")
    monkeypatch.setattr("torch.__version__", "2.13.1+cpu")
    assert memory.current_key().name == "avx2-torch2.13"


def test_the_command_names_the_kernel_that_was_chosen(monkeypatch):
    monkeypatch.delenv("LOWMEM_KERNEL", raising=False)
    assert memory.store_command() == "pytest benchmarks --benchmark-disable --store-memory"
    monkeypatch.setenv("LOWMEM_KERNEL", "avx2")
    assert memory.store_command() == "LOWMEM_KERNEL=avx2 pytest benchmarks --benchmark-disable --store-memory"


def test_the_stored_baseline_can_be_read_in_a_diff(project):
    figures = {"forward_bytes": 4101, "theoretical_bytes": 1000}
    names = [
        f"benchmarks/test_{n}.py::test_{n}[{variant}]" for n in ("first", "second") for variant in ("dense", "small")
    ]
    document = {"backend": KEY.backend, "torch": KEY.torch, "threads": 2, "figures": dict.fromkeys(names, figures)}
    assert (project.path / STORED).read_text() == json.dumps(document, indent=2) + "\n"


@pytest.mark.parametrize(
    "selection",
    [
        ["benchmarks/test_second.py"],
        ["benchmarks", "-k", "second"],
        ["benchmarks", "-m", "benchmark"],
        ["benchmarks", "--deselect", "benchmarks/test_first.py"],
        ["benchmarks", "--ignore", "benchmarks/test_first.py"],
        ["benchmarks", "--ignore-glob", "*first*"],
        ["benchmarks", "--lf"],
        ["benchmarks", "--sw"],
        ["benchmarks", "--benchmark-skip"],
        [],
    ],
    ids=["file", "k", "m", "deselect", "ignore", "glob", "lf", "sw", "skip", "testpaths"],
)
def test_a_part_is_not_stored(project, selection):
    project.mkdir("tests")  # where pytest looks if it is given nothing
    before = (project.path / STORED).read_bytes()
    said = usage_error(project, *selection, "--store-memory")
    assert said == f"--store-memory stores all benchmarks or none; run them all: {STORE}"
    assert (project.path / STORED).read_bytes() == before


@pytest.mark.parametrize(
    "line", ["assert variant != 'dense'", "pytest.skip('not today')", "raise RuntimeError('forward')"]
)
def test_a_run_that_fails_or_skips_stores_nothing(project, line):
    before = (project.path / STORED).read_bytes()
    file = project.path / "benchmarks/test_first.py"
    file.write_text(file.read_text().replace("1000", "1001") + f"    {line}\n")
    result = project.runpytest("benchmarks", "--store-memory")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"FAILED {STORED} is not stored: *"])
    assert (project.path / STORED).read_bytes() == before


def test_a_file_that_skips_itself_is_not_left_out_of_what_is_stored(project):
    before = (project.path / STORED).read_bytes()
    file = project.path / "benchmarks/test_first.py"
    file.write_text(f"import pytest\npytest.importorskip('no_such_module')\n{file.read_text()}")
    result = project.runpytest("benchmarks", "--store-memory")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"FAILED {STORED} is not stored: benchmarks/test_first.py was skipped or left out"])
    assert (project.path / STORED).read_bytes() == before


@pytest.mark.parametrize(
    "name", [STORED, "benchmarks/memory/other-torch2.99.json"], ids=["its own", "of another kernel"]
)
def test_a_verdict_does_not_take_the_place_of_a_baseline(project, name):
    (project.path / name).write_text(before := (project.path / STORED).read_text())
    said = usage_error(project, "benchmarks", "--benchmark-compare", f"--memory-json={name}")
    assert said == f"--memory-json={name} lies among the baselines: name a file elsewhere"
    assert (project.path / name).read_text() == before


def test_storing_and_comparing_at_once_is_refused(project):
    said = usage_error(project, "benchmarks", "--store-memory", "--benchmark-compare")
    assert said.startswith("--store-memory and --benchmark-compare exclude each other")


@pytest.mark.parametrize("option", ["--benchmark-autosave", "--benchmark-save=x", "--benchmark-json=x.json"])
def test_what_pytest_benchmark_saves_is_no_baseline(project, compare, option):
    before = (project.path / STORED).read_bytes()
    file = project.path / "benchmarks/test_first.py"
    file.write_text(file.read_text().replace("1000", "1001"))
    assert project.runpytest("benchmarks", option).ret == 0
    assert (project.path / STORED).read_bytes() == before
    code, output = compare()
    assert code == 1
    assert "theoretical_bytes grew by 1 byte" in output


TIMED = """
import pytest

@pytest.mark.parametrize("variant", ["dense", "small"])
def test_timed(benchmark, variant):
    benchmark.extra_info.update(forward_bytes=1)
    benchmark(lambda: None)

def test_other():
    pass
"""

OPTIONS = {  # of pytest-benchmark, and what shows that it does what its manual says: a line of output, or a file
    "--benchmark-min-time=0.000001": "*test_timed?dense?*",
    "--benchmark-min-rounds=7": "*test_timed?dense?*",
    "--benchmark-precision=0.5 --benchmark-confidence=0.5": "*test_timed?dense?*",
    "--benchmark-timer=time.process_time": "*test_timed?dense?*",
    "--benchmark-calibration-precision=2": "*test_timed?dense?*",
    "--benchmark-warmup=on --benchmark-warmup-iterations=10": "*test_timed?dense?*",
    "--benchmark-disable-gc": "*test_timed?dense?*",
    "--benchmark-disable --benchmark-enable": "*test_timed?dense?*",
    "--benchmark-disable": "* 3 passed*",
    "--benchmark-skip": "* 1 passed, 2 skipped*",
    "--benchmark-only": "* 2 passed, 1 skipped*",
    "--benchmark-sort=name": "*test_timed?dense?*",
    "--benchmark-group-by=param": "*benchmark *dense*: 1 tests*",
    "--benchmark-columns=max,ops": "Name (time in *Max*OPS*",
    "--benchmark-name=long": "*benchmarks/test_timed.py::test_timed?dense?*",
    "--benchmark-time-unit=ms": "*time in ms*",
    "--benchmark-verbose": "*test_timed?dense?*",
    "--benchmark-quiet": "* 3 passed*",
    "--benchmark-cprofile=tottime --benchmark-cprofile-top=3": "*cProfile (time in s)*",
    "--benchmark-cprofile=tottime --benchmark-cprofile-loops=2 --benchmark-cprofile-dump=out/profile": (
        "out/profile-*dense*.prof"
    ),
    "--benchmark-save=name": "benchmarks/baselines/*/0001_name.json",
    "--benchmark-save=name --benchmark-save-data": "benchmarks/baselines/*/0001_name.json",
    "--benchmark-autosave": "benchmarks/baselines/*/0001_*.json",
    "--benchmark-autosave --benchmark-storage=file://elsewhere": "elsewhere/*/0001_*.json",
    "--benchmark-json=out.json": "out.json",
    "--benchmark-compare": "*no memory baseline*",  # it warns where it has no run to compare with, and goes on
    "--benchmark-netrc": "*test_timed?dense?*",
}


@pytest.fixture
def timed(pytester):
    """A project with a benchmark that pytest-benchmark calibrates, a test that is none, and the benchmarks' hooks."""
    pytester.makeconftest(CONFTEST)
    directory = pytester.mkdir("benchmarks")
    (directory / "test_timed.py").write_text(TIMED)
    shutil.copy(ROOT / "benchmarks" / "conftest.py", directory)
    shutil.copy(ROOT / "pyproject.toml", pytester.path)

    def run(*options):
        return pytester.runpytest("benchmarks", "--benchmark-max-time=0.001", *options)

    run.path = pytester.path
    return run


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_of_pytest_benchmark_does_what_its_manual_says(timed, options):
    result, shown = timed(*options.split()), OPTIONS[options]
    assert result.ret == ("--benchmark-compare" in options)
    assert "Error" not in result.stdout.str()
    if shown.endswith((".json", ".prof")):
        (file,) = timed.path.glob(shown)
        assert file.stat().st_size > 0
    else:
        result.stdout.fnmatch_lines([shown])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--benchmark-json=run.json", True),
        ("--benchmark-save=run", False),
        ("--benchmark-save=run --benchmark-save-data", True),
    ],
)
def test_every_single_time_is_kept_where_the_manual_says_so(timed, options, kept):
    assert timed(*options.split()).ret == 0
    (file,) = timed.path.rglob("*run.json")
    stats = [bench["stats"] for bench in json.loads(file.read_text())["benchmarks"]]
    assert ["data" in one for one in stats] == [kept, kept]


@pytest.mark.parametrize("which", ["--benchmark-compare", "--benchmark-compare=0001"])
def test_pytest_benchmark_compares_with_its_own_storage(timed, which):
    assert timed("--benchmark-save=name").ret == 0
    assert timed("--store-memory").ret == 0
    result = timed(which)
    assert result.ret == 0
    result.stdout.fnmatch_lines_random(
        ["test_timed?dense? (0001_name)*", "test_timed?dense? (NOW)*", "2 of the 2 benchmarks*"]
    )


def test_a_latency_that_pytest_benchmark_fails_hides_no_memory_that_moved(timed, edit_file):
    assert timed("--benchmark-save=name").ret == 0
    assert timed("--store-memory").ret == 0
    edit_file(timed.path / STORED, '"forward_bytes": 1', '"forward_bytes": 2')
    passing = timed("--benchmark-compare", "--benchmark-compare-fail=min:100000000%")
    assert passing.ret == 1
    (run,) = timed.path.glob("benchmarks/baselines/*/0001_name.json")
    edit_file(run, '"min": ', '"min": 1e-30, "was": ')
    failing = timed("--benchmark-compare", "--benchmark-compare-fail=min:1%")
    assert failing.ret != 0
    for result in (passing, failing):
        assert result.stdout.str().count("forward_bytes shrank by 1 byte") == 2
    assert "Performance has regressed" in failing.stderr.str()
    assert "Performance has regressed" not in passing.stderr.str()


@pytest.fixture
def edit_file():
    def edit(path, old, new):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return edit


@pytest.mark.skipif(not find_spec("pygal"), reason="pip install pytest-benchmark[histogram]")
def test_histograms_are_drawn(timed):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-histogram=out/histogram"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # a process: pygal changes how Python imports
    run = subprocess.run(command, cwd=timed.path, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list(timed.path.glob("out/histogram*.svg"))) == 1


def test_nothing_to_save_is_a_warning(timed):
    result = timed("--benchmark-skip", "--benchmark-json=out.json")
    assert result.ret == 0
    assert not (timed.path / "out.json").exists()


@pytest.mark.parametrize(
    ("text", "warned"), [("{", "Failed to load"), ('{"benchmarks": []}', "not a run that pytest-benchmark stored")]
)
def test_a_damaged_run_of_pytest_benchmark_is_no_traceback(timed, text, warned):
    assert timed("--store-memory").ret == 0
    folder = timed.path / "benchmarks/baselines"
    folder.mkdir(exist_ok=True)
    (folder / "0001_name.json").write_text(text)
    result = timed("--benchmark-compare", "--benchmark-verbose")
    assert warned in result.stdout.str() + result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def test_the_command_of_pytest_benchmark_reads_its_storage_here():
    stored = "benchmarks/baselines/0001_baseline.json"
    command = Path(sys.executable).with_name("pytest-benchmark")
    run = subprocess.run(
        [command, "compare", stored, "--columns=min", "-k", "test_save"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "test_save" in run.stdout


def test_the_cache_may_be_switched_off(compare, edit):
    gone = FIRST.replace("dense", "gone")
    edit(lambda document: document["figures"].update({gone: {}}))
    code, output = compare("benchmarks", "-p", "no:cacheprovider")
    assert code == 1
    assert [line for line in output.splitlines() if line.startswith("FAILED")] == [
        f"FAILED {gone} is missing: it is in the baseline"
    ]


DAMAGED = {
    "empty": "",
    "cut": '{"figures": {',
    "a list": "[]",
    "no figures": "{}",
    "a list of figures": '{"figures": []}',
    "deep": "[" * 100_000,
    "twice": '{"figures": {"a": {}, "a": {}}}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_baseline_ends_with_one_line(project, text):
    (project.path / STORED).write_text(text)
    said = usage_error(project, "benchmarks", "--benchmark-compare")
    assert said.startswith(f"{STORED} is no baseline of this run: ")
    assert said.endswith(f"; store one: {STORE}")
    assert (project.path / STORED).read_text() == text


def test_bytes_that_are_no_text_end_with_one_line(project):
    (project.path / STORED).write_bytes(b"\xff\xfe")
    assert "it is damaged" in usage_error(project, "benchmarks", "--benchmark-compare")


@pytest.mark.parametrize("value", [1.5, 1.0, True, "1", None, -1])
def test_a_figure_of_the_baseline_that_is_no_number_of_bytes_is_named(project, edit, value):
    edit(change_memory(forward_bytes=value))
    said = usage_error(project, "benchmarks", "--benchmark-compare")
    assert f"'{FIRST}': 'forward_bytes' is {value!r} and must be a number of bytes" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"torch": "2.0"},
            f"its figures are of backend={KEY.backend}, torch=2.0, threads=2, and this run is",
        ),
        ({"backend": "neon"}, "its figures are of backend=neon, torch="),
        ({"threads": 4}, "threads=4, and this run is "),
        ({"figures": {"a": 1}}, "the figures of 'a' must be an object"),
    ],
    ids=["torch", "backend", "threads", "figures"],
)
def test_a_baseline_of_another_run_ends_with_one_line(project, edit, change, said):
    edit(lambda document: document.update(change))
    assert said in usage_error(project, "benchmarks", "--benchmark-compare")


def test_a_damaged_baseline_is_replaced_by_a_new_one(project, compare):
    before = (project.path / STORED).read_bytes()
    (project.path / STORED).write_text("{")
    assert project.runpytest("benchmarks", "--benchmark-disable", "--store-memory").ret == 0
    assert (project.path / STORED).read_bytes() == before


def test_a_folder_that_cannot_be_written_ends_before_anything_runs(project):
    shutil.rmtree(project.path / "benchmarks/memory")
    (project.path / "benchmarks/memory").write_text("a file\n")
    said = usage_error(project, "benchmarks", "--store-memory")
    assert "benchmarks/memory" in said
    assert (project.path / "benchmarks/memory").read_text() == "a file\n"


@pytest.mark.parametrize("value", ["1.5", "True", "'1'", "None", "-1"])
def test_a_figure_that_is_no_number_of_bytes_fails_its_benchmark(project, compare, value):
    file = project.path / "benchmarks/test_first.py"
    file.write_text(file.read_text().replace("theoretical_bytes=1000", f"theoretical_bytes={value}"))
    code, output = compare()
    assert code == 1
    assert f"'{FIRST}': 'theoretical_bytes' is {value} and must be a number of bytes" in output


def test_the_verdict_is_written_as_json(project, edit):
    edit(change_memory(forward_bytes=4102))
    result = project.runpytest(
        "benchmarks", "--benchmark-compare", "--benchmark-disable", "--memory-json=new/out.json"
    )
    assert result.ret == 1
    document = json.loads((project.path / "new/out.json").read_text())
    rows = {(row["name"], row["figure"]): row for row in document.pop("rows")}
    assert document == {
        "gate": "memory",
        "passed": False,
        "base": STORED,
        "head": "this run",
        "machine": {"backend": KEY.backend, "torch": KEY.torch, "threads": 2},
        "notes": [],
    }
    assert len(rows) == 8
    assert rows[FIRST, "forward_bytes"] == {
        "name": FIRST,
        "figure": "forward_bytes",
        "base": 4102,
        "head": 4101,
        "ratio": None,
        "low": None,
        "high": None,
        "verdict": "shrank",
        "says": f"{FIRST}: forward_bytes shrank by 1 byte, from 4,102 to 4,101",
    }
    assert rows[SECOND, "forward_bytes"]["verdict"] == "same"


def test_the_verdict_of_a_run_that_passes_and_of_one_whose_benchmark_fails(project):
    command = ["benchmarks", "--benchmark-compare", "--benchmark-disable", "--memory-json=out.json"]
    assert project.runpytest(*command).ret == 0
    assert json.loads((project.path / "out.json").read_text())["passed"] is True
    file = project.path / "benchmarks/test_first.py"
    file.write_text(f"{file.read_text()}    assert variant != 'dense'\n")
    assert project.runpytest(*command).ret == 1
    assert json.loads((project.path / "out.json").read_text())["passed"] is False


def test_a_verdict_that_cannot_be_written_ends_before_anything_runs(project):
    (project.path / "file").write_text("")
    said = usage_error(project, "benchmarks", "--benchmark-compare", "--memory-json=file/out.json")
    assert "file" in said
    said = usage_error(project, "benchmarks", "--memory-json=out.json")
    assert said.startswith("--memory-json needs --benchmark-compare")


def test_a_file_that_cannot_be_written_when_the_run_ends_is_one_line(project, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(memory, "write_baseline", full)
    result = project.runpytest("benchmarks", "--store-memory")
    assert result.ret == 2
    assert "no space left" in result.stderr.str().splitlines()
    assert "are stored in" not in result.stdout.str()


def rows(stored, now, **missing):
    return [(row.name, row.figure, row.verdict) for row in memory.compare(stored, now, missing)]


@rows_in_one_case(("size", "verdict"), [(9, "shrank"), (10, "same"), (11, "grew")])
def test_only_the_same_bytes_are_the_same(size, verdict):
    assert rows({"a": {"x_bytes": 10}}, {"a": {"x_bytes": size}}) == [("a", "x_bytes", verdict)]
    assert rows({"a": {"x_bytes": 0}}, {"a": {"x_bytes": 0}}) == [("a", "x_bytes", "same")]


def test_what_only_one_run_has_is_new_or_missing():
    assert rows({"a": {"x_bytes": 1}}, {"a": {"y_bytes": 1}}) == [
        ("a", "x_bytes", "missing"),
        ("a", "y_bytes", "new"),
    ]
    assert rows({}, {"a": {}}) == [("a", "", "new")]
    assert rows({"a": {}, "b": {}}, {}, a="", b="slow") == [("a", "", "missing"), ("b", "", "skipped")]


def test_a_renamed_benchmark_is_the_closest_of_the_same_figures():
    stored = {"t[one]": {"x_bytes": 1}, "t[two]": {"x_bytes": 1}, "t[six]": {"x_bytes": 2}}
    now = {"u[two]": {"x_bytes": 1}, "u[one]": {"x_bytes": 1}, "u[six]": {"x_bytes": 3}}
    says = {row.name: row.says for row in memory.compare(stored, now, dict.fromkeys(stored, ""))}
    assert "renamed? u[one] is new" in says["t[one]"]
    assert "renamed? u[two] is new" in says["t[two]"]
    assert "renamed?" not in says["t[six]"]


def result(seconds=1.0, reference=1.0, **memory):
    return Result(seconds, reference, memory)


def test_a_figure_that_a_benchmark_does_not_have_is_a_dash_in_its_own_column():
    now = {"t.py::test_a": result(x_bytes=2**20), "t.py::test_b": result(None, y_bytes=2**21)}
    baseline, stored = {"t.py::test_a": {"x_bytes": 2**20 - 1, "y_bytes": 5}}, {"t.py::test_a": result(1.0, 2.0)}
    assert [line.split() for line in table(now, baseline, stored)] == [
        ["benchmark", "min", "ms", "ratio", "stored", "x", "y"],
        ["a", "1000.00", "1.00", "0.50", "1.00", "(+1)", "-"],
        ["b", "-", "-", "-", "-", "2.00"],
    ]
    assert len({len(line) for line in table(now, baseline, stored)}) == 1  # every column is as wide in each line
    assert [line.split() for line in table(now)][1:] == [
        ["a", "1000.00", "1.00", "1.00", "-"],
        ["b", "-", "-", "-", "2.00"],
    ]


def test_a_ratio_is_of_the_smallest_time_to_the_reference():
    bench = {
        "fullname": "t.py::test_a",
        "extra_info": {"reference_seconds": 4.0, "x_bytes": 1},
        "stats": {"min": 1.0},
    }
    results, machine = read_run({"machine_info": {"torch": "1"}, "benchmarks": [bench]})
    assert results["t.py::test_a"].ratio == 0.25
    assert results["t.py::test_a"].memory == {"x_bytes": 1}
    assert machine == {"torch": "1"}
    assert result(1.0, None).ratio is None
    assert result(1.0, 0.0).ratio is None
    assert result(0.0, 2.0).ratio == 0.0


@rows_in_one_case("value", [1.5, True, "1", None])
def test_a_stored_figure_that_is_no_integer_is_refused_and_named(value):
    bench = {"fullname": "t.py::test_a", "extra_info": {"y_bytes": value}, "stats": {"min": 1.0}}
    with pytest.raises(ValueError, match=f"t.py::test_a: y_bytes={value!r} must be an integer"):
        read_results([bench])


@rows_in_one_case(
    "run",
    [
        [],
        {},
        {"benchmarks": []},
        {"machine_info": {}},
        {"machine_info": {}, "benchmarks": []},
        {"machine_info": {}, "benchmarks": [{"fullname": "a"}]},
        {"machine_info": {}, "benchmarks": [{"fullname": "a", "extra_info": {}, "stats": {"min": None}}]},
    ],
)
def test_what_is_no_stored_run_is_refused(run):
    with pytest.raises(ValueError, match=r"it says nothing of a machine|not benchmarks|it holds no benchmarks"):
        read_run(run)


@rows_in_one_case(
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
