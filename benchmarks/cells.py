"""Products of stored layers beside ``nn.Linear`` in float32, by storage, dtype, rows and direction.

    python -m benchmarks.cells                            all cells: fifteen minutes on two quiet cores
    python -m benchmarks.cells --shape 1024x2048 --dtype bfloat16 --only 'EightBit*'
    python -m benchmarks.cells --threads 1                beside other work: one thread, by the time that it computes

A cell is forward / gradient of the inputs, as a multiple of what ``nn.Linear`` in float32 takes with as many rows. A
layer with adapters may take two float32 products of thin matrices beside; half of these count as the linear layer's.
The calls of one size are taken in turns, and the fastest of each counts. Cells above the limit of 2 (with one row: 4)
are marked with "!".

On a processor with AVX-512, AVX2 alone is had by

    LOWMEM_KERNEL=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from time import perf_counter, thread_time

import torch
from torch import Tensor, nn

import lowmem

SHAPES = ("512x512", "1024x2048", "4096x4096")  # (out, in)
ROWS = (1, 16, 64, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = ("forward", "gradient")
LIMIT, LIMIT_OF_ONE = 2, 4
RANK = 16
LEAST, SECONDS = 5, 0.5  # calls of a cell at least, and seconds until which there are more

STORAGES: dict[str, tuple[object, ...]] = {
    **{
        f"FourBit({name!r}, {size})": (lowmem.FourBit(name, size),)
        for name in lowmem.FORMATS
        for size in (32, 64, 128)
    },
    **{f"EightBit({size})": (lowmem.EightBit(size),) for size in (32, 64, 128)},
    "Half(bfloat16)": (lowmem.Half(torch.bfloat16),),
    "Half(float16)": (lowmem.Half(torch.float16),),
    "FourBit() + LoRA": (lowmem.FourBit(), lowmem.LoRA(RANK)),
    "EightBit() + LoRA": (lowmem.EightBit(), lowmem.LoRA(RANK)),
    "Half(bfloat16) + LoRA": (lowmem.Half(torch.bfloat16), lowmem.LoRA(RANK)),
    "FourBit() + LoRA of x's dtype": (lowmem.FourBit(), lowmem.LoRA(RANK)),
    "FourBit() in int8": (lowmem.FourBit(compute_dtype=torch.int8),),
}

Call = Callable[[], object]


def product(layer: nn.Module, x: Tensor, name: str) -> Call:
    """Return a call that computes the layer's output without gradients, or the gradient of x."""
    if name == "forward":
        return torch.no_grad()(lambda: layer(x))
    x = x.detach().requires_grad_()
    out = layer(x)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)


def stored(dense: nn.Linear, storage: str, dtype: torch.dtype) -> nn.Module:
    """Return a stored copy of a layer, with adapters that are not zero if the storage has them."""
    layer = nn.Sequential(nn.Linear(dense.in_features, dense.out_features, bias=False))
    layer[0].weight.data = dense.weight.detach()
    lowmem.convert(layer, *STORAGES[storage])
    for name, parameter in layer.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return layer.to(dtype) if storage.endswith("of x's dtype") else layer


def thin_products(x: Tensor, features: int, name: str) -> Call:
    """Return a call of the two float32 products that an adapter adds."""
    a, b = torch.randn(RANK, x.shape[1]), torch.randn(features, RANK)
    grad = torch.randn(x.shape[0], features)
    return (lambda: (x @ a.t()) @ b.t()) if name == "forward" else (lambda: (grad @ b) @ a)


def fastest(calls: dict[str, Call], clock: Callable[[], float], least: float) -> dict[str, float]:
    """Return the seconds of the fastest call of each, taken in turns until each has run for ``least`` seconds."""
    best, spent = {}, dict.fromkeys(calls, 0.0)
    for call in calls.values():
        call()  # the first one may pack, or start threads
    for taken in range(10**6):
        for name, call in calls.items():
            if taken >= LEAST and spent[name] > least:
                continue
            start = clock()
            call()
            seconds = clock() - start
            spent[name] += seconds
            best[name] = min(seconds, best.get(name, seconds))
        if taken >= LEAST and min(spent.values()) > least:
            break
    return best


def ratios(
    shape: tuple[int, int],
    rows: int,
    name: str,
    kinds: list[tuple[str, str]],
    clock: Callable[[], float],
    least: float,
) -> dict[tuple[str, str], float]:
    """Return, for each storage and dtype, how many times as long as ``nn.Linear`` in float32 a product takes."""
    dense = nn.Linear(shape[1], shape[0], bias=False)
    x = torch.randn(rows, shape[1])
    calls: dict[str, Call] = {"dense": product(dense.requires_grad_(False), x, name)}
    calls["thin"] = thin_products(x, shape[0], name)
    for storage, dtype in kinds:
        of = DTYPES[dtype]
        calls[f"{storage} {dtype}"] = product(stored(dense, storage, of), x.to(of), name)
    best = fastest(calls, clock, least)
    allowed = {False: best["dense"], True: best["dense"] + best["thin"] / LIMIT}
    return {kind: best[" ".join(kind)] / allowed["LoRA" in kind[0]] for kind in kinds}


def is_above(ratio: float, rows: int) -> bool:
    """Whether a cell is above its limit."""
    return ratio > (LIMIT_OF_ONE if rows == 1 else LIMIT)


def cell(found: dict[str, float], rows: int) -> str:
    """Return the text of a cell: the ratio of each product, marked if it is above the limit."""
    return " / ".join(f"{ratio:.2g}{'!' * is_above(ratio, rows)}" for ratio in found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"OUTxIN; by default {', '.join(SHAPES)}")
    parser.add_argument("--only", action="append", help="storages that match a glob; all by default")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the inputs; all by default")
    parser.add_argument("--rows", type=int, action="append", help=f"by default {', '.join(map(str, ROWS))}")
    parser.add_argument("--threads", type=int, help="with 1, the time that the thread computes counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a cell, at least; by default {SECONDS}")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    clock, rows = (thread_time if given.threads == 1 else perf_counter), given.rows or ROWS
    storages = [name for name in STORAGES if any(fnmatch(name, glob) for glob in given.only or ["*"])]
    kinds = [(storage, dtype) for storage in storages for dtype in given.dtype or DTYPES]
    print(f"{lowmem.backend()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    above = count = 0
    for text in given.shape or SHAPES:
        out_features, in_features = map(int, text.split("x"))
        found: dict[tuple[str, str], dict[int, dict[str, float]]] = {kind: {} for kind in kinds}
        for number in rows:
            for name in PRODUCTS:
                asked = [kind for kind in kinds if name == "forward" or not kind[0].endswith("int8")]
                measured = ratios((out_features, in_features), number, name, asked, clock, given.seconds)
                for kind, ratio in measured.items():
                    found[kind].setdefault(number, {})[name] = ratio
                    above, count = above + is_above(ratio, number), count + 1
        print(f"\n| {text} | Input | {' | '.join(map(str, rows))} |")
        print(f"| :-- | :-- |{' --: |' * len(rows)}")
        for (storage, dtype), by_rows in found.items():
            cells = [cell(by_rows[number], number) for number in rows]
            print(f"| {storage} | {dtype} | {' | '.join(cells)} |", flush=True)
    print(f"\n{above} of {count} are above the limit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
