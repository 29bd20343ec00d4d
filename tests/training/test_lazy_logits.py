"""Lazy logits are the layer's logits for everyone, and their cross entropy never computes them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowmem import FourBit, Half, convert, release_training
from lowmem.training.lazy_logits import LazyLogits, make_logits_lazy
from tests.training.blocks import Language

VOCABULARY = 40


def language():
    """Return a model of tied ends, of which a function computes the loss."""
    return Language(VOCABULARY, 16, [nn.Linear(16, 16)])


def shifted_loss(logits, labels):
    logits = logits.float()
    labels = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), ignore_index=-100, reduction="mean")


def cut_loss(logits, labels):
    shifted = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(shifted.view(-1, shifted.size(-1)), labels[..., 1:].reshape(-1))


def scaled_loss(logits, labels):
    return functional.cross_entropy((logits / 4 * 3).flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def biased_loss(logits, labels):
    frozen = nn.Parameter(torch.linspace(-1, 1, VOCABULARY), requires_grad=False)
    logits = (logits + torch.linspace(0, 3, VOCABULARY).view(1, -1)) * 2 + frozen
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def masked_loss(logits, labels):
    mask = labels > 20
    return functional.cross_entropy(logits[mask], labels[mask], reduction="sum")


def smoothed_by_hand(logits, labels):  # no cross entropy: needs the logits
    return -functional.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).mean()


def loss_of_each_row(logits, labels):
    return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean()


def close(a, b):
    """Compare numbers whose sums of at most 1000 float32 terms of magnitude up to 10 were taken in another order."""
    return float((a.detach().double() - b.detach().double()).abs().max()) <= 1e4 * torch.finfo(torch.float32).eps


LAZY = [shifted_loss, cut_loss, scaled_loss, biased_loss, masked_loss]


@pytest.mark.parametrize("loss", [*LAZY, smoothed_by_hand, loss_of_each_row], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("technique", [None, FourBit(), Half()], ids=["dense", "4-bit", "half"])
def test_losses_and_gradients_stay(loss, technique, monkeypatch):
    torch.manual_seed(0)
    model = language()
    if technique is not None:
        convert(model, technique, skip="layers.0")
    ids, labels = torch.randint(0, VOCABULARY, (2, 3, 9)).unbind()
    wanted = loss(model(ids), labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    make_logits_lazy(model.head)
    logits = model(ids)
    assert isinstance(logits, LazyLogits)
    assert logits.shape == (3, 9, VOCABULARY)
    if loss in LAZY:
        monkeypatch.setattr(LazyLogits, "compute_values", lambda _: pytest.fail("all logits were computed"))
    found = loss(logits, labels)
    found.backward()
    assert close(found, wanted)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or close(parameter.grad, gradients[name]), name


def test_functions_that_need_values_get_the_logits_and_attributes_compute_none(monkeypatch):
    torch.manual_seed(0)
    model = language()
    ids = torch.randint(0, VOCABULARY, (2, 5))
    wanted = model(ids)
    make_logits_lazy(model.head)
    logits = model(ids)
    with monkeypatch.context() as patch:
        patch.setattr(LazyLogits, "compute_values", lambda _: pytest.fail("all logits were computed"))
        assert (logits.dtype, logits.device, logits.dim(), len(logits)) == (wanted.dtype, wanted.device, 3, 2)
        assert (logits.is_leaf, logits.nbytes, logits.is_contiguous()) == (False, 2 * 5 * VOCABULARY * 4, True)
        assert logits.requires_grad
        assert logits.grad_fn is not None
        assert "LazyLogits(shape=(2, 5, 40)" in repr(logits)
    reads = {
        "detach": lambda x: x.detach(),
        "item": lambda x: x[0, 0, 3].reshape(1),
        "last": lambda x: x[:, -1],
        "column": lambda x: x[..., 7],
        "new axis": lambda x: x[None],
        "added": lambda x: x + torch.ones(5, VOCABULARY),
        "offset": lambda x: x + torch.ones(VOCABULARY),
        "offset of more dimensions": lambda x: x + torch.linspace(0, 1, VOCABULARY).view(1, 1, 1, -1),
        "a number for each row": lambda x: x[:1, :1] + torch.linspace(0, 1, VOCABULARY).view(-1, 1),
        "a number for each of as many": lambda x: x + torch.linspace(0, 1, 5).view(-1, 1),
        "softmax": lambda x: torch.softmax(x, -1),
        "concatenated": lambda x: torch.cat([x, x]),
        "capped": lambda x: torch.tanh(x / 30) * 30,
        "halves": lambda x: x.view(2, 5, 2, 20),
        "by a tensor": lambda x: x * torch.tensor(2.0),
        "least": lambda x: x.amin(-1),
        "bfloat16": lambda x: x.to(torch.bfloat16),
        "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    }
    for name, read in reads.items():
        found, expected = read(logits) + 0, read(wanted)
        assert found.shape == expected.shape, name
        assert close(found, expected), name
    assert (logits + 0).requires_grad
    trained = torch.zeros(VOCABULARY, requires_grad=True)
    assert torch.autograd.grad((logits + trained).sum(), trained)[0].tolist() == [10] * VOCABULARY  # one for each row
    logits.sum().backward()


def test_logits_of_autocast_have_its_dtype_and_are_read_outside_of_it():
    torch.manual_seed(0)
    model = language()
    ids, labels = torch.randint(0, VOCABULARY, (2, 3, 9)).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(ids)
        wanted = shifted_loss(plain, labels)
        make_logits_lazy(model.head)
        logits = model(ids)
        assert logits.dtype == torch.bfloat16
        loss = shifted_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert close(loss, wanted)
    assert torch.equal(logits + 0, plain)


class Mean(torch.autograd.Function):
    """Takes logits below Python's functions."""

    @staticmethod
    def forward(ctx, logits):
        ctx.shape = logits.shape
        return (logits * 1.0).sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones(ctx.shape)


