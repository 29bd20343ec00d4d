"""A megabyte that no tensor shows fails the gate of resident memory; what repeated runs differ by does not."""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import lowmem
from benchmarks import resident
from benchmarks.resident import FIGURES, LOADED, VARIANTS, WAYS, Baseline, compare, derive
from lowmem.testing.gate_verdicts import read_verdict
from lowmem.testing.memory_baseline import BaselineKey

ROOT = Path(__file__).parents[2]
KEY = BaselineKey("avx2", "2.13", 2)
BASELINE = Baseline({variant: dict.fromkeys(FIGURES, 10.0) for variant in VARIANTS}, 5, 0.1, 0.5)
WIDTH, MEGABYTE = 256, 2**20

needs_high_water = pytest.mark.skipif(resident.unsupported() is not None, reason=str(resident.unsupported()))


def planted(new=lambda model: None, forward=lambda model, out: out):
    """Return a class of models that do something when they are made, and in each forward."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            new(self)

        def forward(self, x):
            return forward(self, self.linear(x))

    return Model


def keep_once(model, out):
    if not hasattr(model, "kept"):
        model.kept = bytearray(b"1" * MEGABYTE)
    return out


def keep_by_training(model, out):
    if out.requires_grad:
        out.register_hook(lambda _: setattr(model, "kept", np.ones(MEGABYTE, dtype=np.uint8)))
    return out


def measure_planted(folder):
    """Print the figures of models that each keep or take one megabyte that is in no tensor, in this process."""
    with (folder / "library").open("rb") as library:
        mapped = mmap.mmap(library.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)  # as a library's code is
    c = ctypes.CDLL(None)
    c.malloc.restype = ctypes.c_void_p

    def take_scratch(model, out):
        address = ctypes.c_void_p(c.malloc(ctypes.c_size_t(MEGABYTE)))
        ctypes.memset(address, 1, MEGABYTE)
        c.free(address)
        return out

    kinds = {
        "Sound": planted(),
        "again": planted(),
        "AttributeOfNew": planted(lambda model: setattr(model, "kept", bytearray(b"1" * MEGABYTE))),
        "UntouchedOfNew": planted(lambda model: setattr(model, "kept", bytes(MEGABYTE))),
        "AttributeOfForward": planted(forward=keep_once),
        "NumpyInForward": planted(forward=lambda model, out: out + float(np.ones(MEGABYTE, dtype=np.uint8)[0])),
        "UntouchedInForward": planted(forward=lambda model, out: out + float(np.zeros(MEGABYTE, dtype=np.uint8)[0])),
        "ScratchInForward": planted(forward=take_scratch),
        "ReadsALibrary": planted(forward=lambda model, out: out + sum(mapped[:: mmap.PAGESIZE])),
        "KeptByTraining": planted(forward=keep_by_training),
    }

    def convert(factory):
        return lowmem.convert(factory(), lowmem.FourBit())

    resident.steady()
    resident.warm(folder, convert, WIDTH)
    figures = {}
    for name, factory in kinds.items():
        lowmem.save(convert(factory), folder / name)
        figures[name] = resident.measure(folder / name, factory, WIDTH)
    print(json.dumps(figures))


@pytest.mark.gates
@needs_high_water
def test_a_megabyte_that_no_tensor_shows_fails_and_what_is_the_same_passes(tmp_path):
    """A sound model, measured twice, and those with a megabyte too much, in a process of their own."""
    (tmp_path / "library").write_bytes(b"1" * 4 * 2**20)
    command = [sys.executable, "-m", "tests.benchmarks.test_resident", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=resident.environment())
    assert run.returncode == 0, run.stderr
    planted = json.loads(run.stdout)
    for fault, shown in {
        "AttributeOfForward": {"forward_peak", "forward_kept"},
        "NumpyInForward": {"forward_peak"},
        "UntouchedInForward": {"forward_peak"},
        "AttributeOfNew": {"load_peak", "load_kept"},
        "UntouchedOfNew": {"load_kept"},
        "ScratchInForward": {"forward_peak"},
        "KeptByTraining": {"step_peak", "step_kept"},
    }.items():
        baseline = Baseline({fault: planted["Sound"]}, 5, 0.1, resident.LIMIT)  # the largest tolerance there can be
        grown = {row.figure for row in compare(baseline, planted, [fault]) if row.verdict == "grew"}
        assert shown <= grown, fault
    # How much a first read of a library maps depends on what the system has cached of the file: 64 KiB, or megabytes.
    for sound, tolerance in (("again", 0.5), ("ReadsALibrary", 0.3)):
        baseline = Baseline({sound: planted["Sound"]}, 5, 0.1, tolerance)
        assert {row.verdict for row in compare(baseline, planted, [sound])} == {"same"}


def moved(**figures):
    return {variant: dict.fromkeys(FIGURES, 10.0) | figures for variant in VARIANTS}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(9.4, "shrank"), (9.5, "same"), (10.0, "same"), (10.5, "same"), (10.6, "grew"), (11.0, "grew")],
)
def test_a_figure_may_differ_by_the_tolerance_in_both_directions(value, verdict):
    rows = compare(BASELINE, moved(forward_peak=value), ["lora"])
    assert {row.figure: row.verdict for row in rows} == dict.fromkeys(FIGURES, "same") | {"forward_peak": verdict}
    row = rows[FIGURES.index("forward_peak")]
    assert row.says == f"lora: forward_peak is {value:.2f} MiB, from 10.00 MiB (tolerance 0.50)"
    assert (row.base, row.head) == (10.0, value)


def runs(*values):
    return [dict.fromkeys(FIGURES, 1.0) | {"load_peak": value} for value in values]


def test_the_tolerance_is_of_the_distances_to_a_median_and_lets_no_megabyte_pass():
    baseline = derive({"a": runs(1.0, 1.0, 1.1), "b": runs(5.0, 5.05, 5.0)})
    assert [baseline.figures[name]["load_peak"] for name in "ab"] == [1.0, 5.0]
    assert (baseline.runs, baseline.spread, baseline.tolerance) == (3, 0.1, 0.33)
    assert derive({"a": runs(1.0, 1.0, 0.9)}).tolerance == baseline.tolerance
    with pytest.raises(ValueError, match=r"runs differ by 0\.30 MiB from their median"):
        derive({"a": runs(1.0, 1.0, 1.3)})
    assert resident.LIMIT < 1


def test_the_page_says_what_the_stored_baselines_hold():
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf8")
    stored = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "memory").glob("resident-*.json")]
    for name, said in (
        ("spread_mib", "the run that was furthest off was {:.2f} to {:.2f} MiB off"),
        ("tolerance_mib", "the tolerances are {:.2f} to {:.2f} MiB"),
    ):
        values = [document[name] for document in stored]
        assert said.format(min(values), max(values)) in page.replace("\n", " ")
    assert {document["runs"] for document in stored} == {resident.STORE_RUNS}


@pytest.fixture
def gate(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command on figures that are given, and gives exit code, stdout and stderr."""
    path = tmp_path / "benchmarks" / "memory" / f"resident-{KEY.file_stem}.json"
    monkeypatch.setattr(resident, "current_key", lambda: KEY)
    monkeypatch.setattr(resident, "ROOT", tmp_path)
    monkeypatch.setattr(resident, "unsupported", lambda: None)
    monkeypatch.delenv("LOWMEM_KERNEL", raising=False)
    resident.write_baseline(path, KEY, BASELINE)

    def gate(*options, measured=(), ways=100.0):
        answers = iter(measured)

        def measure_variants(variants, count, folder):
            variants = list(variants)
            figures = next(answers) if variants else {}
            return {variant: [figures[variant]] * count for variant in variants}

        monkeypatch.setattr(resident, "measure_ways", lambda folder: dict.fromkeys(WAYS, ways) | {LOADED: 100.0})
        monkeypatch.setattr(resident, "measure_variants", measure_variants)
        code = resident.main(options)
        assert not list(answers), "it was measured less often than it should be"
        return code, *capsys.readouterr()

    gate.path = path
    return gate


