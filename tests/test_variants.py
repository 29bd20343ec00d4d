"""Every variant is its techniques over the same weights."""

import pytest
import torch

from lowmem import VARIANTS, FourBit, LoRA, LoRALinear, build, convert
from lowmem.variants import variant_description, variant_techniques


@pytest.mark.thorough
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_techniques_over_the_seeded_float_model(name):
    dense = build("bignet", seed=3)
    expected = convert(dense, *VARIANTS[name]) if VARIANTS[name] else dense
    x = torch.randn(1, 1024)
    with torch.no_grad():
        assert torch.equal(build(name, seed=3)(x), expected(x))


def test_the_caller_s_generator_is_left_alone_and_the_seed_decides():
    state = torch.random.get_rng_state()
    one = build("lora", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    two, other = build("lora", seed=1), build("lora", seed=2)
    assert torch.equal(one[0].layers[0].lora_a, two[0].layers[0].lora_a)
    assert not torch.equal(one[0].layers[0].lora_a, other[0].layers[0].lora_a)


EXACT = {
    "bignet": (18_903_040, 0, 75_612_160),
    "half_precision": (10_240, 18_892_800, 37_826_560),
    "lora": (1_179_648, 18_903_040, 42_545_152),
    "four_bit": (28_672, 10_063_872, 10_178_560),
    "qlora_4bit": (1_179_648, 10_092_544, 14_897_152),
    "eight_bit": (28_672, 19_206_144, 19_320_832),
    "qlora_8bit": (1_179_648, 19_234_816, 24_039_424),
    "low_precision": (28_672, 10_616_832, 11_911_168),
    "qlora": (1_179_648, 10_645_504, 16_629_760),
    "low_precision_nf4": (28_672, 9_768_960, 9_883_648),
    "qlora_nf4": (1_179_648, 9_797_632, 14_602_240),
}
"""By variant: parameters that train, others, and bytes. ``tests/tools/test_stats.py`` holds all of them."""


def test_variants_are_the_techniques_that_their_names_say():
    assert VARIANTS["four_bit"] == (FourBit(),)
    assert VARIANTS["qlora_4bit"] == (FourBit(), LoRA(rank=32))
    assert variant_description("bignet") == "dense, as the model is made"
    assert variant_description("qlora_4bit") == "4-bit weights (bof4s in blocks of 32), LoRA of rank 32"
    assert variant_description("lora") == "16-bit weights, LoRA of rank 32"
    assert variant_description("low_precision_nf4") == "4-bit weights (nf4 in blocks of 64)"
    assert VARIANTS["qlora"] == (FourBit("int4", block_size=16, scales="float16"), LoRA(rank=32))


def test_another_rank():
    assert variant_techniques("qlora", 4)[1] == LoRA(rank=4)
    model = build("lora", lambda: torch.nn.Linear(8, 8), rank=2)
    assert isinstance(model, LoRALinear)
    assert model.rank == 2


def test_wrong_names_and_ranks_list_the_choices():
    with pytest.raises(ValueError, match="variant='q4' is unknown: choose from bignet, half_precision"):
        build("q4")
    with pytest.raises(ValueError, match="rank=4 has no use for variant='low_precision'.*lora, qlora"):
        build("low_precision", rank=4)
    with pytest.raises(ValueError, match="rank=0 must be a positive integer"):
        build("lora", rank=0)
