"""One run of the latency gate of docs/guides/gate-your-own-model.md by default settings, for the proof.

python -m benchmarks.latency.guide OUT.json              4-bit against dense, at least 1.5 times as fast
python -m benchmarks.latency.guide OUT.json --slower     the 4-bit model with 30% more to compute against itself
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import lowmem
from benchmarks.latency.gate import machine
from lowmem.testing.latency import Speedup, measure_speedup
from lowmem.testing.verdicts import Row, Verdict, write_verdict

WIDTH = 2048
MORE = 0.3  # of the rows of both layers, in the slower candidate
NAMES = {"faster": "same", "slower": "slower", "undecided": "undecided"}


class Slower(nn.Module):
    """A model whose call also computes ``MORE`` of its rows in another layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.more = lowmem.convert(nn.Linear(WIDTH, round(MORE * 2 * WIDTH)), lowmem.FourBit())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.more(x)
        return self.model(x)


def my_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def measure(slower: bool) -> Speedup:
    example_input = torch.ones(1, WIDTH)
    candidate = lowmem.convert(my_model(), lowmem.FourBit())
    if slower:
        reference = lowmem.convert(my_model(), lowmem.FourBit())
        return measure_speedup(Slower(candidate), reference, example_input, at_least=0.95)
    return measure_speedup(candidate, my_model(), example_input, at_least=1.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure once, write the verdict, and return 0 where it passed, 1 where it failed, 2 where it is undecided."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.guide", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT.json", help="write the verdict here")
    parser.add_argument("--slower", action="store_true", help="plant 30% more to compute in the candidate")
    given = parser.parse_args(arguments)
    found = measure(given.slower)
    row = Row("the guide's gate", "", verdict=NAMES[found.verdict], says=f"the candidate is {found}")
    verdict = Verdict.of_rows("latency", "reference", "candidate", machine(), [row])
    write_verdict(given.output, verdict)
    return {"passed": 0, "failed": 1, "undecided": 2}[verdict.outcome]


if __name__ == "__main__":
    raise SystemExit(main())
