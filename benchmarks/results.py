"""Benchmark results: read them from a stored run, and lay them out beside the baseline.

Memory is the integers ``extra_info["..._bytes"]`` of a benchmark: exact, and the same in every run.
Latency is its smallest time divided by ``extra_info["reference_seconds"]``, the time of a float32
reference in the same run: a bare time would compare machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.testing.baseline import layout


@dataclass(frozen=True)
class Result:
    """One benchmark of one run: its smallest time, its reference's, and the bytes of each memory figure.

    A run with ``--benchmark-disable`` has no times.
    """

    seconds: float | None
    reference: float | None
    memory: Mapping[str, int]

    @property
    def ratio(self) -> float | None:
        return self.seconds / self.reference if self.seconds is not None and self.reference else None


Results = Mapping[str, Result]  # by the benchmark's name, its pytest node id


def read_results(benchmarks: Any) -> dict[str, Result]:
    """Read benchmarks as pytest-benchmark stores them.

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
            results[name] = Result(float(bench["stats"]["min"]), extra.get("reference_seconds"), memory)
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


def table(
    now: Results, baseline: Mapping[str, Mapping[str, int]] | None = None, stored: Results | None = None
) -> list[str]:
    """Lay out latency beside memory in MiB.

    Args:
        now: this run.
        baseline: the memory baseline; where a figure differs from it, the change in bytes is shown.
        stored: the run that pytest-benchmark compares with; its ratio gets a column.
    """
    figures = list(dict.fromkeys(figure for result in now.values() for figure in result.memory))
    rows = [["benchmark", "min ms", "ratio", "stored", *(figure.removesuffix("_bytes") for figure in figures)]]
    for name, result in now.items():
        before = (baseline or {}).get(name, {})
        rows.append(
            [
                name.rpartition("::")[2].removeprefix("test_"),
                "-" if result.seconds is None else f"{result.seconds * 1e3:.2f}",
                _ratio(result),
                _ratio((stored or {}).get(name)),
                *(_size(result.memory.get(figure), before.get(figure)) for figure in figures),
            ]
        )
    if stored is None:
        rows = [row[:3] + row[4:] for row in rows]
    return layout(rows, left=(0,))


def _ratio(result: Result | None) -> str:
    return "-" if result is None or result.ratio is None else f"{result.ratio:.2f}"


def _size(after: int | None, before: int | None) -> str:
    if after is None:
        return "-"
    change = "" if before is None or after == before else f" ({after - before:+,})"
    return f"{after / 2**20:.2f}{change}"
