"""What computes with an adapted weight gives what W + s B A gives, by two thin products, and keeps nothing dense."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem.nn.adapted_weight import AdaptedWeight, LowRankSum, adapted_weight
from lowmem.nn.adapter import Layout, Update
from lowmem.nn.stored import StoredTensor
from tests.nn.stored_cases import CASES, OFFSETS, WHOLE, Case, store

RANK, SCALING = 2, 0.5


def grouped(x, matrices):
    """Multiply groups of rows, also in float64, which torch does not."""
    if x.dtype != torch.float64:
        return F.grouped_mm(x, matrices, offs=OFFSETS)
    bounds = [0, *OFFSETS.tolist()]
    return torch.cat([x[bounds[at] : bounds[at + 1]] @ matrices[at] for at in range(3)])


PRODUCTS = {name: case for name, case in CASES.items() if name not in ("bilinear", "a kernel as a matrix")} | {
    "grouped_mm": Case(grouped, (3, 48, 32), (5, 48), 48),
    "grouped_mm of transposed": Case(lambda x, w: grouped(x, w.transpose(-2, -1)), (3, 48, 32), (5, 32), 32),
    "a cast": Case(lambda x, w: F.linear(x, w.to(x.dtype)), (48, 32), (5, 32), 32),
    "a column block": Case(lambda x, w: x @ w[:, 4:9], (48, 32), (5, 48), 48),
    "experts of tokens": Case(
        lambda x, w: torch.bmm(w[torch.tensor([2, 0, 0, 1, 2])], x.unsqueeze(-1)).squeeze(-1),
        (3, 48, 32),
        (5, 32),
        32,
    ),
    "conv2d, depthwise": Case(
        lambda x, w: F.conv2d(x, w, padding="same", groups=8), (8, 1, 3, 3), (2, 8, 6, 6), 9, 1
    ),
}
if not hasattr(F, "grouped_mm"):  # which torch has since 2.10
    PRODUCTS = {name: case for name, case in PRODUCTS.items() if "grouped" not in name}
ON_VALUES = {name: CASES[name] for name in ("bilinear", "a kernel as a matrix")} | WHOLE
FORMS = ("dense", "nf4", "bfloat16")


def layout_of(name, case):
    if "conv" in name or "kernel" in name:
        return Layout(case.weight, "transposed kernel" if "transposed" in name else "kernel")
    return Layout(case.weight, "transposed" if "embedding" in name else "linear")


def make(name, case, form, count=1, dropout=None):
    """Return an adapted weight, its base as a dense tensor, and its matrices A and B."""
    weight = torch.randn(case.weight)
    base = nn.Parameter(weight, requires_grad=False) if form == "dense" else store(weight, form, case.lead)
    layout = layout_of(name, case)
    pairs, updates = [], []
    for _ in range(count):
        shapes = layout.shapes(RANK)
        a, b = (torch.randn(shapes[part]).requires_grad_() for part in ("lora_a", "lora_b"))
        left, right = (a.mT, b.mT) if layout.kind == "transposed" else (b, a)
        updates.append(Update(left, right, SCALING, dropout or nn.Identity()))
        pairs.append((a, b))
    dense = base.dequantize() if isinstance(base, StoredTensor) else base.detach()
    return adapted_weight(base, updates, layout), dense, pairs, layout


def total(dense, pairs, layout):
    return dense.double() + sum(SCALING * layout.weight(b.double() @ a.double()) for a, b in pairs)


@pytest.fixture
def values(monkeypatch):
    """How often the values of an adapted weight were made."""
    made, before = [], LowRankSum.values
    monkeypatch.setattr(LowRankSum, "values", lambda self: made.append(self) or before(self))
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*PRODUCTS, *ON_VALUES])
def test_outputs_and_gradients_are_those_of_the_sum_and_products_never_make_it(name, form, values):
    torch.manual_seed(0)
    case = {**PRODUCTS, **ON_VALUES}[name]
    weight, dense, pairs, layout = make(name, case, form, count=2)
    x = case.make_input()
    x = x.requires_grad_(x.is_floating_point())
    out = case.function(x, weight)
    wide = x.detach().double() if x.is_floating_point() else x
    wide.requires_grad_(x.is_floating_point())
    exact = case.function(wide, total(dense, pairs, layout))
    scale = exact.detach().abs().max()
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() <= 1e-5 * scale  # 1e-7 a term, of at most some hundred
    given = torch.randn_like(exact)
    leaves = [x, *(one for pair in pairs for one in pair)][0 if x.requires_grad else 1 :]
    twins = [wide, *leaves[1:]] if x.requires_grad else leaves
    wanted = torch.autograd.grad(exact, twins, given)
    for got, one in zip(torch.autograd.grad(out, leaves, given.float()), wanted, strict=True):
        torch.testing.assert_close(got, one.to(got.dtype), rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    if name in PRODUCTS:
        assert not values


def test_what_is_kept_for_backward_is_thin_beside_a_large_weight():
    """16 MiB of weight; the product of each kind keeps less than 1 MiB that is not the weight itself."""
    stack, matrix, kernel = (4, 1024, 1024), (2048, 2048), (512, 512, 4, 4)
    offsets = torch.tensor([1, 1, 3, 4], dtype=torch.int32)
    cases = {
        "linear": (F.linear, matrix, (4, 2048)),
        "x @ W": (lambda x, w: x @ w, matrix, (4, 2048)),
        "bmm": (torch.bmm, stack, (4, 4, 1024)),
        "grouped_mm": (lambda x, w: F.grouped_mm(x, w, offs=offsets), stack, (4, 1024)),
        "experts": (lambda x, w: F.linear(x, w[2]), stack, (4, 1024)),
        "conv": (F.conv2d, kernel, (1, 512, 5, 5)),
        "conv, transposed": (F.conv_transpose2d, kernel, (1, 512, 3, 3)),
        "embedding": (lambda x, w: F.embedding(torch.tensor([[1, 7]]), w), matrix, (1,)),
    }
    for name, (function, shape, size) in cases.items():
        if name == "grouped_mm" and not hasattr(F, "grouped_mm"):
            continue
        for form in ("nf4", "dense"):
            weight, *_ = make(name, Case(function, shape, size, 1, 1 if "conv" in name else None), form)
            own = {part.untyped_storage().data_ptr() for part in getattr(weight.base, "parts", (weight.base,))}
            thin = {part.untyped_storage().data_ptr() for one in weight.updates for part in (one.left, one.right)}
            kept = {}

            def keep(one, kept=kept):
                if not isinstance(one, StoredTensor):
                    kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
                return one

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
                function(torch.randn(size, requires_grad=True), weight)
            assert sum(size for at, size in kept.items() if at not in own | thin) < 2**20, (name, form)


def test_dropout_acts_on_the_inputs_of_products_only():
    torch.manual_seed(0)
    dropout = nn.Dropout(0.5)
    for name in ("linear", "x @ W", "bmm", "conv1d", "einsum over rows", "experts"):
        weight, *_ = make(name, PRODUCTS[name], "dense", dropout=dropout)
        function, x = PRODUCTS[name].function, PRODUCTS[name].make_input()
        assert not torch.equal(function(x, weight), function(x, weight)), name
        assert torch.equal(weight.values(), weight.values())
        dropout.eval()
        assert torch.equal(function(x, weight), function(x, weight)), name
        dropout.train()


def test_it_is_a_tensor_of_the_shape_dtype_and_device_of_its_base_and_refuses_writes():
    weight, dense, pairs, layout = make("linear", CASES["linear"], "nf4")
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.numel(), weight.dim(), len(weight)) == (
        (48, 32), torch.float32, dense.device, 48 * 32, 2, 48,
    )  # fmt: skip
    assert not weight.requires_grad
    assert "AdaptedWeight(shape=(48, 32)" in repr(weight)
    assert isinstance(weight.T, AdaptedWeight)
    assert isinstance(weight[3], torch.Tensor)
    assert not isinstance(weight[3], AdaptedWeight)
    torch.testing.assert_close(weight[3], total(dense, pairs, layout)[3].float())
    torch.testing.assert_close(weight.detach() + 0, total(dense, pairs, layout).detach().float())
    assert not (weight.detach() + 0).requires_grad
    for write in (
        lambda: weight.zero_(),
        lambda: nn.init.normal_(weight),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", dense),
        lambda: torch.add(dense, 1, out=weight),
        lambda: weight.mul_(2),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match="would write to a weight with adapters"):
            write()
    with pytest.raises(RuntimeError, match="cannot train: the adapters do"):
        weight.requires_grad_()
    assert weight.requires_grad_(False) is weight


def test_a_module_that_shares_an_adapted_weight_shares_its_base():
    weight, *_ = make("linear", CASES["linear"], "dense")
    layer = nn.Linear(32, 48)
    layer.weight = weight
    assert layer.weight is weight.base


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_in_lower_precision_and_under_autocast(form):
    torch.manual_seed(0)
    for name in ("linear", "x @ W", "addmm", "bmm", "experts", "conv1d", "conv2d, transposed"):
        case = PRODUCTS[name]
        weight, dense, pairs, layout = make(name, case, form)
        x = case.make_input()
        exact = case.function(x.double(), total(dense, pairs, layout))
        with torch.autocast("cpu", torch.bfloat16):
            out = case.function(x, weight)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() <= 0.05 * exact.norm(), name


VIEWS = {
    "rows": lambda w: w[3:9],
    "one row": lambda w: w[5],
    "an element": lambda w: w[5, 2],
    "columns": lambda w: w[:, 4:9],
    "an ellipsis": lambda w: w[..., 4:9],
    "a new axis": lambda w: w[None],
    "chosen rows": lambda w: w[torch.tensor([4, 0, 4])],
    "transposed": lambda w: w.t(),
    "axes swapped": lambda w: w.swapaxes(0, 1),
    "permuted": lambda w: w.permute(1, 0),
    "as it is, permuted": lambda w: w.permute(0, 1),
    "selected": lambda w: w.select(0, 3),
    "narrowed": lambda w: w.narrow(0, 3, 4),
    "rows of an index": lambda w: w.index_select(0, torch.tensor([1, 1, 7])),
    "columns of an index": lambda w: w.index_select(1, torch.tensor([1, 1, 7])),
    "unbound": lambda w: torch.stack(w.unbind()),
    "split": lambda w: torch.cat([part * 2 for part in w.split(20)]),
    "chunks": lambda w: torch.cat([part + 1 for part in w.chunk(3, 1)], 1),
    "a sum with itself": lambda w: w + w,
    "a double": lambda w: w.double() * 1,
    "integers": lambda w: w.to(torch.int32),
    "norm": lambda w: w.norm(),
    "a product with itself": lambda w: w.t() @ w,
    "a contraction of three": lambda w: torch.einsum("ij,ik,jk->k", w, torch.ones(48, 3), torch.ones(32, 3)),
    "a trace": lambda w: torch.einsum("ii->i", w[:9, :9]),
    "a large bag": lambda w: F.embedding_bag(torch.tensor([[1, 2], [3, 3]]), w, mode="max"),
    "a lookup in a row": lambda w: F.conv1d(torch.ones(1, 32, 5), w.unsqueeze(-1)),
    "a copy": lambda w: copy.deepcopy(w) * 1,
    "a pickle": lambda w: pickle.loads(pickle.dumps(w)) * 1,
}


@pytest.mark.parametrize("form", FORMS)
def test_views_and_everything_else_are_those_of_the_sum(form):
    torch.manual_seed(0)
    case = Case(lambda x, w: x, (48, 32), (5, 32), 32)
    weight, *_ = make("linear", case, form)
    exact = weight.values().detach()
    for name, view in VIEWS.items():
        found, wanted = view(weight), view(exact)
        found = (found.values() if isinstance(found, LowRankSum) else found).detach()
        assert found.shape == wanted.shape, name
        assert found.dtype == wanted.dtype, name
        # The sums of rank 2 are taken in another order: a few units in the last place of numbers up to 10.
        if found.dtype.is_floating_point:
            assert float((found - wanted).abs().max()) <= 64 * 2.0**-23 * float(wanted.abs().max()), name
    stack = Case(lambda x, w: x, (3, 48, 32), (5, 32), 32)
    weights, *_ = make("stack", stack, form)
    for number, matrix in enumerate(weights):
        assert isinstance(matrix, LowRankSum)
        assert float((matrix.values() - weights.values()[number]).detach().abs().max()) <= 64 * 2.0**-23 * 10
    kernels, *_ = make("conv2d", Case(lambda x, w: x, (8, 4, 3, 3), (2, 4, 6, 6), 36, 1), form)
    for view in (
        lambda w: w[2],
        lambda w: w.mT,
        lambda w: w.unbind()[1],
        lambda w: F.linear(torch.ones(2, 3), w[0, 0]),
    ):
        assert not isinstance(view(kernels), LowRankSum)
        assert float((view(kernels) - view(kernels.values())).detach().abs().max()) <= 64 * 2.0**-23 * 10


@pytest.mark.parametrize("form", FORMS)
def test_casts_to_it_einsums_of_both_its_sides_and_masks_are_those_of_the_sum(form):
    weight, dense, pairs, layout = make("linear", CASES["linear"], form)
    whole = total(dense, pairs, layout).float()
    x = torch.randn(5, 48, 32)
    for cast in (x.double().to(weight), x.double().type_as(weight)):
        assert (type(cast), cast.dtype) == (torch.Tensor, torch.float32)
    assert torch.equal(weight.to(weight).values(), weight.values())
    torch.testing.assert_close(torch.einsum("boi,oi->b", x, weight), torch.einsum("boi,oi->b", x, whole))
    torch.testing.assert_close(torch.einsum("boi,oi->boi", x, weight), x * whole)
    stack = adapted_weight(
        torch.randn(2, 3, 4, 5),
        [Update(torch.randn(2, 3, 4, RANK), torch.randn(2, 3, RANK, 5), SCALING, nn.Identity())],
        Layout((2, 3, 4, 5), "linear"),
    )
    mask = torch.tensor([[True, False, True], [False, True, True]])
    torch.testing.assert_close(torch.as_tensor(stack[mask] * 1), stack.values()[mask])


def test_its_data_is_such_a_weight_again_and_refuses_writes():
    weight, *_ = make("linear", CASES["linear"], "nf4")
    assert isinstance(weight.data, AdaptedWeight)
    with pytest.raises(RuntimeError, match="would write to a weight with adapters"):
        weight.data.zero_()
    with pytest.raises(RuntimeError, match="would write to a weight with adapters"):
        weight.data = torch.zeros(48, 32)


def test_dimensions_may_be_named_as_torch_names_them():
    weight, *_ = make("linear", CASES["linear"], "nf4")
    for swapped in (
        weight.transpose(dim0=0, dim1=1),
        weight.permute(dims=(1, 0)),
        torch.permute(weight, dims=(1, 0)),
    ):
        assert isinstance(swapped, AdaptedWeight)
        assert torch.equal(swapped.values(), weight.values().T)
