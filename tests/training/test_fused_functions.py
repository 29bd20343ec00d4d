"""Fused functions keep their input alone, and the layers that read a result recompute it."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowmem import FourBit, LoRA, compressed_activations, convert, kernels, release_training
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS
from lowmem.training.fused import Act, LayerNormSpec, fuse
from lowmem.training.fused_functions import gated_product
from lowmem.training.fusion_recognition import probe_fusion_spec_or_reason
from tests.training.blocks import INNER, NORM, WIDTH, assert_near, batch, fused, gradients, make, saved


def test_products_in_bfloat16_are_kept_in_16_bits():
    for dtype in (torch.float32, torch.bfloat16):
        gate = torch.randn(3, 50).to(dtype).float().requires_grad_()
        up = torch.randn(3, 50).to(dtype).float().requires_grad_()
        assert saved(lambda gate=gate, up=up: gated_product(gate, up, "SiLU")) == 2 * 150 * dtype.itemsize
        expected = functional.silu(gate) * up
        got = gated_product(gate, up, "SiLU")
        grads = [torch.autograd.grad(one, [gate, up], torch.ones_like(one)) for one in (got, expected)]
        torch.testing.assert_close([got, *grads[0]], [expected, *grads[1]])
    for mostly in (torch.zeros(64, 64), torch.randn(64, 64), torch.randn(2, 32, 64).mT):
        mostly[..., 0] = 1.0
        mostly[0] = 0.5
        mostly[0, 1:] = 1 / 3 if not mostly[1:, 1:].any() else 1.0
        out = gated_product(mostly.requires_grad_(), mostly.detach(), "SiLU")
        assert torch.equal(out.grad_fn.saved_tensors[0], mostly)  # one number that bfloat16 has not is enough


def test_what_is_written_to_a_product_through_data_is_not_taken_for_bfloat16(monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    layer = convert(nn.Linear(WIDTH, INNER), FourBit(compute_dtype=torch.bfloat16), LoRA(4)).train()
    act = fuse(nn.GELU(), Act("GELU"))
    out = layer(torch.randn(80, WIDTH))
    out.data.add_(2**-10)
    torch.testing.assert_close(act(out), functional.gelu(out), rtol=1e-6, atol=1e-6)


class NewGELU(nn.Module):
    """As in GPT-2."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3))))


class SquaredReLU(nn.Module):
    """As in Nemotron."""

    def forward(self, x):
        return torch.square(functional.relu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "name", "copies"),
    [(NewGELU, "GELU (tanh)", 3), (nn.GELU, "GELU", 1), (SquaredReLU, "squared ReLU", 1)],
)
def test_an_activation_keeps_its_input(kind, name, copies, dtype):
    plain, x = kind(), batch(dtype)
    expected, before = gradients(plain, x), saved(lambda: plain(x))
    made = fuse(kind(), Act(name))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    assert_near(gradients(made, x), expected, bound)
    assert saved(lambda: made(x)) == x.nbytes <= before / copies
    strided = batch(dtype)[:, ::2].mT
    assert_near(gradients(made, strided), gradients(plain, strided), bound)


@pytest.mark.parametrize("kind", [nn.GELU, nn.SiLU, partial(nn.GELU, "tanh"), NewGELU, SquaredReLU])
def test_activations_of_other_layouts_devices_and_of_batches_of_gradients(kind):
    plain, made = kind(), kind()
    fuse(made, probe_fusion_spec_or_reason(made))
    x = batch(torch.bfloat16, rows=16).detach().view(2, 8, 8, 16).float().to(memory_format=torch.channels_last)
    assert made(x).stride() == plain(x).stride() == x.stride()
    assert made(x.to("meta")).is_meta
    for dtype in (torch.float32, torch.float16):
        row = torch.randn(6).to(dtype).requires_grad_()
        found, expected = (torch.autograd.functional.jacobian(one, row, vectorize=True) for one in (made, plain))
        assert_near([found], [expected], 4 * torch.finfo(dtype).eps)


