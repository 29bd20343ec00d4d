"""Torch multiplies no 16-bit floats where a CPU has no instructions for them: it would take up to 200 times as long.
What C does not compute is multiplied in float32."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowmem
from lowmem import kernels
from lowmem.kernels import grouped_matmul
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.backend import backend_for
from tests.compiled import ISAS
from tests.selection import FULL, covering

SIXTEEN = torch.bfloat16, torch.float16
NAMES = (
    "mm addmm bmm baddbmm mv addmv dot linear convolution convolution_backward _grouped_mm "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward"
)
PRODUCTS = {getattr(torch.ops.aten, name, None) for name in NAMES.split()}


class Products(TorchDispatchMode):
    """Notes the products of torch that have 16-bit factors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [one for one in args if isinstance(one, torch.Tensor)]
        if any(isinstance(one, StoredTensor) for one in given):
            with self:
                return StoredTensor.__torch_dispatch__(function, types, args, kwargs or {})
        if function.overloadpacket in PRODUCTS:
            factors = [one for one in given if one.dtype in SIXTEEN]
            self.found += [(str(function), [(one.dtype, tuple(one.shape)) for one in factors])] if factors else []
        return function(*args, **(kwargs or {}))


SLOW = [name for name in ISAS if name not in ("avx512bf16", "avx512amx")]


@pytest.fixture(params=["reference", *(SLOW if FULL else SLOW[-1:])])
def slow(request, monkeypatch):
    """Each kernel of a processor without instructions for bfloat16."""
    with kernels.temporary_cpu_backend(request.param):
        if request.param == "reference":
            monkeypatch.setattr(type(backend_for()), "fast_bfloat16", False)
        assert not backend_for().fast_bfloat16
        yield request.param


def layer(*techniques, dense=None, dtype=None):
    """A model of one layer, with adapters, if any, that are not zero and have the dtype."""
    model = nn.Sequential(dense or nn.Linear(64, 48))
    lowmem.convert(model, *techniques, where=lambda path, module: True)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter).to(dtype or parameter.dtype)
    return model


STORAGES = {
    "4 bits": lowmem.FourBit("nf4", 32),
    "4 bits, rare blocks": lowmem.FourBit("nf4", 10),
    "4 bits, offsets": lowmem.FourBit("int4", 16, offsets=True),
    "4 bits, in bfloat16": lowmem.FourBit("nf4", compute_dtype=torch.bfloat16),
    "4 bits, in int8": lowmem.FourBit("nf4", compute_dtype=torch.int8),
    "8 bits": lowmem.EightBit(),
    "8 bits, rare blocks": lowmem.EightBit(10),
    "bfloat16": lowmem.Half(torch.bfloat16),
    "float16": lowmem.Half(torch.float16),
}
LORA = lowmem.LoRA(4)
MODELS = {
    **{name: (lambda one=one: layer(one), (64,)) for name, one in STORAGES.items()},
    **{f"{name} with an adapter": (lambda one=one: layer(one, LORA), (64,)) for name, one in STORAGES.items()},
    **{
        f"8 bits with an adapter in {dtype}": (lambda dtype=dtype: layer(lowmem.EightBit(), LORA, dtype=dtype), (64,))
        for dtype in SIXTEEN
    },
    **{
        f"{name}{' with an adapter' * adapted}": (
            lambda kind=kind, one=one, adapted=adapted: layer(one, *[LORA] * adapted, dense=kind(8, 6, 3)),
            (8, *(5,) * dims),
        )
        for dims, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (2, nn.ConvTranspose2d))
        for one in (lowmem.Half(torch.bfloat16), lowmem.EightBit(block_size=8))
        for adapted in (False, True)
        for name in [f"{kind.__name__} in {one.bits} bits"]
    },
}


def run(compute, *inputs, autocast=None):
    """Compute forward and backward, and once more without gradients; return the products of torch in 16 bits."""
    given = [one.detach().requires_grad_() for one in inputs]
    with Products() as seen:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = compute(*given)
            with torch.no_grad():
                compute(*inputs)
        out.sum().backward()
    assert all(one.grad is not None for one in given)
    return seen.found


