"""What computes with a stored weight gives what the dequantized one gives, and keeps nothing dense for backward."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lowmem import FORMATS, FourBit, Half, LoRA, convert, measure, restore
from lowmem.nn.linear import shallow_copy_with_column_order
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.scale_encodings import ENCODINGS
from tests.nn.stored_cases import CASES, OFFSETS, WHOLE, store
from tests.rounding import OF_4_BITS, assert_sum

FORMS = ["nf4", "bfloat16"]
forms = pytest.mark.parametrize("form", FORMS)


def run(function, x, weight):
    """Return the output, the gradient of the input for ones, and what backward kept."""
    kept = []
    x = x.clone().requires_grad_(x.is_floating_point())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda one: one):
        out = function(x, weight)
    if x.requires_grad:
        out.backward(torch.ones_like(out))
    return out.detach(), x.grad, kept


def assert_nothing_dense(kept, x, weight):
    """Hold what backward kept to stored tensors, the input and small ones."""
    own = {part.untyped_storage().data_ptr() for part in (*weight.parts, x)}
    for tensor in kept:
        if not isinstance(tensor, StoredTensor) and tensor.is_floating_point():
            known = tensor.untyped_storage().data_ptr() in own or tensor.shape == x.shape
            assert known or tensor.numel() < weight.numel() // 2, (tensor.shape, tensor.dtype)


@forms
@pytest.mark.parametrize("case", CASES.values())
def test_outputs_and_gradients_are_those_of_the_dequantized_weight_and_none_is_kept(case, form):
    torch.manual_seed(0)
    weight, x = store(torch.randn(case.weight), form, case.lead), case.make_input()
    dense = weight.dequantize()
    assert (type(dense), dense.shape) == (torch.Tensor, torch.Size(case.weight))
    got, of_x, kept = run(case.function, x, weight)
    assert_nothing_dense(kept, x, weight)
    wide = x.double() if x.is_floating_point() else x
    exact, exact_of_x, _ = run(case.function, wide, dense.double())
    sizes, sizes_of_x, _ = run(case.function, wide.abs(), dense.double().abs())
    assert_sum(got, exact, sizes, case.terms + OF_4_BITS)
    if of_x is not None:
        assert_sum(of_x, exact_of_x, sizes_of_x, dense.numel() + OF_4_BITS)


OF_EACH_KIND = (
    *("linear", "x @ W", "addmm", "bmm", "embedding", "embedding bag", "conv1d"),
    *("conv2d, groups", "conv3d", "conv2d, transposed"),
)


@pytest.mark.parametrize("compute", [torch.bfloat16, None, torch.float64])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case.x, tuple)])
def test_a_product_and_its_gradient_are_computed_in_the_dtype_that_the_form_says(name, compute):
    """1 + 2^-12 is 1 in bfloat16, and not in float32."""
    case = CASES[name]
    stored = store(torch.randn(case.weight), "nf4", case.lead)
    weight = StoredTensor(replace(stored.form, compute_dtype=compute), stored.parts, stored.tail, stored.dtype)
    assert weight.with_parts(weight.parts).form == weight.form
    x, more = torch.ones(case.x), 1 + 2**-12
    (out, of_x), (other, of_other) = (differentiated(case.function, weight, x * size, size) for size in (1, more))
    assert out.dtype == of_x.dtype == torch.float32
    assert torch.equal(out, other) == torch.equal(of_x, of_other) == (compute is torch.bfloat16)


def differentiated(function, weight, x, grad):
    """Return an output, and the gradient of the input where that of the output is ``grad`` everywhere."""
    x = x.requires_grad_()
    out = function(x, weight)
    out.backward(torch.full_like(out, grad))
    return out, x.grad


@pytest.mark.compile
@forms
def test_a_graph_keeps_nothing_dense_for_backward(form, request):
    request.addfinalizer(torch.compiler.reset)
    for name in OF_EACH_KIND:
        torch.compiler.reset()
        case = CASES[name]
        weight, x = store(torch.randn(case.weight), form, case.lead), case.make_input()
        out, of_x, kept = run(torch.compile(case.function, fullgraph=True, backend="aot_eager"), x, weight)
        assert_nothing_dense(kept, x, weight)
        expected, expected_of_x, _ = run(case.function, x, weight)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_x, expected_of_x, rtol=1e-4, atol=1e-4)
    weight, x = store(torch.randn(24, 24), form), torch.randn(3, 24)
    compiled = torch.compile(lambda x, w: x @ w, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight.T), x @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("technique", [FourBit("nf4", 16), Half(torch.bfloat16)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_recurrent_layer_keeps_nothing_dense_for_backward(kind, technique):
    layer, kept = convert(kind(16, 64), technique), []
    x = torch.randn(*((2, 16) if issubclass(kind, nn.RNNCellBase) else (5, 2, 16)), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = layer(x)
    weights = [getattr(layer, name) for name in layer.forms]
    shapes = {shape for one in weights for shape in (one.shape, one.T.shape)}
    assert not any(type(one) is torch.Tensor and one.is_floating_point() and one.shape in shapes for one in kept)
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    assert x.grad.any()


LARGE = {
    "linear": (F.linear, (1024, 1024), (4, 1024), None),
    "x @ W": (lambda x, w: x @ w, (1024, 1024), (4, 1024), None),
    "x @ W.T, not contiguous": (lambda x, w: x.transpose(0, 1) @ w.T, (1024, 1024), (4, 8, 1024), None),
    "rows as a stack": (
        lambda x, w: torch.bmm(x, w.view(4, -1, 1024).transpose(1, 2)),
        (1024, 1024),
        (4, 4, 1024),
        None,
    ),
    "addmm": (lambda x, w: torch.addmm(x.new_ones(1024), x, w), (1024, 1024), (4, 1024), None),
    "bmm": (torch.bmm, (4, 512, 512), (4, 4, 512), None),
    "conv1d": (F.conv1d, (1024, 512, 2), (1, 512, 4), 1),
    "conv2d": (F.conv2d, (512, 256, 3, 3), (1, 256, 4, 4), 1),
    "conv2d, transposed": (F.conv_transpose2d, (512, 256, 3, 3), (1, 512, 2, 2), 1),
}


@pytest.mark.parametrize("form", ["nf4", "float16"])
@pytest.mark.parametrize("name", LARGE)
def test_the_peak_of_a_step_holds_no_dense_weight(name, form):
    """A weight of 4 MiB or more in float32."""
    function, shape, size, lead = LARGE[name]
    weight, x = store(torch.randn(shape), form, lead), torch.randn(size, requires_grad=True)
    dense = 4 * weight.numel()
    assert dense >= 4 * 2**20

    def step():
        function(x, weight).sum().backward()

    step()  # caches and handles
    x.grad = None
    assert measure.peak_bytes(step) < 3.2 * 2**20 < dense


@pytest.mark.parametrize("kind", ["nf4", "float16", "gathered", "adapted"])
def test_an_einsum_keeps_no_dense_values_for_backward(kind):
    """Backward makes those of one layer after the other again."""
    weights = []
    for number in range(6):
        if kind == "gathered":
            order = torch.randperm(1024).int()
            weights.append(
                shallow_copy_with_column_order(convert(nn.Linear(1024, 1024), FourBit("nf4")), order).weight
            )
        elif kind == "adapted":
            layer = convert(nn.Sequential(nn.Linear(1024, 1024)), FourBit("nf4"), LoRA(2))[0]
            nn.init.normal_(layer.lora_b)
            weights.append(layer.weight)
        else:
            weights.append(store(torch.randn(1024, 4, 256) if number % 2 else torch.randn(4, 256, 1024), kind))
    x = torch.randn(4, 1024, requires_grad=True)

    def step(weights):
        out = x
        for weight in weights:
            if weight.dim() == 2:
                out = torch.einsum("bi,oi->bo", out, weight)
            elif weight.shape[0] == 4:
                out = torch.einsum("bi,ndi->bnd", out, weight)
            else:
                out = torch.einsum("bnd,ind->bi", out, weight)
            out = out / out.norm()
        return torch.autograd.grad(out.square().sum() + out.sum(), x)[0]

    expected = step([weight * 1 for weight in weights])
    torch.testing.assert_close(step(weights), expected)
    assert measure.peak_bytes(lambda: step(weights)) < 4 * 4 * 1024 * 1024  # of 24 MiB dense


def test_an_einsum_takes_all_forms_of_its_arguments_and_derivatives():
    weight, x = store(torch.randn(6, 8), "nf4").double(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    dense = weight.dequantize()
    for einsum in (
        lambda w: torch.einsum("bi,oi->bo", [x, w]),
        lambda w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]),
        lambda w: torch.einsum(w, [2, 1], x, [0, 1], [0, 2]),
        lambda w: torch.einsum("oi,oi", w, w) * x,
        lambda w: torch.func.vmap(lambda x: torch.einsum("i,oi->o", x, w))(x),
        lambda w: torch.func.jvp(lambda x: torch.einsum("bi,oi->bo", x, w), (x,), (x.cos(),))[1],
    ):
        got, expected = einsum(weight), einsum(dense)
        torch.testing.assert_close(got, expected)
        given = torch.randn_like(got)
        torch.testing.assert_close(torch.autograd.grad(got, x, given), torch.autograd.grad(expected, x, given))
    assert torch.autograd.gradgradcheck(lambda x: torch.einsum("bi,oi->bo", x, weight).pow(2), x)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (torch.einsum("bi,oi->bo", x.float(), w.float()) for w in (weight, dense))
    assert got.dtype == torch.bfloat16
    (of_got,), (of_expected,) = (torch.autograd.grad(one.float().sum(), x) for one in (got, expected))
    assert torch.equal(of_got, of_expected)


@forms
@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE.keys())
def test_whatever_else_reads_values_gets_them_dequantized(case, form):
    weight, x = store(torch.randn(case.weight), form), case.make_input()
    got, of_x, _ = run(case.function, x, weight)
    expected, expected_of_x, _ = run(case.function, x, weight.dequantize())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(of_x, expected_of_x)


@pytest.mark.parametrize("scales", ENCODINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_and_scale_encoding_is_read(form, scales):
    weight, x = store(torch.randn(24, 40), form, scales=scales), torch.randn(3, 40, dtype=torch.float64)
    exact = F.linear(x, weight.dequantize(torch.float64))
    for got in (F.linear(x, weight), x @ weight.T, (weight @ x.T).T):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    for bias in (torch.rand(24, dtype=torch.float64), store(torch.rand(24), "bfloat16").double()):
        exact_sum = exact + (bias.dequantize() if isinstance(bias, StoredTensor) else bias)
        torch.testing.assert_close(torch.addmm(bias, x, weight.T), exact_sum, rtol=1e-12, atol=1e-12)
    assert not bias.dequantized_by
    indices = torch.tensor([3, 1])
    dense = weight.dequantize()
    assert torch.equal(F.embedding(indices, weight), dense[indices])
    for rows, is_stored in ((indices, True), (torch.arange(24) % 3 == 0, True), (dense > 0, False)):
        assert isinstance(weight[rows], StoredTensor) == is_stored
        assert torch.equal(weight[rows], dense[rows])


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_grouped_mm"), reason="this torch has no grouped_mm")
@forms
def test_a_grouped_product_is_one_for_each_group_of_rows(form):
    """In bfloat16, as torch has it: held against float64 of the same inputs; one rounding of the result remains."""
    weight = store(torch.randn(3, 48, 32), form).to(torch.bfloat16)
    dense = weight.dequantize(torch.float32).double()
    x = torch.randn(7, 48).bfloat16().requires_grad_()
    out = torch._grouped_mm(x, weight, offs=OFFSETS)
    exact = torch.cat([x[:2].double() @ dense[0], x[2:5].double() @ dense[2], torch.zeros(2, 32).double()])
    sizes = torch.cat(
        [x[:2].double().abs() @ dense[0].abs(), x[2:5].double().abs() @ dense[2].abs(), torch.ones(2, 32).double()]
    )
    assert ((out.double() - exact).abs() <= 2**-6 * sizes).all()
    out.backward(torch.ones_like(out))
    assert x.grad[5:].eq(0).all()
    wanted = torch.cat([dense[0].sum(1).expand(2, -1), dense[2].sum(1).expand(3, -1)])
    assert ((x.grad[:5].double() - wanted).abs() <= 2**-6 * dense.abs().sum(2).max()).all()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@forms
def test_a_bag_gathers_each_row_once(form, mode):
    weight, indices = store(torch.randn(4096, 64), form), torch.randint(4096, (4, 3))
    expected = F.embedding_bag(indices, weight.dequantize(), mode=mode)
    torch.testing.assert_close(F.embedding_bag(indices, weight, mode=mode), expected)
    assert measure.peak_bytes(lambda: F.embedding_bag(indices, weight, mode=mode)) < 64 * 1024


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", ["jvp", "vmap", "hessian", "grad of grad"])
def test_transforms_of_functions_see_a_matrix(form, transform):
    weight, x = store(torch.randn(6, 8), form).double(), torch.randn(8, dtype=torch.float64)
    dense = weight.dequantize()

    def norm(matrix):
        return lambda x: (x @ matrix.T).pow(2).sum()

    if transform == "jvp":
        got, expected = (torch.func.jvp(lambda x, m=m: x @ m.T, (x,), (x.cos(),))[1] for m in (weight, dense))
    elif transform == "vmap":
        got, expected = (torch.func.vmap(lambda x, m=m: m @ x)(x.expand(3, 8)) for m in (weight, dense))
    elif transform == "hessian":
        got, expected = (torch.func.hessian(norm(m))(x) for m in (weight, dense))
    else:
        assert torch.autograd.gradgradcheck(norm(weight), x.clone().requires_grad_())
        return
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_it_is_read_in_inference_mode_and_under_autocast():
    weight, x, bias = store(torch.randn(24, 40), "nf4"), torch.randn(3, 40), torch.randn(24)
    with torch.inference_mode():
        for given in (x, x.expand(2, 3, 40), x[0]):
            for linear in (F.linear, torch.ops.aten.linear):
                for more in ((), (bias,)):
                    got, expected = (linear(given, w, *more) for w in (weight, weight.dequantize()))
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not weight.dequantized_by
    with torch.inference_mode():
        for product in (
            lambda w: x @ w.T,
            lambda w: x.expand(2, 3, 40).transpose(0, 1) @ w.mT,
            lambda w: torch.cat([F.linear(x, part) for part in w.chunk(3)], 1),
            lambda w: F.linear(x, w.narrow(0, 3, 5)),
        ):
            torch.testing.assert_close(product(weight), product(weight.dequantize()), rtol=1e-5, atol=1e-5)
    assert not weight.dequantized_by
    dense = weight.dequantize()
    for view in (((24, 39), (40, 1)), ((24, 40), (39, 1)), ((23, 40), (40, 1), 40), ((40, 24), (1, 40))):
        assert torch.equal(torch.as_strided(weight, *view), torch.as_strided(dense, *view))
    with pytest.raises(RuntimeError, match="out of bounds"):
        weight.as_strided((24, 40), (40, 1), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight).dtype == (x @ weight.T).dtype == torch.bfloat16


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_a_bag_leaves_its_padding_out_also_where_it_is_recorded(padding):
    module = convert(nn.EmbeddingBag(11, 8, mode="mean", padding_idx=padding), FourBit()).eval()
    dense = restore(copy.deepcopy(module))
    for mode in ("mean", "sum", "max"):
        module.mode = dense.mode = mode
        for indices in ([[5, 7, 3, 0], [3, 3, 10, 0]], [[1, 2]], [[3, 3]], [[0, 3]]):
            x = torch.tensor(indices)
            torch.testing.assert_close(module(x), dense(x))
            if mode != "max":
                torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), dense(x))
                traced = make_fx(lambda x: module(x))(x)
                torch.testing.assert_close(traced(x.flip(1)), dense(x.flip(1)))


@pytest.mark.parametrize("form", ["nf4", "bfloat16"])
def test_a_weight_that_was_read_before_inference_mode_is_viewed_in_it_and_after(form):
    x = torch.randn(5, 16)
    views = (
        lambda w: F.linear(x, w[3:7]),
        lambda w: x @ w.T,
        lambda w: w.view(2, 12, 16)[0] * w.unsqueeze(0)[0, :, :1][:12],
        lambda w: w.detach()[:, 2] + w.chunk(2)[0].sum(),
    )
    for first, then in ((torch.inference_mode, nullcontext), (nullcontext, torch.inference_mode)):
        for view in views:
            weight = store(torch.randn(24, 16), form)
            with first():
                expected = view(weight)
            with then():
                torch.testing.assert_close(view(weight), expected, rtol=1e-5, atol=1e-5)
