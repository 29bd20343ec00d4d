"""What is written to a view of a weight that has no dense memory is never lost: it is refused, with the remedy."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem import FourBit, Half, LoRA, convert
from lowmem.kernels.torch_versions import TORCH
from lowmem.nn.linear import gathered_copy
from lowmem.nn.read_only import METADATA, ReadOnlyView, name_of, writes_in_place
from tests.kernels.test_ops import needs_compiler

WRITES = {
    "zero_": lambda w: w.zero_(),
    "*=": lambda w: w.__imul__(2),
    "div_": lambda w: w.div_(2**0.5),
    "copy_": lambda w: w.copy_(torch.ones(24, 16)),
    "normal_": lambda w: nn.init.normal_(w),
    "orthogonal_": lambda w: nn.init.orthogonal_(w),
    "a row": lambda w: w[3].zero_(),
    "rows": lambda w: w[3:5].fill_(1),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "of its data": lambda w: w.data.normal_(),
    "all of it, as out": lambda w: torch.add(torch.ones(24, 16), 1, out=w),
    "clamp_": lambda w: w.clamp_(-1, 1),
    "renorm_": lambda w: w.renorm_(2, 0, 1.0),
    "max_norm": lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0),
    "max_norm of a bag": lambda w: F.embedding_bag(torch.tensor([[1]]), w, max_norm=1.0, mode="sum"),
    "apply_": lambda w: w.apply_(lambda value: value),
    "fill_diagonal_": lambda w: w.fill_diagonal_(1.0),
    "an optimizer": lambda w: torch._foreach_add_([torch.ones(3), w], 1.0),
    "a flat view": lambda w: w.view(-1).zero_(),
    "a column": lambda w: w[:, 0].zero_(),
    "a column of it detached": lambda w: w.detach()[:, 0].zero_(),
    "a column of its data": lambda w: w.data[:, 0].zero_(),
    "transposed": lambda w: w.t().mul_(2),
    "a row of it transposed": lambda w: w.T[0].zero_(),
    "rows of it transposed": lambda w: [row.zero_() for row in w.T],
    "flattened": lambda w: w.flatten().fill_(1),
    "reshaped": lambda w: w.reshape(2, -1).add_(1),
    "an initializer": lambda w: nn.init.normal_(w[:, :3]),
    "an item of a view": lambda w: w.view(-1).__setitem__(0, 1.0),
    "a view of a view": lambda w: w.view(-1)[:3].zero_(),
    "its view by another name": lambda w: w.view(-1).contiguous().data.detach().zero_(),
    "out": lambda w: torch.add(torch.ones(24), 1, out=w[:, 0]),
    "a chunk": lambda w: w.chunk(2, 1)[0].zero_(),
    "a part": lambda w: w.split(4, 1)[0].zero_(),
    "a column of all": lambda w: w.unbind(1)[0].zero_(),
    "a diagonal": lambda w: w.diagonal().fill_(1),
    "narrowed": lambda w: torch.narrow(w, 1, 0, 3).zero_(),
    "expanded": lambda w: w.expand(2, 24, 16)[0, :, 0].zero_(),
    "moved": lambda w: w.movedim(0, 1).zero_(),
    "unsqueezed": lambda w: w.unsqueeze(1)[:, 0, 0].zero_(),
    "a copy into it": lambda w: w.view(-1).copy_(torch.zeros(24 * 16)),
    "several at once": lambda w: torch._foreach_zero_([w.view(-1)]),
    "+=": lambda w: w[:, 1].__iadd__(1),
    "an activation": lambda w: F.relu(w[:, 0], inplace=True),
    "an index": lambda w: w[:, 0].index_fill_(0, torch.tensor([1]), 0),
    "its data": lambda w: setattr(w[:, 0], "data", torch.zeros(24)),
}
IN_GRAPHS = (
    *(Tensor.zero_, nn.init.zeros_, torch.relu_, torch.sqrt_),
    lambda w: torch._foreach_mul_([w], 2.0),
    lambda w: F.relu(w, inplace=True),
)
"""Writes to a tensor, each of another kind for Dynamo."""
KNOWN_TO_DYNAMO = (
    *("a column", "a column of its data", "transposed", "a row of it transposed", "reshaped", "an initializer"),
    *("an item of a view", "a view of a view", "out", "a chunk", "a part", "a diagonal", "expanded", "unsqueezed"),
    *("a copy into it", "several at once", "+=", "an activation", "an index"),
)
"""Writes to views that Dynamo records."""
FRESH = {
    "a product": lambda w: (w * 2).zero_(),
    "a copy": lambda w: w[:, 0].clone().zero_(),
    "chosen columns": lambda w: w[:, [0, 1]].zero_(),
    "a cast": lambda w: w[:, 0].double().zero_(),
    "a sum": lambda w: w.sum(0).zero_(),
    "a negative": lambda w: (-w[:, 0]).add_(1),
    "joined": lambda w: torch.cat([w[:, 0], w[:, 1]]).zero_(),
    "flipped": lambda w: w.view(-1).flip(0).zero_(),
    "a copy of Python": lambda w: copy.deepcopy(w.detach()[:, 0]).zero_(),
    "a pickle": lambda w: pickle.loads(pickle.dumps(w.detach()[:, 0])).zero_(),
    "another tensor": lambda w: torch.zeros(24).add_(w[:, 0]),
    "out": lambda w: torch.add(w[:, 0], 1, out=torch.zeros(24)),
}
TECHNIQUES = {
    "nf4": (FourBit("nf4", 16),),
    "bfloat16": (Half(torch.bfloat16),),
    "adapted": (LoRA(2),),
    "nf4, adapted": (FourBit("nf4", 16), LoRA(2)),
}
techniques = pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES)


def weight_of(technique):
    return convert(nn.Sequential(nn.Linear(16, 24)), *technique)[0].weight


@pytest.mark.parametrize("technique", [*TECHNIQUES.values(), "gathered"], ids=[*TECHNIQUES, "gathered"])
def test_writes_are_refused_and_those_to_fresh_results_are_not(technique):
    layer = convert(nn.Linear(16, 24), *(TECHNIQUES["nf4"] if technique == "gathered" else technique))
    layer = gathered_copy(layer, torch.randperm(16).int()) if technique == "gathered" else layer
    weight, before = layer.weight, copy.deepcopy(layer.state_dict())
    refusal = (
        r"would write to a (view of a )?weight (that is stored in|with adapters).*lowmem.(restore|merge)\(model\)"
    )
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        for name, write in WRITES.items():
            with mode(), pytest.raises(RuntimeError) as raised:
                write(weight)
            assert raised.match(refusal), name
    assert all(torch.equal(one, before[name]) for name, one in layer.state_dict().items())
    for name, write in FRESH.items():
        with torch.no_grad():
            assert type(write(weight)) is Tensor, name


@techniques
def test_a_view_reads_as_the_plain_tensor_does(technique):
    torch.manual_seed(0)
    weight = weight_of(technique)
    dense = (weight * 1).detach()
    view, plain = weight.view(-1), dense.view(-1)
    assert isinstance(view, ReadOnlyView)
    assert (view.shape, view.dtype, view.device, view.stride()) == (plain.shape, plain.dtype, plain.device, (1,))
    assert torch.equal(view, plain)
    assert isinstance(view[3:9], ReadOnlyView)
    for one in (view, view[3:9], view.detach(), view.detach()[3:9]):
        if one._base is not None:  # torch 2.9's compiler follows views to their base
            assert one._base._base is None
            with torch.no_grad(), pytest.raises(RuntimeError, match="would write to a view of a weight"):
                one._base.zero_()
    assert torch.equal(view.detach()[3:9].clone(), plain[3:9])
    assert type(view + 1) is type(F.linear(torch.ones(2, 16), view.view(24, 16))) is Tensor
    array = view.detach().numpy()
    assert (array == plain.numpy()).all()
    assert not array.flags.writeable
    assert view.tolist() == plain.tolist()
    assert torch.equal(torch.tensor(view.tolist()), plain)
    one = view.detach().requires_grad_()
    (one * 3).sum().backward()
    assert torch.equal(one.grad, torch.full_like(plain, 3))


def test_a_view_of_an_adapted_weight_takes_gradients_to_the_adapter():
    layer = convert(nn.Sequential(nn.Linear(16, 24)), LoRA(2))[0]
    nn.init.normal_(layer.lora_b)
    given = torch.randn(24 * 16)
    (layer.weight.view(-1) * given).sum().backward()
    torch.testing.assert_close(layer.lora_b.grad, given.view(24, 16) @ layer.lora_a.T * layer.scaling)


@pytest.mark.compile(keep=1)
@techniques
@pytest.mark.no_cover
def test_graphs_read_views_and_refuse_to_write_to_them(technique, request):
    request.addfinalizer(torch.compiler.reset)
    model, x = convert(nn.Sequential(nn.Linear(16, 24)), *technique), torch.randn(3, 8)

    def run(function):
        torch.compiler.reset()
        return torch.compile(lambda: function(model[0].weight), fullgraph=True, backend="aot_eager")()

    read = lambda w: x @ w[:, :8].T + w.view(-1)[:24] * w.flatten()[1:25] + w.abs()[:, 0]  # noqa: E731
    torch.testing.assert_close(run(read), read(model[0].weight))
    if LoRA(2) in technique and TORCH >= (2, 13):  # Dynamo reads it without asking its class
        with pytest.raises(Exception, match=r"without asking its class: write weight\.abs\(\)"):
            run(abs)
    else:
        torch.testing.assert_close(run(abs), abs(model[0].weight))
    refusal = r"would write to a .*lowmem.(restore|merge)\(model\)"
    if TORCH < (2, 13):  # its compiler ends an initializer of a weight with adapters with words of its own
        refusal += "|(?s:hasattr.*_Traced)"
    in_views = (lambda w, write=write: write(w.view(-1)) for write in IN_GRAPHS)
    for write in (*IN_GRAPHS, *in_views, *(WRITES[name] for name in KNOWN_TO_DYNAMO)):
        with torch.no_grad(), pytest.raises(Exception, match=refusal):
            run(write)
    with pytest.raises(Exception, match=f"{refusal}|view and is being modified inplace"):  # by autograd
        run(lambda w: torch.relu_(w.view(-1)))
    for name in ("a product", "a copy", "chosen columns", "a sum", "joined", "flipped"):
        with torch.no_grad():
            assert type(run(FRESH[name])) is Tensor, name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_graph_returns_views_that_refuse_writes(backend, request):
    """Whoever gets one writes to it after the graph has run."""
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    weight = weight_of(TECHNIQUES["nf4"])

    def read(x):
        column, *parts = weight[:, 0], *weight.chunk(2, 1)
        return x + column, column, parts[1].T, weight.sum(1)

    x = torch.randn(24, requires_grad=True)
    total, column, part, fresh = torch.compile(read, fullgraph=True, backend=backend)(x)
    for got, expected in zip((total, column, part, fresh), read(x), strict=True):
        torch.testing.assert_close(got, expected)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(24))
    for view in (column, part, column[1:]):
        with pytest.raises(RuntimeError, match=r"would write to a view of a weight that is stored in nf4.*restore"):
            view.zero_()
    assert type(fresh) is Tensor


@pytest.mark.compile(keep=1)
@techniques
@torch.no_grad()
def test_a_graph_takes_views_of_another_one_and_of_eager_code(technique, request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    weight = weight_of(technique)

    def read(x, view, change=None):
        own = weight.flatten()[:24]
        torch._dynamo.graph_break()
        if change is not None:
            change(own)
        return x @ own, view[3:] * 2, view[3:]

    run, x, view = torch.compile(read, backend="aot_eager"), torch.randn(24), weight.view(-1)
    for got, expected in zip(run(x, view), read(x, view), strict=True):
        torch.testing.assert_close(got, expected)
    for write in (lambda: run(x, view, lambda own: own.zero_()), lambda: run(x, view)[2].zero_()):
        with pytest.raises(RuntimeError, match="would write to a view of a weight"):
            write()
    turned = weight.view(-1).unsqueeze_(0)  # no operation, but another shape
    assert torch.equal(turned * 2, weight.view(1, -1) * 2)
    with pytest.raises(Exception, match="recorded"):  # and not values of the shape before
        torch.compile(lambda view: view * 2, backend="aot_eager")(turned)


def unseen(function, *args, **kwargs):
    """Call a function of which no subclass is told."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


