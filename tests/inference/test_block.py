"""What a block's call says of itself; tests/integrations/transformers/test_blocks.py holds its values."""

from lowmem.inference.block import Block, Form
from lowmem.training.fused import GatedMLP


def test_a_block_says_what_it_computes():
    block = object.__new__(Block)
    block.form = Form(None, None, GatedMLP("gate", "up", "down", "SiLU"), (None, None, "norm", None), *[None] * 6)
    assert str(block) == "block in one call: attention, SiLU MLP, 1 norms, sums"
