"""bfloat16 parameters with float32 masters train as float32 ones that are rounded when they are read."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import (
    AdamW8bit,
    FourBit,
    LoRA,
    adapter_parameter_groups,
    convert,
    load_adapter,
    master_weights,
    prepare_training,
    save_adapter,
    step_in_backward,
)
from lowmem.training.master_weights import join_bfloat16_and_rest, split_into_bfloat16_and_rest


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_halves_are_the_nearest_and_hold_all_bits(bits):
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    upper, rest = split_into_bfloat16_and_rest(master)
    assert upper.dtype is torch.bfloat16
    assert rest.dtype is torch.int16
    assert torch.equal(join_bfloat16_and_rest(upper, rest).view(torch.int32), master.view(torch.int32))
    near = master.bfloat16()
    ties = master.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(upper[~ties & ~master.isnan()], near[~ties & ~master.isnan()])
    bound = ties & upper.isfinite()
    off, least = ((one[bound].double() - master[bound]).abs() for one in (upper, near))
    assert torch.equal(off, least)


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.003, weight_decay=0.1),
    "adamw8bit": lambda groups: AdamW8bit(groups, lr=0.003, weight_decay=0.1),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.003),  # makes its states before the first step
}


class Rounded(torch.autograd.Function):
    """A float32 parameter as a bfloat16 one has it: read, and differentiated, in bfloat16."""

    @staticmethod
    def forward(ctx, master):
        return split_into_bfloat16_and_rest(master)[0]

    @staticmethod
    def backward(ctx, grad):
        return grad.float()


def data():
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).bfloat16()


def loss(weight, bias, x):
    return ((x @ weight.t()).float() + bias - x.float().flip(1)).square().mean()


def parameters():
    torch.manual_seed(0)
    return nn.Parameter((torch.randn(96, 96) / 10).bfloat16()), nn.Parameter(torch.zeros(96))


def train(optimizer, weight, bias, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weight, bias, data()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_it_is_float32_training_of_rounded_parameters(kind, monkeypatch):
    weight, bias = parameters()
    optimizer = OPTIMIZERS[kind]([weight, bias])
    masters = master_weights(optimizer)
    exact, own_bias = nn.Parameter(weight.detach().float()), nn.Parameter(bias.detach().clone())
    plain = OPTIMIZERS[kind]([exact, own_bias])
    for _ in range(6):
        train(optimizer, weight, bias, 1)
        plain.zero_grad()
        loss(Rounded.apply(exact), own_bias, data()).backward()
        plain.step()
        assert torch.equal(masters.master(weight), exact)
        assert torch.equal(weight, split_into_bfloat16_and_rest(exact.detach())[0])
        assert torch.equal(bias, own_bias)
    assert set(optimizer.state) == {weight, bias}
    assert weight.grad.dtype is torch.bfloat16
    kept = sum(one.nbytes for one in optimizer.state[weight].values() if torch.is_tensor(one) and one.dim())
    numbers = weight.numel()
    moments = {"sgd": 4, "adagrad": 4, "adamw": 8, "adamw8bit": 2 * 260 / 256}
    assert kept == (2 + moments[kind]) * numbers

    file = io.BytesIO()
    torch.save((optimizer.state_dict(), weight, bias), file)
    file.seek(0)
    state, *again = torch.load(file, weights_only=True)
    again = [nn.Parameter(one) for one in again]
    resumed = OPTIMIZERS[kind](again)
    handle = master_weights(resumed)
    resumed.load_state_dict(state)
    train(optimizer, weight, bias, 2)
    train(resumed, *again, 2)
    assert torch.equal(handle.master(again[0]), masters.master(weight))
    assert handle.release() is resumed
    assert "master_rest" not in resumed.state[again[0]]
    assert not resumed._optimizer_step_pre_hooks
    assert not resumed._optimizer_step_post_hooks


def test_small_updates_are_not_lost():
    """An update of a thousandth changes no bfloat16 number; a hundred of them are 10%."""
    found = {}
    for keeps in (False, True):
        weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        if keeps:
            master_weights(optimizer)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found[keeps] = weight[0].item()
    assert found == {False: 1.0, True: torch.tensor(0.9).bfloat16().item()}


def model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    return convert(net, FourBit("nf4", compute_dtype=torch.bfloat16), LoRA(32, dtype=dtype))


def learn(net, optimizer, steps=120):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
    return (net(x) - x.flip(1)).square().mean().item()


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW8bit])
def test_adapters_in_bfloat16_learn_the_same_with_loraplus_and_in_lean(kind):
    losses = {}
    for dtype in (None, torch.bfloat16):
        net = prepare_training(model(dtype), "lean")
        assert {p.dtype for p in net.parameters() if p.requires_grad} == {dtype or torch.float32}
        optimizer = kind(adapter_parameter_groups(net, 4.0, lr=2e-3))
        if dtype:
            master_weights(optimizer)
        losses[dtype] = learn(net, optimizer)
    start = learn(model(), torch.optim.SGD(model().parameters()), 0)
    assert losses[None] < 0.5 * start
    assert abs(losses[torch.bfloat16] - losses[None]) <= 0.01 * start


def test_a_step_in_backward_and_a_closure():
    for inside in (False, True):
        weights = [parameters()[0] for _ in range(2)]
        optimizers = [torch.optim.AdamW([one], lr=0.01) for one in weights]
        handles = [master_weights(one) for one in optimizers]
        if inside:
            step_in_backward(optimizers[1])
        for _ in range(3):
            loss(weights[0], 0, data()).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()

            def closure(weight=weights[1], optimizer=optimizers[1]):
                optimizer.zero_grad()
                value = loss(weight, 0, data())
                value.backward()
                return value

            if inside:
                loss(weights[1], 0, data()).backward()
                optimizers[1].step()
            else:
                assert optimizers[1].step(closure).item() > 0
        assert torch.equal(handles[0].master(weights[0]), handles[1].master(weights[1]))


def test_a_step_that_fails_leaves_the_parameters_in_their_groups():
    weight, bias = parameters()
    optimizer = AdamW8bit([weight, bias])
    handle = master_weights(optimizer)
    train(optimizer, weight, bias, 1)
    master = handle.master(weight)
    loss(weight, bias, data()).backward()
    bias.grad = torch.zeros(96).to_sparse()
    weight.grad = None
    with pytest.raises(RuntimeError, match="dense real gradients"):
        optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 2
    assert torch.equal(handle.master(weight), master)


def test_an_adapter_s_file_keeps_its_dtype(tmp_path):
    net = model()
    nn.init.normal_(net[0].lora_b)
    save_adapter(net, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    loaded = load_adapter(convert(base, FourBit("nf4", compute_dtype=torch.bfloat16)), tmp_path / "a.safetensors")
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.bfloat16}
    others = (load_adapter(one, tmp_path / "a.safetensors") for one in (copy.deepcopy(net), model(None)))
    for other in (loaded, *others):
        assert torch.equal(other[0].lora_b.float(), net[0].lora_b.float())


def test_what_cannot_be_is_refused():
    weight, bias = parameters()
    for wrong, message in (
        (weight, "expected a torch.optim.Optimizer, found Parameter"),
        (torch.optim.SGD([bias]), "no parameter that trains is torch.bfloat16, found torch.float32: make"),
        (torch.optim.LBFGS([weight]), "LBFGS keeps parameters of its own"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            master_weights(wrong)
    optimizer = torch.optim.AdamW([weight])
    master_weights(optimizer)
    with pytest.raises(ValueError, match="AdamW has master weights already"):
        master_weights(optimizer)
    train(optimizer, weight, 0, 1)
    late = torch.optim.AdamW([weight])
    late.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="call master_weights before load_state_dict"):
        master_weights(late)
    with pytest.raises(ValueError, match="dtype=torch.float16 must be torch.bfloat16"):
        LoRA(dtype=torch.float16)
