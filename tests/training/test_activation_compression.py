"""What autograd saves is kept in 8 bits, within its bound, and comes back as what it was."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowmem import FourBit, LoRA, compressed_activations, convert
from lowmem.kernels.codes_8bit import BLOCK
from lowmem.measure import PeakMemory
from lowmem.training.activation_compression import ActivationArena, quantize_activation
from tests.strategies import make_weight, seeds


class Square(torch.autograd.Function):
    """Saves its input, and nothing else: the gradient of ``x ** 2`` shows what came back."""

    @staticmethod
    def forward(ctx, x, view=lambda x: x):
        ctx.save_for_backward(view(x))
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        Square.came_back = saved
        return gradient, None


def saved(tensor, view=lambda x: x):
    """Return a view of a tensor as it comes back from autograd inside the context."""
    x = tensor.requires_grad_() * 1  # not a leaf
    with compressed_activations(nn.Module()):
        out = Square.apply(x, view)
    out.sum().backward()
    return Square.came_back


@given(
    st.sampled_from(["normal", "zeros", "zero blocks", "subnormal", "constant", "outlier", "mixed", "few"]),
    st.integers(1, 700),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seeds,
)
def test_each_number_is_within_half_a_step(kind, count, dtype, seed):
    numbers = make_weight(kind, (count,), 0, seed).to(dtype)
    if not numbers.isfinite().all():
        return
    codes = quantize_activation(numbers)
    back = codes.dequantize()
    assert back.dtype == dtype
    assert back.shape == numbers.shape
    padded = functional.pad(numbers.double(), (0, -count % BLOCK)).view(-1, BLOCK)
    # Half a step of 1/127 of a block's largest magnitude; the scale, quotient and product are rounded in float32,
    # which moves a number of magnitude m by at most 4 eps m, and the result is rounded to the dtype.
    largest = padded.abs().amax(1, keepdim=True)
    bound = largest / 254 + 4 * 2.0**-23 * largest + torch.finfo(dtype).eps * largest + 2.0**-126
    assert ((back.double() - numbers.double()).abs() <= bound.expand(-1, BLOCK).reshape(-1)[:count]).all()
    assert (back[numbers == 0] == 0).all()


def test_what_went_wrong_stays_visible():
    with pytest.raises(TypeError, match="found dict"), compressed_activations({}):
        pass
    numbers = torch.randn(256)
    numbers[3], numbers[BLOCK + 6] = torch.nan, torch.inf
    back = quantize_activation(numbers).dequantize()
    assert back[: 2 * BLOCK].isnan().all()
    assert back[2 * BLOCK :].isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x.view(2, 48, 100),
        lambda x: x[10:70],
        lambda x: x[:, 3:90],
        lambda x: x.expand(3, 96, 100),
        lambda x: x.unflatten(1, (10, 10)).transpose(0, 1),
        lambda x: x.flatten()[:9000].view(90, 100),
        lambda x: x.repeat(12, 1)[5:100],  # a twelfth of its storage
        lambda x: x.to(torch.bfloat16),
    ],
)
def test_a_view_comes_back_as_the_same_view(view):
    x = torch.randn(96, 100)
    wanted, found = view(x), saved(x, view)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert found.stride() == wanted.stride()
    error = (found.detach() - wanted.detach()).abs().max()
    assert 0 < error <= x.detach().abs().max() / 254 * 1.5


def test_what_is_left_alone_comes_back_exactly():
    layer = nn.Linear(100, 100)
    cases = {
        "integers": torch.randint(0, 9, (100, 100)),
        "few": torch.randn(10, 10),
        "complex": torch.randn(100, 100, dtype=torch.complex64),
        "statistics": torch.randn(10000, 1),
        "one dimension": torch.randn(10000),
        "mask": torch.full((100, 100), -torch.inf).triu(1),
        "probabilities": torch.randn(100, 100).mul(8).softmax(-1),
        "parameters": layer.weight.detach().t(),
    }
    for name, tensor in cases.items():
        with compressed_activations(layer):
            out = Square.apply(torch.randn(2, requires_grad=True) * 1, lambda _, tensor=tensor: tensor)
        out.sum().backward()
        assert Square.came_back.data_ptr() == tensor.data_ptr(), name


def test_complex_and_sparse_factors_are_kept():
    """DeepSeek-V2 turns its rotary positions by complex numbers."""
    x, turn = torch.randn(100, 100, requires_grad=True), torch.randn(100, 50, dtype=torch.complex64)
    sparse = torch.eye(100).to_sparse()
    with compressed_activations(nn.Module()):
        turned = torch.view_as_complex((x * 1).view(100, 50, 2)) * turn
        mixed = torch.sparse.mm(sparse, x * 1)
    (turned.real.sum() + mixed.sum()).backward()
    (wanted,) = torch.autograd.grad((torch.view_as_complex((x * 1).view(100, 50, 2)) * turn).real.sum() + x.sum(), x)
    assert torch.equal(x.grad, wanted)


def test_memory_that_is_used_again_is_another_tensor():
    """An address comes back after a free, and a storage can be written to: neither returns older numbers."""
    wanted, outs = [], []
    with compressed_activations(nn.Module()):
        for seed in range(6):
            x = (torch.randn(96, 100, generator=torch.Generator().manual_seed(seed)) * 1).requires_grad_()
            outs.append(Square.apply(x * 1))
            wanted.append(x.detach().clone())
            del x
            gc.collect()
        written = torch.randn(96, 100)
        for seed in range(3):
            written.normal_(generator=torch.Generator().manual_seed(seed))
            outs.append(Square.apply(torch.randn(2, requires_grad=True) * 1, lambda _: written))
            wanted.append(written.clone())
    for out, tensor in zip(outs, wanted, strict=True):
        out.sum().backward()
        assert (Square.came_back.detach() - tensor).abs().max() < 0.03


def test_one_copy_serves_all_views_of_a_tensor():
    x = torch.randn(512, 256, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(256, 8, bias=False) for _ in range(4))
    with PeakMemory() as memory, compressed_activations(layers):
        out = x * 1
        outs = [layer(out) for layer in layers]
        del out
        gc.collect()
        kept = memory.current - sum(one.untyped_storage().nbytes() for one in outs)
    assert kept <= 512 * 256 * (1 + 4 / BLOCK) + 64
    sum(one.sum() for one in outs).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_layer_is_within_its_bound(dtype):
    """The gradient of a weight is ``g.T @ x``: each number of x moves it by at most ``|g| step / 2``."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, dtype=dtype)
    x, g = torch.randn(96, 128, dtype=dtype), torch.randn(96, 64, dtype=dtype)
    with compressed_activations(layer):
        out = layer(x.clone().requires_grad_() * 1)
    out.backward(g)
    exact = g.double().t() @ x.double()
    step = x.double().view(-1, BLOCK).abs().amax(1).view(96, -1).repeat_interleave(BLOCK, 1) / 127  # (96, 128)
    rounding = 98 * torch.finfo(dtype).eps * (g.double().abs().t() @ x.double().abs())
    error = (layer.weight.grad.double() - exact).abs()
    assert (error <= g.double().abs().t() @ (step * 0.51) + rounding).all()
    assert error.max() > 0


