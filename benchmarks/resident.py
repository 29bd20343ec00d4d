"""Resident memory: what a process holds while a variant is loaded, runs and trains, in pages.

``lowmem.measure`` counts storages of tensors, to the byte. It sees no array of numpy, no plain attribute, and nothing
that C takes with ``malloc``. The kernel's high-water mark of a process (``VmHWM``) sees them all:

    python -m benchmarks.resident            fails where a figure is further from the baseline than its tolerance
    python -m benchmarks.resident --store    stores the baseline, with the tolerance that repeated runs give

docs/memory-gate.md says what is measured, and how noise is kept out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import lowmem
from lowmem import kernels
from lowmem.errors import describe, one_line, reason, show
from lowmem.io.atomic import check_writable
from lowmem.testing.baseline import Key, parse_document, stored_keys, write_figures
from lowmem.testing.memory import THREADS
from lowmem.testing.verdicts import FAILING, Row, Verdict, verdict_of, write_verdict
from lowmem.transforms.summary import aligned

ROOT = Path(__file__).parents[1]
RUNS = 3  # fresh processes of a variant, whose median counts; and so many more before one fails
STORE_RUNS = 5  # of a variant, from which the tolerance is derived
# MiB by which Linux may show a high-water mark too small: a processor holds back up to 32 pages.
COUNTER_LAG = 0.125
LIMIT = 0.7  # MiB of tolerance: a megabyte may be shown as 1 - COUNTER_LAG, and must fail
BATCHES = {"forward": 1, "step": 16}  # activations of one input are small: a megabyte taken beside them shows
CLASSES = 10
WAYS_LIMIT = 10  # MiB by which processes with the same model, converted or loaded, may differ
FIGURES = [f"{phase}_{what}" for phase in ("load", "forward", "step") for what in ("peak", "kept")]

# four_bit and qlora_4bit compute as the nf4 variants do, with other levels and blocks.
VARIANTS = [name for name in lowmem.VARIANTS if name not in ("four_bit", "qlora_4bit")]

Figures = Mapping[str, Mapping[str, float]]  # MiB, by variant, then by name of the figure


class Small(nn.Module):
    """A model of the layers that BigNet has, to warm lowmem's code without its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(x + self.first(x).relu()))


class Layers(nn.Sequential):
    """Weights of 3 MiB, for which glibc takes the heap once it has freed a larger one."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(*((512, 1536), (1536, 512))[number % 2]) for number in range(48)))


# The process that measures


def measure(path: Path, factory: Callable[[], nn.Module], width: int = 1024) -> dict[str, float]:
    """Measure a saved model in this process, which ``warm`` has prepared: MiB of each of ``FIGURES``.

    The peak is what was resident at most beyond what was before, and kept what still is afterwards.
    """
    figures: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    x = {phase: torch.randn(batch, width, generator=generator) for phase, batch in BATCHES.items()}

    def load() -> nn.Module:
        model = lowmem.load(path, factory)
        _touch(model)
        return model

    def forward() -> None:
        with torch.no_grad():
            model(x["forward"])

    model = _record(figures, "load", load)
    _record(figures, "forward", forward)
    step = _step(model, x["step"], width)
    _record(figures, "step", step)
    return figures


def warm(folder: Path, convert: Callable[[Callable[[], nn.Module]], nn.Module], width: int = 1024) -> None:
    """Let this process import and allocate once what is not the measured model's."""
    dense = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width))
    for batch in BATCHES.values():
        _run_once(dense, batch, width)
    lowmem.save(convert(Small), folder / "small")
    small = lowmem.load(folder / "small", Small)
    _touch(small)
    for batch in BATCHES.values():
        _run_once(small, batch, 64)
    _record({}, "nothing", lambda: None)
    map_libraries()


def _run_once(model: nn.Module, batch: int, width: int) -> None:
    x = torch.ones(batch, width)
    with torch.no_grad():
        model(x)
    _step(model, x, width)()


def _step(model: nn.Module, x: torch.Tensor, width: int) -> Callable[[], None]:
    trained = nn.Sequential(model, nn.Linear(width, CLASSES))
    labels = torch.zeros(len(x), dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), labels).backward()
        optimizer.step()

    return step


def _touch(model: nn.Module) -> None:
    """Read a byte of each page: a loaded file is mapped, and only what was read is resident."""
    for tensor in {*model.parameters(), *model.buffers()}:
        torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())[:: os.sysconf("SC_PAGE_SIZE")].sum()


def _record(figures: dict[str, float], phase: str, run: Callable[[], Any]) -> Any:
    gc.collect()
    gc.disable()  # so that it does not depend on when it collects
    try:
        reset_high_water()
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
    finally:
        gc.enable()
    gc.collect()
    figures[f"{phase}_peak"] = _mib(peak - before)
    figures[f"{phase}_kept"] = _mib(_status("VmRSS") - before)
    return result


