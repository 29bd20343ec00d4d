"""AdamW with moments in 8 bits: how far each is off, that it learns as AdamW does, and that its state survives."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import AdamW8bit
from lowmem.training.adamw_8bit import BLOCK, e4m3_codes_and_scales_of_moment
from tests import strategies


@given(st.integers(1, 700), st.integers(-30, 30), st.booleans(), strategies.seeds)
def test_a_moment_is_off_by_a_sixteenth_of_itself_or_a_part_of_the_largest(count, exponent, positive, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-20, 1, (count,), generator=generator).float())
    moment = torch.randn(count, generator=generator) * size * 2.0**exponent
    moment = moment.abs() if positive else moment
    codes, scales = e4m3_codes_and_scales_of_moment(moment, positive)
    assert codes.dtype is torch.uint8
    assert codes.shape == (-(-count // BLOCK), BLOCK)
    got = (codes.view(torch.float8_e4m3fn).float() * scales).view(-1)[:count]
    padded = nn.functional.pad(moment, (0, -count % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(1, keepdim=True).expand_as(padded).reshape(-1)[:count]
    floor = 2.0**-9 if positive else 2.0**-10
    assert ((got - moment).abs() <= (moment.abs() / 16).maximum(largest * floor / 448) * (1 + 1e-6)).all()
    exact = moment.abs() == largest
    torch.testing.assert_close(got[exact], moment[exact], rtol=1e-6, atol=0)  # a block's largest is not rounded
    if positive:
        assert (got > 0).all()


def test_zeros_and_what_is_not_finite():
    codes, scales = e4m3_codes_and_scales_of_moment(torch.zeros(300))
    assert not codes.any()
    assert not scales.any()
    for broken in (torch.nan, torch.inf):
        moment = torch.ones(300)
        moment[3] = broken
        codes, scales = e4m3_codes_and_scales_of_moment(moment)
        got = (codes.view(torch.float8_e4m3fn).float() * scales).view(-1)
        assert not got[3].isfinite()
        assert got[256:300].isfinite().all()


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)
    x = torch.randn(256, 64)
    target = torch.sin(x @ torch.randn(64, 64) / 8)
    return model, x.to(dtype), target.to(dtype)


def learn(make, steps=150, dtype=torch.float32):
    model, x, target = problem(dtype)
    optimizer = make(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x).float(), target.float())
        loss.backward()
        optimizer.step()
    return loss.item(), model, optimizer


def test_it_learns_as_adamw_does():
    loss, _, optimizer = learn(AdamW8bit)
    exact, _, _ = learn(torch.optim.AdamW)
    assert loss <= 1.1 * exact
    kept = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
    numbers = 2 * 64 * 128
    assert kept == 2 * numbers * (1 + 4 / BLOCK) + 8 * (64 + 128)  # and float32 moments of the biases
    loss, model, _ = learn(AdamW8bit, dtype=torch.bfloat16)
    assert model[0].weight.dtype is torch.bfloat16
    assert loss < 0.1


def test_a_gradient_whose_square_is_infinite_stays_in_its_block():
    def trained(spike):
        parameter = nn.Parameter(torch.ones(40 * BLOCK))
        optimizer = AdamW8bit([parameter], lr=1e-2)
        for step in range(4):
            parameter.grad = torch.linspace(-1, 1, len(parameter))
            parameter.grad[3] = spike if step == 0 else 0.5
            optimizer.step()
        return parameter.detach()

    usual, found = trained(0.5), trained(1e30)
    assert found.isfinite().all()  # as with torch's AdamW
    assert torch.equal(found[BLOCK:], usual[BLOCK:])
    assert trained(torch.inf)[3].isnan()  # what went wrong stays visible


def test_small_parameters_are_updated_exactly():
    parameter = nn.Parameter(torch.randn(30, 40).t())  # strided
    other = nn.Parameter(parameter.detach().clone())
    mine, torchs = AdamW8bit([parameter], lr=0.1), torch.optim.AdamW([other], lr=0.1)
    for seed in range(5):
        parameter.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
        other.grad = parameter.grad.clone()
        assert mine.step(lambda: 3) == 3
        torchs.step()
    torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_state_survives_to_the_bit(dtype):
    _, model, optimizer = learn(AdamW8bit, 5, dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, x, target = copy.deepcopy(model), *problem(dtype)[1:]
    loaded = AdamW8bit(again.parameters(), lr=1.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for one, its in ((model, optimizer), (again, loaded)):
        its.zero_grad()
        (one(x) - target).square().mean().backward()
        its.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wrong_options_and_gradients():
    parameter = nn.Parameter(torch.zeros(4))
    for options, message in (
        ({"lr": -1}, "lr=-1"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": -1e-8}, "eps=-1e-08"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW8bit([parameter], **options)
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense real gradients, found torch.sparse_coo"):
        AdamW8bit(table.parameters()).step()


def test_a_state_of_another_optimizer_or_parameter_is_refused():
    parameter, other = nn.Parameter(torch.ones(80, 80)), nn.Parameter(torch.ones(100, 100))
    states = []
    for optimizer in (torch.optim.AdamW([parameter]), AdamW8bit([other])):
        for one in (parameter, other):
            one.grad = torch.ones_like(one)
        optimizer.step()
        states.append(optimizer.state_dict())
    for state in states:
        optimizer = AdamW8bit([parameter], lr=0.5)
        with pytest.raises(ValueError, match=r"state of parameter 0, of shape \(80, 80\): found .*exp_avg"):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert not optimizer.state
