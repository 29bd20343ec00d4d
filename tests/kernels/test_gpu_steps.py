"""What a training step on a GPU does, counted on the CPU: the numbers of ``tests/kernels/gpu_steps.json``."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowmem import FourBit, LoRA, convert
from lowmem.kernels import gpu, reference
from tests.gpu_steps import (
    PAGE,
    STEPS,
    STORED,
    TABLE,
    VERSION,
    RecordedStep,
    drawn,
    gpu_backend_on_cpu,
    record,
    record_step,
)

# Figures are of one minor version of torch, which decides how an operator decomposes
FIGURES = json.loads(STORED.read_text(encoding="utf8"))


@pytest.mark.parametrize("name", STEPS)
def test_steps_do_what_is_stored(name):
    if "Mixtral" in name and not hasattr(functional, "grouped_mm"):
        pytest.skip("torch has grouped_mm since 2.10")
    step = record_step(name)
    assert list(step.float32_products) == []
    assert list(step.misaligned) == []
    assert list(step.waits) == []
    if VERSION in FIGURES:
        expected = FIGURES[VERSION][name]
        changed = {key: (expected[key], number) for key, number in step.counts.items() if number != expected[key]}
        places = [step.float32_products, step.waits, step.launches, step.kernels]
        assert not changed, f"{name}: (stored, counted) {changed}, of {places}: python -m tests.gpu_steps stores it"


def test_the_table_is_that_of_the_stored_figures():
    """Of the newest version of torch that has some."""
    assert TABLE.search(PAGE.read_text(encoding="utf8"))[0] == drawn(FIGURES[max(FIGURES)])


def layer_step(rows: int = 64, **options) -> RecordedStep:
    layer = convert(nn.Linear(128, 256, bias=False).bfloat16(), FourBit("nf4", 64, search=False))
    x = torch.randn(rows, 128, dtype=torch.bfloat16, requires_grad=True)
    return record(lambda: layer(x).sum().backward())


def test_a_product_in_float32_is_found(monkeypatch):
    linear = gpu.GpuBackend.linear
    monkeypatch.setattr(
        gpu.GpuBackend, "linear", lambda self, x, weight, dtype, *rest: linear(self, x, weight, torch.float32, *rest)
    )
    (found,) = layer_step().float32_products
    assert found.startswith("mm of (64, 128) x (128, 256)")


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 16, 3, groups=2, bias=False), nn.ConvTranspose1d(16, 8, 3, groups=2, bias=False)], ids=str
)
def test_an_adapter_s_convolutions_in_bfloat16_differ_by_its_roundings(layer):
    """Of the input, both kernels and what is between them, each of 2^-9 at most; and of the output and gradients."""
    nn.init.zeros_(layer.weight)  # so that the update alone is compared
    model = convert(nn.Sequential(layer).bfloat16(), LoRA(4), where=lambda *_: True)
    adapted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapted:
        nn.init.normal_(parameter)
    x = torch.randn(2, layer.in_channels, *[12] * len(layer.kernel_size), dtype=torch.bfloat16, requires_grad=True)

    def results():
        out = model(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, *adapted])

    wanted = results()
    with gpu_backend_on_cpu():
        found = results()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        assert 0 < (one - other).float().norm() <= 6 * 2**-9 * other.float().norm()


@pytest.mark.parametrize("step", [3, 5])
def test_a_misaligned_chunk_is_found(step, monkeypatch):
    """Chunks of as many rows of the weight: the output begins at an odd address in one of them."""
    monkeypatch.setattr(
        reference,
        "row_slices_within_scratch",
        lambda rows, *_, **__: [slice(start, min(start + step, rows)) for start in range(0, rows, step)],
    )
    assert layer_step().misaligned


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.float().tolist(), "tolist"),
    ],
)
def test_a_value_that_is_read_is_found(read, name, monkeypatch):
    linear = gpu.GpuBackend.linear

    def reading(self, x, *rest):
        read(x)
        return linear(self, x, *rest)

    assert not layer_step().waits
    monkeypatch.setattr(gpu.GpuBackend, "linear", reading)
    assert any(text.startswith(name) for text in layer_step().waits)
