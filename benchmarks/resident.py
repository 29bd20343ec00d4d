"""Resident memory: what a process holds while a variant is loaded, runs and trains, in pages.

``lowmem.measure`` counts storages of tensors, to the byte. It sees no array of numpy, no plain attribute, and nothing
that C takes with ``malloc``. The kernel's high-water mark of a process (``VmHWM``) sees them all:

    python -m benchmarks.resident            fails where a figure is further from the baseline than its tolerance
    python -m benchmarks.resident --store    stores the baseline, with the tolerance that repeated runs give

docs/benchmarking.md says what is measured, and how noise is kept out.
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
from typing import Any

import torch
from torch import nn

import lowmem
from lowmem import kernels
from lowmem.errors import command_error_message, truncated_error_line
from lowmem.testing.gate_verdicts import FAILING, FigureComparison, GateVerdict, figure_verdict, write_verdict
from lowmem.testing.memory import THREADS
from lowmem.testing.memory_baseline import (
    BaselineKey,
    parse_baseline,
    stored_torch_versions_text,
    write_baseline_figures,
)
from lowmem.transforms.model_summary import aligned_table_lines

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


def _measure_here(name: str, folder: Path) -> dict[str, float]:
    """Measure a variant or one of ``WAYS`` in this process."""
    steady()
    warm(folder, _converted if name in WAYS else lambda factory: lowmem.build(name, factory))
    if name not in WAYS:
        return measure(folder / name, lowmem.BigNet)
    model = WAYS[name](folder)
    _touch(model)
    gc.collect()
    return {"kept": _mib(_status("VmRSS"))}


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


@dataclass(frozen=True)
class Baseline:
    """What was stored: the figures, and how far off one may be, in MiB."""

    figures: Figures  # medians
    runs: int  # of each variant
    spread: float  # by which the run that was furthest off differed from its median
    tolerance: float


def unsupported() -> str | None:
    """Say why nothing can be measured on this system, or return None."""
    processors = os.cpu_count() or 1
    # Linux holds back max(32, 2 * processors) pages on each, and COUNTER_LAG is for 32.
    if processors > 16:
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


def printed_json(module: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run a module of the benchmarks in a fresh process, and return the JSON of the last line that it prints."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure_variants(variants: Iterable[str], runs: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Measure each variant in so many fresh processes."""
    measured: dict[str, list[dict[str, float]]] = {}
    for variant in variants:
        lowmem.save(lowmem.build(variant), folder / variant)
        command = ("resident", "--measure", variant, str(folder))
        measured[variant] = [printed_json(*command, env=environment()) for _ in range(runs)]
        (folder / variant).unlink()
    return measured


def measure_ways(folder: Path) -> dict[str, float]:
    """Return the resident MiB of a fresh process for each of ``WAYS``, with the C library's own settings."""
    write_layers(folder)
    own = {name: value for name, value in environment().items() if not name.startswith("MALLOC_")}
    return {way: printed_json("resident", "--measure", way, str(folder), env=own)["kept"] for way in WAYS}


def compare_ways(kept: Mapping[str, float]) -> list[FigureComparison]:
    base = kept[LOADED]
    return [_row(way, "kept", base, size, WAYS_LIMIT) for way, size in kept.items() if way != LOADED]


