"""A megabyte that no tensor shows fails the gate of resident memory; what repeated runs differ by does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import resident
from benchmarks.resident import FIGURES, LOADED, VARIANTS, WAYS, Baseline, MeasurementError, compare, derive
from lowmem.testing.baseline import Key
from lowmem.testing.verdicts import read_verdict
from tests.selection import rows_in_one_case

ROOT = Path(__file__).parents[2]
KEY = Key("avx2", "2.13", 2)
BASELINE = Baseline({variant: dict.fromkeys(FIGURES, 10.0) for variant in VARIANTS}, 5, 0.1, 0.5)

needs_high_water = pytest.mark.skipif(resident.unsupported() is not None, reason=str(resident.unsupported()))

# Each model keeps or takes one megabyte that is in no tensor. One process measures them all, as starting one is slow.
PLANTED = """
import ctypes
import json
import mmap
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lowmem
from benchmarks import resident

WIDTH, MEGABYTE = 256, 2**20
LIBRARY = open(sys.argv[2], "rb")
MAPPED = mmap.mmap(LIBRARY.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)  # as a library's code is
C = ctypes.CDLL(None)
C.malloc.restype = ctypes.c_void_p
C.malloc.argtypes = [ctypes.c_size_t]
C.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
C.free.argtypes = [ctypes.c_void_p]


def scratch():
    address = C.malloc(MEGABYTE)
    C.memset(address, 1, MEGABYTE)
    return address


def planted(new=lambda model: None, forward=lambda model, out: out):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            new(self)

        def forward(self, x):
            return forward(self, self.linear(x))

    return Model


def keep_once(make):
    def keep(model, out):
        if not hasattr(model, "kept"):
            model.kept = make()
        return out

    return keep


def keep_by_training(model, out):
    if out.requires_grad:
        out.register_hook(lambda _: setattr(model, "kept", np.ones(MEGABYTE, dtype=np.uint8)))
    return out


KINDS = {
    "Sound": planted(),
    "again": planted(),
    "AttributeOfNew": planted(lambda model: setattr(model, "kept", bytearray(b"1" * MEGABYTE))),
    "UntouchedOfNew": planted(lambda model: setattr(model, "kept", bytes(MEGABYTE))),
    "AttributeOfForward": planted(forward=keep_once(lambda: bytearray(b"1" * MEGABYTE))),
    "NumpyInForward": planted(forward=lambda model, out: out + float(np.ones(MEGABYTE, dtype=np.uint8)[0])),
    "UntouchedInForward": planted(forward=lambda model, out: out + float(np.zeros(MEGABYTE, dtype=np.uint8)[0])),
    "ScratchInForward": planted(forward=lambda model, out: (C.free(scratch()), out)[1]),
    "ScratchKept": planted(forward=keep_once(scratch)),
    "ReadsALibrary": planted(forward=lambda model, out: out + sum(MAPPED[:: mmap.PAGESIZE])),
    "KeptByTraining": planted(forward=keep_by_training),
}


def convert(factory):
    return lowmem.convert(factory(), lowmem.FourBit())


folder = Path(sys.argv[1])
resident.steady()
resident.warm(folder, convert, WIDTH)
figures = {}
for name, factory in KINDS.items():
    lowmem.save(convert(factory), folder / name)
    figures[name] = resident.measure(folder / name, factory, WIDTH)
