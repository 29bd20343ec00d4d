"""Speeds relative to the dense model, both times of a ratio from one run: a benchmark's, or one made here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowmem.errors import printable, refusal, show
from lowmem.testing.latency import measure_speedup
from lowmem.testing.verdicts import read_json

DENSE = "float32"
"""The panel of float32 inputs, compared with the dense float32 model."""

_PANELS = {"": DENSE, "_in_bfloat16": "bfloat16", "_in_int8": "8-bit integers"}
_INFERENCE = re.compile(r"test_inference(\w*)\[(\w+)-batch([1-9][0-9]{0,8})\]")
_PEER = re.compile(r"test_peer\[(\w+)-(\w+)-batch([1-9][0-9]{0,8})\]")


@dataclass(frozen=True)
class Timing:
    """The relative speed of a model at a batch size.

    Attributes:
        panel: the dtype of inputs and products, or a panel of other libraries (see ``is_peers``).
        name: of the variant, or of the other library.
        batch: the batch size.
        speed: time of the panel's reference divided by that of the model.
        low: the lower end of its 99% interval if it was timed in turns; None for a benchmark run.
        high: the upper end.
    """

    panel: str
    name: str
    batch: int
    speed: float
    low: float | None = None
    high: float | None = None


def is_peers(panel: str) -> bool:
    """Whether a panel compares other libraries, with lowmem's ``nf4`` as the reference."""
    return panel.startswith("peers")


def read_run(path: Path) -> tuple[list[Timing], dict[str, str]]:
    """Read a run that pytest-benchmark stored: its timings and machine; a FileError names one that is damaged."""
    run = read_json(path)
    try:
        if not (
            isinstance(run, dict)
            and isinstance(run.get("benchmarks"), list)
            and isinstance(run.get("machine_info"), dict)
        ):
            raise ValueError("it is no run of pytest-benchmark")
        machine = {printable(key): printable(str(value)) for key, value in run["machine_info"].items()}
        return from_benchmarks(run["benchmarks"]), machine
    except ValueError as reason:
        raise refusal(path, f"{reason}; store one with pytest benchmarks --benchmark-json=FILE") from None


def from_benchmarks(benchmarks: Iterable[Any]) -> list[Timing]:
    """Return the timings of the inference benchmarks in the records of pytest-benchmark, stored or from its hooks.

    An invalid record is a ValueError.
    """
    timings = []
    for number, bench in enumerate(benchmarks):
        if not (
            isinstance(bench, Mapping)
            and isinstance(bench.get("fullname"), str)
            and isinstance(bench.get("extra_info"), Mapping)
            and isinstance(bench.get("stats", bench), Mapping)
        ):
            raise ValueError(f"benchmark {number} is {show(bench)}")
        reference = bench["extra_info"].get("reference_seconds")
        place = _place(bench["fullname"])
        if place is not None and reference is not None:
            speed = _seconds(reference, number) / _seconds(bench.get("stats", bench).get("min"), number)
            timings.append(Timing(*place, speed))
    return timings


def _place(fullname: str) -> tuple[str, str, int] | None:
    """Return panel, name and batch size of an inference benchmark; None for other benchmarks."""
    test = fullname.rpartition("::")[2]
    if found := _INFERENCE.fullmatch(test):
        return _PANELS.get(found[1], found[1].strip("_")), found[2], int(found[3])
    if found := _PEER.fullmatch(test):
        return f"peers, {found[2]}", found[1], int(found[3])
    return None


def _seconds(value: Any, number: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-12 < value < 1e12:
        raise ValueError(f"benchmark {number} took {show(value)} seconds")
    return float(value)


def time_in_turns(name: str, dense: nn.Module, other: nn.Module, x: Tensor, *, seconds: float = 0.5) -> Timing:
    """Time forwards of two models on x (batch, ...) in turns: the speed of ``measure_speedup``, with its interval.

    At least 8 rounds are timed, even if they take longer than ``seconds``.
    """
    ratio = measure_speedup(other, dense, x, seconds=seconds).ratio
    return Timing(DENSE, name, len(x), ratio.value, ratio.low, ratio.high)
