"""Code that reads an adapted weight gets a tensor, in graphs, too: products multiply by its low-rank matrices, and
keep nothing dense; all else is computed of the sum."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowmem
from lowmem import FourBit, Half, LoRA, convert
from lowmem.kernels.torch_versions import TORCH
from lowmem.nn.adapted_weight import AdaptedWeight, adapted_weight
from lowmem.nn.adapter import LowRankUpdate
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.linear import shallow_copy_with_column_order
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.torch_functions import METADATA
from tests.nn.adapted_cases import FORMS, ON_VALUES, PRODUCTS, RANK, SCALING, make, total
from tests.nn.stored_cases import CASES, INDICES, Case, store
from tests.rounding import OF_4_BITS, assert_sum


def test_it_is_a_tensor_of_the_shape_dtype_and_device_of_its_base():
    weight, dense, pairs, layout = make("linear", CASES["linear"], "nf4")
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.numel(), weight.dim(), len(weight)) == (
        (48, 32), torch.float32, dense.device, 48 * 32, 2, 48,
    )  # fmt: skip
    assert not weight.requires_grad
    assert "AdaptedWeight(shape=(48, 32)" in repr(weight)
    assert isinstance(weight.T, AdaptedWeight)
    assert isinstance(weight.data, AdaptedWeight)
    torch.testing.assert_close(weight[3] + 0, total(dense, pairs, layout)[3].float())
    torch.testing.assert_close(weight.detach() + 0, total(dense, pairs, layout).detach().float())
    assert not (weight.detach() + 0).requires_grad
    with pytest.raises(RuntimeError, match="would write to a weight with adapters"):
        weight.data = dense
    with pytest.raises(RuntimeError, match="cannot train: the adapters do"):
        weight.requires_grad_()
    assert weight.requires_grad_(False) is weight


@pytest.mark.parametrize("form", FORMS)
def test_a_module_without_adapters_cannot_hold_a_weight_with_adapters(form):
    weight, *_ = make("linear", CASES["linear"], form)
    layer, bare = nn.Linear(32, 48), nn.Module()
    own = layer.weight
    for register in (
        lambda: setattr(layer, "weight", weight),
        lambda: layer.register_parameter("weight", weight),
        lambda: setattr(bare, "weight", weight),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be a parameter of a module without.*weight\.unadapted"):
            register()
    assert layer.weight is own
    assert not [*bare.parameters()]
    assert weight.unadapted is weight.base


def length(weight):
    """Return ``len(weight)``, which torch's compiler cannot take of a subclass before 2.13."""
    return len(weight) if TORCH >= (2, 13) else weight.shape[0]


READS = {
    "arithmetic": lambda x, w: x @ (2 * w - 1).T + (w + 1).sum() + x @ (-w).T,
    "a cast": lambda x, w: F.linear(x, w.to(x.dtype)) + F.linear(x, w.double().float()),
    "a question": lambda x, w: F.linear(x, w) if isinstance(w, torch.Tensor) and not w.requires_grad else x,
    "its sizes": lambda x, w: F.linear(x, w) * w.shape[0] + w.size(1) + w.dim() + length(w) + w.numel(),
    "rows": lambda x, w: F.linear(x, w[2:9]).sum() + x @ w[0] + sum(F.linear(x, part).sum() for part in w.chunk(3)),
    "parts": lambda x, w: x[:, :4] @ w.split([4, 12], 1)[0].T + w.unflatten(0, (4, 6)).sum() + w.split(8)[1][0, 0],
    "columns": lambda x, w: x[:, 2:7] @ w[:, 2:7].T,
    "transposed": lambda x, w: x @ w.t() + x @ w.T + x @ w.mT + torch.addmm(x.new_ones(24), x, w.t()),
    "a normalized one": lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)),
    "other views": lambda x, w: x @ w.view(8, 3, 16)[:, 1].T + x.sum() * w.reshape(-1)[:8] + w.flip(0)[0, 0],
    "joined": lambda x, w: F.linear(x, torch.cat([w, torch.exp(w)])),
    "detached": lambda x, w: F.linear(x, w.detach()) + F.linear(x, w.data) + F.linear(x, w),
    "an einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w) + torch.einsum("oi,bi->bo", w, x),
    "by keyword": lambda x, w: torch.matmul(input=x, other=w.T) + F.linear(input=x, weight=w),
}