print(json.dumps(figures))
"""


@pytest.mark.gates
@needs_high_water
def test_a_megabyte_that_no_tensor_shows_fails_and_what_is_the_same_passes(tmp_path):
    """A sound model, measured twice, and those with a megabyte too much, in a process of their own."""
    (tmp_path / "planted.py").write_text(PLANTED)
    environment = {**resident.environment(), "PYTHONPATH": str(ROOT)}
    (tmp_path / "library").write_bytes(b"1" * 4 * 2**20)
    command = [sys.executable, str(tmp_path / "planted.py"), str(tmp_path), str(tmp_path / "library")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    planted = json.loads(run.stdout)
    for fault, shown in {
        "AttributeOfNew": {"load_peak", "load_kept"},
        "AttributeOfForward": {"forward_peak", "forward_kept"},
        "NumpyInForward": {"forward_peak"},
        "UntouchedInForward": {"forward_peak"},
        "UntouchedOfNew": {"load_kept"},
        "ScratchInForward": {"forward_peak"},
        "ScratchKept": {"forward_peak", "forward_kept"},
        "KeptByTraining": {"step_peak", "step_kept"},
    }.items():
        baseline = Baseline({fault: planted["Sound"]}, 5, 0.1, resident.LIMIT)  # the largest tolerance there can be
        grown = {row.figure for row in compare(baseline, planted, [fault]) if row.verdict == "grew"}
        assert shown <= grown, fault
    baseline = Baseline({"again": planted["Sound"]}, 5, 0.1, 0.5)
    assert {row.verdict for row in compare(baseline, planted, ["again"])} == {"same"}
    # How much a first read of a library maps depends on what the system has cached of the file: 64 KiB, or megabytes.
    baseline = Baseline({"ReadsALibrary": planted["Sound"]}, 5, 0.1, 0.3)
    assert {row.verdict for row in compare(baseline, planted, ["ReadsALibrary"])} == {"same"}


def moved(**figures):
    return {variant: dict.fromkeys(FIGURES, 10.0) | figures for variant in VARIANTS}


@rows_in_one_case(
    ("value", "verdict"),
    [(9.4, "shrank"), (9.5, "same"), (10.0, "same"), (10.5, "same"), (10.6, "grew"), (11.0, "grew")],
)
def test_a_figure_may_differ_by_the_tolerance_in_both_directions(value, verdict):
    rows = compare(BASELINE, moved(forward_peak=value), ["lora"])
    assert {row.figure: row.verdict for row in rows} == dict.fromkeys(FIGURES, "same") | {"forward_peak": verdict}
    row = rows[FIGURES.index("forward_peak")]
    assert row.says == f"lora: forward_peak is {value:.2f} MiB, {value - 10:+.2f} from 10.00 (tolerance 0.50)"
    assert (row.base, row.head) == (10.0, value)


def runs(*values):
    return [dict.fromkeys(FIGURES, 1.0) | {"load_peak": value} for value in values]


def test_the_tolerance_is_twice_the_largest_distance_to_a_median_and_the_lag_of_the_counters():
    baseline = derive({"a": runs(1.0, 1.0, 1.1), "b": runs(5.0, 5.05, 5.0)})
    assert baseline.figures["a"]["load_peak"] == 1.0
    assert baseline.figures["b"]["load_peak"] == 5.0
    assert (baseline.runs, baseline.spread) == (3, 0.1)
    assert resident.COUNTER_LAG == 0.125
    assert baseline.tolerance == 0.33
    assert derive({"a": runs(1.0, 1.0, 0.9)}).tolerance == baseline.tolerance


def test_runs_that_would_let_a_megabyte_pass_give_no_baseline():
    with pytest.raises(MeasurementError, match=r"runs differ by 0\.30 MiB from their median"):
        derive({"a": runs(1.0, 1.0, 1.3)})
    assert resident.LIMIT < 1


def test_the_page_says_what_the_stored_baselines_hold():
    page = (ROOT / "docs" / "memory-gate.md").read_text(encoding="utf8")
    stored = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "memory").glob("resident-*.json")]
    for name, said in (
        ("spread_mib", "the run that was furthest off was {:.2f} to {:.2f} MiB off"),
        ("tolerance_mib", "the tolerances are {:.2f} to {:.2f} MiB"),
    ):
        values = [document[name] for document in stored]
        assert said.format(min(values), max(values)) in page.replace("\n", " ")
    assert {document["runs"] for document in stored} == {resident.STORE_RUNS}


def test_the_median_counts_and_not_the_run_that_was_disturbed():
    assert resident.medians({"a": runs(1.0, 9.0, 1.2)})["a"]["load_peak"] == 1.2


@rows_in_one_case(
    ("change", "said"),
    [
        ({"torch": "2.4"}, "its figures are of backend='avx2', torch='2.4'"),
        ({"figures": {"lora": 1}}, "it is damaged .lora: the figures"),
        ({"figures": {"lora": dict.fromkeys(FIGURES, True)}}, "load_peak=True must be a number"),
        ({"runs": "5"}, "runs='5' must be a number"),
        ({"tolerance_mib": 0.0}, "tolerance_mib=0.0 must be above 0"),
        ({"tolerance_mib": 1.0}, "tolerance_mib=1.0 must be above 0 and at most 0.7"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_refused(tmp_path, change, said):
    path = tmp_path / "resident.json"
    resident.write_baseline(path, KEY, BASELINE)
    assert resident.read_baseline(path, KEY) == BASELINE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        resident.read_baseline(path, KEY)


@pytest.fixture
def gate(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command on figures that are given, and gives exit code, stdout and stderr."""
    path = tmp_path / "benchmarks" / "memory" / f"resident-{KEY.name}.json"
    monkeypatch.setattr(resident, "current_key", lambda: KEY)
    monkeypatch.setattr(resident, "ROOT", tmp_path)
    monkeypatch.setattr(resident, "unsupported", lambda: None)
    monkeypatch.setattr(resident, "measure_ways", lambda folder: dict.fromkeys(WAYS, 100.0))
    monkeypatch.delenv("LOWMEM_KERNEL", raising=False)
    resident.write_baseline(path, KEY, BASELINE)

    def gate(*options, measured=()):
        answers = iter(measured)

        def measure_variants(variants, count, folder):
            variants = list(variants)
            figures = next(answers) if variants else {}
            return {variant: [figures[variant]] * count for variant in variants}

        monkeypatch.setattr(resident, "measure_variants", measure_variants)
        code = resident.main(options)
        assert not list(answers), "it was measured less often than it should be"
        return code, *capsys.readouterr()

    gate.path = path
    return gate


