"""A stored tensor answers like the dense one that it replaced."""

import copy
import io
import pickle

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import lowmem
from lowmem import measure
from lowmem.nn.stored_tensor import StoredTensor
from tests.nn.stored_cases import store
from tests.rounding import OF_4_BITS, assert_sum

FORMS = ["bof4s", "bfloat16"]
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_it_has_the_shape_dtype_and_device_of_the_dense_weight(form):
    dense = torch.randn(3, 24, 40)
    weight = store(dense, form)
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "itemsize"):
        assert getattr(weight, name) == getattr(dense, name), name
    assert weight.size() == dense.size()
    assert weight.size(-1) == 40
    assert weight.stride() == dense.stride()
    assert (weight.numel(), weight.dim(), len(weight)) == (dense.numel(), 3, 3)
    assert weight.is_floating_point()
    assert weight.is_contiguous()
    assert not weight.is_sparse
    assert not weight.is_meta
    assert form in repr(weight)
    assert "shape=(3, 24, 40)" in repr(weight)
    assert (weight.dequantize() - dense).norm() < 0.2 * dense.norm()


@forms
@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[1],
        lambda w: w[1][4],
        lambda w: w[-1, 2:9],
        lambda w: w[:, 3],
        lambda w: w[1:],
        lambda w: w.view(72, 40),
        lambda w: w.reshape(-1, 40),
        lambda w: w.flatten(0, 1),
        lambda w: w.view(3, 2, -1, 40),
        lambda w: w.view(72, -1),
        lambda w: w.mT,
        lambda w: w.transpose(1, 2).transpose(1, 2),
        lambda w: w[1].t(),
        lambda w: w.expand(2, 3, 24, 40),
        lambda w: w.detach(),
        lambda w: w.split(1)[2],
        lambda w: w.chunk(3)[0],
        lambda w: w.unbind()[1],
        lambda w: w.data,
    ],
)
def test_views_of_rows_share_the_stored_bytes(form, view):
    weight = store(torch.randn(3, 24, 40), form)
    made, expected = view(weight), view(weight.dequantize())
    assert isinstance(made, StoredTensor)
    assert made.shape == expected.shape
    assert made.stride() == expected.stride() or not expected.is_contiguous()
    assert torch.equal(made.dequantize(), expected)
    own = [part.untyped_storage().data_ptr() for part in weight.parts]
    assert [part.untyped_storage().data_ptr() for part in made.parts] == own


OF_ANY_KIND = {
    (3, 24, 40): (
        *(lambda w: w[..., 4:9], lambda w: w.permute(2, 0, 1), lambda w: w[0, 1, 2], lambda w: w.float() + 1),
        *(lambda w: w[::2], lambda w: w[:, ::5], lambda w: w.unbind(1)[4], lambda w: w.split(8, 1)[2]),
        *(lambda w: w.split([4, 20], 1)[1], lambda w: w.split([1, 2])[1], lambda w: w.select(1, 7)),
        *(
            lambda w: w.view(3, 24, 5, 8),
            lambda w: w.unsqueeze(0),
            lambda w: w[:, :1].squeeze(1),
            lambda w: w[None].mT,
        ),
        *(lambda w: w[:, -3], lambda w: w.mT.reshape(-1), lambda w: w.mT.contiguous().view(5, -1)),
        *(lambda w: w.mT.reshape(-1, 24), lambda w: w.mT.contiguous().view_as(w)),
        lambda w: w.mT.clone(memory_format=torch.contiguous_format).view(3, 2, -1),
    ),
    (24, 40): (
        *(lambda w: w.T[2], lambda w: w.T[1:7], lambda w: w.T.unbind()[3], lambda w: w.T.split(8)[1]),
        *(lambda w: w.T[[3, 1]], lambda w: w.T.reshape(-1), lambda w: w.T.contiguous().view(5, -1)),
    ),
}
"""Views and copies, by the shape of the weight: of rows, of whatever is no whole rows, and of a transposed weight."""
DENSE = OF_ANY_KIND[3, 24, 40][:4]


@forms
def test_every_view_has_the_values_of_the_dense_one(form):
    for shape, views in OF_ANY_KIND.items():
        weight = store(torch.randn(shape), form)
        for view in views:
            made, expected = view(weight), view(weight.dequantize())
            assert made.shape == expected.shape
            assert torch.equal(made, expected)
            assert type(made) in ((torch.Tensor,) if view in DENSE else (torch.Tensor, StoredTensor))


@forms
def test_a_matrix_of_a_stack_is_made_once_and_follows_the_storage(form):
    weight = store(torch.randn(3, 24, 40), form)
    assert weight[1] is weight[1] is weight[torch.tensor(1)]
    assert weight[1] is not weight[2]
    before = weight[1].dequantize()
    for part in weight.parts:
        part.data = part.data.flip(0).contiguous()
    assert torch.equal(weight[1].dequantize(), before)  # the one in the middle
    assert not torch.equal(weight[0].dequantize(), weight[2].dequantize())


@forms
def test_casts_change_what_it_presents_and_no_stored_bit(form):
    weight = store(torch.randn(24, 40), form)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = weight.to(dtype)
        assert isinstance(cast, StoredTensor)
        assert cast.dtype == cast.dequantize().dtype == dtype
        assert all(a is b or torch.equal(a, b) for a, b in zip(cast.parts, weight.parts, strict=True))
    assert weight.half().dtype == torch.float16
    assert weight.double().dtype == torch.float64
    assert torch.equal(weight.half().float().dequantize(), weight.dequantize())
    assert weight.to("meta").is_meta
    with pytest.raises(ValueError, match="dtype=torch.int32 must be a floating-point dtype"):
        weight.dequantize(torch.int32)