@covering(1, name=list(MODELS), dtype=[*SIXTEEN, "autocast"])
def test_torch_multiplies_no_16_bit_floats_for_stored_layers(slow, name, dtype):
    make, shape = MODELS[name]
    model = make()
    for rows in (2, 70):
        x = torch.randn(rows, *shape)
        if dtype == "autocast":
            assert run(model, x, autocast=torch.bfloat16) == []
        else:
            assert run(model, x.to(dtype)) == []


@covering(1, dtype=SIXTEEN, weight=[lowmem.EightBit(), lowmem.Half(torch.bfloat16), None], biased=[False, True])
def test_torch_multiplies_no_16_bit_floats_in_the_chunked_loss(slow, dtype, weight, biased):
    rows = 9000  # more than are converted at a time
    dense = nn.Linear(64, rows, bias=False).to(dtype)
    head = layer(weight, dense=dense)[0].weight if weight else dense.weight
    bias = torch.randn(rows).to(dtype) if biased else None
    hidden, trained = torch.randn(5, 64).to(dtype), [] if weight else [head]

    def loss(hidden, *weights):
        return lowmem.linear_cross_entropy(hidden, *(weights or [head]), torch.arange(5), bias=bias)

    assert run(loss, hidden, *trained) == []


@covering(1, dtype=SIXTEEN, on_cpu=[False, True])
def test_torch_multiplies_no_16_bit_floats_for_adapters_of_experts(slow, dtype, on_cpu, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "_can_read_without_sync", lambda offsets: on_cpu)
    offsets, x, grad = torch.tensor([2, 2, 6], dtype=torch.int32), torch.randn(6, 8), torch.randn(6, 4)
    matrices = torch.randn(3, 8, 4)
    with Products() as seen:  # what the operators compute, into which a mode does not see
        outs = (
            grouped_matmul._grouped_matmul_kernel(x.to(dtype), matrices.to(dtype), offsets),
            grouped_matmul._grouped_matrices_grad(x.to(dtype), grad.to(dtype), offsets),
        )
    assert seen.found == []
    exact = (
        grouped_matmul._grouped_matmul_kernel(x, matrices, offsets),
        grouped_matmul._grouped_matrices_grad(x, grad, offsets),
    )
    for got, expected in zip(outs, exact, strict=True):
        assert got.dtype is dtype
        torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


@covering(1, dtype=SIXTEEN, technique=[lowmem.EightBit(), lowmem.Half(torch.bfloat16)], adapted=[False, True])
def test_torch_multiplies_no_16_bit_floats_for_embeddings_and_attention(slow, dtype, technique, adapted):
    table = layer(technique, *[LORA] * adapted, dense=nn.Embedding(9, 32), dtype=dtype)
    tokens = torch.arange(9)
    with Products() as seen:
        out = table(tokens)
        (out + torch.zeros((), requires_grad=True)).sum().backward()
    assert seen.found == []
    attention = layer(technique, *[LORA] * adapted, dense=nn.MultiheadAttention(32, 2), dtype=dtype)[0]
    assert run(lambda x: attention(x, x, x)[0], torch.randn(4, 3, 32).to(dtype)) == []


@pytest.mark.parametrize("isa", SLOW[-1:])
def test_a_product_in_float32_is_rounded_once(isa):
    """The weight is not rounded to the 16 bits of the input, and neither is a bias or a part of the sum."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 800, 3100  # several chunks of each
    weight = lowmem.quantize(torch.randn(rows, columns, generator=generator), "nf4", block_size=10)
    dense, bias = weight.dequantize().double(), torch.randn(rows, generator=generator)
    for dtype in SIXTEEN:
        (x, onto_x), (grad, onto_grad) = (
            torch.randn(2, 3, n, generator=generator).to(dtype) for n in (columns, rows)
        )
        with kernels.temporary_cpu_backend(isa):
            found = {
                kernels.linear(x, weight, dtype, bias): x.double() @ dense.t() + bias,
                kernels.input_grad(grad, weight, dtype): grad.double() @ dense,
                kernels.add_product(onto_grad.clone(), x, weight, False): onto_grad + x.double() @ dense.t(),
                kernels.add_product(onto_x.clone(), grad, weight, True): onto_x + grad.double() @ dense,
            }
        for got, expected in found.items():
            assert got.dtype is dtype
            off = (got.double() - expected).abs()
            assert (off <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-3).all()  # sums of float32: 1e-4
