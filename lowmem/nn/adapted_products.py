"""Products, gathers and convolutions with a weight that has adapters: those with W, plus the product of the input
with the adapters' two thin matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels.grouped import grouped_matmul
from lowmem.nn.adapter import add_low_rank
from lowmem.nn.adapter_autograd import read_product
from lowmem.nn.calls import no_slow_autocast
from lowmem.nn.low_rank_sum import ADAPTED_FUNCTIONS, LowRankSum, implements_adapted, is_adapted
from lowmem.nn.stored_products import recomputed_einsum


@implements_adapted(functional.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product with W, plus the low-rank one: (..., in) -> (..., out)."""
    if not is_adapted(weight) or is_adapted(input) or weight.is_kernel or len(weight.base.shape) != 2:
        return NotImplemented
    if (fused := _fused(weight, "linear", input, bias)) is not None:
        return fused
    out = weight.of_rows(input, functional.linear, bias.values() if is_adapted(bias) else bias)
    for one in weight.updates:
        out = add_low_rank(out, one.dropped(input), one.right, one.left, one.scaling)
    return out


def _fused(weight: Any, kind: str, input: Any, bias: Any) -> Tensor | None:
    """Return the product with a weight and its only adapter as one autograd node (``read_product``), or None."""
    if weight.known is not None or weight.holds.kind != kind or len(weight.updates) != 1 or is_adapted(input):
        return None
    (update,) = weight.updates
    if update.adapter is None or len(weight.base.shape) != 2 or is_adapted(bias):
        return None
    return read_product(input, weight.base, update, bias, kind == "transposed")


_MATMULS = torch.matmul, Tensor.matmul
_OF_MATRICES = torch.mm, Tensor.mm  # take 2-dimensional tensors only


def _register_products() -> None:
    for name, *matrices in (
        ("matmul", "other"), ("mm", "mat2"), ("bmm", "mat2"), ("mv", "vec"),
        ("addmm", "mat1", "mat2"), ("baddbmm", "batch1", "batch2"),
    ):  # fmt: skip
        for place in (torch, Tensor):
            function = getattr(place, name)
            ADAPTED_FUNCTIONS[function] = partial(_named_product, function, matrices)
    ADAPTED_FUNCTIONS[torch.linalg.matmul] = ADAPTED_FUNCTIONS[torch.matmul]
    ADAPTED_FUNCTIONS[Tensor.__matmul__] = partial(_product, torch.matmul)
    ADAPTED_FUNCTIONS[Tensor.__rmatmul__] = lambda b, a: _product(torch.matmul, a, b)


def _named_product(function: Any, names: Sequence[str], first: Any, *rest: Any, **named: Any) -> Any:
    """Compute a function whose arguments ``names`` may be given by keyword: a product with one name, with two the sum
    of ``first`` and the product of the two."""
    given = [*rest, *[named[name] for name in names[len(rest) :]]]
    options = {name: value for name, value in named.items() if name not in names}
    if len(names) == 1:
        return NotImplemented if options else _product(function, first, *given)
    return _added_product(function, first, *given, **options)


