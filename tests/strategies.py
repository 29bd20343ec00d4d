"""What the properties are tried on: weights of every kind, formats, block sizes and scale encodings."""

import math

import torch
from hypothesis import strategies as st

from lowmem import FourBit, Half, LoRA, LoRALinear, convert
from lowmem.io.safetensors_header import DTYPES
from lowmem.quant.formats import EIGHT_BIT, FORMATS
from lowmem.quant.scale_encodings import ENCODINGS
from tests.selection import FULL

four_bit_formats = st.sampled_from(sorted(FORMATS))
formats = st.sampled_from([*sorted(FORMATS), *EIGHT_BIT])
encodings = st.sampled_from(sorted(ENCODINGS))
block_sizes = st.one_of(st.sampled_from([8, 16, 64, 4096]), st.integers(4, 2048).map(lambda half: 2 * half))
small_blocks = st.sampled_from([8, 10, 16, 32, 64])
seeds = st.integers(0, 2**31 - 1)
few_rows = st.integers(1, 5)

# Matrices for the compiled kernel: 16 rows make a tile, and 128 or 256 columns a part of a row. Most have more of
# both, and most blocks are short, so that most rows are longer than a block and end anywhere in one.
tiled_rows = st.one_of(st.integers(1, 15), st.integers(16, 40), st.sampled_from([16, 31, 32, 33, 48, 64]))
long_columns = st.one_of(st.integers(1, 256), st.integers(257, 512), st.integers(513, 700))
short_blocks = st.one_of(st.sampled_from([8, 10, 16, 24]), st.sampled_from([32, 64, 80, 128]), block_sizes)
leading_shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)

BASES = {"dense": (), "half": (Half(),), "bfloat16": (Half(torch.bfloat16),), "4-bit": (FourBit("nf4", 16),)}
KINDS = (
    "normal",
    "zeros",
    "zero blocks",
    "subnormal",
    "float16 subnormal",
    "constant",
    "outlier",
    "far outlier",
    "mixed",
    "few",
)


def make_weight(kind: str, shape: tuple[int, ...], exponent: int, seed: int) -> torch.Tensor:
    """Return float32 weights of one kind, times 2 ** exponent where the kind has a size of its own to choose."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    columns = shape[-1]
    scale = 2.0**exponent
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "zero blocks":
        return normal * scale * (torch.arange(columns) // 8 % 2)
    if kind == "subnormal":
        return normal * 2.0**-140
    if kind == "float16 subnormal":
        return normal * 2.0**-24
    if kind == "constant":
        return torch.full(shape, float(normal.flatten()[0]) * scale if normal.numel() else 0.0)
    if kind == "outlier":
        return torch.where(torch.arange(columns) == seed % columns, normal * scale * 1000, normal * scale)
    if kind == "far outlier":  # 1e3 to 1e7 times the rest
        size = scale * 1000
        return torch.where(
            torch.arange(columns) == seed % columns, normal * size, normal * size / 10.0 ** (3 + seed % 5)
        )
    if kind == "mixed":
        return normal * torch.exp2(torch.randint(-60, 10, shape, generator=generator).float())
    if kind == "few":
        return torch.randint(-2, 3, shape, generator=generator) * scale
    return normal * scale


@st.composite
def weights(draw, min_dims=1, max_dims=3, max_columns=200, max_exponent=2, views=True, rows=few_rows, columns=None):
    """Draw float32 weights, some of them strided, transposed or offset views, that every encoding can hold.

    The values are made from a seed, so that a large weight takes no more of hypothesis's choices than a small one.
    """
    leading = draw(st.lists(rows, min_size=min_dims - 1, max_size=max_dims - 1))
    columns = draw(st.integers(1, max_columns) if columns is None else columns)
    kind = draw(st.sampled_from(KINDS))
    weight = make_weight(kind, (*leading, columns), draw(st.integers(-30, max_exponent)), draw(seeds))
    view = draw(st.sampled_from(["plain", "strided", "transposed", "offset"])) if views else "plain"
    if view == "strided":
        wide = torch.full((*leading, 2 * columns), math.nan)
        wide[..., ::2] = weight
        return wide[..., ::2]
    if view == "transposed" and weight.dim() > 1:
        return weight.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "offset":
        wide = torch.full((*leading, columns + 3), math.nan)
        wide[..., 3:] = weight
        return wide[..., 3:]
    return weight


def make_importance(kind: str, columns: int, seed: int) -> torch.Tensor | None:
    """Return what the squared errors of columns count: some nothing, powers of two far apart, or all alike."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "some zeros":
        return torch.rand(columns, generator=generator) * torch.randint(0, 2, (columns,), generator=generator)
    if kind == "mixed":
        return torch.exp2(torch.randint(-149, 128, (columns,), generator=generator).float())
    return None


importance_kinds = st.sampled_from(["none", "some zeros", "mixed"])


GRADCHECKED = 40 if FULL else 20  # features: gradcheck takes a product for each number; blocks have 16


@st.composite
def linears(draw, dtype=torch.float32, max_features=40):
    """Draw an nn.Linear of any small size, with or without a bias."""
    sizes = st.integers(1, max_features)
    in_features, out_features, bias = draw(sizes), draw(sizes), draw(st.booleans())
    linear = torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(draw(seeds))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def make_input(leading: tuple[int, ...], features: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    """Return a normal input (*leading, features) that takes a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, features, generator=generator, dtype=dtype).requires_grad_()


names = st.text(max_size=12).filter(lambda name: name != "__metadata__")
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
metadatas = st.dictionaries(st.text().filter(lambda name: name != "version"), json_values, max_size=4)


@st.composite
def tensors(draw):
    """Draw a small tensor of any dtype that safetensors has and any bits, some of them views, some of them empty."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(seeds))
    high = 2 if dtype == torch.bool else 256
    values = torch.randint(high, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    tensor = values.view(dtype).view(shape)
    view = draw(st.sampled_from(["plain", "transposed", "strided", "conjugate"]))
    if view == "transposed":
        return tensor.transpose(0, -1) if shape else tensor
    if view == "strided" and shape:
        return tensor[::2]
    return tensor.conj() if view == "conjugate" else tensor


@st.composite
def convolutions(draw, dtype=torch.float32):
    """Draw an nn.Conv1d or nn.Conv2d of any geometry, and the size of an input that it takes."""
    dims, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation, stride = each(1, 4), each(1, 2), each(1, 3)
    padding = draw(st.sampled_from([each(0, 2), "valid", "same"]))
    layer = (torch.nn.Conv1d if dims == 1 else torch.nn.Conv2d)(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        (1,) * dims if padding == "same" else stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        dtype=dtype,
    )
    return layer, each(7, 10)


def make_adapted(
    linear: torch.nn.Linear,
    base: str,
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    technique: LoRA | None = None,
) -> LoRALinear:
    """Return a linear layer of ``BASES`` with an adapter, of at most the weight's rank, whose lora_b is not zero."""
    rank = min(rank, *linear.weight.shape)
    layer = convert(linear, *BASES[base], LoRA(rank, alpha) if technique is None else technique)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator))
    return layer
