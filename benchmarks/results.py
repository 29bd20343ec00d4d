"""Benchmark results of two runs: read them, compare them, lay them out.

Memory is the integers ``extra_info["..._bytes"]`` of a benchmark: exact, and the same in every run.
Latency is its smallest time divided by ``extra_info["reference_seconds"]``, the time of a float32
reference in the same run: a bare time would compare machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """One benchmark of one run: its smallest time, its reference's, and the bytes of each memory figure."""

    seconds: float
    reference: float | None
    memory: Mapping[str, int]

    @property
    def ratio(self) -> float | None:
        return self.seconds / self.reference if self.reference else None


Results = Mapping[str, Result]  # by the benchmark's name, its pytest node id


def read_results(benchmarks: Any) -> dict[str, Result]:
    """Read benchmarks as pytest-benchmark stores them, or hands them to its hooks.

    Raises:
        ValueError: they are not what it stores, a memory figure is not an integer, or there are none.
    """
    results = {}
    try:
        for bench in benchmarks:
            name, extra = bench["fullname"], bench["extra_info"]
            memory = {figure: value for figure, value in extra.items() if figure.endswith("_bytes")}
            for figure, value in memory.items():
                if type(value) is not int:
                    raise ValueError(f"{name}: {figure}={value!r} must be an integer")
            stats = bench.get("stats", bench)
            results[name] = Result(float(stats["min"]), extra.get("reference_seconds"), memory)
    except (AttributeError, KeyError, TypeError) as reason:
        raise ValueError(f"not benchmarks of pytest-benchmark ({type(reason).__name__}: {reason})") from reason
    if not results:
        raise ValueError("it holds no benchmarks")
    return results


def read_run(run: Any) -> tuple[dict[str, Result], dict[str, Any]]:
    """Read the benchmarks of a stored run and the machine it ran on.

    Raises:
        ValueError: as ``read_results``, or it is no stored run at all.
    """
    if not isinstance(run, dict) or not isinstance(run.get("machine_info"), dict):
        raise ValueError("it says nothing of a machine")
    return read_results(run.get("benchmarks")), run["machine_info"]


def regressions(stored: Results, now: Results, tolerance: float | None = None) -> list[str]:
    """Say what got worse in the benchmarks that both runs have, a line each."""
    lines = []
    for name in stored.keys() & now.keys():
        before, after = stored[name], now[name]
        for figure, size in before.memory.items():
            if figure not in after.memory:
                lines.append(f"{name}: {figure} went missing")
            elif after.memory[figure] > size:
                grown = _bytes(after.memory[figure] - size)
                lines.append(f"{name}: {figure} grew by {grown}, from {size:,} to {after.memory[figure]:,}")
        if tolerance is not None and before.ratio is not None:
            if after.ratio is None:
                lines.append(f"{name}: the ratio to float32 went missing")
            elif after.ratio > tolerance * before.ratio:
                lines.append(
                    f"{name}: the ratio to float32 grew from {before.ratio:.2f} to {after.ratio:.2f}, "
                    f"by more than the factor {tolerance:g}"
                )
    return sorted(lines)


def improvements(stored: Results, now: Results) -> list[str]:
    """Say what the stored run does not hold yet: smaller figures and new ones, a line each."""
    lines = [f"{name} is new" for name in now.keys() - stored.keys()]
    for name in stored.keys() & now.keys():
        before = stored[name].memory
        for figure, size in now[name].memory.items():
            if figure not in before:
                lines.append(f"{name}: {figure} is new")
            elif size < before[figure]:
                lines.append(f"{name}: {figure} shrank by {_bytes(before[figure] - size)}")
    return sorted(lines)


def table(now: Results, stored: Results | None) -> list[str]:
    """Lay out latency beside memory, in MiB, with the change in bytes where a figure differs."""
    figures = list(dict.fromkeys(figure for result in now.values() for figure in result.memory))
    rows = [["benchmark", "min ms", "ratio", "stored", *(figure.removesuffix("_bytes") for figure in figures)]]
    for name, result in now.items():
        before = (stored or {}).get(name)
        rows.append(
            [
                name.rpartition("::")[2].removeprefix("test_"),
                f"{result.seconds * 1e3:.2f}",
                _ratio(result),
                _ratio(before),
                *(
                    _size(result.memory.get(figure), before.memory.get(figure) if before else None)
                    for figure in figures
                ),
            ]
        )
    if stored is None:
        rows = [row[:3] + row[4:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _bytes(count: int) -> str:
    return f"{count:,} byte{'s' * (count != 1)}"


def _ratio(result: Result | None) -> str:
    return "-" if result is None or result.ratio is None else f"{result.ratio:.2f}"


def _size(after: int | None, before: int | None) -> str:
    if after is None:
        return "-"
    change = "" if before is None or after == before else f" ({after - before:+,})"
    return f"{after / 2**20:.2f}{change}"
