"""Running statistics, and other buffers that training changes, are an adapter's own; the base's bits come back."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowmem
from lowmem import FourBit, LoRA, activate, add_adapter, convert, deactivate, delete_adapter
from lowmem.nn.adapter_buffers import buffers_changed_by_adapter, buffers_of_adapter_or_base


class Average(nn.Module):
    """Subtracts a running average that it assigns anew, as modules of users do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = self.mean * 0.5 + x.detach().mean(0) * 0.5
            self.calls += 1
        return x - self.mean


def fresh():
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))


def net(technique=None):
    torch.manual_seed(0)
    model = fresh().append(Average())
    for _ in range(3):
        model(torch.randn(32, 16))
    return model.eval() if technique is None else convert(model.eval(), technique)


def train(model, seed=1):
    """Some steps with other inputs, whose statistics are not the base's."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    model.train()
    for _ in range(3):
        model(torch.randn(32, 16) * 3 + seed).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = torch.linspace(-2, 2, 8 * 16).view(8, 16)
CHANGED = {"1.running_mean", "1.running_var", "1.num_batches_tracked", "4.mean"}


@pytest.mark.parametrize("technique", [None, FourBit("nf4")], ids=["dense", "stored"])
def test_without_the_adapter_the_bits_are_the_base_s(technique):
    model = net(technique)
    before, state = model(X), copy.deepcopy(dict(model.named_buffers()))
    add_adapter(model, "a", LoRA(2))
    assert torch.equal(model(X), before)
    trained = train(model)(X)
    assert buffers_changed_by_adapter(model, "a").keys() == CHANGED
    deactivate(model)
    assert torch.equal(model(X), before)
    activate(model, "a")
    assert torch.equal(model(X), trained)
    delete_adapter(model, "a")
    assert torch.equal(model(X), before)
    now = dict(model.named_buffers())
    assert now.keys() == state.keys()  # no child is left
    torch.testing.assert_close({**now, "4.calls": None}, {**state, "4.calls": None}, rtol=0, atol=0)


def test_each_adapter_has_its_own():
    model = net()
    before = model(X)
    add_adapter(model, "a", LoRA(2))
    of_a = train(model)(X)
    deactivate(model, "a")
    add_adapter(model, "b", LoRA(3))
    assert torch.equal(model(X), before)  # it begins with the base's
    of_b = train(model, 5)(X)
    assert not torch.equal(of_a, of_b)
    deactivate(model)
    activate(model, "a")
    assert torch.equal(model(X), of_a)
    activate(model, "b")
    assert torch.equal(
        model[1].running_mean, buffers_of_adapter_or_base(model, "b")["1.running_mean"]
    )  # of the last one
    deactivate(model, "a")
    assert torch.equal(model(X), of_b)
    delete_adapter(model, "b")
    assert torch.equal(model(X), before)
    activate(model, "a")
    assert torch.equal(model(X), of_a)


def test_one_that_is_added_beside_active_ones_begins_with_what_the_model_computes():
    model = train(add_adapter(net(), "a", LoRA(2)))
    before = model(X)
    add_adapter(model, "b", LoRA(2))
    assert torch.equal(model(X), before)
    train(model, 3)
    deactivate(model, "b")
    assert buffers_of_adapter_or_base(model, "a").keys() == CHANGED
    assert torch.equal(model[1].running_var, buffers_of_adapter_or_base(model, "a")["1.running_var"])


def test_merging_keeps_what_the_adapter_computes_with():
    model = train(add_adapter(net(), "a", LoRA(2)))
    before = model(X)
    lowmem.merge_adapter(model, "a")
    torch.testing.assert_close(model(X), before)
    with pytest.raises(ValueError, match="merged"):
        deactivate(model)
    lowmem.unmerge_adapter(model)
    assert torch.equal(model(X), before)
    lowmem.merge(model)
    torch.testing.assert_close(model(X), before)
    assert model.state_dict().keys() == net().state_dict().keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_casts_keep_all_of_them(copied):
    model = train(add_adapter(net(), "a", LoRA(2)))
    on, off = model(X), (deactivate(model), model(X))[1]
    other = copied(model).double().float()
    assert torch.equal(other(X), off)
    activate(other, "a")
    assert torch.equal(other(X), on)
    assert torch.equal(model(X), off)


def test_convert_with_an_adapter_keeps_the_base_s_too():
    base = net(FourBit("nf4"))(X)
    model = train(convert(net(), FourBit("nf4"), LoRA(2)))
    assert not torch.equal(model(X), base)
    deactivate(model)
    assert torch.equal(model(X), base)


def test_a_buffer_that_modules_share_stays_shared():
    model = nn.ModuleDict({"a": Average(), "b": Average(), "fc": nn.Linear(16, 16)})
    model["b"]._buffers["mean"] = model["a"].mean
    add_adapter(model, "x", LoRA(2))
    assert model["a"].mean is model["b"].mean
    deactivate(model)
    assert model["a"].mean is model["b"].mean


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("copied", [lambda one: one, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("first", ["train", "activate", "load_state_dict"])
def test_buffers_of_a_lazy_module_become_each_adapter_s_own_once_it_has_a_shape(copied, first):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyBatchNorm1d())
    add_adapter(add_adapter(model, "a", LoRA(2)), "b", LoRA(2))
    model = copied(model)
    base = nn.BatchNorm1d(16).state_dict()
    if first == "load_state_dict":
        base = net()[1].state_dict()
        model[1].load_state_dict(base, strict=False)
    trained, used = "b", "a"
    if first == "activate":
        deactivate(model)
        activate(model, "a")
        trained, used = "a", "b"
    train(model)
    assert "1.running_mean" in buffers_changed_by_adapter(model, trained)
    assert not buffers_changed_by_adapter(model, used)
    deactivate(model)
    activate(model, used)
    assert torch.equal(model[1].running_mean, base["running_mean"])
    deactivate(model)
    assert torch.equal(model[1].running_var, base["running_var"])
    assert not model[1]._forward_pre_hooks
    delete_adapter(model, "a")
    delete_adapter(model, "b")
    assert "adapter_buffers" not in str(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_without_adapters_left_is_an_ordinary_one():
    model = add_adapter(nn.Sequential(nn.Linear(16, 16), nn.LazyBatchNorm1d()), "a", LoRA(2))
    delete_adapter(model, "a")
    model(torch.randn(32, 16))
    assert model[1].running_mean.any()
    assert not model[1]._forward_pre_hooks
    assert "adapter_buffers" not in str(model)


def test_a_model_without_such_buffers_has_the_state_that_it_had():
    model = convert(
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.BatchNorm1d(16, track_running_stats=False)), LoRA(2)
    )
    assert not any("adapter_buffers" in name for name in model.state_dict())


def test_a_file_has_no_copies_of_what_no_training_changed(tmp_path):
    model = add_adapter(net()[:4], "a", LoRA(2))
    lowmem.save(model, tmp_path / "m")
    assert not any("adapter_buffers" in name for name in load_file(tmp_path / "m"))
    loaded = train(lowmem.load(tmp_path / "m", fresh).eval())
    deactivate(loaded)
    assert torch.equal(loaded(X), net()[:4](X))
    lowmem.save(loaded, tmp_path / "m")
    assert "1.adapter_buffers.adapters.a.running_mean" in load_file(tmp_path / "m")
