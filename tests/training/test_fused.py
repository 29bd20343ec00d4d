"""Fused modules compute what the modules compute, and keep less for backward."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from lowmem import FourBit, LoRA, compressed_activations, kernels, release_training
from lowmem.measure import PeakMemory
from lowmem.training.fused import Act, LayerNormSpec, fuse
from lowmem.training.fused_functions import recomputable_rms_norm
from tests.rounding import unit
from tests.training.blocks import (
    INNER,
    JOINED,
    NORM,
    SEPARATE,
    WIDTH,
    assert_near,
    batch,
    fused,
    gradients,
    make,
    saved,
)


@pytest.mark.parametrize("kernel", ["best", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_fused_module_returns_can_be_written_to(dtype, kernel):
    block = fused(make(dtype=dtype))
    layer_norm, act = nn.LayerNorm(WIDTH).to(dtype), nn.SiLU()
    fuse(layer_norm, LayerNormSpec())
    fuse(act, Act("SiLU"))
    x = batch(dtype)
    with kernels.temporary_cpu_backend(kernels.available_cpu_backend_names()[-1] if kernel == "best" else kernel):
        for module in (block.norm, block.mlp, layer_norm, act):
            trained, found = [x, *module.parameters()], []
            for add in (torch.add, torch.Tensor.add_):
                found.append(torch.autograd.grad(add(module(x), 1).float().sin().sum(), trained))
            assert all(map(torch.equal, *found))


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("techniques", [(), (LoRA(4),), (FourBit(), LoRA(4))], ids=["dense", "lora", "qlora"])
def test_a_fused_block_computes_the_same(techniques, dtype, joined):
    if techniques and dtype is torch.float64:
        techniques = techniques[-1:]
    model, x = make(*techniques, joined=joined, dtype=dtype), batch(dtype)
    exact = gradients(copy.deepcopy(model).double() if dtype is not torch.float64 else model, batch().double())
    plain = gradients(model, x)
    found = gradients(fused(model), x)
    # Few roundings of the dtype each, where the plain modules have more.
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    assert_near(found, plain, bound)
    if not techniques or dtype is torch.float32:
        assert_near([one.double() for one in found], [one.double() for one in exact], max(bound, 64 * unit(dtype)))


def test_what_backward_keeps():
    """Of (80, 64) rows: the norm's input and output; and of (80, 96): the outputs of gate and up."""
    model, x = make(LoRA(4)), batch()
    before = saved(lambda: model(x), model)
    after = saved(lambda: fused(model)(x), model)
    rows, narrow = 80, 3 * 80 * 4 * 4  # A x of three adapters
    own = 4 * rows * (WIDTH + 2 * INNER)
    assert own <= after <= own + 4 * rows * WIDTH + narrow + 2 * 4 * WIDTH + 1000
    assert after < 0.65 * before


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
def test_checkpoints_give_the_same_bits(joined):
    """Also nested ones, with the same numbers of tensors saved in both passes."""
    model, x = fused(make(FourBit(), LoRA(4), joined=joined)), batch()
    expected = gradients(model, x)
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    for got, one in zip(found, expected, strict=True):
        assert torch.equal(got, one)
    inner = lambda x: x + checkpoint(model.mlp, model.norm(x), use_reentrant=False)  # noqa: E731
    for got, one in zip(
        gradients(model, x, lambda x: checkpoint(inner, x, use_reentrant=False)), expected, strict=True
    ):
        assert torch.equal(got, one)
    plain = saved(lambda: model(x), model)
    assert saved(lambda: checkpoint(model, x, use_reentrant=False), model) < 0.5 * plain


def test_under_autocast_and_twice():
    model, x = make(LoRA(4)), batch()
    call = lambda one: torch.autocast("cpu", torch.bfloat16)(one)(x)  # noqa: E731
    expected = gradients(model, x, lambda x: call(model))
    fused(model)
    assert_near(gradients(model, x, lambda x: call(model)), expected, 0.02)
    out = model(x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    down = model.mlp.down.lora_a
    partly = torch.autograd.grad(out, down, retain_graph=True)[0]  # what lies before it is not reached
    assert torch.equal(partly, torch.autograd.grad(out, down, retain_graph=True)[0])
    assert torch.equal(torch.autograd.grad(out, x)[0], first)
    again = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="has no second derivative: call lowmem.release_training"):
        again.sum().backward()


