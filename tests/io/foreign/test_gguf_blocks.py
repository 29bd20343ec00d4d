"""Block types of GGUF. ``tox -e formats`` holds them against the package gguf, as the samples do here."""

import torch

from lowmem.io.foreign.gguf_blocks import BLOCKS


def test_each_type_is_read_or_says_why_not_and_has_the_bytes_that_its_parts_take():
    for block in BLOCKS.values():
        raw = torch.randint(0, 200, (2, 3, block.nbytes), dtype=torch.uint8)
        if block.refusal is not None:
            assert block.packed is None
            assert block.dense is None
        elif block.format is None:
            assert block.dense(raw).shape == (2, 3, block.size)
        else:
            assert block.packed(raw).shape == (2, 3, block.size // 2)
            assert block.scales(raw).shape == (2, 3, block.size // 32)


def test_q4_0_of_one_block_by_hand():
    """ggml: the weight j is d * ((qs[j] & 15) - 8), and j + 16 is d * ((qs[j] >> 4) - 8)."""
    raw = torch.cat([torch.tensor([-0.5]).half().view(torch.uint8), torch.arange(16, dtype=torch.uint8) * 17])
    block = BLOCKS[2]
    assert block.scales(raw[None, None]).tolist() == [[[-4.0]]]
    assert torch.equal(block.packed(raw[None, None])[0, 0], raw[2:])