BASES = {"dense": (), "nf4": (FourBit("nf4", 16),), "bfloat16": (Half(torch.bfloat16),)}


class Reader(nn.Module):
    """It reads one weight in all of these ways, and calls no layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 24, bias=False)

    def forward(self, x):
        return [read(x, self.layer.weight) for read in READS.values()]


@pytest.mark.compile
@pytest.mark.parametrize(
    "base", [(), (FourBit("nf4", 16),), (Half(torch.bfloat16),)], ids=["dense", "nf4", "bfloat16"]
)
@pytest.mark.no_cover
def test_whoever_reads_it_in_a_graph_gets_the_results_and_gradients_of_the_sum(base, request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    torch.manual_seed(0)
    model = convert(Reader(), *base, LoRA(2))
    adapter = lowmem.adapter_layers(model, "default")["layer"]
    matrices = adapter.lora_a, adapter.lora_b
    for matrix in matrices:
        nn.init.normal_(matrix, 0, 0.3)
    x = torch.randn(5, 16)
    base_weight = unadapted_parameter(model.layer, "weight")
    dense = base_weight.dequantize() if base else base_weight.detach()
    whole = dense + adapter.scaling * (adapter.lora_b @ adapter.lora_a)
    exact = [read(x, whole if name != "a question" else whole.detach()) for name, read in READS.items()]
    exact[2] = F.linear(x, whole)
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for name, got, wanted in zip(READS, run(x), exact, strict=True):
            torch.testing.assert_close(
                got, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        given = torch.autograd.grad(sum(one.square().sum() for one in run(x)), matrices)
        of_sum = torch.autograd.grad(sum(one.square().sum() for one in exact), matrices, retain_graph=True)
        for got, wanted in zip(given, of_sum, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_what_a_graph_cannot_do_with_it_names_the_remedy(request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    model = convert(nn.Sequential(nn.Linear(16, 24)), LoRA(2))

    def run(function):
        return torch.compile(lambda: function(model[0].weight), fullgraph=True, backend="aot_eager")()

    refusal = r"weight with adapters.*lowmem.merge\(model\)"
    refusal += "|hasattr.*AdaptedWeight" * (TORCH < (2, 13))  # its compiler ends an initializer with words of its own
    for write in (
        *(lambda w: w.zero_(), nn.init.normal_, lambda w: torch.add(torch.ones(24, 16), 1, out=w)),
        *(lambda w: w[3].zero_(), lambda w: w[3:5].fill_(1), lambda w: w.T[0].zero_(), lambda w: w.data.normal_()),
        *(lambda w: w.__setitem__(0, 1.0), lambda w: F.relu(w, inplace=True), lambda w: w.split(8)[1].zero_()),
        lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0),
    ):
        with torch.no_grad(), pytest.raises(Exception, match=f"(?s){refusal}"):
            run(write)
    # Dynamo does not call __torch_function__ of these, and raises an error of its own.
    for unasked in (
        torch.relu_,
        torch.sqrt_,
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: [row * 2 for row in w],
    ):
        with torch.no_grad(), pytest.raises(Exception, match="(?i)bits16|dispatch|meta|not implemented|type"):
            run(unasked)


@pytest.mark.parametrize("techniques", [(LoRA(2),), (FourBit(), LoRA(2))], ids=["dense", "4-bit"])
@pytest.mark.parametrize("write", [nn.init.zeros_, lambda w: w.data.zero_(), lambda w: w.T.zero_()])
def test_a_write_that_ends_a_graph_is_refused_and_not_made_to_the_base(techniques, write, request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()

    class Own(nn.Linear):
        pass

    model = convert(nn.Sequential(Own(16, 24)), *techniques)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"zero_ would write to a weight with adapters"):
        torch.compile(lambda: write(model[0].weight), backend="eager")()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.fixture
def values(monkeypatch):
    """How often the values of an adapted weight were made."""
    made, before = [], AdaptedWeight.dense_values
    monkeypatch.setattr(AdaptedWeight, "values", lambda self: made.append(self) or before(self))
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*PRODUCTS, *ON_VALUES])
def test_outputs_and_gradients_are_those_of_the_sum_and_products_never_make_it(name, form, values):
    torch.manual_seed(0)
    values.clear()
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
    stack, matrix = (4, 1024, 1024), (2048, 2048)
    offsets = torch.tensor([1, 1, 3, 4], dtype=torch.int32)
    cases = {
        "linear": (F.linear, matrix, (4, 2048)),
        "x @ W": (lambda x, w: x @ w, matrix, (4, 2048)),
        "bmm": (torch.bmm, stack, (4, 4, 1024)),
        "grouped_mm": (lambda x, w: F.grouped_mm(x, w, offs=offsets), stack, (4, 1024)),
        "experts": (lambda x, w: F.linear(x, w[2]), stack, (4, 1024)),
    }
    for name, (function, shape, size) in cases.items():
        if name == "grouped_mm" and not hasattr(F, "grouped_mm"):
            continue
        for form in ("nf4", "dense"):
            weight, *_ = make(name, Case(function, shape, size, 1), form)
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
    for name in ("linear", "x @ W", "bmm", "experts"):
        weight, *_ = make(name, PRODUCTS[name], "dense", dropout=dropout)
        function, x = PRODUCTS[name].function, PRODUCTS[name].make_input()
        assert not torch.equal(function(x, weight), function(x, weight)), name
        assert torch.equal(weight.dense_values(), weight.dense_values())
        dropout.eval()
        assert torch.equal(function(x, weight), function(x, weight)), name
        dropout.train()


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_in_lower_precision_and_under_autocast(form):
    torch.manual_seed(0)
    for name in ("linear", "x @ W", "addmm", "bmm", "experts", "conv1d", "conv2d, transposed"):
        case = (PRODUCTS | ON_VALUES)[name]
        weight, dense, pairs, layout = make(name, case, form)
        x = case.make_input()
        exact = case.function(x.double(), total(dense, pairs, layout))
        with torch.autocast("cpu", torch.bfloat16):
            out = case.function(x, weight)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() <= 0.05 * exact.norm(), name


X, STACK, KERNEL = torch.randn(5, 48), torch.randn(3, 5, 48), torch.randn(2, 4, 6, 6)
BY_NAME = {
    "linear": (lambda w: F.linear(input=X, weight=w.t(), bias=torch.ones(32)), (48, 32)),
    "linear, in any order": (lambda w: F.linear(weight=w.mT, input=X), (48, 32)),
    "matmul": (lambda w: torch.matmul(input=X, other=w), (48, 32)),
    "a method": (lambda w: X.matmul(other=w) + X.mm(mat2=w), (48, 32)),
    "of linalg": (lambda w: torch.linalg.matmul(input=X, other=w), (48, 32)),
    "the weight first": (lambda w: torch.matmul(input=w.T, other=X.T), (48, 32)),
    "mm": (lambda w: torch.mm(input=X, mat2=w), (48, 32)),
    "mv": (lambda w: torch.mv(input=w.T, vec=X[0]), (48, 32)),
    "addmm": (lambda w: torch.addmm(input=torch.ones(32), mat1=X, mat2=w, beta=2, alpha=3), (48, 32)),
    "addmm, half by name": (lambda w: torch.addmm(torch.ones(32), X, mat2=w), (48, 32)),
    "bmm": (lambda w: torch.bmm(input=STACK, mat2=w), (3, 48, 32)),
    "baddbmm": (lambda w: torch.baddbmm(input=torch.ones(3, 5, 32), batch1=STACK, batch2=w), (3, 48, 32)),
    "embedding": (lambda w: F.embedding(input=INDICES, weight=w), (48, 32)),
    "embedding bag": (lambda w: F.embedding_bag(input=INDICES, weight=w, mode="sum"), (48, 32)),
    "conv2d": (lambda w: F.conv2d(input=KERNEL, weight=w, stride=2, padding=1), (8, 4, 3, 3)),
    "out": (lambda w: torch.mm(X, w, out=torch.empty(5, 32)), (48, 32)),
    "transpose": (lambda w: X @ torch.transpose(input=w, dim0=1, dim1=0).T, (48, 32)),
    "narrow": (lambda w: X[:, :9] @ torch.narrow(input=w, dim=0, start=2, length=9), (48, 32)),
    "split": (
        lambda w: X[:, :8] @ torch.split(tensor=w, split_size_or_sections=8)[1] + w.split(split_size=8)[0][0],
        (48, 32),
    ),
    "chunk": (lambda w: X[:, :16] @ torch.chunk(input=w, chunks=3)[2], (48, 32)),
    "unbind": (lambda w: X @ torch.unbind(input=w)[1], (3, 48, 32)),
    "select": (lambda w: X @ torch.select(input=w, dim=0, index=1), (3, 48, 32)),
    "index_select": (lambda w: X[:, :2] @ torch.index_select(input=w, dim=0, index=INDICES[0, :2]), (48, 32)),
    "permute": (lambda w: X @ torch.permute(input=w, dims=(1, 0)).T, (48, 32)),
    "a sum": (lambda w: torch.add(input=X[:, :1].T, other=w[:5].T, alpha=2), (48, 32)),
}


ROWS, THREE = torch.arange(48) % 3 > 0, torch.tensor([True, False, True])
OF_ROWS = {
    (48, 32): (3, -1, torch.tensor(3), slice(3, 9), [3, 1], torch.tensor([3, 1]), ROWS),
    (3, 48, 32): (1, -1, torch.tensor(1), slice(1, None), [2, 0], torch.tensor([2, 0]), THREE),
    (8, 4, 3, 3): (2, slice(2)),
}
"""Indices of the first dimension of a weight, by its shape."""
OF_VALUES = {
    (48, 32): (
        *((slice(None), 3), (slice(3, 9), [1, 2]), None, (3, slice(4, 9)), ROWS[:, None].expand(48, 32)),
        *(
            (..., slice(4, 9)),
            (slice(3, 9), slice(4, 9)),
            ([3, 1], slice(4, 9)),
            torch.tensor([[3, 1], [0, 2]]),
            True,
        ),
    ),
    (3, 48, 32): (
        *((slice(None), [3, 1]), (1, 3), ([2, 0], [1, 2]), THREE[:, None].expand(3, 48), (..., 3)),
        *((1, slice(3, 9)), (1, ...), (slice(None), slice(3, 9)), (THREE, slice(3, 9))),
    ),
    (8, 4, 3, 3): ((..., slice(2)),),
}
"""Other indices."""


@pytest.mark.parametrize("form", FORMS)
def test_arguments_may_be_given_by_name_and_rows_of_a_weight_are_adapted_weights(form):
    torch.manual_seed(0)
    for name, (function, shape) in BY_NAME.items():
        case = Case(function, shape, (1,), 0, 1 if len(shape) == 4 else None)
        kind = "conv" if len(shape) == 4 else "embedding" if "embedding" in name else "linear"
        weight, dense, pairs, layout = make(kind, case, form)
        with torch.no_grad():
            exact = function(total(dense, pairs, layout).float())
            torch.testing.assert_close(function(weight), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
            if form != "dense":
                stored = store(dense, form, case.lead)
                dense = stored.dequantize()
                exact = function(dense)
                torch.testing.assert_close(function(stored), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    for group in (OF_ROWS, OF_VALUES):
        for shape, indices in group.items():
            case = Case(F.linear, shape, (1,), 0, 1 if len(shape) == 4 else None)
            weight, dense, pairs, layout = make("conv" if len(shape) == 4 else "linear", case, form)
            exact = total(dense, pairs, layout).float().detach()
            for index in indices:
                found = weight[index]
                assert isinstance(found, AdaptedWeight) == (group is OF_ROWS), (shape, index)
                values = found.dense_values() if group is OF_ROWS else found
                torch.testing.assert_close(values, exact[index], rtol=1e-4, atol=1e-4)


def test_what_needs_no_values_makes_none():
    weight, *_ = make("linear", Case(F.linear, (48, 32), (5, 32), 32), "nf4")
    known = weight.base.dequantized_by.copy()
    for function in METADATA:
        function(weight)
    assert weight.base.dequantized_by == known


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
    "every other column of some rows": lambda w: w[2:5, ::2],
    "joined": lambda w: torch.cat([w, w]),
    "flat": lambda w: w.reshape(-1),
    "a linear layer": lambda w: F.linear(torch.ones(2, 32), w),
    "a product": lambda w: torch.ones(2, 32) @ w.T,
    "an einsum": lambda w: torch.einsum("...i,oi->...o", torch.ones(2, 3, 32), w),
    "an embedding": lambda w: F.embedding(torch.tensor([1, 5]), w),
}


def values_of(weight):
    dense = weight.dense_values() if isinstance(weight, AdaptedWeight) else weight
    return (dense.dequantize() if isinstance(dense, StoredTensor) else dense).detach()


@pytest.mark.parametrize("form", [*FORMS, "stored", "gathered"])
def test_views_and_everything_else_are_those_of_the_values(form):
    torch.manual_seed(0)
    case = Case(lambda x, w: x, (48, 32), (5, 32), 32)
    if form == "gathered":
        weight = shallow_copy_with_column_order(
            convert(nn.Linear(32, 48), FourBit("nf4", 8)), torch.randperm(32).int()
        ).weight
    else:
        weight = store(torch.randn(48, 32), "nf4") if form == "stored" else make("linear", case, form)[0]
    exact = values_of(weight)
    for name, view in VIEWS.items():
        found, wanted = values_of(view(weight)), view(exact)
        assert found.shape == wanted.shape, name
        assert found.dtype == wanted.dtype, name
        # The sums of rank 2 are taken in another order: a few units in the last place of numbers up to 10.
        if found.dtype.is_floating_point:
            assert float((found - wanted).abs().max()) <= 64 * 2.0**-23 * float(wanted.abs().max()), name
    if form not in FORMS:
        return
    stack = Case(lambda x, w: x, (3, 48, 32), (5, 32), 32)
    weights, *_ = make("stack", stack, form)
    for number, matrix in enumerate(weights):
        assert isinstance(matrix, AdaptedWeight)
        assert (
            float((matrix.dense_values() - weights.dense_values()[number]).detach().abs().max()) <= 64 * 2.0**-23 * 10
        )
    kernels, *_ = make("conv2d", Case(lambda x, w: x, (8, 4, 3, 3), (2, 4, 6, 6), 36, 1), form)
    for view in (
        lambda w: w[2],
        lambda w: w.mT,
        lambda w: w.unbind()[1],
        lambda w: F.linear(torch.ones(2, 3), w[0, 0]),
        lambda w: w[2][1],
        lambda w: w[1:3].mT,
    ):
        assert float((view(kernels) - view(kernels.dense_values())).detach().abs().max()) <= 64 * 2.0**-23 * 10


@pytest.mark.parametrize("form", FORMS)
def test_casts_to_it_einsums_of_both_its_sides_and_masks_are_those_of_the_sum(form):
    weight, dense, pairs, layout = make("linear", CASES["linear"], form)
    whole, most = (total(of(dense), [(of(a), of(b)) for a, b in pairs], layout) for of in (torch.clone, torch.abs))
    x = torch.randn(5, 48, 32)
    for cast in (x.double().to(weight), x.double().type_as(weight)):
        assert (type(cast), cast.dtype) == (torch.Tensor, torch.float32)
    assert torch.equal(weight.to(weight), weight.dense_values())
    terms = RANK + 2 + OF_4_BITS  # of a weight: the sum over the rank, its scaling, the base
    for sums, added in (("boi,oi->b", 48 * 32), ("boi,oi->boi", 1)):
        exact, sizes = torch.einsum(sums, x.double(), whole), torch.einsum(sums, x.double().abs(), most)
        assert_sum(torch.einsum(sums, x, weight), exact, sizes, added + terms)
    stack = adapted_weight(
        torch.randn(2, 3, 4, 5),
        [LowRankUpdate(torch.randn(2, 3, 4, RANK), torch.randn(2, 3, RANK, 5), SCALING, nn.Identity())],
    )
    mask = torch.tensor([[True, False, True], [False, True, True]])
    torch.testing.assert_close(torch.as_tensor(stack[mask] * 1), stack.dense_values()[mask])


def test_dimensions_may_be_named_as_torch_names_them():
    weight, *_ = make("linear", CASES["linear"], "nf4")
    swapped = weight.transpose(dim0=0, dim1=1)
    assert isinstance(swapped, AdaptedWeight)
    for one in (swapped.dense_values(), weight.permute(dims=(1, 0)), torch.permute(weight, dims=(1, 0))):
        assert torch.equal(one, weight.dense_values().T)
