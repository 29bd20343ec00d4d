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


def numbers(*values):
    return list(torch.tensor(values).half().view(torch.uint8))


def test_superblocks_of_two_and_three_bits_by_hand():
    """As the loops of ggml's dequantize_row_q2_K and dequantize_row_q3_K have it."""
    generator = torch.Generator().manual_seed(0)
    q2 = [*torch.randint(0, 256, (80,), generator=generator), *numbers(0.37, -0.021)]
    q3 = [*torch.randint(0, 256, (108,), generator=generator), *numbers(-0.37)]
    d, dmin = (float(torch.tensor(one).half()) for one in (0.37, -0.021))
    first, second = [], []
    for n in range(16):  # 16 weights each
        half, shift, side = n // 8, n % 8 // 2, n % 2
        scale = q3[96 + n % 8] >> 4 * (n // 8) & 15 | (q3[104 + n % 4] >> 2 * (n // 4) & 3) << 4
        for at in range(32 * half + 16 * side, 32 * half + 16 * side + 16):
            code = int(q2[16 + at] >> 2 * shift & 3)
            first.append(d * int(q2[n] & 15) * code - dmin * int(q2[n] >> 4))
            third = int(q3[at % 32] >> 4 * half + shift & 1)
            second.append(-d * (int(scale) - 32) * (int(q3[32 + at] >> 2 * shift & 3) + 4 * third - 4))
    for kind, raw, expected in ((10, q2, first), (11, q3, second)):
        raw = torch.tensor([int(byte) for byte in raw], dtype=torch.uint8)[None, None]
        assert raw.shape[-1] == BLOCKS[kind].nbytes
        found = BLOCKS[kind].dense(raw)[0, 0]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)
