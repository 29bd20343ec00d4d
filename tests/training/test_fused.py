"""Fused norms and MLPs compute what the modules compute, and keep less for backward."""

import copy
import gc
import pickle
import weakref
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

from lowmem import FourBit, LoRA, compressed_activations, convert, kernels
from lowmem.kernels.rowwise import ACTIVATIONS
from lowmem.measure import PeakMemory
from lowmem.training.fused import (
    Act,
    FusedModule,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    fuse,
    gated_product,
    rms_norm,
)
from lowmem.training.prepared_module import release_module
from lowmem.training.recognize import recognize
from tests.rounding import unit
from tests.selection import rows_in_one_case

WIDTH, INNER = 64, 96


class Norm(nn.Module):
    """As in Llama."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """As in Llama, or with one layer for gate and up, as in Phi-3."""

    def __init__(self, joined=False):
        super().__init__()
        if joined:
            self.gate_up = nn.Linear(WIDTH, 2 * INNER, bias=False)
        else:
            self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        if hasattr(self, "gate_up"):
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self, joined=False):
        super().__init__()
        self.norm, self.mlp = Norm(), MLP(joined)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


NORM = RMSNorm("weight", "variance_epsilon", 0.0, rounds_first=True, mixes=True)
SEPARATE, JOINED = GatedMLP("gate", "up", "down", "SiLU"), GatedMLP("gate_up", None, "down", "SiLU")


def make(*techniques, joined=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block(joined).to(dtype)
    if techniques:
        convert(model, *techniques)
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(p, std=0.1)
    return model


def fused(model):
    fuse(model.norm, NORM)
    fuse(model.mlp, JOINED if hasattr(model.mlp, "gate_up") else SEPARATE)
    return model


def batch(dtype=torch.float32, rows=40):
    x = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_()


def gradients(model, x, call=None):
    """Return the output, and the gradients of the input and of all parameters that train."""
    out = (call or model)(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.float().sin().sum(), [x, *trained])]


def assert_near(found, expected, bound):
    for got, one in zip(found, expected, strict=True):
        assert got.dtype is one.dtype
        assert (got.double() - one.double()).norm() <= bound * one.double().norm()


def saved(function, model=None):
    """Return the bytes of the distinct storages that autograd saves in a call, without those of parameters."""
    kept, own = {}, {one.untyped_storage()._cdata for one in ([] if model is None else model.parameters())}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(one.nbytes() for one in kept.values())


@rows_in_one_case("kernel", ["best", "reference"])
@rows_in_one_case("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_fused_module_returns_can_be_written_to(dtype, kernel):
    block = fused(make(dtype=dtype))
    layer_norm, act = nn.LayerNorm(WIDTH).to(dtype), nn.SiLU()
    fuse(layer_norm, LayerNorm())
    fuse(act, Act("SiLU"))
    x = batch(dtype)
    with kernels.using(kernels.available()[-1] if kernel == "best" else kernel):
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


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
def test_checkpoints_give_the_same_bits(joined):
    """Also nested ones, with the same numbers of tensors saved in both passes."""
    model, x = fused(make(FourBit(), LoRA(4), joined=joined)), batch()
    expected = gradients(model, x)
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    for got, one in zip(found, expected, strict=True):
        assert torch.equal(got, one)
    checkpoint(model, x, use_reentrant=True).float().sin().sum().backward()
    found = [p.grad for p in (x, *model.parameters()) if p.requires_grad]
    assert_near(found, expected[1:], 1e-5)  # its first pass is without gradients, where layers add adapters otherwise
    inner = lambda x: x + checkpoint(model.mlp, model.norm(x), use_reentrant=False)  # noqa: E731
    for got, one in zip(
        gradients(model, x, lambda x: checkpoint(inner, x, use_reentrant=False)), expected, strict=True
    ):
        assert torch.equal(got, one)
    plain = saved(lambda: model(x), model)
    assert saved(lambda: checkpoint(model, x, use_reentrant=False), model) < 0.5 * plain


def test_what_is_written_to_a_product_through_data_is_not_taken_for_bfloat16(monkeypatch):
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
    layer = convert(nn.Linear(WIDTH, INNER), FourBit(compute_dtype=torch.bfloat16), LoRA(4)).train()
    act = fuse(nn.GELU(), Act("GELU"))
    out = layer(torch.randn(80, WIDTH))
    out.data.add_(2**-10)
    torch.testing.assert_close(act(out), functional.gelu(out), rtol=1e-6, atol=1e-6)


def test_with_compressed_activations():
    model, x = fused(make(FourBit(), LoRA(4))), batch(rows=128)
    expected = gradients(model, x)

    def call(x):
        with compressed_activations(model):
            return model(x)

    assert_near(gradients(model, x, call), expected, 0.02)
    assert not torch.equal(gradients(model, x, call)[1], expected[1])


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
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
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
        monkeypatch.setattr("lowmem.training.fused.recomputed_input", None)  # calling it is a TypeError
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


def test_evaluation_transforms_and_compilers_get_the_plain_module():
    model, x = make(), batch()
    expected = model(x)
    fused(model)
    assert torch.equal(model.eval()(x), expected)
    model.train()
    with torch.no_grad():
        assert_near([model(x)], [expected], 1e-6)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    mapped = torch.func.vmap(lambda one: torch.func.functional_call(model, {}, (one,)))(x.detach())
    assert torch.allclose(mapped, expected, atol=1e-6)
    assert model(x.detach()[:, :0]).shape == (2, 0, WIDTH)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_states(how):
    model, x = make(LoRA(4)), batch()
    model.mlp.register_forward_hook(hook)
    names, before = list(model.state_dict()), {one: type(one) for one in model.modules()}
    plain = gradients(model, x)
    fused(model)
    assert list(model.state_dict()) == names
    assert type(model.mlp).__name__ == "MLP"
    assert isinstance(model.mlp, MLP)
    copied = how(model)
    assert isinstance(copied.mlp, FusedModule)
    assert copied.mlp.fused_as == SEPARATE
    assert all(a is not b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    for got, one in zip(gradients(copied, x), gradients(model, x), strict=True):
        assert torch.equal(got, one)
    for module in model.modules():
        release_module(module)
    assert {one: type(one) for one in model.modules()} == before
    assert "fused_as" not in vars(model.mlp)
    for got, one in zip(gradients(model, x), plain, strict=True):
        assert torch.equal(got, one)


def hook(module, args, out):
    return out * 1.5


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
    assert type(only(x).grad_fn).__name__ != "_NormBackward"  # as the module does, whatever that is
    assert type(only(batch()).grad_fn).__name__ == "_NormBackward"
    late = rms_norm(batch(torch.bfloat16), torch.ones(WIDTH), 1e-6, offset=1.0)
    assert late.dtype is torch.bfloat16
    torch.testing.assert_close(late.float().pow(2).mean(-1), torch.full((2, 40), 4.0), rtol=0.01, atol=0)


def test_a_parametrized_module_is_not_released():
    model = fused(make())
    nn.utils.parametrize.register_parametrization(model.norm, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="was made of the prepared module since"):
        release_module(model.norm)


class NewGELU(nn.Module):
    """As in GPT-2."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "name", "copies"), [(NewGELU, "GELU (tanh)", 3), (nn.GELU, "GELU", 1)])