@forms
def test_copies_have_bytes_of_their_own(form):
    weight = store(torch.randn(24, 40), form)
    for twin in (weight.clone(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(twin, StoredTensor)
        assert (twin.form, twin.tail, twin.dtype) == (weight.form, weight.tail, weight.dtype)
        assert torch.equal(twin, weight)
        assert not {p.data_ptr() for p in twin.parts} & {p.data_ptr() for p in weight.parts}
    pair = copy.deepcopy([weight, weight])
    assert pair[0] is pair[1]
    for twin in (copy.deepcopy(weight.T), pickle.loads(pickle.dumps(weight.T)), weight.T.clone()):
        assert torch.equal(twin.dequantize(), weight.dequantize().T)


@forms
def test_tensors_like_it_are_dense(form):
    weight = store(torch.randn(24, 40), form)
    for make in (torch.zeros_like, torch.empty_like, torch.randn_like, torch.ones_like):
        made = make(weight)
        assert (type(made), made.shape, made.dtype) == (torch.Tensor, weight.shape, weight.dtype)
    assert torch.full_like(weight, 2.0, dtype=torch.float64).eq(2).all()
    assert weight.new_zeros(3).shape == (3,)


def test_it_is_equal_to_what_has_the_same_values():
    weight = store(torch.randn(24, 40), "nf4", scales="float32")
    assert torch.equal(weight, weight.dequantize())
    assert torch.equal(weight.dequantize(), weight)
    assert not torch.equal(weight, store(torch.randn(24, 40), "nf4"))
    other = store(torch.randn(24, 40), "fp4", scales="float32")
    assert not torch.equal(weight, other)
    assert not torch.equal(weight, type(weight)(other.form, weight.parts, weight.tail, weight.dtype))


@forms
def test_a_file_that_holds_one_loads_without_trusting_it(form):
    weight, file = store(torch.randn(24, 40), form), io.BytesIO()
    torch.save({"weight": weight, "rows": weight[2:5]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["weight"], weight)
    assert torch.equal(loaded["rows"], weight[2:5])


@forms
def test_products_with_an_expanded_weight_read_no_dense_one_also_in_a_trace(form):
    """A trace is held on another input, of which a constant knows nothing."""
    weight, stack = store(torch.randn(24, 40), form), store(torch.randn(3, 24, 40), form)
    x, other = torch.randn(3, 4, 40, requires_grad=True), torch.randn(3, 4, 40)

    def output_and_gradient(product, x, w, grad):
        out = product(x, w)
        return out, *torch.autograd.grad(out, x, grad.view(out.shape))

    for stored, product in (
        (weight, lambda x, w: x @ w.expand(3, 24, 40).mT),
        (weight, lambda x, w: torch.bmm(x, w.expand(3, -1, -1).transpose(1, 2))),
        (weight, lambda x, w: w.expand(3, 24, 40) @ x.mT),
        (weight, lambda x, w: F.linear(x, weight=w)),
        (weight, lambda x, w: F.linear(input=x, weight=w.expand(24, 40), bias=None)),
        (stack, lambda x, w: torch.bmm(x, w.mT)),
    ):
        grad, dense = torch.randn(3, 4, 24), stored.dequantize()
        found = output_and_gradient(product, x, stored, grad)
        exact = output_and_gradient(product, x.double(), dense.double(), grad.double())
        most = output_and_gradient(product, x.double().abs(), dense.double().abs(), grad.double().abs())
        for one, terms in enumerate((40, 24)):
            assert_sum(found[one], exact[one], most[one], terms + OF_4_BITS)
        traced = make_fx(lambda x: (product(x, stored), stored.dequantize() * x.sum()))(x.detach())  # noqa: B023 - called here
        if form != "bfloat16":  # one operator of the codes, which a graph's reader need not follow
            assert "lowmem.dequantize_rows" in traced.code
        of_other, scaled = traced(other)
        exact, most = product(other.double(), dense.double()), product(other.double().abs(), dense.double().abs())
        assert_sum(of_other, exact, most, 40 + OF_4_BITS)
        torch.testing.assert_close(scaled, dense * other.sum())
    assert not weight.dequantized_by | stack.dequantized_by


@forms
def test_an_expanded_weight_is_multiplied_as_one_matrix(form):
    weight, x = store(torch.randn(512, 512), form), torch.randn(8, 4, 512)
    codes = sum(part.nbytes for part in weight.parts)
    chunk = 4 * weight.numel() if lowmem.backend().startswith("reference") else 0  # rows that plain torch dequantizes
    for product in (lambda w: torch.bmm(x, w.expand(8, -1, -1).mT), lambda w: torch.bmm(x, w.T.expand(8, 512, 512))):
        product(weight)  # caches
        assert measure.peak_bytes(lambda product=product: product(weight)) < 2 * x.nbytes + 2 * codes + chunk
    for expand in (
        lambda w: w[:1].expand(7, 512),
        lambda w: w.T.expand(2, 512, 512),
    ):
        made = expand(weight)
        assert isinstance(made, StoredTensor)
        assert torch.equal(made.dequantize(), expand(weight.dequantize()))
    assert not isinstance(weight.view(512, 512, 1).expand(512, 512, 2), StoredTensor)