def one_error(code, out, err):
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert len(err) <= 300
    assert err.startswith("resident: ")
    return err.rstrip("\n")


def test_the_same_figures_pass(gate):
    code, out, err = gate(measured=[moved(load_peak=10.4)])
    assert (code, err) == (0, "")
    assert f"{len(FIGURES) * len(VARIANTS)} figures are those of benchmarks/memory/resident-{KEY.name}.json" in out
    assert "FAILED" not in out
    assert all(any(line.startswith(f"{variant} ") for line in out.splitlines()) for variant in VARIANTS)


def test_what_a_converted_model_keeps_may_differ_by_ten_megabytes_from_the_same_one_loaded(
    gate, monkeypatch, tmp_path
):
    def measured(size):
        monkeypatch.setattr(resident, "measure_ways", lambda folder: dict.fromkeys(WAYS, size) | {LOADED: 100.0})
        return gate("--json", str(tmp_path / "out.json"), measured=[moved()])

    assert measured(110.0)[0] == 0
    code, out, err = measured(111.0)
    assert (code, err) == (1, "")
    line = "mapped, converted: 111.00 MiB are resident, +11.00 from 100.00 loaded (tolerance 10)"
    assert f"FAILED {line}\n" in out
    assert "To store" not in out  # it has no baseline
    verdict = read_verdict(tmp_path / "out.json")
    assert (verdict.passed, verdict.rows[-1].verdict, verdict.rows[-1].says) == (False, "grew", line)
    assert measured(89.0)[0] == 1
    code, out, _ = gate("--variant", "lora", measured=[moved()])
    assert code == 0
    assert f"{len(FIGURES)} figures are those" in out