def test_an_activation_keeps_its_input(kind, name, copies, dtype):
    plain, x = kind(), batch(dtype)
    expected, before = gradients(plain, x), saved(lambda: plain(x))
    made = fuse(kind(), Act(name))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    assert_near(gradients(made, x), expected, bound)
    assert saved(lambda: made(x)) == x.nbytes <= before / copies
    strided = batch(dtype)[:, ::2].mT
    assert_near(gradients(made, strided), gradients(plain, strided), bound)


@pytest.mark.parametrize("kind", [nn.GELU, nn.SiLU, partial(nn.GELU, "tanh"), NewGELU])
def test_activations_of_other_layouts_devices_and_of_batches_of_gradients(kind):
    plain, made = kind(), kind()
    fuse(made, recognize(made))
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
    fuse(norm, LayerNorm())
    for got, one in zip(gradients(norm, x), expected, strict=True):
        assert torch.equal(got, one)
    assert (
        saved(lambda: norm(x), norm) <= x.nbytes + 2 * max(4, x.element_size()) * 160
    )  # mean and deviation of each row
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x).dtype
        release_module(norm)
        assert norm(x).dtype is found


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "layer norm"])
def test_what_is_returned_is_not_kept_by_the_layer_that_reads_it(name, lean, monkeypatch):
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
    torch.manual_seed(0)
    layer = convert(nn.Sequential(nn.Linear(WIDTH, INNER)), FourBit(compute_dtype=torch.bfloat16), LoRA(4))
    nn.init.normal_(layer[0].lora_b, std=0.1)
    x = batch(torch.bfloat16, rows=128).detach().float().requires_grad_()  # as a product in bfloat16 returns it
    before = fuse(nn.LayerNorm(WIDTH), LayerNorm()) if name == "layer norm" else fuse(nn.SiLU(), Act(name))

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
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
    layer = convert(nn.Sequential(nn.Linear(WIDTH, INNER)), FourBit(compute_dtype=torch.bfloat16), LoRA(4))
    nn.init.normal_(layer[0].lora_b, std=0.1)
    norm, x = nn.LayerNorm(WIDTH), batch(rows=160)

    def read(x):
        both = norm(x)
        return layer(both[0])[40:120] * layer(both.view(4, 80, WIDTH)[3])

    expected = gradients(layer, x, read)
    fuse(norm, LayerNorm())
    with compressed_activations(layer) if lean else nullcontext():
        found = gradients(layer, x, read)
    assert_near(found, expected, 0.05 if lean else 1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lean_computes_a_checkpoint_of_an_activation_again(name):
    """The region's input comes back from 8 bits, with other numbers than those of bfloat16."""
    act, x = fuse(nn.SiLU(), Act(name)), batch(torch.bfloat16, rows=128).detach().float().requires_grad_()
    expected = gradients(act, x)
    with compressed_activations(act):
        found = gradients(act, x, lambda x: checkpoint(act, 1 * x, use_reentrant=False))
    assert_near(found, expected, 0.05)


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
def test_lean_keeps_the_input_of_a_block_alone(joined, monkeypatch):
    """Neither what the norm returns nor gate and up are kept; dropout drops the same numbers again."""
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
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
    release_module(model.mlp)
    fuse(model.mlp, replace(how, again=True))
    assert "computes again the outputs of gate" in model.mlp.training_note
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


def test_what_a_norm_returns_is_not_kept_by_the_layers_that_read_it(monkeypatch):
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
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
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
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
        release_module(model.norm)


@pytest.mark.parametrize("act", ["module", "function"])
def test_another_activation_than_was_fused_is_called(act):
    model, x = make(), batch()
    if act == "function":
        del model.mlp.act
        model.mlp.act = functional.silu
    fused(model)
    model.mlp.act = nn.ReLU() if act == "module" else functional.relu
    found = gradients(model, x)
    release_module(model.mlp)
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


@pytest.mark.parametrize("read", [False, True])
def test_a_graph_goes_with_its_last_reference(read, monkeypatch):
    """Not with the next collection of garbage, until which what a step keeps would stay."""
    monkeypatch.setattr(kernels.cpu.Kernel, "fast_bfloat16", True)
    layer = convert(nn.Sequential(nn.Linear(WIDTH, INNER)), FourBit(compute_dtype=torch.bfloat16), LoRA(4))
    norm, x = fuse(nn.LayerNorm(WIDTH), LayerNorm()), batch(rows=128)
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


@pytest.mark.parametrize("part", ["norm", "separate", "joined", "GELU (sigmoid)"])
def test_gradients_in_batches_are_those_of_each(part):
    """As those of a Jacobian that is vectorized; of weights, too."""
    model = fused(make(joined=part == "joined"))
    module = {"norm": model.norm, "GELU (sigmoid)": fuse(nn.SiLU(), Act("GELU (sigmoid)"))}.get(part, model.mlp)
    x = batch(rows=300)
    wanted, out = [x, *module.parameters()], module(x)
    grads = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, wanted, grads, retain_graph=True, is_grads_batched=True)
    for number, grad in enumerate(grads):
        each = torch.autograd.grad(out, wanted, grad, retain_graph=True)
        assert_near([one[number] for one in found], each, 1e-5)


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
def test_of_tensors_without_values_shapes_are_computed(joined):
    model = fused(make(joined=joined)).to("meta")
    out = model(batch().to("meta"))
    assert out.is_meta
    assert out.shape == (2, 40, WIDTH)
