"""Weights with adapters, made for tests, and ways in which models compute with them."""

import torch
from torch import nn
from torch.nn import functional as F

from lowmem.nn.adapted_weight import adapted_weight
from lowmem.nn.adapter import Layout, LowRankUpdate
from lowmem.nn.stored_tensor import StoredTensor
from tests.nn.stored_cases import CASES, OFFSETS, WHOLE, Case, store

RANK, SCALING = 2, 0.5


def grouped(x, matrices):
    """Multiply groups of rows, also in float64, which torch does not."""
    if x.dtype != torch.float64:
        return F.grouped_mm(x, matrices, offs=OFFSETS)
    bounds = [0, *OFFSETS.tolist()]
    return torch.cat([x[bounds[at] : bounds[at + 1]] @ matrices[at] for at in range(3)])


def attention(x, weight, biased=True):
    """Attend to other keys and values than the queries; no two rows have the same bias."""
    size, keys = x.shape[-1], x.flip(0) * 0.05
    bias = torch.linspace(-1, 1, 3 * size, dtype=x.dtype) if biased else None
    of_out = torch.eye(size, dtype=x.dtype), None
    return F.multi_head_attention_forward(
        x * 0.05, keys, x.roll(1, 0), size, 2, weight, bias, None, None, False, 0.0, *of_out
    )[0]


_PRODUCTS = (
    "linear", "linear of three dimensions", "linear of a vector", "x @ W.T", "x @ W.mT", "x @ W", "W @ x", "addmm",
    "bmm", "bmm, transposed", "bmm on the left", "baddbmm", "matmul, broadcast", "experts", "unbind", "rows by index",
    "a slice of rows",
)  # fmt: skip
PRODUCTS = {name: CASES[name] for name in _PRODUCTS} | {
    "attention": Case(attention, (96, 32), (5, 32), 32),
    "attention without a bias": Case(lambda x, w: attention(x, w, False), (96, 32), (5, 32), 32),
    "experts of tokens": Case(
        lambda x, w: torch.bmm(w[torch.tensor([2, 0, 0, 1, 2])], x.unsqueeze(-1)).squeeze(-1),
        (3, 48, 32),
        (5, 32),
        32,
    ),
}
if hasattr(F, "grouped_mm"):  # which torch has since 2.10
    PRODUCTS |= {
        "grouped_mm": Case(grouped, (3, 48, 32), (5, 48), 48),
        "grouped_mm of transposed": Case(lambda x, w: grouped(x, w.transpose(-2, -1)), (3, 48, 32), (5, 32), 32),
    }
ON_VALUES = (
    {name: case for name, case in CASES.items() if name not in PRODUCTS}
    | WHOLE
    | {
        "a cast": Case(lambda x, w: F.linear(x, w.to(x.dtype)), (48, 32), (5, 32), 32),
        "a column block": Case(lambda x, w: x @ w[:, 4:9], (48, 32), (5, 48), 48),
        "conv2d, depthwise": Case(
            lambda x, w: F.conv2d(x, w, padding="same", groups=8), (8, 1, 3, 3), (2, 8, 6, 6), 9, 1
        ),
    }
)
FORMS = ("dense", "nf4", "bfloat16")


def layout_of(name, case):
    if "conv" in name or "kernel" in name:
        return Layout(case.weight, "transposed kernel" if "transposed" in name else "kernel")
    return Layout(case.weight, "transposed" if "embedding" in name else "linear")


def make(name, case, form, count=1, dropout=None):
    """Return an adapted weight, its base as a dense tensor, and its matrices A and B."""
    weight = torch.randn(case.weight)
    base = nn.Parameter(weight, requires_grad=False) if form == "dense" else store(weight, form, case.lead)
    layout = layout_of(name, case)
    pairs, updates = [], []
    for _ in range(count):
        shapes = layout.lora_matrix_shapes(RANK)
        a, b = (torch.randn(shapes[part]).requires_grad_() for part in ("lora_a", "lora_b"))
        left, right = (a.mT, b.mT) if layout.kind == "transposed" else (b, a)
        if layout.kind == "transposed kernel":
            right = a.view(RANK, layout.shape[0], -1).movedim(1, 0)
        updates.append(LowRankUpdate(left, right, SCALING, dropout or nn.Identity()))
        pairs.append((a, b))
    dense = base.dequantize() if isinstance(base, StoredTensor) else base.detach()
    return adapted_weight(base, updates), dense, pairs, layout


def total(dense, pairs, layout):
    return dense.double() + sum(SCALING * layout.from_matrices(b.double() @ a.double()) for a, b in pairs)
