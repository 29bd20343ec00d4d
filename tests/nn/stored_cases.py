"""Ways in which models compute with a weight, for the tests of stored ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem.nn.forms import CodedForm, HalfForm
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.quantize_tensor import quantize

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
INDICES = torch.tensor([[1, 2, 2], [7, 0, 1]])


@dataclass(frozen=True)
class Case:
    """A function of an input and a weight that is linear in both.

    Attributes:
        terms: the length of its sums.
        lead: how many dimensions of the weight count rows; None: all but the last.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    weight: tuple[int, ...]
    x: tuple[int, ...] | Tensor
    terms: int
    lead: int | None = None

    def make_input(self) -> Tensor:
        return torch.randn(self.x) if isinstance(self.x, tuple) else self.x


def chunks(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(x, part) for part in weight.chunk(3)], -1)


def split(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.split([16, 24, 8])[1].T


def experts(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([F.linear(x, weight[number]) for number in (2, 0, torch.tensor(1), -1)])


def unbound(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([x @ part.T for part in weight.unbind()])


CASES = {
    "linear": Case(F.linear, (48, 32), (5, 32), 32),
    "linear of three dimensions": Case(F.linear, (48, 32), (2, 5, 32), 32),
    "linear of a vector": Case(F.linear, (48, 32), (32,), 32),
    "x @ W.T": Case(lambda x, w: x @ w.T, (48, 32), (2, 5, 32), 32),
    "x @ W.mT": Case(lambda x, w: x @ w.mT, (48, 32), (5, 32), 32),
    "x @ W": Case(lambda x, w: x @ w, (48, 32), (2, 5, 48), 48),
    "W @ x": Case(lambda x, w: w @ x, (48, 32), (32, 7), 32),
    "mv": Case(lambda x, w: w.mv(x), (48, 32), (32,), 32),
    "addmm": Case(lambda x, w: torch.addmm(x.new_ones(32), x, w), (48, 32), (5, 48), 49),
    "addmm, scaled": Case(lambda x, w: torch.addmm(x.new_ones(32), x, w, beta=2, alpha=3), (48, 32), (5, 48), 52),
    "bmm": Case(torch.bmm, (3, 48, 32), (3, 5, 48), 48),
    "bmm, transposed": Case(lambda x, w: torch.bmm(x, w.transpose(1, 2)), (3, 48, 32), (3, 5, 32), 32),
    "bmm on the left": Case(lambda x, w: torch.bmm(w, x), (3, 48, 32), (3, 32, 4), 32),
    "baddbmm": Case(lambda x, w: torch.baddbmm(x.new_ones(3, 5, 32), x, w), (3, 48, 32), (3, 5, 48), 49),
    "matmul, broadcast": Case(torch.matmul, (3, 48, 32), (2, 1, 5, 48), 48),
    "experts": Case(experts, (3, 48, 32), (5, 32), 32),
    "unbind": Case(unbound, (3, 48, 32), (5, 32), 32),
    "chunk": Case(chunks, (48, 32), (5, 32), 32),
    "split": Case(split, (48, 32), (5, 32), 32),
    "rows by index": Case(lambda x, w: F.linear(x, w[torch.tensor([3, 1, 1])]), (48, 32), (5, 32), 32),
    "a slice of rows": Case(lambda x, w: F.linear(x, w[4:40:3]), (48, 32), (5, 32), 32),
    "conv1d": Case(lambda x, w: F.conv1d(x, w, x.new_ones(8), 2, 1), (8, 4, 3), (2, 4, 9), 13, 1),
    "conv2d, groups": Case(lambda x, w: F.conv2d(x, w, padding=1, groups=2), (8, 4, 3, 3), (2, 8, 9, 9), 36, 1),
    "conv3d": Case(lambda x, w: F.conv3d(x, w, padding=1, dilation=2), (8, 4, 3, 3, 3), (2, 4, 5, 5, 5), 108, 1),
    "conv1d, transposed": Case(
        lambda x, w: F.conv_transpose1d(x, w, stride=2, groups=2), (8, 3, 3), (2, 8, 5), 12, 1
    ),
    "conv2d, transposed": Case(
        lambda x, w: F.conv_transpose2d(x, w, x.new_ones(6), 2, 1, 1), (8, 6, 3, 3), (2, 8, 5, 5), 73, 1
    ),
    "conv3d, transposed": Case(lambda x, w: F.conv_transpose3d(x, w), (4, 6, 2, 2, 2), (2, 4, 3, 3, 3), 32, 1),
    "embedding": Case(lambda x, w: F.embedding(x, w), (50, 32), INDICES, 1),
    "embedding bag": Case(lambda x, w: F.embedding_bag(x, w, mode="sum"), (50, 32), INDICES, 3),
}
"""Those that never dequantize the whole weight."""

WHOLE = {
    "a norm": Case(lambda x, w: x @ (w * w.norm()), (48, 32), (5, 48), 0),
    "the elements": Case(lambda x, w: x * w, (5, 32), (5, 32), 0),
    "columns": Case(lambda x, w: x @ w[:, 4:9], (48, 32), (5, 48), 0),
    "an exponential": Case(lambda x, w: x * -torch.exp(w), (5, 32), (5, 32), 0),
    "a kernel as a matrix": Case(lambda x, w: x @ w.squeeze(1).T, (32, 1, 4), (5, 4), 4, 1),
    "bilinear": Case(lambda x, w: F.bilinear(x, torch.ones_like(x[..., :8]), w), (4, 16, 8), (2, 3, 16), 16 + 8),
    "einsum over rows": Case(lambda x, w: torch.einsum("bi,oi->bo", x, w), (16, 32), (2, 32), 32),
    "einsum over columns": Case(lambda x, w: torch.einsum("ibh,hnd->ibnd", x, w), (16, 3, 8), (2, 4, 16), 16),
    "einsum over both": Case(lambda x, w: torch.einsum("ibnd,hnd->ibh", x, w), (16, 3, 8), (2, 4, 3, 8), 24 + 3),
    "einsum over two letters of rows": Case(
        lambda x, w: torch.einsum("bhnd,hnid->bi", x, w), (4, 3, 5, 8), (2, 4, 3, 8), 96
    ),
    "einsum over no letter of rows": Case(lambda x, w: torch.einsum("bi,hnid->hnbd", x, w), (4, 3, 5, 8), (2, 5), 5),
    "einsum with dots": Case(lambda x, w: torch.einsum("...i,oi->...o", x, w), (16, 32), (2, 3, 32), 32),
    "einsum of W.T": Case(lambda x, w: torch.einsum("bi,io->bo", x, w.t()), (16, 32), (2, 32), 32),
    "einsum, weight first": Case(lambda x, w: torch.einsum("oi,bi->ob", w, x), (16, 32), (2, 32), 32),
}
"""Those that are computed of the dequantized one."""


def store(weight: Tensor, form: str, lead: int | None = None, scales: str | None = None) -> StoredTensor:
    """Return a weight, stored in a 4-bit format, or in ``float16`` or ``bfloat16``."""
    lead = weight.dim() - 1 if lead is None else lead
    rows = weight.detach().flatten(lead) if weight.dim() > lead + 1 else weight.detach()
    if form in ("float16", "bfloat16"):
        dtype = getattr(torch, form)
        return StoredTensor(HalfForm(dtype), (rows.to(dtype),), weight.shape[lead:], weight.dtype)
    quantized = quantize(rows, form, block_size=16, scales=scales)
    made = CodedForm.from_quantized_tensor(quantized)
    return StoredTensor(made, made.codes_and_scale_bytes(quantized), weight.shape[lead:], weight.dtype)