def reset_high_water() -> None:
    """Let VmHWM start again from what is resident now (``man 5 proc_pid_clear_refs``)."""
    Path("/proc/self/clear_refs").write_text("5")


def map_libraries() -> None:
    """Make every page of the libraries' files resident.

    Code that runs for the first time would otherwise count, by as many pages as the system happens to map at once.
    """
    populate_read = 22
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if not (permissions.startswith("r") and permissions.endswith("p") and path and path[0].startswith("/")):
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), populate_read):
            raise OSError(ctypes.get_errno(), "the pages of a library cannot be mapped", path[0])


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _mib(count: int) -> float:
    return round(count / 2**20, 3)


def steady() -> None:
    """Make what is resident in this process as much the same in every run as can be."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # each holds back some of what it counts
    no_huge_pages = 41  # PR_SET_THP_DISABLE
    ctypes.CDLL(None).prctl(no_huge_pages, 1, 0, 0, 0)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is larger has pages of its own, which are returned when it is freed
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
        "MALLOC_PERTURB_": "1",  # malloc and calloc fill what they give: pages that nobody writes to count, too
        "OMP_NUM_THREADS": str(THREADS),
        "OMP_WAIT_POLICY": "passive",  # they share a processor
        "GOMP_SPINCOUNT": "0",
        "PYTHONHASHSEED": "0",
    }


def _measure_here(name: str, folder: Path) -> int:
    """Measure a variant or way in this process, and print figures as JSON; or say in one line why that failed."""
    try:
        steady()
        warm(folder, _converted if name in WAYS else lambda factory: lowmem.build(name, factory))
        figures = measure_way(name, folder) if name in WAYS else measure(folder / name, lowmem.BigNet)
    except Exception as error:  # noqa: BLE001  whatever a model raises
        print(describe(error), file=sys.stderr)
        return 2
    print(json.dumps(figures))
    return 0


def _converted(factory: Callable[[], nn.Module]) -> nn.Module:
    return lowmem.convert(factory(), lowmem.FourBit("nf4"))


def _read_dense(folder: Path) -> nn.Module:
    model = Layers()
    model.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
    return model


LOADED = "loaded"
WAYS: Mapping[str, Callable[[Path], nn.Module]] = {
    LOADED: lambda folder: lowmem.load(folder / "stored", Layers),
    "read, converted": lambda folder: _converted(lambda: _read_dense(folder)),
    "mapped, converted": lambda folder: _converted(lambda: lowmem.load(folder / "dense", Layers)),
}
"""Ways to get the same converted model from the files that ``write_layers`` writes."""


def write_layers(folder: Path) -> None:
    model = Layers()
    torch.save(model.state_dict(), folder / "dense.pt")
    lowmem.save(model, folder / "dense")
    lowmem.save(_converted(lambda: model), folder / "stored")


def measure_way(way: str, folder: Path) -> dict[str, float]:
    """Return the MiB that this process, which ``warm`` has prepared, has resident with a model."""
    model = WAYS[way](folder)
    _touch(model)
    gc.collect()
    return {"kept": _mib(_status("VmRSS"))}


# The process that compares


class MeasurementError(RuntimeError):
    """A variant could not be measured; the message says which, and why."""


@dataclass(frozen=True)
class Baseline:
    """What was stored: the figures, and how far off one may be, in MiB."""

    figures: Figures  # medians
    runs: int  # of each variant
    spread: float  # by which the run that was furthest off differed from its median
    tolerance: float


def unsupported() -> str | None:
    """Say why nothing can be measured on this system, or return None."""
    processors = os.cpu_count()
    # Linux holds back max(32, 2 * processors) pages on each, and COUNTER_LAG is for 32.
    if processors is not None and processors > 16:
        return f"Linux counts pages too coarsely with {processors} processors"
    try:
        reset_high_water()
        _status("VmHWM")
    except OSError as error:
        return f"this system has no high-water mark of a process that can be reset ({error.strerror or error})"
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if version and tuple(map(int, version.groups())) < (5, 14):
        return f"Linux {platform.release()} cannot map a library whole: it needs 5.14"
    return None


def measure_variants(variants: Iterable[str], runs: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Measure each variant in so many fresh processes."""
    measured: dict[str, list[dict[str, float]]] = {}
    for variant in variants:
        try:
            lowmem.save(lowmem.build(variant), folder / variant)
        except Exception as error:
            raise MeasurementError(f"{variant}: {describe(error)}") from error
        measured[variant] = [_in_process(variant, folder) for _ in range(runs)]
        (folder / variant).unlink()
    return measured