class Runs(nn.Module):
    """Calls a function with the weight of a layer."""

    def __init__(self, technique, function):
        super().__init__()
        self.layer, self.function = convert(nn.Sequential(nn.Linear(16, 24)), *technique)[0], function

    def forward(self, x):
        return self.function(self.layer.weight, x)


@pytest.mark.compile(keep=1)
@techniques
def test_an_exported_program_reads_views_and_refuses_to_write_to_them(technique):
    x, export = torch.randn(3, 8), torch.export.export
    reads = (
        lambda w, x: x @ w[:, :8].T + w.view(-1)[:24] * w.flatten()[1:25] + abs(w)[:, 0],
        lambda w, x: (w[:, 0], [w.view(-1).view(16, 24)], F.linear(x, w[:, :8]), w.shape[0]),
        lambda w, x: torch.cat([w.chunk(2, 1)[0], w.detach().t()[:8].T], 1).mul_(x.sum()),
        lambda w, x: (wide := unseen(torch.sum, w[:, 0], dim=0, dtype=torch.float64)) + x.sum() * wide.dtype.itemsize,
    )
    with torch.no_grad():
        for read in reads:
            model = Runs(technique, read)
            torch.testing.assert_close(export(model, (x,)).module()(x), model(x))
        known = WRITES.values() if technique is TECHNIQUES["nf4"] else ()
        for write in (*IN_GRAPHS, *(lambda w, one=one: one(w.view(-1)) for one in IN_GRAPHS[:2]), *known):
            with pytest.raises(RuntimeError, match=r"would write to a .*lowmem.(restore|merge)\(model\)"):
                export(Runs(technique, lambda w, x, write=write: (write(w), x)[1]), (x,))


