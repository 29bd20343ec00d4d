"""The products as operators: what torch.compile and torch.export make of them."""

from contextlib import contextmanager

import pytest
import torch

from lowmem import FourBit, Half, LoRA, convert, kernels, quantize
from lowmem.kernels import cpu, ops
from tests import strategies


def make_weight(kind: str):
    dense = strategies.make_weight("normal", (6, 40), 0, 0)
    return quantize(dense, block_size=8) if kind == "4-bit" else dense.half()


# dynamo makes an instance of every function of one's own
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
)

compiles = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="torch 2.4's compiler does not take such a function whole; the versions between were not tried",
)
kinds = pytest.mark.parametrize("kind", ["half", "4-bit"])
models = pytest.mark.parametrize("kind", ["half", "4-bit", "8-bit products"])
every_order = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])


@kinds
@every_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_what_torch_expects_of_one(kind, transposed, dtype):
    weight = make_weight(kind)
    x = torch.randn(3, 6 if transposed else 40, dtype=dtype, requires_grad=True)
    if kind == "half":
        torch.library.opcheck(torch.ops.lowmem.product_16bit.default, (x, weight, dtype, transposed))
    else:
        described = weight.format, weight.block_size, weight.scale_encoding, weight.shape[1]
        arguments = (x, weight.packed, weight.scales, *described, dtype, transposed)
        torch.library.opcheck(torch.ops.lowmem.product_4bit.default, arguments)


@every_order
def test_the_operator_of_8_bit_integers_gives_the_input_s_dtype(transposed):
    weight = make_weight("4-bit")
    described = weight.format, weight.block_size, weight.scale_encoding, weight.shape[1]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 6 if transposed else 40, dtype=dtype, requires_grad=True)
        arguments = (x, weight.packed, weight.scales, *described, torch.int8, transposed)
        torch.library.opcheck(torch.ops.lowmem.product_4bit.default, arguments)
        out = ops.product(x, weight, torch.int8, transposed)
        (got,) = torch.autograd.grad(out.sum(), x)
        (exact,) = torch.autograd.grad(ops.product(x, weight, dtype, transposed).sum(), x)
        assert out.dtype == dtype
        assert torch.equal(got, exact)


@kinds
@every_order
def test_an_operator_and_its_gradient_equal_the_plain_products(kind, transposed):
    weight = make_weight(kind)
    dense = weight.dequantize(torch.float64) if kind == "4-bit" else weight.double()
    dense = dense.t() if transposed else dense
    x = torch.randn(3, dense.shape[1], dtype=torch.float64, requires_grad=True)
    product = lambda x: ops.product(x, weight, torch.float64, transposed)  # noqa: E731
    torch.testing.assert_close(product(x), x @ dense.t())
    assert torch.autograd.gradcheck(product, x)
    assert torch.autograd.gradgradcheck(product, x)


def build(kind: str) -> torch.nn.Module:
    compute = torch.int8 if kind == "8-bit products" else None
    technique = Half() if kind == "half" else FourBit(block_size=8, compute_dtype=compute)
    plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    return convert(plain, technique, LoRA(2))


@compiles
@models
def test_a_compiled_training_step_is_one_graph_with_the_same_gradient(kind):
    model = build(kind)
    torch.nn.init.ones_(model[0].lora_b)
    x = torch.randn(3, 16)
    expected = torch.autograd.grad(model(x).sum(), model[0].lora_a)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), model[0].lora_a)[0], expected)


@compiles
@models
@pytest.mark.skipif(kernels.available() == ["reference"], reason="the kernel is not compiled here")
def test_a_compiled_graph_is_served_by_the_kernel(kind, monkeypatch):
    model = build(kind).eval().requires_grad_(False) if kind == "half" else build(kind).eval()
    served = []
    run = cpu.Kernel.linear
    monkeypatch.setattr(cpu.Kernel, "linear", lambda *given: (served.append(given[1].shape), run(*given))[1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (3, 5):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(compiled(x), model(x))
    assert torch.Size((5, 16)) in served


@compiles
@models
def test_an_exported_model_gives_the_same(kind):
    model = build(kind).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@contextmanager
def may_be_refused(message: str):
    """Let a RuntimeError pass that says this, and no other error."""
    try:
        yield
    except RuntimeError as refusal:
        if message not in str(refusal):
            raise


@compiles
@models
@pytest.mark.parametrize("transform", ["forward mode", "gradient"])
def test_compiled_transforms_of_torch_func_are_right_or_refused(kind, transform):
    """Forward mode in a function of one's own is not compiled: it falls back to eager, and never gives zeros."""
    layer = build(kind)[0].base
    x = torch.randn(3, 16)
    forward_mode = lambda x: torch.func.jvp(layer, (x,), (x,))[1]  # noqa: E731
    function = forward_mode if transform == "forward mode" else torch.func.grad(lambda x: layer(x).square().sum())
    compiled = torch.compile(function, backend="aot_eager")
    if transform == "gradient":
        with may_be_refused("functions with out=... arguments don't support automatic differentiation"):
            torch.testing.assert_close(compiled(x), function(x))
    else:
        torch.testing.assert_close(compiled(x), function(x))


@compiles
def test_autocast_and_compile_together():
    model = build("4-bit").eval()
    x = torch.randn(3, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
