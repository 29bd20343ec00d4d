"""A budget is never exceeded, its total is that of the bytes, and more bits never lose more."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowmem
from lowmem import Budget, EightBit, FourBit, Half, LoRA, convert, measure, summary
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import CHOICES
from lowmem.transforms.bit_budget import (
    BudgetUnit,
    RowAndColumnImportance,
    budget_choices_with_reasons,
    bytes_per_choice,
    greedy_choice_index_per_unit,
    loss_per_choice,
    module_groups_sharing_weights,
)
from lowmem.transforms.module_registry import storage_technique_type_or_none
from tests.refusing import refused

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")

losses = st.lists(st.floats(0, 100), min_size=4, max_size=4).map(tuple)
sizes = st.lists(st.integers(1, 50), min_size=4, max_size=4).map(tuple)
units = st.lists(
    st.builds(BudgetUnit, st.text("ab", max_size=3), st.just(10), sizes, losses, st.just(100)), min_size=1
)


class Tied(nn.Module):
    """An embedding whose table is the output layer's, a convolution, an LSTM with several weights, and attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, 64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.seen = nn.LSTM(64, 32, batch_first=True)
        self.last = nn.Linear(32, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.table.weight
        with torch.no_grad():
            self.down.weight[:, ::16] *= 8

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        x = self.mix(x.mT).mT
        return self.head(self.last(self.seen(x)[0]))


def batches():
    return [torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def stored_bits(model):
    """Return the bits of the distinct stored tensors for each distinct weight."""
    parts, weights = {}, {}
    for module in model.modules():
        for name in module.forms if isinstance(module, StoredModule) else ():
            for part in module.forms[name].parts:
                own = module._parameters[f"{name}_{part}"]
                parts[id(own)] = own.nbytes
            weights[id(module._parameters[f"{name}_packed"])] = module.stored_tensor(name).numel()
    return 8 * sum(parts.values()) / sum(weights.values())


@given(units, st.floats(0, 50), st.floats(0, 50))
def test_an_allocation_fits_and_more_bits_never_lose_more(found, one, other):
    least = sum(min(unit.bytes) for unit in found)
    lost = []
    for bits in sorted((one, other)):
        if not least <= bits * (10 * len(found)) / 8 <= 100 * len(found):
            with pytest.raises(ValueError, match=r"is out of reach: these weights take \d"):
                greedy_choice_index_per_unit(found, bits)
            continue
        chosen = greedy_choice_index_per_unit(found, bits)
        assert chosen == greedy_choice_index_per_unit(found, bits)
        assert sum(unit.bytes[at] for unit, at in zip(found, chosen, strict=True)) <= bits * (10 * len(found)) / 8
        lost.append(math.fsum(unit.losses[at] for unit, at in zip(found, chosen, strict=True)))
    assert lost == sorted(lost, reverse=True) or math.isclose(*lost)


@given(units)
def test_with_room_for_all_each_unit_loses_least(found):
    assert greedy_choice_index_per_unit([], 4.4) == []
    chosen = greedy_choice_index_per_unit(found, 80)
    assert all(unit.losses[at] == min(unit.losses) for unit, at in zip(found, chosen, strict=True))


def test_where_a_step_ends_exactly_no_other_allocation_of_as_many_bytes_loses_less():
    """The hull's steps are optimal at the totals where they end: found here by trying all allocations."""
    generator = torch.Generator().manual_seed(1)
    found = [
        BudgetUnit(str(number), 64, (33, 34, 36, 65), tuple(float(x) * scale for x in (9.0, 7.5, 6.0, 0.1)), 256)
        for number, scale in enumerate(torch.rand(5, generator=generator).tolist())
    ]
    for bits in (4.4, 5.0, 6.0):
        chosen = greedy_choice_index_per_unit(found, bits)
        spent = sum(unit.bytes[at] for unit, at in zip(found, chosen, strict=True))
        lost = sum(unit.losses[at] for unit, at in zip(found, chosen, strict=True))
        best = min(
            sum(unit.losses[at] for unit, at in zip(found, tried, strict=True))
            for tried in itertools.product(range(4), repeat=5)
            if sum(unit.bytes[at] for unit, at in zip(found, tried, strict=True)) <= spent
        )
        assert lost == pytest.approx(best)
    unit = BudgetUnit("a", 2**20, (528 * 2**10, 544 * 2**10, 576 * 2**10, 1040 * 2**10), (8.0, 6.0, 4.0, 0.0), 2**22)
    told = {
        4.2: "blocks of 32 would save 25.00% of the loss for 16.0 KiB",
        4.3: "saves 25.00% of the loss for 16.0 KiB; blocks of 16 would save 25.00% of the loss for 32.0 KiB",
        4.6: "saves 50.00% of the loss for 48.0 KiB; 8 bits would save 50.00% of the loss for 464.0 KiB",
        8.2: "saves 100.00% of the loss for 512.0 KiB",
    }
    assert {bits: budget_choices_with_reasons([unit], Budget(bits))[0].why for bits in told} == told


def test_losses_are_those_of_what_is_stored():
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    important = RowAndColumnImportance(torch.rand(6).double(), torch.rand(100).double())
    for at, one in enumerate(CHOICES):
        stored = one.store(weight)
        error = (stored.dequantize() - weight).double().square()
        assert loss_per_choice(weight)[at] == pytest.approx(float(error.sum() / weight.double().square().mean()))
        weighted = (error * important.rows[:, None] * important.columns).sum()
        assert loss_per_choice(weight, important)[at] == pytest.approx(float(weighted))
        assert bytes_per_choice(weight)[at] == stored.nbytes == bytes_per_choice(weight.to("meta"))[at]
    assert loss_per_choice(torch.zeros(2, 8)) == (0.0,) * 4


def test_modules_that_share_a_weight_are_together():
    a, b, c, d = (nn.Identity() for _ in range(4))
    assert list(map(set, module_groups_sharing_weights({a: [1, 2], b: [3], c: [2, 3], d: [4]}))) == [{a, b, c}, {d}]


@pytest.mark.parametrize("inputs", [None, batches()], ids=["data-free", "samples"])
def test_a_model_takes_at_most_its_budget_and_says_what_each_layer_got(inputs, tmp_path):
    tokens = torch.arange(24).view(2, 12)
    lost = []
    for bits in (4.36, 4.4, 4.6, 6.0, 8.4):
        model = convert(Tied().eval(), Budget(bits, inputs))
        assert stored_bits(model) <= bits
        assert model.head.weight_packed is model.table.weight_packed
        assert type(model.head.forms["weight"]) is type(model.table.forms["weight"])
        again = convert(Tied().eval(), Budget(bits, inputs))
        for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
        rows = {row.path: row for row in summary(model)}
        assert all("of the loss for" in row.chosen_because or bits > 8 for row in rows.values())
        assert all("Chosen because" in str(one) for one in (summary(model), summary(model).grouped()))
        lowmem.save(model, tmp_path / "model.safetensors")
        loaded = lowmem.load(tmp_path / "model.safetensors", Tied).eval()
        assert torch.equal(loaded(tokens), model(tokens))
        assert "Chosen because" not in str(summary(loaded))
        kept = [row for row in rows.values() if row.shared_with is None]
        lost.append(math.fsum(row.weight_error**2 * row.weights for row in kept))
    assert {storage_technique_type_or_none(one) for one in model.modules() if isinstance(one, StoredModule)} == {
        EightBit
    }
    if inputs is None:
        assert lost == sorted(lost, reverse=True)
    planned = lowmem.plan(Tied, Budget(4.6), batch=tokens, training=None)
    assert planned.stored_bytes <= 4.6 / 8 * measure.weight_count(Tied()) + planned.stored["dense"]


def test_embeddings_that_a_budget_puts_in_8_bits_have_no_reason_of_four_bits(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))

    model = convert(make(), Budget(7.2))
    lowmem.save(model, tmp_path / "budget")
    for one in (model, lowmem.load(tmp_path / "budget", make)):
        assert [storage_technique_type_or_none(layer) for layer in one].count(EightBit) == 2
        assert storage_technique_type_or_none(one[0]) is EightBit
        assert [row.reason for row in summary(one)] == [None] * 3
    assert "8 bits, since it is an embedding" in summary(convert(make(), FourBit()))[0].reason


def test_layers_that_samples_find_to_matter_get_more_bits():
    """The second layer's output is what comes out; the first one's is multiplied by a thousandth."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.quiet, self.loud = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return 1e-3 * self.quiet(x) + self.loud(x)

    model = Two()
    converted = convert(copy.deepcopy(model), Budget(6.4, inputs=[torch.randn(8, 64)]))
    assert (storage_technique_type_or_none(converted.loud), storage_technique_type_or_none(converted.quiet)) == (
        EightBit,
        FourBit,
    )
    model.unseen = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="no batch of inputs= reached unseen, which get the least bits"):
        converted = convert(model, Budget(6.4, inputs=[torch.randn(8, 64)]))
    assert converted.unseen.forms["weight"].block_size == 64


def test_adapters_come_on_top():
    model = convert(Tied(), Budget(4.6), LoRA(4))
    assert isinstance(model.up, lowmem.LoRALinear)
    assert storage_technique_type_or_none(model.up) in (FourBit, EightBit)
    assert model.up.chosen_because
    loss = model(torch.arange(24).view(2, 12)).square().mean()
    loss.backward()
    assert model.up.adapters.default.weight.lora_b.grad is not None
    assert torch.equal(
        lowmem.restore(convert(Tied(), Budget(8.5)), dtype=None).up.weight,
        convert(Tied(), Budget(8.5)).up.weight.dequantize(),
    )


def test_what_is_out_of_reach_or_does_not_compose_leaves_the_model_as_it_was():
    model = Tied()
    cases = [
        (
            (Budget(4.05),),
            r"Budget\(bits=4.05\) is out of reach: these weights take 4\.\d+ bits at least, in blocks of "
            r"64, 8\.\d+ in 8 bits, and 32 dense",
        ),
        ((Budget(32.5),), "is out of reach"),
        ((Budget(4.5), FourBit()), "Budget stores the weights: name it alone, or before LoRA, not Budget"),
        ((Half(), Budget(4.5)), "name it alone"),
        ((LoRA(2), Budget(4.5)), "name it alone"),
        ((Budget(4.5), Budget(4.6)), "Budget was given 2 times"),
        ((Budget(4.5, inputs=[]),), "inputs is empty"),
    ]
    for techniques, message in cases:
        with refused(model, ValueError, message):
            convert(model, *techniques)
    with refused(model, ValueError, "bits a weight are out of reach"):
        convert(model, Budget(8.5), at_most=5)
    with refused(model, TypeError, "a batch is a str"):
        convert(model, Budget(4.5, inputs=["words"]))
    with torch.no_grad():
        model.up.weight[0, 0] = math.nan
    with refused(model, ValueError, "^up: weight holds"):
        convert(model, Budget(4.5))
    assert all(one.grad is None for one in model.parameters())
    assert convert(nn.Linear(64, 64).bfloat16(), Budget(16)).quantized.format == "int8"