def test_converted_models_are_measured_with_the_settings_of_the_c_library(monkeypatch, tmp_path):
    found = []

    def run(command, *, env, **_):
        found.append((command[-2], any(name.startswith("MALLOC_") for name in env)))
        return subprocess.CompletedProcess(command, 0, stdout='{"kept": 12.5}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(resident, "Layers", lambda: resident.Small())
    assert resident.measure_ways(tmp_path) == dict.fromkeys(WAYS, 12.5)
    assert found == [(way, False) for way in WAYS]
    sizes = [sum(one.nbytes for one in build(tmp_path).parameters()) for build in WAYS.values()]
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("value", [9.0, 11.0])
def test_a_megabyte_more_or_less_fails_with_the_command_that_stores_it(gate, value):
    figures = moved()
    figures["lora"]["forward_kept"] = value
    code, out, err = gate(measured=[figures, figures])
    assert (code, err) == (1, "")
    (line,) = (line for line in out.splitlines() if line.startswith("FAILED"))
    assert line.startswith(f"FAILED lora: forward_kept is {value:.2f} MiB")
    assert "To store the new figures: python -m benchmarks.resident --store\nand say in the commit's message" in out
    code, out, _ = gate(measured=[figures, moved()])  # it is measured again before it fails
    assert (code, "FAILED" in out) == (0, False)


def test_a_variant_that_the_baseline_lacks_fails_and_so_does_one_that_went(gate):
    document = json.loads(gate.path.read_text())
    document["figures"]["gone"] = document["figures"].pop("lora")
    gate.path.write_text(json.dumps(document))
    code, out, _ = gate(measured=[moved()])
    assert code == 1
    assert "FAILED lora is new" in out
    assert "FAILED gone is missing" in out


def test_without_a_baseline_it_fails_and_names_the_versions_that_have_one_and_the_command(gate, monkeypatch):
    gate.path.rename(gate.path.with_name("resident-avx512-torch2.12.json"))
    monkeypatch.setenv("LOWMEM_KERNEL", "avx2")
    code, out, err = gate()
    assert (code, err) == (1, "")
    said = (
        f"FAILED there is no benchmarks/memory/resident-{KEY.name}.json; baselines are stored for torch 2.12 (avx512)"
    )
    assert said in out
    assert "To store one: LOWMEM_KERNEL=avx2 python -m benchmarks.resident --store" in out
    assert not gate.path.exists()


@rows_in_one_case("text", ["", "{", "[]", '{"figures": {}}'])
def test_a_damaged_baseline_is_one_line(gate, text):
    gate.path.write_text(text)
    line = one_error(*gate())
    assert f"resident-{KEY.name}.json is no baseline of this run: " in line
    assert line.endswith("; store one: python -m benchmarks.resident --store")
    assert gate.path.read_text() == text


def test_a_system_without_a_high_water_mark_skips_and_says_so(gate, monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "unsupported", lambda: "no such file")
    code, out, _ = gate("--json", str(tmp_path / "out.json"))
    assert (code, out) == (0, "skipped: no such file\n")
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["verdict"] == "skipped"
    assert "no such file" in one_error(*gate("--store"))


def test_a_system_that_cannot_map_libraries_or_reset_the_mark_or_has_many_processors_is_unsupported(monkeypatch):
    monkeypatch.setattr(resident.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(resident, "reset_high_water", lambda: None)
    monkeypatch.setattr(resident.platform, "release", lambda: "5.13.0-generic")
    assert "needs 5.14" in resident.unsupported()
    monkeypatch.setattr(resident.platform, "release", lambda: "5.14.0-1.el9")
    assert resident.unsupported() is None
    for processors in (None, 16):
        monkeypatch.setattr(resident.os, "cpu_count", lambda processors=processors: processors)
        assert resident.unsupported() is None
    monkeypatch.setattr(resident.os, "cpu_count", lambda: 17)
    assert resident.unsupported() == "Linux counts pages too coarsely with 17 processors"
    monkeypatch.setattr(resident.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(resident, "reset_high_water", Path("/no such file").read_text)
    assert "No such file" in resident.unsupported()


def test_a_verdict_that_cannot_be_written_or_would_replace_a_baseline_is_one_line(gate, tmp_path):
    before = gate.path.read_bytes()
    for name in (gate.path.name, "resident-avx512-torch2.13.json"):
        assert "lies among the baselines" in one_error(*gate("--json", str(gate.path.with_name(name))))
    (tmp_path / "file").write_text("")
    assert "file" in one_error(*gate("--json", str(tmp_path / "file" / "out.json")))
    assert gate.path.read_bytes() == before


def test_storing_writes_the_medians_and_the_tolerance(gate):
    gate.path.unlink()
    code, out, _ = gate("--store", measured=[moved(load_peak=7.0)])
    assert code == 0
    assert "the tolerance is 0.13 MiB" in out
    stored = resident.read_baseline(gate.path, KEY)
    assert stored.figures == moved(load_peak=7.0)
    assert stored.runs == resident.STORE_RUNS


def test_storing_a_part_or_where_nothing_can_be_written_is_refused(gate):
    before = gate.path.read_bytes()
    for options in (["--variant", "lora"], ["--json", "out.json"]):
        assert "leave --variant and --json out" in one_error(*gate("--store", *options))
    assert gate.path.read_bytes() == before
    gate.path.unlink()
    gate.path.parent.rmdir()
    gate.path.parent.write_text("a file")
    one_error(*gate("--store"))
    assert gate.path.parent.read_text() == "a file"


@pytest.mark.parametrize("options", [[], ["--store"]], ids=["compare", "store"])
def test_a_variant_that_fails_is_one_line_and_nothing_is_overwritten(gate, monkeypatch, capsys, options):
    before = gate.path.read_bytes()
    ended = subprocess.CompletedProcess([], 2, stdout="", stderr="a warning\nRuntimeError: forward\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    line = one_error(resident.main(options), *capsys.readouterr())
    assert line == "resident: bignet: its process ended with exit code 2: RuntimeError: forward"
    assert gate.path.read_bytes() == before


@pytest.mark.processes(keep=1)
@pytest.mark.parametrize(
    ("code", "out"), [(0, ""), (0, "{}"), (0, "text"), (-9, ""), (1, json.dumps(dict.fromkeys(FIGURES, 1.0)))]
)
def test_a_process_without_all_figures_counts_as_failed(monkeypatch, tmp_path, code, out):
    ended = subprocess.CompletedProcess([], code, stdout=out, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(MeasurementError, match=f"lora: its process ended with exit code {code}: it said nothing"):
        resident.measure_variants(["lora"], 1, tmp_path)


@pytest.mark.processes
def test_each_variant_is_measured_in_processes_of_its_own(monkeypatch, tmp_path):
    figures, commands = dict.fromkeys(FIGURES, 1.0), []

    def run(command, *, env, **_):
        assert (tmp_path / command[-2]).is_file()
        assert env["MALLOC_ARENA_MAX"] == "1"
        commands.append(command[-3:])
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{json.dumps(figures)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    measured = resident.measure_variants(["half_precision", "lora"], 2, tmp_path)
    assert measured == {"half_precision": [figures] * 2, "lora": [figures] * 2}
    assert commands == [["--measure", variant, str(tmp_path)] for variant in measured for _ in range(2)]


def test_a_variant_that_cannot_be_built_is_one_line(gate, monkeypatch, capsys):
    def fail(*_):
        raise IndexError("build\nof a model")

    monkeypatch.setattr("lowmem.build", fail)
    assert one_error(resident.main([]), *capsys.readouterr()) == "resident: bignet: IndexError: build"


@rows_in_one_case("options", [["--variant", "gone"], ["--nothing"], ["--json"]])
def test_an_option_that_is_none_is_one_line(capsys, options):
    with pytest.raises(SystemExit) as ended:
        resident.main(options)
    assert options[0] in one_error(ended.value.code, *capsys.readouterr())


def test_a_model_that_fails_in_its_process_is_one_line_there(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("forward\nof a model")

    monkeypatch.setattr(resident, "steady", lambda: None)
    monkeypatch.setattr(resident, "warm", fail)
    assert resident.main(["--measure", "lora", str(tmp_path)]) == 2
    assert tuple(capsys.readouterr()) == ("", "RuntimeError: forward\n")