def medians(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        variant: {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        for variant, runs in measured.items()
    }


def derive(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> Baseline:
    """Derive the tolerance: twice the largest distance to a median, and the lag of the counters."""
    figures = medians(measured)
    spread = max(
        abs(run[name] - figures[variant][name]) for variant, runs in measured.items() for run in runs for name in run
    )
    tolerance = math.ceil(round(200 * spread + 100 * COUNTER_LAG, 3)) / 100  # in hundredths
    if tolerance > LIMIT:
        raise ValueError(
            f"runs differ by {spread:.2f} MiB from their median, so that a megabyte might pass; "
            "store again when the machine has memory to spare"
        )
    return Baseline(figures, min(map(len, measured.values())), round(spread, 3), tolerance)


def compare(baseline: Baseline, now: Figures, variants: Iterable[str]) -> list[FigureComparison]:
    """Compare the medians of this run with the baseline, in both directions."""
    rows = []
    for variant in variants:
        before, after = baseline.figures.get(variant, {}), now.get(variant, {})
        rows += [_row(variant, name, before.get(name), after.get(name), baseline.tolerance) for name in FIGURES]
    return rows


def _row(variant: str, figure: str, base: float | None, head: float | None, tolerance: float) -> FigureComparison:
    before, after = ("none" if size is None else f"{size:.2f} MiB" for size in (base, head))
    says = f"{variant}: {figure} is {after}, from {before} (tolerance {tolerance:.2f})"
    return FigureComparison(variant, figure, base, head, verdict=figure_verdict(base, head, tolerance), says=says)


def current_key() -> BaselineKey:
    """Return the key of this process: the kernel that serves it, and torch's minor version."""
    return BaselineKey.with_current_torch(lowmem.backend().partition(":")[0], THREADS)


def baseline_path(key: BaselineKey) -> Path:
    return ROOT / "benchmarks" / "memory" / f"resident-{key.file_stem}.json"


def read_baseline(path: Path, key: BaselineKey) -> Baseline:
    """Read a baseline; an OSError or ValueError says what is wrong with it, and names the remedy."""
    try:
        document = parse_baseline(path.read_bytes(), key, "runs", "spread_mib", "tolerance_mib")
        baseline = Baseline(*(document[name] for name in ("figures", "runs", "spread_mib", "tolerance_mib")))
        if not 0 < baseline.tolerance <= LIMIT:
            raise ValueError(f"tolerance_mib={baseline.tolerance} must be above 0 and at most {LIMIT}")
    except (TypeError, ValueError) as error:
        shown = path.relative_to(ROOT).as_posix()
        raise ValueError(f"{shown} is no baseline of this run: {error}; store one: {store_command()}") from error
    return baseline


def write_baseline(path: Path, key: BaselineKey, baseline: Baseline) -> None:
    measured = {"runs": baseline.runs, "spread_mib": baseline.spread, "tolerance_mib": baseline.tolerance}
    write_baseline_figures(path, key, baseline.figures, **measured)


def store_command() -> str:
    """Return the command that stores this run's figures, for the kernel that was chosen if one was."""
    chosen = os.environ.get(kernels.VARIABLE)
    return f"{kernels.VARIABLE}={chosen} " * bool(chosen) + "python -m benchmarks.resident --store"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or store: exit code 0 done, 1 a figure moved, 2 bad input or a variant that fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description="The gate of resident memory.")
    parser.add_argument("--store", action="store_true", help="store the baseline of this kernel and version of torch")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="compare this one alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the verdict as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(_measure_here(options.measure[0], Path(options.measure[1]))))
        return 0
    if options.store and (options.variant or options.json):
        parser.error("--store measures every variant, and gives no verdict: leave --variant and --json out")
    try:
        if options.store:
            return _store()
        key = current_key()
        rows = _gate(key, options.variant)
        verdict = GateVerdict.from_rows("resident", baseline_path(key).name, "this run", asdict(key), rows)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_verdict(options.json, verdict)
        return 0 if verdict.passed else 1
    except Exception as error:  # noqa: BLE001 - whatever a variant raises: it is no verdict
        print(truncated_error_line(f"resident: {command_error_message(error)}"), file=sys.stderr)
        return 2


def _store() -> int:
    if why := unsupported():
        raise ValueError(f"nothing to store: {why}")
    key = current_key()
    path = baseline_path(key)
    with tempfile.TemporaryDirectory() as folder:
        baseline = derive(measure_variants(VARIANTS, STORE_RUNS, Path(folder)))
    write_baseline(path, key, baseline)
    print(
        f"Stored in {path.relative_to(ROOT)}: {baseline.runs} runs differ by at most {baseline.spread:.2f} MiB from "
        f"their median, the tolerance is {baseline.tolerance:.2f} MiB. Say in the commit's message why figures moved."
    )
    return 0


def _gate(key: BaselineKey, variants: Sequence[str] | None) -> list[FigureComparison]:
    """Measure, compare and print; return a row for each figure."""
    path = baseline_path(key)
    shown = path.relative_to(ROOT).as_posix()
    if why := unsupported():
        print(f"skipped: {why}")
        return [FigureComparison("resident", "", verdict="skipped", says=f"skipped: {why}")]
    if not path.exists():
        others = stored_torch_versions_text(path.parent, "resident-")
        says = f"there is no {shown}{f'; baselines are stored for {others}' if others else ''}"
        print(f"FAILED {says}\nTo store one: {store_command()}")
        return [FigureComparison("resident", "", verdict="missing", says=says)]
    baseline = read_baseline(path, key)
    asked = variants or sorted({*VARIANTS, *baseline.figures})
    with tempfile.TemporaryDirectory() as folder:
        known = [variant for variant in asked if variant in VARIANTS and variant in baseline.figures]
        measured = measure_variants(known, RUNS, Path(folder))
        rows = compare(baseline, medians(measured), asked)
        again = {row.name for row in rows if row.verdict in FAILING["resident"]} & measured.keys()
        for variant, runs in measure_variants(sorted(again), RUNS, Path(folder)).items():
            measured[variant] += runs
        rows = compare(baseline, medians(measured), asked)
        ways = [] if variants else compare_ways(measure_ways(Path(folder)))
    table = [("resident, MiB", *FIGURES)]
    table += [(name, *(f"{own[figure]:.2f}" for figure in FIGURES)) for name, own in medians(measured).items()]
    print("\n".join(aligned_table_lines(table, right_aligned=range(1, len(FIGURES) + 1))))
    failed = [row for row in rows if row.verdict in FAILING["resident"]]
    for row in (*failed, *ways):
        print(f"FAILED {row.says}" if row.verdict in FAILING["resident"] else row.says)
    if failed:
        print(f"To store the new figures: {store_command()}\nand say in the commit's message why they moved.")
    else:
        print(f"{len(rows)} figures are those of {shown}, within {baseline.tolerance:.2f} MiB")
    return [*rows, *ways]


if __name__ == "__main__":
    sys.exit(main())