def _added_product(function: Any, input: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if function in (torch.addmm, Tensor.addmm) and is_adapted(b) and beta == alpha == 1 and len(a.shape) == 2:
        fused = _fused(b, "transposed", a, input)
        if fused is not None:
            return fused
    return _product(lambda a, b: function(input, a, b, beta=beta, alpha=alpha), a, b, alpha)


def _product(function: Callable[[Any, Any], Tensor], a: Any, b: Any, alpha: float = 1) -> Any:
    """Return ``function(a, b)``, one of which is an adapted weight, plus alpha times the low-rank product."""
    weight = b if is_adapted(b) else a
    if is_adapted(a) == is_adapted(b) or weight.is_kernel or len(weight.base.shape) < 2:
        return NotImplemented
    if not is_adapted(b):
        out = a.of_rows(b, lambda x, weight: function(weight, x))
        for one in a.updates:
            with no_slow_autocast(b):
                narrow = torch.matmul(one.right, one.dropped(b)) * (one.scaling * alpha)
                out = out + torch.matmul(one.left, narrow).to(out.dtype)
        return out
    if alpha == 1 and (function in _MATMULS or (function in _OF_MATRICES and len(a.shape) == 2)):
        fused = _fused(b, "transposed", a, None)
        if fused is not None:
            return fused
    out = b.of_rows(a, function)
    for one in b.updates:
        if len(b.base.shape) == 2:
            out = add_low_rank(out, one.dropped(a), one.left.mT, one.right.mT, one.scaling * alpha)
        else:
            with no_slow_autocast(a):
                narrow = torch.matmul(one.dropped(a), one.left) * (one.scaling * alpha)
                out = out + torch.matmul(narrow, one.right).to(out.dtype)
    return out


_register_products()


def _grouped_mm(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not is_adapted(mat_b) or is_adapted(mat_a) or len(mat_a.shape) != 2 or len(mat_b.base.shape) != 3:
        return NotImplemented
    if offs is None:
        return NotImplemented
    out = mat_b.of_rows(mat_a, lambda x, weight: _GROUPED[0](x, weight, offs=offs, bias=bias, out_dtype=out_dtype))
    return _with_groups(out, mat_a, mat_b, offs)


def _grouped_mm_of_transformers(input: Any, weight: Any, offs: Any) -> Any:
    """Implement transformers' fallback for torch versions without grouped_mm, without dequantizing the weight."""
    if not is_adapted(weight) or len(weight.base.shape) != 3:
        return NotImplemented
    out = torch.ops.transformers.grouped_mm_fallback(input, weight.base, offs)
    return _with_groups(out, input, weight, offs)


def _with_groups(out: Tensor, x: Tensor, weight: Any, offsets: Tensor) -> Tensor:
    for one in weight.updates:
        narrow = grouped_matmul(one.dropped(x), one.left, offsets) * one.scaling
        out = out + grouped_matmul(narrow, one.right, offsets).to(out.dtype)
    return out


_GROUPED = [
    getattr(place, name)
    for place, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(place, name)
]
ADAPTED_FUNCTIONS.update(dict.fromkeys(_GROUPED, _grouped_mm))
ADAPTED_FUNCTIONS["transformers.grouped_mm_fallback"] = _grouped_mm_of_transformers


@implements_adapted(torch.einsum)
def _einsum(*arguments: Any) -> Any:
    """Contract with the dense sum, which backward makes again."""
    return recomputed_einsum(arguments, LowRankSum, LowRankSum.values)


@implements_adapted(functional.embedding)
def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not is_adapted(weight) or weight.is_kernel or len(weight.base.shape) != 2 or max_norm is not None:
        return NotImplemented
    rest = padding_idx, max_norm, norm_type, scale_grad_by_freq
    out = functional.embedding(input, weight.base, *rest, sparse)
    for one in weight.updates:
        narrow = functional.embedding(input, one.left, *rest) * one.scaling  # (..., rank)
        with no_slow_autocast(narrow):
            out = out + (narrow @ one.right).to(out.dtype)
    return out


@implements_adapted(functional.embedding_bag)
def _embedding_bag(
    input: Tensor,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    if not is_adapted(weight) or mode == "max" or max_norm is not None:
        return NotImplemented

    def bag(table: Any, sparse: bool) -> Tensor:
        return functional.embedding_bag(
            input, table, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, *rest, **named
        )

    out = bag(weight.base, sparse)
    for one in weight.updates:
        with no_slow_autocast(out):
            out = out + ((bag(one.left.contiguous(), False) * one.scaling) @ one.right).to(out.dtype)
    return out


def _convolve(
    function: Any, expand: Any, kind: str, input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any
) -> Any:
    """Convolve with a kernel of layout ``kind``: A convolves to ``rank`` channels, and B is a 1x1 kernel."""
    if not is_adapted(weight) or weight.holds.kind != kind:
        return NotImplemented

    def convolved(x: Tensor, kernel: Any, bias: Any = None) -> Any:
        return function(x, kernel, bias, *rest, **named)

    out = weight.of_rows(input, convolved, bias)
    first, second, *kernel = weight.holds.shape
    groups = rest[3] if len(rest) > 3 else named.get("groups", 1)  # the fourth, plain and transposed
    ones = (1,) * len(kernel)
    for one in weight.updates:
        if kind == "kernel":
            a, b = one.right.view(-1, second, *kernel), one.left  # (rank, in / groups, *kernel)
            a = a if groups == 1 else a.repeat(groups, *ones, 1)
        else:
            a, b = one.right.view(-1, first, *kernel).movedim(0, 1), one.left.repeat(groups, 1)  # (in, rank, *kernel)
        with no_slow_autocast(input):
            narrow = convolved(one.dropped(input), a) * one.scaling
            out = out + expand(narrow, b.view(*b.shape, *ones), groups=groups).to(out.dtype)
    return out


for _dims in (1, 2, 3):
    _conv, _transposed = getattr(functional, f"conv{_dims}d"), getattr(functional, f"conv_transpose{_dims}d")
    ADAPTED_FUNCTIONS[_conv] = partial(_convolve, _conv, _conv, "kernel")
    ADAPTED_FUNCTIONS[_transposed] = partial(_convolve, _transposed, _conv, "transposed kernel")