LAYER_NORMS = {
    "whole": {},
    "two dimensions": {"normalized_shape": (80, WIDTH)},
    "no bias": {"bias": False},
    "no weight": {"elementwise_affine": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_a_layer_norm_computes_the_same(options, dtype):
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(**{"normalized_shape": WIDTH, **options}, dtype=dtype), batch(dtype, rows=80)
    for one in norm.parameters():
        nn.init.normal_(one)
    expected = gradients(norm, x)
    fuse(norm, LayerNormSpec())
    for got, one in zip(gradients(norm, x), expected, strict=True):
        assert torch.equal(got, one)
    assert (
        saved(lambda: norm(x), norm) <= x.nbytes + 2 * max(4, x.element_size()) * 160
    )  # mean and deviation of each row
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x).dtype
        release_training(norm)
        assert norm(x).dtype is found


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "layer norm"])
def test_what_is_returned_is_not_kept_by_the_layer_that_reads_it(name, lean, monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    torch.manual_seed(0)
    layer = convert(nn.Sequential(nn.Linear(WIDTH, INNER)), FourBit(compute_dtype=torch.bfloat16), LoRA(4))
    nn.init.normal_(layer[0].lora_b, std=0.1)
    x = batch(torch.bfloat16, rows=128).detach().float().requires_grad_()  # as a product in bfloat16 returns it
    before = fuse(nn.LayerNorm(WIDTH), LayerNormSpec()) if name == "layer norm" else fuse(nn.SiLU(), Act(name))

    def call(x):
        return layer(before(x))

    def copied(x):
        return layer(before(x).clone())

    expected, without = gradients(layer, x, copied), saved(lambda: copied(x), layer)
    if not lean:
        assert saved(lambda: call(x), layer) <= without - x.nbytes // 2  # its copy in bfloat16
    with compressed_activations(layer) if lean else nullcontext():
        found = gradients(layer, x, call)
    assert_near(found, expected, 0.05 if lean else 1e-5)


@pytest.mark.parametrize("lean", [False, True])
def test_a_part_of_a_result_is_read(lean, monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    layer = convert(nn.Sequential(nn.Linear(WIDTH, INNER)), FourBit(compute_dtype=torch.bfloat16), LoRA(4))
    nn.init.normal_(layer[0].lora_b, std=0.1)
    norm, x = nn.LayerNorm(WIDTH), batch(rows=160)

    def read(x):
        both = norm(x)
        return layer(both[0])[40:120] * layer(both.view(4, 80, WIDTH)[3])

    expected = gradients(layer, x, read)
    fuse(norm, LayerNormSpec())
    with compressed_activations(layer) if lean else nullcontext():
        found = gradients(layer, x, read)
    assert_near(found, expected, 0.05 if lean else 1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lean_computes_a_checkpoint_of_an_activation_again(name):
    """The region's input comes back from 8 bits, with other numbers than those of bfloat16."""
    act, x = (
        fuse(nn.SiLU(), Act(name)),
        batch(torch.bfloat16, rows=128).detach().float().requires_grad_(),
    )
    expected = gradients(act, x)
    with compressed_activations(act):
        found = gradients(act, x, lambda x: checkpoint(act, 1 * x, use_reentrant=False))
    assert_near(found, expected, 0.05)


def test_what_a_norm_returns_is_not_kept_by_the_layers_that_read_it(monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    model, x = make(FourBit(compute_dtype=torch.bfloat16), LoRA(4)), batch()
    layers = [model.mlp.gate, model.mlp.up]
    model.mlp.down.requires_grad_(False)
    read = lambda x: sum(layer(model.norm(x)) for layer in layers)  # noqa: E731
    shared = lambda x: (lambda y: sum(layer(y) for layer in layers))(model.norm(x))  # noqa: E731
    expected, plain = gradients(model, x, shared), saved(lambda: shared(x), model)
    fuse(model.norm, NORM)
    found = gradients(model, x, shared)
    assert_near(found, expected, 1e-5)
    assert saved(lambda: shared(x), model) <= plain - x.nbytes // 2
    assert_near(gradients(model, x, read), expected, 0.01)  # siblings add their gradients in bfloat16
    twice = checkpoint(shared, x, use_reentrant=False).float().sin().sum()
    assert_near([torch.autograd.grad(twice, x)[0]], [expected[1]], 1e-5)
    out = model.norm(x)
    held, node = out.detach(), weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert node() is None  # a copy without a graph keeps none alive
    assert held.untyped_storage().lowmem_note is not None
    out = model.norm(x)
    with torch.no_grad():
        out.add_(1)  # is seen: it is kept as it is now
    grad = torch.autograd.grad(layers[0](out).sum(), layers[0].lora_a)[0]
    assert_near([grad], [torch.autograd.grad(layers[0](out.detach().clone()).sum(), layers[0].lora_a)[0]], 1e-5)


@pytest.mark.parametrize("lean", [False, True])
def test_a_detached_result_of_a_norm_may_outlive_its_graph(lean, monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    model, x = make(FourBit(compute_dtype=torch.bfloat16), LoRA(4)), batch()
    layer, trained = model.mlp.gate, [model.mlp.gate.lora_a, model.mlp.gate.lora_b]
    apart = {
        "detached": lambda y: y.detach(),
        "a leaf's view": lambda y: y.detach().requires_grad_().view(y.shape),
        "without gradients": torch.no_grad()(lambda y: y.view(y.shape)),
    }
    for cut in apart.values():
        call = lambda cut=cut: layer(cut(model.norm(x))).float().sin().sum()  # noqa: E731
        expected = torch.autograd.grad(call(), trained)
        fuse(model.norm, NORM)
        with compressed_activations(model) if lean else nullcontext():
            out = call()
            gc.collect()
        assert_near(torch.autograd.grad(out, trained), expected, 0.03 if lean else 1e-5)
        with compressed_activations(model) if lean else nullcontext():
            y = model.norm(x)
            y.sum().backward()
            out = layer(cut(y)).float().sin().sum()  # the norm has let go of its input
        assert_near(torch.autograd.grad(out, trained), expected, 0.03 if lean else 1e-5)
        with compressed_activations(model) if lean else nullcontext():
            y = model.norm(x)
            out = layer(cut(y)).float().sin().sum()
        y.sum().backward()  # the norm's input is free to change before the reader's backward
        with torch.no_grad():
            model.norm.weight.mul_(2)
        assert_near(torch.autograd.grad(out, trained), expected, 0.03 if lean else 1e-5)
        with torch.no_grad():
            model.norm.weight.div_(2)
        release_training(model.norm)


@pytest.mark.parametrize("read", [False, True])
def test_a_graph_goes_with_its_last_reference(read, monkeypatch):
    """Not with the next collection of garbage, until which what a step keeps would stay."""
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    layer = convert(nn.Sequential(nn.Linear(WIDTH, INNER)), FourBit(compute_dtype=torch.bfloat16), LoRA(4))
    norm, x = fuse(nn.LayerNorm(WIDTH), LayerNormSpec()), batch(rows=128)
    gc.collect()
    gc.disable()
    try:
        out = norm(x)
        node = weakref.ref(out.grad_fn)
        out = layer(out)
        if read:
            out.sum().backward()
        del out
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["norm", "separate", "joined", "GELU (sigmoid)", "squared ReLU"])
def test_gradients_in_batches_are_those_of_each(part):
    """As those of a Jacobian that is vectorized; of weights, too."""
    model = fused(make(joined=part == "joined"))
    alone = fuse(nn.SiLU(), Act(part)) if part in ACTIVATIONS else None
    module = alone or {"norm": model.norm}.get(part, model.mlp)
    x = batch(rows=300)
    wanted, out = [x, *module.parameters()], module(x)
    grads = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, wanted, grads, retain_graph=True, is_grads_batched=True)
    for number, grad in enumerate(grads):
        each = torch.autograd.grad(out, wanted, grad, retain_graph=True)
        assert_near([one[number] for one in found], each, 1e-5)
