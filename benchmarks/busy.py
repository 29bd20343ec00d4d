"""What a busy neighbour costs: mean times of calls on a quiet machine, and beside processes that compute.

    python -m benchmarks.busy                               all workloads, two minutes each way on two cores
    python -m benchmarks.busy --only 'BigNet, batch 1'      one of them

The rounds are taken in turns, quiet then busy, dense then stored, and the mean of all calls counts: what a neighbour
takes comes in a few calls that are very long, which a median would not see. Nothing else may run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch

import lowmem
from benchmarks.cases import Training
from benchmarks.latency.workloads import Call, inference
from lowmem import BigNet
from lowmem.kernels.threads import usable_cpu_count

BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"  # ends with a parent that is killed
SETTLED = 0.3  # seconds of calls that are not measured: the neighbours have begun by then, or ended


def generation(technique: lowmem.FourBit | None) -> Call:
    """Return a call that generates 8 tokens after 32: a Llama of 576 columns and 12 layers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    if technique is not None:
        lowmem.convert(model, technique)
    tokens = torch.randint(8192, (1, 32), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    return lambda: model.generate(tokens, **options)


WORKLOADS: dict[str, dict[str, Callable[[], Call]]] = {
    **{
        f"BigNet, batch {batch}": {
            "dense": lambda batch=batch: inference("bignet", batch),
            "nf4": lambda batch=batch: inference("low_precision_nf4", batch),
        }
        for batch in (1, 32)
    },
    "BigNet, a training step": {
        "dense": lambda: Training("", body=lowmem.convert(BigNet(), lowmem.LoRA(rank=32))).step,
        "nf4": lambda: Training("qlora_nf4").step,
    },
    "Llama, 8 tokens generated": {
        "dense": lambda: generation(None),
        "nf4": lambda: generation(lowmem.FourBit("nf4")),
    },
}


@contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """Keep ``number`` cores busy, each by a process, for the block."""
    with ExitStack() as stack:
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]))
            stack.callback(process.kill)
        yield


def measure(call: Call, seconds: float) -> tuple[int, float]:
    """Return how many calls were made in about ``seconds``, and the seconds that they took."""
    start, calls = perf_counter(), 0
    while (taken := perf_counter() - start) < seconds:
        call()
        calls += 1
    return calls, taken


def means(calls: dict[str, Call], count: int, seconds=1.0, rounds: int = 4) -> dict[str, tuple[float, float]]:
    """Return the mean seconds of each call, quiet and beside ``count`` neighbours."""
    sums = {(name, busy): [0, 0.0] for name in calls for busy in (False, True)}
    for call in calls.values():
        measure(call, seconds / 2)
    for _ in range(rounds):
        for busy in (False, True):
            with busy_cores(count * busy):
                for name, call in calls.items():
                    measure(call, SETTLED)
                    for i, value in enumerate(measure(call, seconds)):
                        sums[name, busy][i] += value
    mean = {key: seconds / calls_made for key, (calls_made, seconds) in sums.items()}
    return {name: (mean[name, False], mean[name, True]) for name in calls}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WORKLOADS, action="append", help="workloads; all by default")
    given = parser.parse_args(arguments)
    print("| Workload | Model | Quiet, ms | Busy, ms | Slowdown |\n| :-- | :-- | --: | --: | --: |")
    for name in given.only or WORKLOADS:
        if name.startswith("Llama") and find_spec("transformers") is None:
            print(f"{name}: skipped, since transformers is not installed", file=sys.stderr)
            continue
        calls = {model: make() for model, make in WORKLOADS[name].items()}
        found = means(calls, usable_cpu_count())
        for model, (quiet, busy) in found.items():
            print(f"| {name} | {model} | {1e3 * quiet:.2f} | {1e3 * busy:.2f} | {busy / quiet:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
