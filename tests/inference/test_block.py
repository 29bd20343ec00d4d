"""What a block's call says of itself; tests/integrations/transformers/test_blocks.py holds its values."""

from lowmem.inference.block import Block, Form
from lowmem.training.fused import GatedMLP


def test_a_block_says_what_it_computes():
    block = object.__new__(Block)
    served, parts = [True], ("gate", "up", "down", "SiLU")
    block.form = Form(None, None, GatedMLP(*parts), (None, None, "norm", None), *[None] * 7, served.pop)
    assert str(block) == "block in one call: attention, SiLU MLP, 1 norms, sums"
    served.append(False)
    assert str(block) == "as before: its attention or mask function is none of those that C stands in for"