def test_functions_that_python_does_not_see_get_a_gradient():
    torch.manual_seed(0)
    model = language()
    ids = torch.randint(0, VOCABULARY, (2, 5))
    model(ids).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    make_logits_lazy(model.head)
    Mean.apply(model(ids)).backward()
    assert all(close(p.grad, wanted[name]) for name, p in model.named_parameters())


def test_writes_and_stale_reads_are_refused():
    model = language()
    make_logits_lazy(model.head)
    ids = torch.randint(0, VOCABULARY, (2, 5))
    logits = model(ids)
    writes = {
        "item": lambda: logits.__setitem__((..., 0), 1.0),
        "in place": lambda: logits.mul_(2),
        "masked": lambda: logits.masked_fill_(torch.ones(2, 5, VOCABULARY, dtype=torch.bool), 0),
        "a view": lambda: logits.view(10, VOCABULARY).clamp_(0),
        "out": lambda: torch.add(torch.ones(2, 5, VOCABULARY), 1, out=logits),
        "a hook": lambda: logits.register_hook(print),
    }
    for write in writes.values():
        with pytest.raises(RuntimeError, match="not computed: change a copy"):
            write()
    assert torch.equal(logits.view(size=(10, VOCABULARY)), (logits + 0).view(10, VOCABULARY))
    assert logits[:, :, 5, ...].shape == (2, 5)
    hidden = torch.ones(2, 16) * 1
    read = {
        "values": lambda logits: logits.softmax(-1),
        "loss": lambda logits: functional.cross_entropy(logits, torch.ones(2, dtype=torch.int64)),
        "rows": lambda logits: logits[:1],
    }
    for written, name in ((model.head.weight, "weight"), (hidden, "input")):
        stale = model.head(hidden)
        with torch.no_grad():
            written.mul_(2)
        for one in read.values():
            with pytest.raises(RuntimeError, match=f"{name} was written to since"):
                one(stale)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64], ids=str)
def test_numbers_of_any_dtype_are_added(dtype):
    model = language()
    ids, labels = torch.randint(0, VOCABULARY, (2, 3, 9)).unbind()
    added = (torch.arange(VOCABULARY) % 3).to(dtype)
    wanted = functional.cross_entropy((model(ids) + added).flatten(0, 1), labels.flatten())
    make_logits_lazy(model.head)
    found = functional.cross_entropy((model(ids) + added).flatten(0, 1), labels.flatten())
    assert found.dtype is wanted.dtype
    assert close(found, wanted)


def test_what_was_added_may_be_written_to():
    model = language()
    make_logits_lazy(model.head)
    ids, labels = torch.randint(0, VOCABULARY, (2, 3, 9)).unbind()
    added = torch.linspace(0, 5, VOCABULARY)
    logits = model(ids) + added
    wanted = functional.cross_entropy(logits.flatten(0, 1) + 0, labels.flatten())
    added.zero_()
    assert close(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), wanted)


@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone], ids=["parameters", "tensors"])
def test_logits_of_other_parameters_are_not_made_of_the_layer_s_own(kind):
    """As those of a functional call, or of a layer whose weight was replaced since."""
    model = language()
    make_logits_lazy(model.head)
    ids, labels = torch.randint(0, VOCABULARY, (2, 3, 9)).unbind()
    other = {name: kind(one.detach() * 2) for name, one in model.named_parameters()}

    def loss(ids):
        return functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    inside = torch.func.functional_call(Loss(model, loss), {f"model.{name}": one for name, one in other.items()}, ids)
    release_training(model.head)
    logits = torch.func.functional_call(model, other, ids)
    assert close(inside, functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    make_logits_lazy(model.head)
    stale = torch.func.functional_call(model, other, ids)
    with pytest.raises(RuntimeError, match="weight was written to since it was called, .* or replaced"):
        functional.cross_entropy(stale.flatten(0, 1), labels.flatten())


class Loss(nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids):
        return self.loss(ids)
