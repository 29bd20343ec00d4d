"""The table of which kernel runs: ``python -m tests.kernel_table`` writes it into docs/kernels.md."""

import re
from itertools import groupby
from pathlib import Path

import torch

from lowmem.kernels.cpu import CpuBackend
from lowmem.kernels.native_loader import load_native_module_and_reason
from lowmem.quant.quantize_tensor import quantize

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
TABLE = re.compile(r"(?<=<!-- plan -->\n).*?(?=<!-- end -->)", re.DOTALL)
ISAS = ("portable", "neon", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "avx512amx")
MOST = 2048  # rows of an input: no plan changes beyond
PRODUCTS = {"linear": "x @ W.T", "linear_inputs8": "x @ W.T in int8", "input_grad": "grad @ W"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = {  # blocks of 16, 32, 64 and 128 are whole parts of a group of 128 columns
    "4-bit, blocks of 16 to 128": quantize(torch.zeros(1, 64), "nf4", block_size=64),
    "4-bit, other multiples of 8": quantize(torch.zeros(1, 256), "nf4", block_size=256),
    "4-bit, other blocks": quantize(torch.zeros(1, 12), "nf4", block_size=12),
    "8-bit, blocks of 16 to 128": quantize(torch.zeros(1, 64), "int8"),
    "8-bit, other multiples of 16": quantize(torch.zeros(1, 48), "int8", block_size=48),
    "8-bit, other blocks": quantize(torch.zeros(1, 12), "int8", block_size=12),
    "bfloat16": torch.zeros(1, 1, dtype=torch.bfloat16),
    "float16": torch.zeros(1, 1, dtype=torch.float16),
}


def compiled_isas() -> dict[str, CpuBackend]:
    """Return a kernel for each ISA that was compiled, whether this processor can run it or not, by name."""
    native, _ = load_native_module_and_reason()
    return {name: CpuBackend(native, name) for name, _ in native.isas()} if native else {}


def ranges(kernel: CpuBackend, weight, dtype: torch.dtype, operation: str) -> list[tuple[int, str]]:
    """Return the kernels for 1 to ``MOST`` rows of an input, each with the first row count that it takes."""
    asked = ((rows, kernel.tried_kernels(weight, rows, dtype, operation)) for rows in range(1, MOST + 1))
    names = ((rows, plan[-1][1] if plan else "") for rows, plan in asked)
    return [(next(group)[0], name) for name, group in groupby(names, key=lambda pair: pair[1])]


def cell(found: list[tuple[int, str]]) -> str:
    """Return ranges as text: "1 to 4 `few`, 5 and more `tiled`"."""
    parts = []
    for (first, name), (after, _) in zip(found, [*found[1:], (0, "")], strict=True):
        rows = f"{first} and more" if not after else f"{first}" if after == first + 1 else f"{first} to {after - 1}"
        parts += [f"{rows} `{name}`"] if name else []
    return ", ".join(parts)


def plans(kernel: CpuBackend) -> dict[tuple[str, str, str], str]:
    """Return the cell of each product, weight and dtype of an input that an ISA computes, also by inheritance."""
    made = {
        (product, weight, dtype): cell(ranges(kernel, stored, given, operation))
        for operation, product in PRODUCTS.items()
        for weight, stored in WEIGHTS.items()
        for dtype, given in DTYPES.items()
    }
    return {key: text for key, text in made.items() if text}


def lines(cells: dict[tuple[str, str, str], str]) -> list[str]:
    """Return the lines of an ISA, without its name: weights and dtypes that have the same cell share one."""
    shared: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (product, weight, dtype), text in cells.items():
        shared.setdefault((product, text), {}).setdefault(weight, []).append(dtype)
    found = []
    for (product, text), weights in shared.items():
        for dtypes in {tuple(of): None for of in weights.values()}:
            alike = ", ".join(weight for weight, of in weights.items() if tuple(of) == dtypes)
            given = "any" if len(dtypes) == len(DTYPES) else ", ".join(dtypes)
            found.append(f"{product} | {alike} | {given} | {text} |")
    return found


def is_own(kernel: CpuBackend, key: tuple[str, str, str]) -> bool:
    """Whether a kernel of the ISA's own table computes a product for some number of rows."""
    product, weight, dtype = key
    (operation,) = (name for name, text in PRODUCTS.items() if text == product)
    asked = (kernel.tried_kernels(WEIGHTS[weight], rows, DTYPES[dtype], operation) for rows in (1, MOST))
    return any(plan[-1][0] == kernel.name for plan in asked if plan)


def extended(kernel: CpuBackend) -> str:
    """Return the ISA that a kernel's ISA extends, or an empty text: the plan asks its kernels next."""
    asked = kernel.tried_kernels(
        WEIGHTS["float16"], MOST, torch.float32, "input_grad"
    )  # which the first of all ISAs computes
    return next((isa for isa, *_ in asked if isa != kernel.name), "")


def drawn(page: str) -> str:
    """Return the table: an ISA has the lines of the one that it extends, too, where it has none of its own, and ISAs
    share the lines that they have alike.

    Lines of ISAs that are not compiled on this machine are those of the page.
    """
    isas = compiled_isas()
    made = {name: plans(kernel) for name, kernel in isas.items()}
    isas_by_line: dict[str, list[str]] = {}
    for name in ISAS:
        if name in made:
            inherited = made.get(extended(isas[name]), {})
            own = {key for key, text in made[name].items() if text != inherited.get(key) or is_own(isas[name], key)}
            found = lines({key: text for key, text in made[name].items() if key in own})
        else:
            rows = (line.removeprefix("| ").split(" | ", 1) for line in page.splitlines())
            found = [rest for names, *rests in rows for rest in rests if name in names.split(", ")]
        for line in found:
            isas_by_line.setdefault(line, []).append(name)
    table = ["| ISA | Product | Weight | Input | Rows of the input and kernel |", "| :-- | :-- | :-- | :-- | :-- |"]
    table += [f"| {', '.join(names)} | {line}" for line, names in isas_by_line.items()]
    return "\n".join(table) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf8")
    old = TABLE.search(text)
    assert old, f"{PAGE} has no <!-- plan --> ... <!-- end -->"
    PAGE.write_text(TABLE.sub(lambda _: drawn(old.group()), text), encoding="utf8")
