"""Speeds relative to the dense model, both times of a ratio from one run: a benchmark's, or one made here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowmem.errors import file_error, printable_line, short_repr
from lowmem.testing.gate_verdicts import read_report_json
from lowmem.testing.latency import measure_speedup

DENSE = "float32"
"""The panel of float32 inputs, compared with the dense float32 model."""

_PANELS = {"": DENSE, "_in_bfloat16": "bfloat16", "_in_int8": "8-bit integers"}
_INFERENCE = re.compile(r"test_inference(\w*)\[(\w+)-batch([1-9][0-9]{0,8})\]")
_PEER = re.compile(r"test_peer\[(\w+)-(\w+)-batch([1-9][0-9]{0,8})\]")


@dataclass(frozen=True)
class RelativeSpeed:
    """The relative speed of a model at a batch size.

    Attributes:
        panel: the dtype of inputs and products, or a panel of other libraries (see ``is_other_library_panel``).
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


def is_other_library_panel(panel: str) -> bool:
    """Whether a panel compares other libraries, with lowmem's ``nf4`` as the reference."""
    return panel.startswith("peers")


def read_relative_speeds_and_machine(path: Path) -> tuple[list[RelativeSpeed], dict[str, str]]:
    """Read a run that pytest-benchmark stored: its timings and machine; a FileError names one that is damaged."""
    run = read_report_json(path)
    try:
        if not (
            isinstance(run, dict)
            and isinstance(run.get("benchmarks"), list)
            and isinstance(run.get("machine_info"), dict)
        ):
            raise ValueError("it is no run of pytest-benchmark")
        machine = {printable_line(key): printable_line(str(value)) for key, value in run["machine_info"].items()}
        return inference_speeds_from_benchmarks(run["benchmarks"]), machine
    except ValueError as reason:
        raise file_error(path, f"{reason}; store one with pytest benchmarks --benchmark-json=FILE") from None


def inference_speeds_from_benchmarks(benchmarks: Iterable[Any]) -> list[RelativeSpeed]:
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
            raise ValueError(f"benchmark {number} is {short_repr(bench)}")
        reference = bench["extra_info"].get("reference_seconds")
        place = _panel_name_and_batch_or_none(bench["fullname"])
        if place is not None and reference is not None:
            speed = _checked_seconds(reference, number) / _checked_seconds(
                bench.get("stats", bench).get("min"), number
            )
            timings.append(RelativeSpeed(*place, speed))
    return timings


def _panel_name_and_batch_or_none(fullname: str) -> tuple[str, str, int] | None:
    """Return panel, name and batch size of an inference benchmark; None for other benchmarks."""
    test = fullname.rpartition("::")[2]
    if match := _INFERENCE.fullmatch(test):
        return _PANELS.get(match[1], match[1].strip("_")), match[2], int(match[3])
    if match := _PEER.fullmatch(test):
        return f"peers, {match[2]}", match[1], int(match[3])
    return None


def _checked_seconds(value: Any, benchmark_number: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-12 < value < 1e12:
        raise ValueError(f"benchmark {benchmark_number} took {short_repr(value)} seconds")
    return float(value)


def measure_relative_speed(
    name: str, dense_model: nn.Module, other_model: nn.Module, x: Tensor, *, seconds: float = 0.5
) -> RelativeSpeed:
    """Time forwards of two models on x (batch, ...) in turns: the speed of ``measure_speedup``, with its interval.

    At least 8 rounds are timed, even if they take longer than ``seconds``.
    """
    ratio = measure_speedup(other_model, dense_model, x, seconds=seconds).ratio
    return RelativeSpeed(DENSE, name, len(x), ratio.value, ratio.low, ratio.high)
