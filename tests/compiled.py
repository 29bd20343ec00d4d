"""What tests of the compiled kernel share: at which ISAs they run, weights of every kind, and how exact it is."""

from collections.abc import Iterable
from contextlib import contextmanager

import pytest
import torch

from lowmem import QuantizedTensor, kernels, quantize
from lowmem.kernels import cpu, reference
from lowmem.quant.backend import backend_for
from tests import strategies
from tests.rounding import gamma, unit
from tests.selection import FULL, PROFILE

ISAS = kernels.available_cpu_backend_names()[1:]
needs_kernel = pytest.mark.skipif(not ISAS, reason="the kernel is not compiled here")


def at(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test at the slowest and the fastest of these ISAs that the processor has.

    Planted faults and mutants are tried at all of these ISAs. Where ``FULL`` is true, a test runs at every ISA.
    """
    found = [name for name in ISAS if FULL or name in names]
    if not FULL and PROFILE != "faults":
        found = [*found[:1], *found[1:][-1:]]
    return pytest.mark.parametrize("isa", found)


# Every ISA serves every product. Those that are not named compute it with the source of one that is.
compiled = at(["portable", "neon", "avx2", "avx512"])  # products of float32 and float16; rows
compiled_bfloat16 = at(["portable", "neon", "avx2", "avx512", "avx512bf16", "avx512amx"])
compiled_int8 = at(["portable", "neon", "avx2", "avxvnni", "avx512", "avx512vnni"])
bound = at([*ISAS[:1], *ISAS[-1:]])  # how C is called, which is one source: the slowest and the fastest

# The largest batches that are taken in one way, or are a step of one, at some ISA; each with its neighbours.
STEPS = (1, 3, 4, 6, 8, 12, 16, 24, 32, 48)
EDGES = sorted({step + beside for step in STEPS for beside in (-1, 0, 1)} - {0})

given_stored = (  # a matrix and how it is stored: weight, format, block size, scales
    strategies.weights(2, 2, max_exponent=0, rows=strategies.tiled_rows, columns=strategies.long_columns),
    strategies.formats,
    strategies.short_blocks,
    strategies.encodings,
)


@contextmanager
def on_threads(count: int):
    """Let torch and the kernel use so many threads, on however few CPUs and beside whatever else runs."""
    before, native = torch.get_num_threads(), cpu.load_native_module_and_reason()[0]
    torch.set_num_threads(count)
    limit = native.limit_threads(count, False) if native else None
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if native:
            native.limit_threads(limit, False)


@contextmanager
def no_plain_rows():
    """Let no rows be quantized or dequantized because plain torch did it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dequantize", "quantize_rows"):
            patch.setattr(reference, name, None)  # calling it is a TypeError
        yield


def roundings(terms: int) -> int:
    """Return the most roundings that one product meets in a float32 sum of so many, at every ISA and batch size.

    A sum is off by at most gamma(k) times the sum of the magnitudes, where no term meets more than k roundings
    (Higham, section 4.2). In any order that is one for each term. The kernel adds products in chains of at most 64,
    and then what the chains made: at most one chain for 16 products.

    The other 12: 3 dequantize the weight (steps times the row's scale, over the row's steps, times the level), 1
    rounds the product, 8 add up the lanes, the parts of wide rows and the bias.
    """
    return min(terms, 64 + -(-terms // 16)) + 12


def exact_product(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None, by_torch: bool = False):
    """Return the float64 product, and how far off a float32 one may be: ``roundings`` of the sum of the magnitudes.

    Where torch multiplies, a BLAS adds, which may do so in one chain.

    1e-40 is for products that are subnormal in float32: 4096 of them are off by half of 2**-149 each.
    """
    expected, magnitudes = x.double() @ dense.double().t(), x.double().abs() @ dense.double().abs().t()
    if bias is not None:
        expected, magnitudes = expected + bias.double(), magnitudes + bias.double().abs()
    most = x.shape[1] + 12 if by_torch else roundings(x.shape[1])
    return expected, gamma(most) * magnitudes + 1e-40


def by_torch(weight: kernels.Weight, rows: int, dtype: torch.dtype, operation: str = "linear") -> bool:
    """Whether torch multiplies by this weight where the kernel in use is asked to."""
    return "torch" in backend_for().tried_kernels(weight, rows, dtype, operation)[-1][1]


def assert_exact(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias=None, by_torch: bool = False) -> None:
    expected, allowed = exact_product(x, dense, bias, by_torch)
    assert got.dtype == torch.float32
    assert ((got.double() - expected).abs() <= allowed).all()


def assert_close_in(dtype: torch.dtype, got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """Within the roundings of the factors, of the sum and of the result of the float64 product.

    In bfloat16 both factors are rounded: the weight, or its level, and its scale times the input. Numbers of float16
    and float32 are multiplied as they are. Sums are in float32; those of bfloat16 by AMX are one chain. With AVX2,
    bfloat16 inputs are rounded to integers of 14 bits. Sixteen columns share a unit, which their largest input sets.
    """
    of_one = unit(dtype)
    terms = x.shape[1]
    expected = x.double() @ dense.double().t()
    magnitudes = x.double().abs() @ dense.double().abs().t()
    factors = 2 * of_one + of_one**2 + gamma(terms + 32) if dtype == torch.bfloat16 else gamma(roundings(terms))
    tiny = torch.finfo(dtype).smallest_normal * (1 + x.double().abs().sum(1, keepdim=True))  # subnormals count as 0
    if dtype == torch.bfloat16 and backend_for().name in ("avx2", "avxvnni"):
        tiny = tiny + 2.0**-14 * x.double().abs().amax(1, keepdim=True) * dense.double().abs().sum(1)
    allowed = (1 + of_one) * (factors * magnitudes + tiny) + of_one * expected.abs()
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


def dequantized(weight, dtype):
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)


def both(weight: str):
    dense = strategies.make_weight("normal", (6, 40), 0, 0)
    return dense.half() if weight == "half" else quantize(dense, block_size=8)


both_kinds = pytest.mark.parametrize("weight", ["half", "4-bit"])
