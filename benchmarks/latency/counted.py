"""What runs under callgrind: ``python -m benchmarks.latency.counted marks.so``.

Only workloads are counted, not the imports and what each does for the first time.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import torch
from torch import nn

import lowmem
from benchmarks.latency.workloads import Call, small_layer

WARM, CALLS = 40, 20  # Python specializes what has run some dozen times
ROWS, COLUMNS = 128, 512  # of a layer whose product counts


def product(technique: object, batch: int, gradient: bool = False) -> Call:
    """Return the product of a layer with a batch, or that and the gradient of its input."""
    torch.manual_seed(0)
    layer = lowmem.convert(nn.Linear(COLUMNS, ROWS).eval(), technique)
    x = torch.randn(batch, COLUMNS, requires_grad=gradient)
    out = torch.ones(batch, ROWS)

    def run() -> object:
        if gradient:
            return torch.autograd.grad(layer(x), x, out)
        with torch.no_grad():
            return layer(x)

    return run


def quantizing(form: str) -> Call:
    weight = torch.randn(16, COLUMNS, generator=torch.Generator().manual_seed(0))
    return lambda: lowmem.quantize(weight, form)


def counted() -> dict[str, Callable[[], Call]]:
    found: dict[str, Callable[[], Call]] = {
        f"layer's Python, {variant}": lambda techniques=techniques: small_layer(techniques)
        for variant, techniques in lowmem.VARIANTS.items()
        if techniques
    }
    techniques = {"nf4": lowmem.FourBit("nf4"), "int4": lowmem.FourBit("int4", block_size=16), "half": lowmem.Half()}
    for name, technique in techniques.items():
        for batch in (1, 8, 32):
            found[f"portable kernel, {name} batch {batch}"] = lambda t=technique, b=batch: product(t, b)
        found[f"portable kernel, {name} gradient"] = lambda t=technique: product(t, 8, gradient=True)
    for form in lowmem.FORMATS:
        found[f"portable kernel, quantize {form}"] = lambda form=form: quantizing(form)
    return found


def main() -> None:
    marks = ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    gc.disable()  # a collection would fall into one workload or another
    marks.begin()
    for name, set_up in counted().items():
        print(name)  # what was to be counted, whether or not it can be
        try:
            run = set_up()
            run()
        except Exception as error:  # noqa: BLE001 - a base that lacks what this needs: the other side may have it
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for _ in range(WARM if "Python" in name else 1):
            run()
        marks.zero()
        for _ in range(CALLS if "Python" in name else 2):
            run()
        marks.dump(name.encode())


if __name__ == "__main__":
    main()
