"""What tests of the compiled kernel share: its levels, weights of every kind, and how exact it must be."""

from contextlib import contextmanager

import pytest
import torch

from lowmem import QuantizedTensor, blockwise, kernels, quantize
from tests import strategies

compiled = pytest.mark.parametrize("level", kernels.available()[1:])
given_stored = (  # a matrix and how it is stored in 4 bits: weight, format, block size, scales
    strategies.weights(min_dims=2, max_dims=2, max_columns=400, max_exponent=0),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
)


@contextmanager
def on_threads(count: int):
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_plain_rows():
    """Let no rows be quantized or restored because plain torch did it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dequantize", "quantize_rows"):
            patch.setattr(type(blockwise.PLAIN), name, None)  # calling it is a TypeError
        yield


def exact_product(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None):
    """The float64 product, and how far off one may be: 1e-6 of the norms' product, as torch's own float32 is."""
    expected = x.double() @ dense.double().t()
    expected = expected if bias is None else expected + bias.double()
    allowed = 1e-6 * x.double().norm(dim=1)[:, None] * dense.double().norm(dim=1) + 1e-40
    return expected, allowed if bias is None else allowed + 1e-6 * bias.double().abs()


def assert_exact(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected, allowed = exact_product(x, dense, bias)
    assert got.dtype == torch.float32
    assert ((got.double() - expected).abs() <= allowed).all()


def assert_no_worse_than_torch(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """Within 1e-6 of the norms' product, or what torch's own float32 product loses, where that is more."""
    exact, norms = x.double() @ dense.double().t(), x.double().norm(dim=1)[:, None] * dense.double().norm(dim=1)
    lost, torchs = (((y.double() - exact).abs() / norms).max() for y in (got, x @ dense.t()))
    assert lost <= max(1e-6, torchs)


def assert_close_in(dtype: torch.dtype, got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """Within the roundings of both factors and of the result of the float64 product; sums are in float32."""
    unit = torch.finfo(dtype).eps / 2  # what one rounding loses
    expected = x.double() @ dense.double().t()
    magnitudes = x.double().abs() @ dense.double().abs().t()
    factors = 2.1 * unit if dtype == torch.bfloat16 else 1e-6  # float16 is widened: its factors are exact
    tiny = torch.finfo(dtype).smallest_normal * (1 + x.double().abs().sum(1, keepdim=True))  # subnormals count as 0
    allowed = factors * magnitudes + 1.1 * unit * expected.abs() + tiny
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= allowed).all()


def assert_same_bytes(got: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert torch.equal(got.packed, expected.packed)
    assert torch.equal(got.scales.view(torch.uint8), expected.scales.view(torch.uint8))


def spread_inputs(exponents: torch.Tensor, columns: int, decades: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs whose magnitudes lie apart: a column's own, by so many decades, and an input's own."""
    spread = -decades * torch.rand(columns, generator=generator) ** 3
    return torch.randn(len(exponents), columns, generator=generator) * 10**spread * 10 ** exponents[:, None]


def stored(kind: str, dense: torch.Tensor, **options):
    """A weight of a kind (float16, bfloat16, or a 4-bit format with its options), and what it stands for."""
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(kind)
    w = dense.to(dtype) if dtype else quantize(dense, kind, **options)
    return w, w.float() if dtype else w.dequantize()
