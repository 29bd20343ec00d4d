"""What a block's call says of itself; tests/integrations/transformers/test_block_recognition.py holds its values."""

from lowmem.inference.transformer_block import BlockSpec, NativeBlock
from lowmem.training.fused import GatedMLPSpec


def test_a_block_says_what_it_computes():
    block = object.__new__(NativeBlock)
    served, parts = [True], ("gate", "up", "down", "SiLU")
    block.spec = BlockSpec(None, None, GatedMLPSpec(*parts), (None, None, "norm", None), *[None] * 7, served.pop)
    assert str(block) == "block in one call: attention, SiLU MLP, 1 norms, sums"
    served.append(False)
    assert str(block) == "as before: its attention or mask function is none of those that C stands in for"
