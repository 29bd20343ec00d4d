"""Weights in 8 bits: layers that answer as those in 4 bits do, in files and with adapters, within half a step."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowmem
from lowmem import EightBit, FourBit, LoRA, convert, load, merge, restore, save, summary
from lowmem.nn.conv import Conv4Bit
from lowmem.nn.embedding import Embedding8Bit
from lowmem.nn.linear import Linear8Bit
from lowmem.quant.formats import EIGHT_BIT
from lowmem.report.footprint import stored_by_kind
from tests.rounding import assert_product, assert_sum


class Mixed(nn.Module):
    """An embedding, both convolutions, a recurrent layer, a tied output layer, and a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.mix = nn.Conv1d(24, 24, 3, padding=1)
        self.plane = nn.Conv2d(1, 2, 3, padding=1)
        self.memory = nn.GRU(24, 24, batch_first=True)
        self.up = nn.Linear(24, 70)
        self.down = nn.Linear(70, 24, bias=False)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(indices).transpose(1, 2))
        x = self.plane(x[:, None]).mean(1).transpose(1, 2)
        return self.head(self.memory(x + self.down(self.up(x).relu()))[0])


INDICES = torch.arange(12).view(2, 6)
LAYERS = {"embed": Embedding8Bit, "mix": Conv4Bit, "plane": Conv4Bit, "up": Linear8Bit, "down": Linear8Bit}


def made(*techniques: object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return convert(Mixed(), *techniques)


def test_every_layer_is_stored_in_8_bits_and_computes_with_what_it_stores():
    model = made(EightBit())
    assert all(isinstance(getattr(model, name), kind) for name, kind in LAYERS.items())
    assert {getattr(model, name).stored_bits for name in LAYERS} == {8}
    assert type(model.memory).__name__ == "GRU"
    assert isinstance(model.memory, nn.GRU)
    assert model.head.weight is model.embed.weight
    out, twin = model(INDICES), restore(copy.deepcopy(model)).double()
    assert type(twin.up) is nn.Linear
    torch.testing.assert_close(out.double(), twin(INDICES), rtol=1e-4, atol=1e-5)


def test_bits_are_eight_and_those_of_the_scales():
    assert len({EightBit(), EightBit(), EightBit(32)}) == 2  # a technique is a value, which a set holds
    weight = EightBit().store(torch.randn(16, 256))
    assert weight.nbytes == 16 * (256 + 4 + 2)  # codes, a byte for each block of 64, a float16 for each row
    assert EightBit(32, "float32").store(torch.randn(16, 256)).nbytes == 16 * (256 + 8 * 4)
    rows = {row.path: row for row in summary(made(EightBit()))}
    assert "int8, block_size=64, scales=double" in str(summary(made(EightBit())))
    assert rows["up"].bits_per_weight < 10


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_forward_and_gradient_are_the_products_with_the_stored_weight(format):
    torch.manual_seed(2)
    for columns, block, batch in ((70, 64, 1), (300, 16, 3), (129, 24, 2), (256, 128, 20)):
        layer = convert(nn.Linear(columns, 33), EightBit(block, format=format))
        weight = layer.quantized.restore(slice(None)).double()  # by plain torch
        x = torch.randn(batch, columns, requires_grad=True)
        out = layer(x)
        out.backward(grad := torch.randn(batch, 33))
        left = torch.cat([x.detach().double(), torch.ones(batch, 1)], 1)
        right = torch.cat([weight, layer.bias.detach().double()[:, None]], 1)
        # the scale of a block is multiplied with the sum of its products, and with 1/127: two roundings more
        assert_sum(out, left @ right.t(), left.abs() @ right.abs().t(), columns + 3)
        assert_sum(x.grad, grad.double() @ weight, grad.double().abs() @ weight.abs(), 33 + 3)


def test_products_in_8_bits_are_those_of_rounded_inputs_with_the_integers_that_are_stored():
    """In plain torch: C has no product of 8 times 8 bits, and every backend says the same."""
    torch.manual_seed(4)
    layer = convert(nn.Linear(300, 33), EightBit(compute_dtype=torch.int8))
    x = torch.randn(5, 300)
    rounded = lowmem.kernels.int8.round_inputs(x, 64).double()
    left = torch.cat([rounded, torch.ones(5, 1)], 1)
    right = torch.cat([layer.quantized.restore(slice(None)).double(), layer.bias.detach().double()[:, None]], 1)
    for kernel in lowmem.kernels.available():
        with lowmem.kernels.using(kernel):
            assert_sum(layer(x), left @ right.t(), left.abs() @ right.abs().t(), 300 + 5)


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_every_code_has_its_level_also_code_0(format):
    """No quantizer of lowmem writes it; a file may hold it."""
    stored = EightBit(16, "float32", format=format).store(torch.randn(8, 64))
    stored.packed.data[:] = torch.arange(512).view(8, 64) % 256
    levels = (torch.arange(512).view(8, 64) % 256 - 128) / (127 if format == "int8" else 1)
    expected = levels * stored.scales.repeat_interleave(16, -1)
    x = torch.randn(2, 64)
    for kernel in lowmem.kernels.available():
        with lowmem.kernels.using(kernel):
            assert torch.equal(stored.dequantize(), expected)
            assert_product(lowmem.kernels.linear(x, stored, torch.float32), x, expected, more=5)


def test_files_states_and_pickles_keep_it_to_the_bit(tmp_path):
    for techniques in ((EightBit(),), (EightBit(32, "float16"), LoRA(4)), (EightBit(format="q8_0"),)):
        model = made(*techniques)
        save(model, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", Mixed)
        other = made(*techniques, seed=1)
        other.load_state_dict(model.state_dict())
        for again in (loaded, other, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            kinds = [[type(one).__name__ for one in each.modules()] for each in (again, model)]
            assert kinds[0] == kinds[1]
            assert torch.equal(again(INDICES), model(INDICES))


def test_codes_of_another_format_are_refused():
    four, eight = made(FourBit("nf4", 64, "double")), made(EightBit())
    integers = made(EightBit(64, "double", format="q8_0"))
    for one, other in ((four, eight), (eight, four), (integers, eight)):
        with pytest.raises(RuntimeError, match=r"int8|nf4|shape"):
            one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="stored in int8"):
        convert(eight, FourBit())


def test_adapters_train_and_merge_into_8_bits():
    model = made(EightBit(format="q8_0"), LoRA(4))
    model(INDICES).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "lora" in name)
    before = model(INDICES).detach()
    with pytest.warns(UserWarning, match="adapted weights to 8 bits again"):
        added = merge(made(EightBit(), LoRA(4, init="loftq")))
    assert type(added.up) is Linear8Bit
    merged = merge(model)
    assert type(merged.up) is Linear8Bit
    assert torch.equal(merged(INDICES), before)  # lora_b is zero


def test_messages_and_reports_say_how_many_bits():
    model = convert(nn.Sequential(nn.Linear(16, 8)), EightBit())
    state = {name: part for name, part in model.state_dict().items() if not name.endswith("_extra_state")}
    with pytest.warns(UserWarning, match="how its 8-bit codes are stored: they are taken for int8"):
        model.load_state_dict(state)
    assert stored_by_kind(model)["8-bit codes"] == 8 * 16
    assert stored_by_kind(model)["4-bit codes"] == 0
