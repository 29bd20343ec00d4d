"""The products as operators: what torch.compile and torch.export make of them."""

import io
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, LoRA, convert, kernels, quantize
from lowmem.kernels import cpu, ops
from lowmem.kernels.frozen_weight_operator import codes_scales_and_description
from lowmem.nn.fold import unadapted_shallow_copy
from tests import strategies
from tests.operators import assert_operator
from tests.rounding import OF_4_BITS, assert_sum, stored_weight


def make_weight(kind: str):
    dense = strategies.make_weight("normal", (6, 40), 0, 0)
    return quantize(dense, block_size=8) if kind == "4-bit" else dense.half()


# dynamo makes an instance of every function of one's own
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
)

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
kinds = pytest.mark.parametrize("kind", ["half", "4-bit"])
models = pytest.mark.parametrize("kind", ["half", "4-bit", "8-bit products"])
every_order = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])


@pytest.mark.thorough(keep=1)
@kinds
@every_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_operators_are_what_torch_expects_of_one(kind, transposed, dtype):
    """With a bias and an adapter, too; the gradient of a product in 8-bit integers is that of the input's dtype."""
    if kind == "half" and dtype is torch.int8:
        return
    weight, own = make_weight(kind), torch.float32 if dtype is torch.int8 else dtype
    x = torch.randn(3, 6 if transposed else 40, dtype=own, requires_grad=True)
    added = [torch.randn(shape, dtype=own) for shape in ((6,), (2, 40), (6, 2))]
    for some in [()] if transposed else [(), added[:1], (*added, 0.5)]:
        if kind == "half":
            operator, given = torch.ops.lowmem.product_16bit.default, (x, weight, dtype, transposed, *some)
        else:
            own_dtype = None if dtype is own and some else dtype  # None is that of the input
            given = (x, *codes_scales_and_description(weight), own_dtype, transposed, *some)
            operator = torch.ops.lowmem.product_4bit.default
        assert_operator(operator, given)
        out = operator(*given)
        assert out.dtype == own
        assert torch.equal(out, ops.product(x, weight, dtype, transposed, *some))
        got, exact = (torch.autograd.grad(ops.product(x, weight, one, transposed).sum(), x) for one in (dtype, own))
        assert torch.equal(*got, *exact)


def build(kind: str) -> torch.nn.Module:
    compute = torch.int8 if kind == "8-bit products" else None
    technique = Half() if kind == "half" else FourBit(block_size=8, compute_dtype=compute)
    plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    return convert(plain, technique, LoRA(2))


@models
@pytest.mark.skipif(kernels.available_cpu_backend_names() == ["reference"], reason="the kernel is not compiled here")
def test_a_compiled_graph_is_served_by_the_kernel(kind, monkeypatch):
    model = build(kind).eval().requires_grad_(False) if kind == "half" else build(kind).eval()
    served = []
    run = cpu.CpuBackend.linear
    monkeypatch.setattr(cpu.CpuBackend, "linear", lambda *given: (served.append(given[1].shape), run(*given))[1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), kernels.temporary_cpu_backend(kernels.available_cpu_backend_names()[-1]):
        for batch in (3, 5):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(compiled(x), model(x))
    assert torch.Size((5, 16)) in served


@needs_compiler
def test_inductor_gives_what_the_model_gives_for_any_batch(request):
    """In float64, where what two orders of addition differ by is 1e-15 of a sum: 1e-9 allows for any condition."""
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    model = convert(convert(model, FourBit(block_size=16), skip="2"), Half()).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 16), (7, 3, 16)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        got, expected = compiled(x), model(x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        of_x = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected)]
        torch.testing.assert_close(*of_x, rtol=1e-9, atol=1e-9)


@contextmanager
def may_be_refused(message: str):
    """Let a RuntimeError pass that says this, and no other error."""
    try:
        yield
    except RuntimeError as refusal:
        if message not in str(refusal):
            raise


def assert_gradient_of_squares(got, layer, x, precision):
    """Hold ``got`` to the exact gradient of ``layer(x).square().sum()``, within seven roundings to ``precision``.

    Forward rounds x, W, their product, and the product with the bias. Backward rounds the output's gradient, W, and
    the product of these two.
    """
    weight, bias, x = stored_weight(layer), layer.bias.detach().double(), x.double()
    exact = 2 * (x @ weight.t() + bias) @ weight
    magnitudes = 2 * (x.abs() @ weight.abs().t() + bias.abs()) @ weight.abs()
    terms = sum(weight.shape) + 1 + 2 * OF_4_BITS + 1  # a bias; and the square's derivative is rounded once
    assert_sum(got, exact, magnitudes, terms, rounded=(precision,) * 7)