def printed_json(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run a module of the benchmarks in a fresh process, and return the JSON of the last line that it prints."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _in_process(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.resident", "--measure", name, str(folder)]
    own = {key: value for key, value in environment().items() if name not in WAYS or not key.startswith("MALLOC_")}
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    try:
        figures = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {}
    except (IndexError, ValueError):
        figures = {}
    if sorted(figures) != (["kept"] if name in WAYS else sorted(FIGURES)):
        said = run.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MeasurementError(f"{name}: its process ended with exit code {run.returncode}: {said[0]}")
    return figures


def measure_ways(folder: Path) -> dict[str, float]:
    """Return the resident MiB of a fresh process for each of ``WAYS``, with the C library's own settings."""
    write_layers(folder)
    return {way: _in_process(way, folder)["kept"] for way in WAYS}


def compare_ways(kept: Mapping[str, float]) -> list[Row]:
    """Compare a process that has converted a model with one that has loaded it."""
    rows, base = [], kept[LOADED]
    for way, size in kept.items():
        if way != LOADED:
            moved = f"{size - base:+.2f} from {base:.2f} {LOADED} (tolerance {WAYS_LIMIT})"
            says = f"{way}: {size:.2f} MiB are resident, {moved}"
            rows.append(Row(way, "kept", base, size, verdict=verdict_of(base, size, WAYS_LIMIT), says=says))
    return rows