def gradients(model, x, run, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = run(model, x).float().square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compressed(model, x):
    with compressed_activations(model):
        return model(x)


def checkpointed(model, x):
    with compressed_activations(model):
        return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("kind", ["dense", "4-bit with adapters", "autocast", "checkpointed"])
def test_the_gradient_of_a_transformer_stays_near(kind):
    """The bound is what is documented, 6%; errors of rows are independent, so sums over rows have a part of it."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    model = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 256, **options) for _ in range(3)))
    if kind == "4-bit with adapters":
        convert(model, FourBit(), LoRA(4, init="loftq"))
    x = torch.randn(4, 96, 64)
    whole = gradients(model, x, lambda model, x: model(x), kind == "autocast")
    near = gradients(model, x, checkpointed if kind == "checkpointed" else compressed, kind == "autocast")
    error = float((near - whole).norm() / whole.norm())
    assert 0 < error < 0.06


def test_attention_keeps_its_sums_and_softmax_its_probabilities():
    """A query of large numbers makes attention's sums of exponentials large: in 8 bits they would be useless."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 600, 32) * size for size in (30, 1, 1))
    results = []
    for context in (None, compressed_activations(nn.Module())):
        leaves = [one.clone().requires_grad_() for one in (q, k, v)]
        if context is None:
            functional.scaled_dot_product_attention(*leaves).sum().backward()
        else:
            with context:
                out = functional.scaled_dot_product_attention(*(leaf * 1 for leaf in leaves))
            out.sum().backward()
        results.append(leaves[2].grad)
    assert float((results[1] - results[0]).norm() / results[0].norm()) < 0.2
    scores = torch.randn(100, 500, requires_grad=True)
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.mul_(6)
    exact = {
        "cross entropy": (scores, lambda: functional.cross_entropy(scores * 1, torch.arange(100))),
        "module": (layer.in_proj_weight, lambda: layer(*[v.transpose(1, 2)[:, :128, 0]] * 3)[0]),
    }
    for name, (source, call) in exact.items():
        with compressed_activations(layer):
            out = call()
        assert torch.equal(*(torch.autograd.grad(one.square().sum(), source)[0] for one in (out, call()))), name


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * x + 1e-6).log(),
        lambda x: torch.sqrt(x * x + 1e-8),
        lambda x: x / (x.abs() + 1e-3),
        lambda x: 1 / (x.abs() + 1e-3),
        lambda x: (x * x + 1e-6).pow(0.5),
        lambda x: (x * x + 1e-6) ** -0.5,
        lambda x: torch.rsqrt(x * x + 1e-6),
        lambda x: functional.softmin(x * 5, -1)[:, :9],
    ],
)
def test_what_is_divided_by_is_kept(function):
    """Near a pole no rounding of x leaves the gradient near; but nothing is divided by a zero that was none."""
    torch.manual_seed(0)
    x = torch.randn(128, 128, requires_grad=True)
    with compressed_activations(nn.Module()):
        out = function(x)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_writes_after_a_save_are_noticed():
    x = torch.ones(5, 4, requires_grad=True)
    with compressed_activations(nn.Module()):
        z = x.exp()
        z.mul_(100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_what_was_compressed_before_is_kept_for_a_divisor():
    x = torch.full((64, 128), 1e-3)
    x[0, 0] = 1e3  # its block's others vanish in 8 bits, too few for the tensor to be kept
    x.requires_grad_()
    with compressed_activations(nn.Module()):
        divisor = x * 1
        product = Square.apply(divisor)  # saves it, too
        out = torch.ones(()).div(divisor)
    (out.sum() + 0 * product.sum()).backward()
    wanted = -1 / x.detach().square()
    assert float(((x.grad - wanted) / wanted).abs().max()) <= 8 * torch.finfo(torch.float32).eps


def test_views_do_not_overlap_and_pieces_grow_with_what_is_kept():
    room, sizes = ActivationArena(), [1000, 70, 64, 4096, 1] * 40
    views = [room.allocate_int8(size) for size in sizes]
    for number, view in enumerate(views):
        view.fill_(number % 100)
    assert all(
        view.shape == (size,) and view.data_ptr() % 64 == views[0].data_ptr() % 64
        for view, size in zip(views, sizes, strict=True)
    )
    assert all(bool((view == number % 100).all()) for number, view in enumerate(views))
    pieces = {view.untyped_storage()._cdata: view.untyped_storage().nbytes() for view in views}
    assert sum(pieces.values()) <= 1.25 * (
        sum(sizes) + 32 * len(sizes)
    )  # an eighth, and what the next view does not fit in
    assert len(pieces) < len(sizes) / 3
    assert all(view[: len(view) // 4 * 4].view(torch.float32).numel() == len(view) // 4 for view in views)


def test_what_is_given_back_is_taken_again_and_pieces_are_freed():
    room = ActivationArena()
    for _ in range(20):
        room.allocate_int8(512)
    first = room.allocate_int8(256).data_ptr()
    room.free_last_allocation()
    assert room.allocate_int8(128).data_ptr() == first
    view = ActivationArena().allocate_int8(64)
    piece = weakref.ref(view.untyped_storage())
    del view
    gc.collect()
    assert piece() is None