@pytest.mark.compile(keep=1)
@models
@pytest.mark.parametrize("transform", ["forward mode", "gradient"])
def test_compiled_transforms_of_torch_func_are_right_or_refused(kind, transform):
    """Forward mode in a function of one's own is not compiled: it falls back to eager, and never gives zeros."""
    layer = unadapted_shallow_copy(build(kind)[0])
    x = torch.randn(3, 16)
    forward_mode = lambda x: torch.func.jvp(layer, (x,), (x,))[1]  # noqa: E731
    function = forward_mode if transform == "forward mode" else torch.func.grad(lambda x: layer(x).square().sum())
    compiled = torch.compile(function, backend="aot_eager")
    if transform == "gradient":
        with may_be_refused("functions with out=... arguments don't support automatic differentiation"):
            got, expected = compiled(x), function(x)
            precision = kernels.differentiable_dtype(torch.int8, x) if kind == "8-bit products" else x.dtype
            if precision is x.dtype:
                torch.testing.assert_close(got, expected)
            for one in (got, expected) if kind == "8-bit products" else ():
                assert_gradient_of_squares(one, layer, x, precision)
    else:
        torch.testing.assert_close(compiled(x), function(x))


def test_autocast_and_compile_together():
    model = build("4-bit").eval()
    x = torch.randn(3, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


TRACED = {
    "nf4": (FourBit("nf4", 16),),
    "bof4s": (FourBit("bof4s", 16, "float16"),),
    "in bfloat16": (FourBit(block_size=16, compute_dtype=torch.bfloat16),),
    "8-bit products": (FourBit(block_size=16, compute_dtype=torch.int8),),
    "half": (Half(),),
    "bfloat16": (Half(torch.bfloat16),),
    "qlora": (FourBit(block_size=16), LoRA(2)),
    "half and lora": (Half(), LoRA(2)),
    "lora": (LoRA(2),),
}
traced = pytest.mark.parametrize("technique", sorted(TRACED))
in_float32 = pytest.mark.parametrize("technique", sorted(TRACED.keys() - {"in bfloat16"}))


class Everything(nn.Module):
    """One layer of each kind that ``convert`` takes, with several geometries; takes (batch, length) of indices."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 24)
        self.linear = nn.Linear(24, 40)
        self.conv = nn.Conv1d(40, 16, 3, padding="same", groups=2, padding_mode="circular")
        self.conv2 = nn.Conv2d(1, 3, (3, 2), stride=2, bias=False)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, indices):
        x = torch.relu(self.linear(self.embedding(indices)))  # (batch, length, 40)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)  # (batch, length, 16)
        return self.head(x), self.conv2(x.unsqueeze(1))


def everything(technique: str) -> nn.Module:
    torch.manual_seed(0)
    model = convert(Everything(), *TRACED[technique]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    return model


def trace(model: nn.Module | Callable, *inputs: torch.Tensor, check: bool = True) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a size that was made a constant, among others
        warnings.filterwarnings("ignore", ".*torch.jit.*(deprecated|not supported)")  # itself
        return torch.jit.trace(model, inputs, check_trace=check)


def assert_gives_the_same(traced_model, model, *inputs: torch.Tensor, in_8_bits: bool = False) -> None:
    """Hold a traced model's outputs to the model's.

    ``in_8_bits``: layers round inputs to steps, of which the largest number is 127. Last bits decide where a number
    at half a step goes. A step of any one, in any layer, moves an output by at most 1.8 steps of the largest output.
    """
    with torch.no_grad():
        got, expected = traced_model(*inputs), model(*inputs)
    for one, other in zip(got, expected, strict=True):
        allowed = {"rtol": 0, "atol": 2 * float(other.abs().max()) / 127} if in_8_bits else {}
        torch.testing.assert_close(one, other, **allowed)  # the adapter's update may be added in another order


@pytest.mark.thorough(keep=2)
@in_float32
def test_a_traced_model_gives_the_same_for_other_sizes_and_when_it_is_saved(technique):
    model = everything(technique)
    generator = torch.Generator().manual_seed(1)
    indices = lambda *shape: torch.randint(30, shape, generator=generator)  # noqa: E731
    traced_model = trace(model, indices(3, 9))
    file = io.BytesIO()
    torch.jit.save(traced_model, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in ((3, 9), (1, 9), (5, 14)):
        x = indices(*shape)
        for one in (traced_model, loaded):
            assert_gives_the_same(one, model, x, in_8_bits=technique == "8-bit products")


@traced
def test_a_traced_linear_layer_takes_every_shape_and_keeps_the_input_s_dtype(technique):
    for dtype, shape in product((torch.float32, torch.bfloat16), ((24,), (2, 24), (2, 3, 24), (0, 24))):
        torch.manual_seed(0)
        layer = convert(nn.Linear(24, 8), *TRACED[technique]).to(dtype)  # a fresh adapter, if any, adds nothing
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            got, expected = trace(layer, x, check=False)(x), layer(x)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        # A traced product is rounded before the bias is added: one rounding more of product, bias and sum.
        # What both take from their factors is the same.
        weight, bias = stored_weight(layer), layer.bias.double()
        magnitudes = x.double().abs() @ weight.abs().t() + bias.abs()
        unit = torch.finfo(torch.bfloat16 if technique == "in bfloat16" else dtype).eps
        assert ((got.double() - expected.double()).abs() <= 2 * unit * magnitudes).all()


@pytest.mark.parametrize("technique", ["nf4", "half", "qlora"])
def test_a_traced_model_has_the_gradient_of_its_input(technique):
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3)), *TRACED[technique])
    x, other = torch.randn(2, 24, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    traced_model = trace(model, x)
    got, expected = (torch.autograd.grad(each(other).square().sum(), other)[0] for each in (traced_model, model))
    torch.testing.assert_close(got, expected)


@pytest.mark.processes
def test_a_traced_file_runs_where_lowmem_is_imported(tmp_path):
    model, x = everything("nf4"), torch.arange(18).view(2, 9)
    torch.jit.save(trace(model, x), tmp_path / "model.pt")
    with torch.no_grad():
        torch.save([*model(x)], tmp_path / "expected.pt")
    script = (
        "import sys, torch, lowmem; model = torch.jit.load(sys.argv[1]); expected = torch.load(sys.argv[2]); "
        "[torch.testing.assert_close(*pair) for pair in zip(model(torch.arange(18).view(2, 9)), expected)]"
    )
    files = [str(tmp_path / "model.pt"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, *files], check=True)


def test_the_operator_of_rows_is_what_torch_expects_of_one():
    weight = make_weight("4-bit")
    for dtype in (torch.float32, torch.bfloat16):
        assert_operator(torch.ops.lowmem.dequantize_rows.default, (*codes_scales_and_description(weight), dtype))
        assert torch.equal(ops.dequantize_by_operator(weight, dtype), weight.dequantize(dtype))


@pytest.fixture
def exporting_to_onnx(monkeypatch):
    """Let torch.jit.trace run as the older exporter to ONNX runs it, without needing onnx."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)


@pytest.mark.usefixtures("exporting_to_onnx")
@pytest.mark.parametrize("technique", ["half", "bfloat16", "lora", "half and lora"])
def test_the_older_onnx_exporter_gets_a_graph_of_plain_operations_of_16_bit_layers(technique):
    model = everything(technique)
    x = torch.arange(18).view(2, 9)
    traced_model = trace(model, x)
    assert "lowmem::" not in str(traced_model.inlined_graph)
    other = torch.arange(30).view(3, 10)
    assert_gives_the_same(traced_model, model, other)


@pytest.mark.usefixtures("exporting_to_onnx")
@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 4), nn.Conv1d(8, 4, 1), nn.Embedding(8, 4)], ids=lambda m: type(m).__name__
)
def test_the_older_onnx_exporter_is_told_that_4_bit_layers_have_no_operator(layer):
    x = torch.zeros(1, 2, dtype=torch.int64) if isinstance(layer, nn.Embedding) else torch.randn(2, 8, 8)
    with pytest.raises(RuntimeError, match="cannot write layers in 4 or 8 bits: use dynamo=True"):
        torch.jit.trace(convert(layer, FourBit()), x)
