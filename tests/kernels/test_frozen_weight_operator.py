"""Operators on a frozen weight: what is cached by address, and that compiled models do what eager ones do."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

from lowmem import FourBit, Half, LoRA, convert, kernels, measure, quantize
from lowmem.kernels import ops
from lowmem.kernels.frozen_weight_operator import codes_scales_and_description, quantized_tensor_from_operands

# dynamo makes an instance of every function of one's own
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
)

TECHNIQUES = {
    "nf4": (FourBit("nf4", 16),),
    "int4": (FourBit("int4", 16, "float16"),),
    "half": (Half(),),
    "qlora": (FourBit(block_size=16), LoRA(4, alpha=3)),
    "half and lora": (Half(), LoRA(4)),
}
techniques = pytest.mark.parametrize("technique", TECHNIQUES)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    """Torch compiles one function a few times only, and all models here are called by the same one."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(technique: str) -> nn.Module:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), *TECHNIQUES[technique])
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.compile(keep=1)
@techniques
def test_a_compiled_model_gives_the_eager_one_s_bits_without_a_graph_for_each_batch(technique):
    model = build(technique)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled, counted = torch.compile(model, backend="aot_eager"), torch.compile(model, backend=count)
        for batch in (1, 3, 5, 7, 9):
            x = torch.randn(batch, 32)
            assert torch.equal(compiled(x), model(x))
            counted(x)
    assert len(graphs) <= 3  # of one input, of three, and of any number
    # A layer is one call, with its bias and its adapter, as it is in eager mode.
    called = [str(node.target) for node in graphs[-1].graph.nodes if "lowmem" in str(node.target)]
    assert len(called) == 2
    assert not [node for node in graphs[-1].graph.nodes if node.target in (torch.addmm, torch.Tensor.t)]


@techniques
def test_an_exported_inference_program_has_the_gradients_of_a_training_one(technique):
    model = build(technique)
    x = torch.randn(3, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
    x.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p for p in program.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), [x, *trained])
    found = torch.autograd.grad(program(x).square().sum(), [x, *own])
    torch.testing.assert_close(found[0], expected[0])
    assert sorted(float(g.norm()) for g in found) == pytest.approx(sorted(float(g.norm()) for g in expected))


@pytest.mark.parametrize("kernel", sorted({"reference", kernels.available_cpu_backend_names()[-1]}))
def test_weights_that_take_the_same_memory_in_turn_are_told_apart(kernel):
    """The cache of an address outlives its weight: another one there, in another format too, gets its own results."""
    x = torch.randn(2, 64)
    memory = [torch.empty(64, 32, dtype=torch.uint8), torch.empty(64, 3, dtype=torch.uint8)]
    with kernels.temporary_cpu_backend(kernel):
        for form in ("nf4", "fp4", "nf4"):
            weight = quantize(torch.randn(64, 64), form, block_size=64, scales="double")
            *parts, described = codes_scales_and_description(weight)
            for place, tensor in zip(memory, parts, strict=True):
                place.copy_(tensor)
            again = quantized_tensor_from_operands(*memory, described)
            assert torch.equal(again.dequantize(), weight.dequantize())
            dtype = torch.float32
            assert torch.equal(kernels.linear(x, again, dtype), kernels.linear(x, weight, dtype))
            moved = quantized_tensor_from_operands(memory[0], memory[1].clone(), described)
            assert torch.equal(kernels.linear(x, moved, dtype), kernels.linear(x, weight, dtype))
            plain = torch.ops.lowmem.product_4bit.default
            for scales in (memory[1], memory[1].clone(), memory[1]):  # the handle that is kept is one of them's
                for _ in range(2):
                    found = plain(x, memory[0], scales, described, dtype, False)
                    assert torch.equal(found, kernels.linear(x, weight, dtype))
            grad = torch.randn(2, 64)
            found = plain(grad, *memory, described, dtype, True)
            assert torch.equal(found, kernels.input_grad(grad, weight, dtype))


def test_an_operator_takes_no_handle_that_another_kernel_has_made():
    weight, x = quantize(torch.randn(48, 64), "nf4"), torch.randn(2, 64)
    for name in 2 * kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            expected = kernels.linear(x, weight, torch.float32)
            assert torch.equal(
                torch.ops.lowmem.product_4bit.default(x, *codes_scales_and_description(weight), torch.float32, False),
                expected,
            )


class Own(torch.Tensor):
    """Somebody's own class of tensors."""