def medians(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        variant: {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        for variant, runs in measured.items()
    }


def derive(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> Baseline:
    """Derive the tolerance of repeated runs: twice the largest distance to a median, and the lag of the counters."""
    figures = medians(measured)
    spread = max(
        abs(run[name] - figures[variant][name]) for variant, runs in measured.items() for run in runs for name in run
    )
    tolerance = math.ceil(round(200 * spread + 100 * COUNTER_LAG, 3)) / 100  # in hundredths
    if tolerance > LIMIT:
        raise MeasurementError(
            f"runs differ by {spread:.2f} MiB from their median, so that a megabyte might pass; "
            "store again when the machine has memory to spare"
        )
    return Baseline(figures, min(map(len, measured.values())), round(spread, 3), tolerance)


def compare(baseline: Baseline, now: Figures, variants: Iterable[str]) -> list[Row]:
    """Compare the medians of this run with the baseline, in both directions."""
    rows = []
    for variant in variants:
        before, after = baseline.figures.get(variant), now.get(variant)
        if before is None or after is None:
            verdict = "new" if before is None else "missing"
            why = "the baseline has no figures of it" if before is None else "it is in the baseline"
            rows.append(Row(variant, "", verdict=verdict, says=f"{variant} is {verdict}: {why}"))
            continue
        for name in FIGURES:
            base, head = before[name], after[name]
            moved = f"{head - base:+.2f} from {base:.2f} (tolerance {baseline.tolerance:.2f})"
            says = f"{variant}: {name} is {head:.2f} MiB, {moved}"
            rows.append(Row(variant, name, base, head, verdict=verdict_of(base, head, baseline.tolerance), says=says))
    return rows


def current_key() -> Key:
    """Return the key of this process: the kernel that serves it, and torch's minor version."""
    return Key.of_this_process(lowmem.backend().partition(":")[0], THREADS)


def baseline_path(key: Key) -> Path:
    """Return where the baseline of a key lies, beside the one of exact bytes."""
    return ROOT / "benchmarks" / "memory" / f"resident-{key.name}.json"


def read_baseline(path: Path, key: Key) -> Baseline:
    """Read a baseline."""
    document = parse_document(path.read_bytes(), key, "runs", "spread_mib", "tolerance_mib")
    figures, tolerance = document["figures"], document["tolerance_mib"]
    for variant, values in figures.items():
        if not isinstance(values, dict) or sorted(values) != sorted(FIGURES):
            raise ValueError(f"it is damaged ({variant}: the figures {', '.join(FIGURES)} were expected)")
        for name, value in values.items():
            _check_number(f"{variant}: {name}", value)
    for name in ("runs", "spread_mib", "tolerance_mib"):
        _check_number(name, document[name])
    if not 0 < tolerance <= LIMIT:
        raise ValueError(f"it is damaged (tolerance_mib={tolerance} must be above 0 and at most {LIMIT})")
    return Baseline(figures, document["runs"], document["spread_mib"], tolerance)


def _check_number(name: str, value: object) -> None:
    if type(value) not in (int, float):
        raise ValueError(f"it is damaged ({name}={show(value)} must be a number)")


def write_baseline(path: Path, key: Key, baseline: Baseline) -> None:
    """Write a baseline, whole or not at all."""
    measured = {"runs": baseline.runs, "spread_mib": baseline.spread, "tolerance_mib": baseline.tolerance}
    write_figures(path, key, baseline.figures, **measured)


def store_command() -> str:
    """Return the command that stores this run's figures, for the kernel that was chosen if one was."""
    chosen = os.environ.get(kernels.VARIABLE)
    return f"{kernels.VARIABLE}={chosen} " * bool(chosen) + "python -m benchmarks.resident --store"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"resident: {message}") + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or store: exit code 0 done, 1 a figure moved, 2 bad input or a variant that fails."""
    parser = _Parser(prog="python -m benchmarks.resident", description="The gate of resident memory.")
    parser.add_argument("--store", action="store_true", help="store the baseline of this kernel and version of torch")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="compare this one alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the verdict as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        return _measure_here(options.measure[0], Path(options.measure[1]))
    try:
        return _store(options) if options.store else _gate(options)
    except (MeasurementError, OSError, ValueError) as error:
        said = str(error) if isinstance(error, MeasurementError) else reason(error)
        print(one_line(f"resident: {said}"), file=sys.stderr)
        return 2


def _store(options: argparse.Namespace) -> int:
    if options.variant or options.json:
        raise ValueError("--store measures every variant, and gives no verdict: leave --variant and --json out")
    if why := unsupported():
        raise ValueError(f"nothing to store: {why}")
    key = current_key()
    path = baseline_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    with tempfile.TemporaryDirectory() as folder:
        baseline = derive(measure_variants(VARIANTS, STORE_RUNS, Path(folder)))
    write_baseline(path, key, baseline)
    print(
        f"Stored in {path.relative_to(ROOT)}: {baseline.runs} runs differ by at most {baseline.spread:.2f} MiB from "
        f"their median, the tolerance is {baseline.tolerance:.2f} MiB. Say in the commit's message why figures moved."
    )
    return 0


def _gate(options: argparse.Namespace) -> int:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        check_writable(options.json)
    key = current_key()
    path = baseline_path(key)
    shown = path.relative_to(ROOT).as_posix()
    if options.json and options.json.resolve().parent == path.resolve().parent:
        raise ValueError(f"--json={options.json} lies among the baselines: name a file elsewhere")
    if why := unsupported():
        rows = [Row("resident", "", verdict="skipped", says=f"skipped: {why}")]
        print(rows[0].says)
        return _finish(options, key, shown, rows)
    try:
        baseline = read_baseline(path, key)
    except FileNotFoundError:
        others = stored_keys(path.parent, "resident-")
        says = f"there is no {shown}{f'; baselines are stored for {others}' if others else ''}"
        print(f"FAILED {says}")
        print(f"To store one: {store_command()}")
        rows = [Row("resident", "", verdict="missing", says=says)]
        return _finish(options, key, shown, rows)
    except ValueError as error:
        raise ValueError(f"{shown} is no baseline of this run: {error}; store one: {store_command()}") from error
    asked = options.variant or sorted({*VARIANTS, *baseline.figures}, key=str)
    with tempfile.TemporaryDirectory() as folder:
        known = [variant for variant in asked if variant in VARIANTS and variant in baseline.figures]
        measured = measure_variants(known, RUNS, Path(folder))
        rows = compare(baseline, medians(measured), asked)
        again = {row.name for row in rows if row.verdict in FAILING["resident"]} & measured.keys()
        for variant, runs in measure_variants(sorted(again), RUNS, Path(folder)).items():
            measured[variant] += runs
        rows = compare(baseline, medians(measured), asked)
        ways = [] if options.variant else compare_ways(measure_ways(Path(folder)))
    failed = [row for row in rows if row.verdict in FAILING["resident"]]
    for line in table(medians(measured)):
        print(line)
    for row in (*failed, *ways):
        print(f"FAILED {row.says}" if row.verdict in FAILING["resident"] else row.says)
    if failed:
        print(f"To store the new figures: {store_command()}\nand say in the commit's message why they moved.")
    else:
        print(f"{len(rows)} figures are those of {shown}, within {baseline.tolerance:.2f} MiB")
    return _finish(options, key, shown, [*rows, *ways])


def _finish(options: argparse.Namespace, key: Key, shown: str, rows: list[Row]) -> int:
    verdict = Verdict.of_rows("resident", shown, "this run", asdict(key), rows)
    if options.json:
        write_verdict(options.json, verdict)
    return 0 if verdict.passed else 1


def table(figures: Figures) -> list[str]:
    rows = [(variant, *(f"{values[name]:.2f}" for name in FIGURES)) for variant, values in figures.items()]
    return aligned([("resident, MiB", *FIGURES), *rows], right=range(1, len(FIGURES) + 1))


if __name__ == "__main__":
    sys.exit(main())
