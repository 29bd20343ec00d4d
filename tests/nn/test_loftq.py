"""A truncated SVD is near to the best approximation, and LoftQ starts an adapter from it."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FORMATS, FourBit, Half, LoRA, add_adapter, convert, merge
from lowmem.nn.adapter import randomized_svd
from tests.rounding import gamma


def squares(matrix):
    return float(matrix.double().square().sum())


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (9, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_a_matrix_of_low_rank_is_found_whole(shape, rank):
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(*size, generator=generator).double() for size in ((shape[0], 3), (3, shape[1]))]
    matrix = factors[0] @ factors[1]
    u, s, vt = randomized_svd(matrix, rank)
    count = min(rank, *shape)
    assert (u.shape, s.shape, vt.shape) == ((shape[0], count), (count,), (count, shape[1]))
    exact = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(s, exact[:count], atol=1e-9, rtol=1e-9)
    for basis in (u[:, : min(count, 3)], vt[: min(count, 3)].t()):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.shape[1]).double())
    torch.testing.assert_close(squares(matrix - (u * s) @ vt), squares(exact[count:]), atol=1e-9, rtol=1e-9)


def test_it_draws_from_no_global_generator_and_comes_out_the_same():
    matrix = torch.randn(30, 20)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second = randomized_svd(matrix, 2), randomized_svd(matrix, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_base_and_adapter_of_rank_16_are_nearer_to_the_weight_than_the_base(format, stabilized):
    """The best approximation takes the squares of the 16 largest singular values off the squared error.

    That is at least the share 16 / 192 of it, since their mean square is above that of all 192. Subspace iteration
    finds 95% of it at least here, where the singular values lie close together.
    """
    torch.manual_seed(0)
    layer = nn.Linear(256, 192)
    weight = layer.weight.detach().clone()
    plain = convert(copy.deepcopy(layer), FourBit(format))
    layer = convert(layer, FourBit(format), LoRA(16, 8.0, init="loftq", rank_stabilized=stabilized))
    assert torch.equal(layer.quantized.packed, plain.quantized.packed)  # the bytes of FourBit alone
    assert torch.equal(layer.quantized.scales, plain.quantized.scales)
    error = weight.double() - layer.quantized.dequantize().double()
    singular = torch.linalg.svdvals(error)
    left = squares(error - layer.adapters.default.weight.delta().double())
    assert squares(singular[16:]) * (1 - gamma(256)) <= left  # Eckart and Young: no rank of 16 leaves less
    assert left <= squares(error) - 0.95 * squares(singular[:16])
    assert left <= (1 - 0.95 * 16 / 192) * squares(error)
    x = torch.randn(64, 256)
    dense = nn.functional.linear(x, weight, layer.bias)
    assert squares((layer(x) - dense).detach()) < squares((plain(x) - dense).detach())


def test_a_and_b_have_the_same_size_and_train():
    layer = convert(nn.Linear(64, 64), FourBit(), LoRA(4, 32.0, init="loftq"))
    a, b = layer.lora_a, layer.lora_b
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    assert (a.dtype, b.dtype, a.requires_grad, b.requires_grad) == (torch.float32, torch.float32, True, True)
    layer(torch.randn(2, 64)).sum().backward()
    assert a.grad.any()
    assert b.grad.any()


@pytest.mark.parametrize("shape", [(4, 64), (64, 4)])
def test_a_rank_above_the_layer_s_sizes_takes_the_whole_error_and_the_rest_can_train(shape):
    layer = nn.Linear(*shape)
    weight = layer.weight.detach().double()
    with pytest.warns(UserWarning, match=r"56% .*can use a rank of 4 at most, and gets 9;"):
        layer = convert(layer, FourBit(), LoRA(9, init="loftq"))
    error = weight - layer.quantized.dequantize().double()
    assert squares(error - layer.adapters.default.weight.delta().double()) < 1e-9 * squares(error)
    assert not layer.lora_b[:, 4:].any()
    assert layer.lora_a[4:].any(1).all()
    layer = nn.Linear(*shape)
    nn.init.zeros_(layer.weight)  # 4 bits hold it: the adapter is a fresh one
    layer = convert(layer, FourBit(), LoRA(2, init="loftq"))
    assert not layer.lora_b.any()
    assert layer.lora_a.any(1).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: convert(model, LoRA(2, init="loftq")),
        lambda model: convert(model, Half(), LoRA(2, init="loftq")),
        lambda model: convert(convert(model, FourBit()), LoRA(2, init="loftq")),
        lambda model: add_adapter(model, "mine", LoRA(2, init="loftq")),
        lambda model: add_adapter(convert(model, FourBit()), "mine", LoRA(2, init="loftq")),
    ],
)
def test_without_the_dense_weight_of_a_4_bit_base_it_is_refused(change):
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"init='loftq' .* needs both: apply it in the call that quantizes, convert"):
        change(model)
    assert not any(isinstance(module, lowmem.LoRALinear) for module in model.modules())


def test_merging_a_fresh_one_changes_the_base_and_says_so():
    model = convert(nn.Sequential(nn.Linear(64, 32)), FourBit(), LoRA(16, init="loftq"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = merge(model, torch.float32, report=True)
    assert report[0].before > 0.01
    assert report[0].after < 1e-6