def test_the_same_figures_pass_and_what_moved_fails_once_it_is_measured_again(gate, tmp_path):
    code, out, err = gate("--json", str(tmp_path / "out.json"), measured=[moved(load_peak=10.4)])
    assert (code, err) == (0, "")
    assert (
        f"{len(FIGURES) * len(VARIANTS)} figures are those of benchmarks/memory/resident-{KEY.file_stem}.json" in out
    )
    assert all(any(line.startswith(f"{variant} ") for line in out.splitlines()) for variant in VARIANTS)
    assert read_verdict(tmp_path / "out.json").passed
    for value in (9.0, 11.0):
        figures = moved()
        figures["lora"]["forward_kept"] = value
        code, out, _ = gate(measured=[figures, figures])
        assert code == 1
        assert out.count("FAILED") == 1
        assert f"FAILED lora: forward_kept is {value:.2f} MiB, from 10.00 MiB (tolerance 0.50)\n" in out
        assert "To store the new figures: python -m benchmarks.resident --store\n" in out
        assert gate(measured=[figures, moved()])[0] == 0


def test_a_converted_model_may_keep_ten_megabytes_more_than_the_same_one_loaded(gate, tmp_path):
    for size, code in ((110.0, 0), (111.0, 1), (89.0, 1)):
        found, out, _ = gate("--json", str(tmp_path / "out.json"), measured=[moved()], ways=size)
        assert found == code
        line = f"mapped, converted: kept is {size:.2f} MiB, from 100.00 MiB (tolerance 10.00)"
        assert read_verdict(tmp_path / "out.json").rows[-1].says == line
        assert (f"FAILED {line}\n" in out) == bool(code)
        assert "To store" not in out  # it has no baseline
    code, out, _ = gate("--variant", "lora", measured=[moved()])
    assert (code, f"{len(FIGURES)} figures are those" in out) == (0, True)