class Functions(BaseTorchFunctionMode):
    """Keeps which functions of torch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.append(function)
        return super().__torch_function__(function, types, args, kwargs)


def test_whatever_watches_a_call_of_an_operator_sees_it():
    weight, x, bias = quantize(torch.randn(48, 32), "nf4"), torch.randn(3, 32), torch.randn(48)
    packed, scales, text = codes_scales_and_description(weight)
    how = torch.float32, False
    plain = torch.ops.lowmem.product_4bit.default
    expected = kernels.linear(x, weight, torch.float32, bias)

    def call(x=x, packed=packed, bias=bias, **named):
        return plain(x, packed, scales, text, *how, bias, **named)

    assert torch.equal(call(), expected)
    with torch.no_grad():  # as compiled models run: parameters get no gradient
        assert torch.equal(call(bias=nn.Parameter(bias), packed=nn.Parameter(packed, requires_grad=False)), expected)
    assert torch.equal(torch.func.vmap(lambda one: call(one))(x[None])[0], expected)
    assert torch.equal(torch.func.functionalize(lambda one: call(one))(x), expected)
    traced = torch.jit.trace(lambda one: call(one), (x,), check_trace=False)
    assert "product_4bit" in str(traced.graph)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x))).tangent
        assert torch.equal(tangent, kernels.linear(x, weight, torch.float32))
    assert call(x.clone().requires_grad_()).requires_grad
    assert call(bias=nn.Parameter(bias)).requires_grad
    with BaseTorchDispatchMode():
        out = call()
    assert torch.equal(out, expected)
    with Functions() as mode:
        call()
    assert plain in mode.called
    with torch.profiler.profile() as profiled:
        call()
    assert "lowmem::product_4bit" in {event.name for event in profiled.events()}
    on_meta = (x.to("meta"), packed.to("meta"), scales.to("meta"), text, *how, bias.to("meta"))
    assert plain(*on_meta).shape == expected.shape
    with FakeTensorMode() as fake:
        made = fake.from_tensor(x), fake.from_tensor(packed), fake.from_tensor(scales), text
        assert isinstance(plain(*made, *how, fake.from_tensor(bias)), FakeTensor)
    assert isinstance(call(x.as_subclass(Own)), Own)
    with pytest.raises(RuntimeError, match="product_4bit"):
        call(other=1)


def test_vmap_of_an_operator_is_one_call_where_all_examples_meet_the_same_weight(monkeypatch):
    weight, x, bias = quantize(torch.randn(6, 40)), torch.randn(4, 3, 40).double(), torch.randn(4, 6).double()
    plain, called, compute = torch.ops.lowmem.product_4bit.default, [], ops.product.compute
    monkeypatch.setattr(ops.product, "compute", lambda *given: called.append(1) or compute(*given))
    vmap = torch.func.vmap

    def call(x, bias):
        return plain(x, *codes_scales_and_description(weight), torch.float64, False, bias)

    expected = torch.stack([call(*one) for one in zip(x, bias, strict=True)])
    called.clear()
    got = vmap(call, (1, None))(x.movedim(0, 1), bias[0])
    torch.testing.assert_close(got, expected + (bias[0] - bias)[:, None])
    assert len(called) == 1
    torch.testing.assert_close(vmap(call)(x, bias), expected)
    torch.testing.assert_close(vmap(vmap(call, (0, None)))(x[:, :, None], bias), expected[:, :, None])
    x.requires_grad_()
    (got,) = torch.autograd.grad(vmap(call)(x, bias).square().sum(), x)
    (exact,) = torch.autograd.grad((x @ weight.dequantize().double().t() + bias[:, None]).square().sum(), x)
    torch.testing.assert_close(got, exact)
    group = torch.ops.lowmem.grouped_product_4bit
    groups = lambda x: group(x, *codes_scales_and_description(weight), torch.float64, False, 2, torch.tensor([1, 3]))  # noqa: E731
    torch.testing.assert_close(vmap(groups)(x), torch.stack([groups(one) for one in x]))  # rows meet other matrices


def test_the_cache_keeps_no_tensor_alive():
    weight = quantize(torch.randn(8, 64))
    again = quantized_tensor_from_operands(*codes_scales_and_description(weight))
    kernels.linear(torch.randn(1, 64), again, torch.float32)
    assert quantized_tensor_from_operands(*codes_scales_and_description(weight)).cache is again.cache
    held = [weakref.ref(weight.packed), weakref.ref(weight.scales)]
    del weight, again
    gc.collect()
    assert [reference() for reference in held] == [None, None]


@pytest.mark.parametrize("technique", ["nf4", "half"])
@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(32, 48), (64, 32)), (lambda: nn.Conv1d(8, 48, 3), (4, 8, 20))]
)
def test_an_inference_on_fake_tensors_takes_a_layer_s_output_once_with_its_bias(technique, make, shape):
    layer = convert(make(), *TECHNIQUES[technique])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(shape)
        with measure.PeakMemory() as memory:
            out = layer(x)
        assert out.nbytes <= memory.peak <= out.nbytes + 4 * 48  # a fake of the bias