def test_a_hidden_state_that_is_written_to_is_kept():
    class Writes(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model = make()
    model.mlp.down.__class__ = Writes
    plain = copy.deepcopy(model)
    assert_near(gradients(fused(model), batch()), gradients(plain, batch()), 1e-5)


def test_layers_whose_outputs_do_not_fit_are_called_once():
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    model, seen = make(), []
    model.mlp.up.__class__, model.mlp.down = Wide, model.mlp.down.double()
    model.mlp.gate.register_forward_hook(lambda *_: seen.append("gate"))
    plain = gradients(model, batch())
    seen.clear()
    assert_near(gradients(fused(model), batch()), plain, 1e-5)
    assert seen == ["gate"]


def test_a_second_derivative_that_lacks_what_is_computed_again_is_refused(monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    model, x = fused(make(FourBit(compute_dtype=torch.bfloat16), LoRA(4))), batch()
    first = torch.autograd.grad(model(x).sin().sum(), model.mlp.down.lora_a, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="has no second derivative: call lowmem.release_training"):
        first.square().sum().backward()


def test_where_hooks_of_saved_tensors_are_off_inputs_are_kept():
    model, x = fused(make()), batch()
    expected = gradients(model, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("off"):
        assert all(map(torch.equal, gradients(model, x), expected))


@pytest.mark.parametrize("save", ["products", "all"])
def test_selective_checkpoints_keep_what_their_policy_says(save, monkeypatch):
    """Nothing that a policy keeps is written to: it would be an error, or added twice.

    What they keep is the user's hooks' to see, where asked for (torch 2.15), and never those of a fused module.
    """
    asked = "respect_saved_tensors_hooks" in signature(checkpoint).parameters
    options = [{}, {"respect_saved_tensors_hooks": True}] if asked else [{}]
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    policy = products if save == "products" else lambda *_, **__: checkpoints.CheckpointPolicy.MUST_SAVE
    contexts = partial(checkpoints.create_selective_checkpoint_contexts, policy)
    for techniques in ((), (LoRA(4),), (FourBit(), LoRA(4)), (FourBit(compute_dtype=torch.bfloat16), LoRA(4))):
        model, x = fused(make(*techniques, dtype=torch.bfloat16)), batch(torch.bfloat16, rows=300)
        expected = gradients(model, x)
        monkeypatch.setattr("lowmem.training.fused.recomputed_instead_of_saved", None)  # calling it is a TypeError
        for more in options:
            again = partial(checkpoint, model, use_reentrant=False, context_fn=contexts, **more)
            assert_near(gradients(model, x, again), expected, 0.03)
        monkeypatch.undo()


def test_hooks_on_layers_are_called_and_on_the_activation_too():
    model, x = fused(make()), batch()
    seen = []
    for name in ("gate", "up", "down"):
        getattr(model.mlp, name).register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    expected = gradients(make(), x)
    assert_near(gradients(model, x), expected, 1e-5)
    assert len(seen) == 3
    model.mlp.act.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.allclose(model(x) - x, 2 * (expected[0] - x), atol=1e-5)


def test_a_norm_of_16_bits_and_of_mixed_dtypes():
    model = make()
    x = batch(torch.bfloat16)
    expected = model.norm(x)
    found = fuse(model.norm, NORM)(x)
    assert found.dtype is expected.dtype is torch.float32
    assert_near(
        torch.autograd.grad(found.sum(), [x, model.norm.weight]),
        torch.autograd.grad(expected.sum(), [x, model.norm.weight]),
        0.01,
    )
    only = fuse(make().norm, replace(NORM, mixes=False))
    assert type(only(x).grad_fn).__name__ != "_RMSNormFunctionBackward"  # as the module does, whatever that is
    assert type(only(batch()).grad_fn).__name__ == "_RMSNormFunctionBackward"
    late = recomputable_rms_norm(batch(torch.bfloat16), torch.ones(WIDTH), 1e-6, offset=1.0)
    assert late.dtype is torch.bfloat16
    torch.testing.assert_close(late.float().pow(2).mean(-1), torch.full((2, 40), 4.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
def test_lean_keeps_the_input_of_a_block_alone(joined, monkeypatch):
    """Neither what the norm returns nor gate and up are kept; dropout drops the same numbers again."""
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    model = make(FourBit(compute_dtype=torch.bfloat16), LoRA(4, dropout=0.3), joined=joined)
    x = batch(rows=128)
    fuse(model.norm, NORM)
    how = JOINED if joined else SEPARATE
    fuse(model.mlp, how)

    def call(x, context=True):
        torch.manual_seed(3)
        with compressed_activations(model) if context else nullcontext():
            return model(x)

    def kept():
        with PeakMemory() as memory:
            out = call(x)
        return memory.current - out.nbytes

    expected, before = gradients(model, x, partial(call, context=False)), kept()
    release_training(model.mlp)
    fuse(model.mlp, replace(how, again=True))
    assert "computes again the outputs of gate" in model.mlp.report_note
    products, coded = 2 * 128 * 2 * INNER, 65 / 64
    assert kept() <= before - products * coded
    found = gradients(model, x, call)
    assert torch.equal(found[0], expected[0])
    assert_near(found[1:], expected[1:], 0.06)
    within = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    torch.manual_seed(3)
    with compressed_activations(model):
        found = gradients(model, x, within)  # whose input is kept in 8 bits, and nothing computed a third time
    assert_near(found[1:], expected[1:], 0.06)


@pytest.mark.parametrize("act", ["module", "function"])
def test_another_activation_than_was_fused_is_called(act):
    model, x = make(), batch()
    if act == "function":
        del model.mlp.act
        model.mlp.act = functional.silu
    fused(model)
    model.mlp.act = nn.ReLU() if act == "module" else functional.relu
    found = gradients(model, x)
    release_training(model.mlp)
    assert_near(found, gradients(model, x), 1e-6)


def test_lean_refuses_layers_that_are_not_those_of_forward():
    model, x = make(LoRA(4)), batch(rows=200)
    fuse(model.mlp, replace(SEPARATE, again=True))
    changes = {
        "mode": lambda: model.eval(),
        "parameter": lambda: setattr(model.mlp.up, "bias", nn.Parameter(torch.ones(INNER))),
    }
    for change in changes.values():
        model.train()
        with compressed_activations(model):
            out = model(x)
        change()
        with pytest.raises(RuntimeError, match="computes again in backward, have other parameters"):
            out.sum().backward()