def test_a_variant_that_is_new_or_gone_fails_and_so_does_a_baseline_that_is_missing(gate, monkeypatch):
    text = gate.path.read_text()
    gate.path.write_text(text.replace('"lora"', '"gone"'))
    code, out, _ = gate(measured=[moved()])
    assert code == 1
    assert "FAILED lora: load_peak is none" in out
    assert "FAILED gone: load_peak is none, from 10.00 MiB" in out
    gate.path.rename(gate.path.with_name("resident-avx512-torch2.12.json"))
    monkeypatch.setenv("LOWMEM_KERNEL", "avx2")
    code, out, _ = gate()
    assert (code, "LOWMEM_KERNEL=avx2 python -m benchmarks.resident --store" in out) == (1, True)
    assert f"resident-{KEY.file_stem}.json; baselines are stored for torch 2.12 (avx512)\n" in out


def one_error(code, out, err):
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert len(err) <= 300
    assert err.startswith("resident: ")
    return err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("", "the JSON is broken"),
        ({"torch": "2.4"}, "its figures are of backend='avx2', torch='2.4'"),
        ({"tolerance_mib": 1.0}, "tolerance_mib=1.0 must be above 0 and at most 0.7"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_one_line(gate, change, said):
    resident.write_baseline(gate.path, KEY, BASELINE)
    assert resident.read_baseline(gate.path, KEY) == BASELINE
    text = change if isinstance(change, str) else json.dumps(json.loads(gate.path.read_text()) | change)
    gate.path.write_text(text)
    line = one_error(*gate())
    assert f"resident-{KEY.file_stem}.json is no baseline of this run: " in line, line
    assert said in line
    assert gate.path.read_text() == text


def test_a_system_that_cannot_map_libraries_or_reset_the_mark_skips(gate, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(resident.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(resident, "reset_high_water", lambda: None)
    for release, said in (("5.13.0-generic", "needs 5.14"), ("5.14.0-1.el9", "")):
        monkeypatch.setattr(resident.platform, "release", lambda release=release: release)
        assert (resident.unsupported() or "").endswith(said)
    monkeypatch.setattr(resident, "reset_high_water", Path("/no such file").read_text)
    assert "No such file" in resident.unsupported()
    monkeypatch.setattr(resident.os, "cpu_count", lambda: 17)
    assert resident.main([]) == 0
    assert resident.main(["--store"]) == 2
    out, err = capsys.readouterr()
    assert out == "skipped: Linux counts pages too coarsely with 17 processors\n"
    assert err == "resident: nothing to store: Linux counts pages too coarsely with 17 processors\n"


def test_storing_writes_the_medians_and_the_tolerance(gate):
    gate.path.unlink()
    code, out, _ = gate("--store", measured=[moved(load_peak=7.0)])
    assert (code, "the tolerance is 0.13 MiB" in out) == (0, True)
    stored = resident.read_baseline(gate.path, KEY)
    assert (stored.figures, stored.runs) == (moved(load_peak=7.0), resident.STORE_RUNS)
    with pytest.raises(SystemExit, match="2"):
        resident.main(["--store", "--variant", "lora"])


@pytest.mark.processes
def test_each_variant_has_processes_of_its_own_with_the_settings_of_the_c_library(monkeypatch, tmp_path, capsys):
    commands = []

    def run(command, *, env, **_):
        commands.append((command[-2], env.get("MALLOC_ARENA_MAX")))
        return subprocess.CompletedProcess(command, 0, stdout='noise\n{"kept": 12.5}\n')

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(resident, "Layers", lambda: resident.Small())
    assert resident.measure_variants(["half_precision", "lora"], 2, tmp_path)["lora"] == [{"kept": 12.5}] * 2
    assert commands == [(variant, "1") for variant in ("half_precision", "lora") for _ in range(2)]
    commands.clear()
    assert resident.measure_ways(tmp_path) == dict.fromkeys(WAYS, 12.5)
    assert commands == [(way, None) for way in WAYS]
    assert len({sum(one.nbytes for one in build(tmp_path).parameters()) for build in WAYS.values()}) == 1

    def fails(*_, **__):
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr(resident, "unsupported", lambda: None)
    monkeypatch.setattr(subprocess, "run", fails)
    assert "returned non-zero exit status 1" in one_error(resident.main(["--store"]), *capsys.readouterr())


if __name__ == "__main__":
    measure_planted(Path(sys.argv[1]))