class Chooses(nn.Module):
    """Reads the weight of a layer in branches of a graph."""

    def __init__(self, technique):
        super().__init__()
        self.layer = convert(nn.Sequential(nn.Linear(16, 24)), *technique)[0]

    def forward(self, x):
        first, second = (
            (lambda x: F.linear(x, self.layer.weight)),
            (lambda x: x @ self.layer.weight.view(24, 16).T * 2),
        )
        return torch.cond(x.sum() > 0, first, second, (x,))


@pytest.mark.compile(keep=1)
@techniques
def test_an_exported_program_reads_weights_in_branches(technique, request):
    request.addfinalizer(torch.compiler.reset)
    model, x = Chooses(technique), torch.rand(3, 16)
    with torch.no_grad():
        dense = model.layer.weight.dequantize().view(24, 16)
        program = torch.export.export(model, (x,)).module()
        for given, expected in ((x, x @ dense.T), (-x, -x @ dense.T * 2)):
            torch.testing.assert_close(program(given), expected)


def test_writes_are_told_by_their_names():
    writes = (
        *(Tensor.zero_, Tensor.mul_, Tensor.__imul__, Tensor.__setitem__, Tensor.data.__set__),
        *(torch.relu_, torch._foreach_add_, nn.init.normal_, torch.ops.aten.zero_.default),
    )
    reads = Tensor.mul, Tensor.__mul__, Tensor.__getitem__, torch.relu, nn.init.calculate_gain, *METADATA
    assert [function for function in writes if not writes_in_place(function)] == []
    assert [function for function in reads if writes_in_place(function)] == []
    assert name_of(torch.ops.aten.add.Tensor) == name_of(torch.add) == "add"
