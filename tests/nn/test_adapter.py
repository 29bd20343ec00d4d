"""An adapter's matrices have the shapes of the parameter that they change, and none takes bad options."""

import copy
import pickle
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem import FourBit, LoRA, adapter_layers, convert
from lowmem.nn.adapted_weight import adapted_weight
from lowmem.nn.adapter import Adapter, Layout, is_transformers_conv1d, parameter_layout
from tests.test_any_model import Experts, Transposed

KINDS = {
    "Linear": (lambda: nn.Linear(6, 4), "weight", "linear", (2, 6), (4, 2)),
    "Conv1D": (lambda: Transposed(6, 4), "weight", "transposed", (2, 6), (4, 2)),
    "Embedding": (lambda: nn.Embedding(6, 4), "weight", "transposed", (2, 6), (4, 2)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(6, 4), "weight", "transposed", (2, 6), (4, 2)),
    "Conv2d": (lambda: nn.Conv2d(6, 4, (3, 2), groups=2), "weight", "kernel", (2, 18), (4, 2)),
    "ConvTranspose": (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), "weight", "transposed kernel", (2, 18), (2, 2)),
    "experts": (Experts, "up", "linear", (4, 2, 16), (4, 48, 2)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", "linear", (2, 8), (24, 2)),
}


def test_shapes_are_those_of_the_parameter_whatever_stores_it():
    for kind, (make, name, how, of_a, of_b) in KINDS.items():
        for module in (make(), convert(make(), FourBit("nf4", 8))):
            layout = parameter_layout(module, name)
            assert layout == Layout(tuple(getattr(module, name).shape), how), kind
            adapter = Adapter(module, LoRA(2, alpha=4), name=name)
            assert (adapter.lora_a.shape, adapter.lora_b.shape) == (of_a, of_b), kind
            assert adapter.is_zero()
            assert not adapter.zero_initialized_matrix.any()
            assert adapter.zero_initialized_matrix is (adapter.lora_a if "Embedding" in kind else adapter.lora_b)
            nn.init.normal_(adapter.zero_initialized_matrix)
            assert not adapter.is_zero()
            assert adapter.delta().shape == getattr(module, name).shape
            torch.testing.assert_close(
                layout.to_matrices(adapter.delta()), 2 * adapter.lora_b.detach() @ adapter.lora_a
            )
            torch.testing.assert_close(
                layout.from_matrices(layout.to_matrices(adapter.delta()).contiguous()), adapter.delta()
            )
            total = adapted_weight(torch.zeros(adapter.layout.shape), [adapter.low_rank_update()])
            torch.testing.assert_close(total.dense_values(), adapter.delta())
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                wide = torch.promote_types(dtype, torch.float32)
                for technique, wanted in ((LoRA(2), wide), (LoRA(2, dtype=torch.bfloat16), torch.bfloat16)):
                    other = Adapter(module.to(dtype), technique, name=name)
                    assert other.lora_a.dtype is other.lora_b.dtype is wanted, kind
                    assert other.delta().dtype is torch.promote_types(wanted, torch.float32), kind


def test_a_stack_starts_as_its_matrices_would():
    """Of 2000 numbers, uniform to 1 / sqrt(16), the largest is within a hundredth of the bound."""
    adapter = Adapter(Experts(), LoRA(32), name="up")
    largest = float(adapter.lora_a.detach().abs().max())
    assert 0.99 / 4 < largest <= 1 / 4


def test_conv1d_is_known_by_its_name_and_by_that_of_its_bases():
    assert is_transformers_conv1d(Transposed(2, 2))
    assert is_transformers_conv1d(type("Other", (Transposed,), {})(2, 2))
    assert not is_transformers_conv1d(nn.Conv1d(2, 2, 2))


class Calls(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counted[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def test_experts_that_are_read_one_by_one_have_one_gradient_of_the_stack():
    torch.manual_seed(0)
    model = convert(nn.Sequential(Experts()), LoRA(2))
    adapters = adapter_layers(model, "default").values()
    for adapter in adapters:
        nn.init.normal_(adapter.lora_b)
    matrices = [one for adapter in adapters for one in (adapter.lora_a, adapter.lora_b)]
    x, weights = torch.randn(6, 16), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0], [3, 1]])

    def step(model):
        return model[0](x, chosen, weights).square().sum()

    def exact():
        twin = Experts()
        for name in ("up", "down"):
            weight = model[0]._parameters[name]
            adapter = model[0].adapters.adapters_by_parameter("default")[name]
            delattr(twin, name)
            setattr(twin, name, weight + adapter.scaling * (adapter.lora_b @ adapter.lora_a))
        return torch.autograd.grad(twin(x, chosen, weights).square().sum(), matrices)

    optimizer = torch.optim.SGD(matrices, lr=1e-3)
    for _ in range(2):  # the second step sees other values
        optimizer.zero_grad()
        out = step(model)
        with Calls() as calls:
            out.backward()
        assert calls.counted["select_backward"] == 0
        for one, wanted in zip(matrices, exact(), strict=True):
            torch.testing.assert_close(one.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        step(model).backward()  # without a step between: the gradients add up
        for one, wanted in zip(matrices, exact(), strict=True):
            torch.testing.assert_close(one.grad, 2 * wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        optimizer.step()
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(step(twin), step(model))
        assert torch.equal(step(pickle.loads(pickle.dumps(model))), step(model))
    matrices[0].data = matrices[0].data * 2
    with torch.no_grad():
        assert not torch.equal(step(twin), step(model))
