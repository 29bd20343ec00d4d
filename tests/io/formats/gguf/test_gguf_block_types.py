"""Block types of GGUF. ``tox -e formats`` holds them against the package gguf, as the samples do here."""

import torch

from lowmem.io.formats.gguf.gguf_block_types import BLOCKS
from lowmem.quant.formats import get_format

# Of types that are not read: the weights of a block, and the bytes of its parts in ggml-common.h, in their order.
REFUSED = {
    9: ("Q8_1", 32, (4, 4, 32)),  # as the package gguf counts them: no file holds it
    15: ("Q8_K", 256, (4, 256, 32)),
    16: ("IQ2_XXS", 256, (2, 64)),
    17: ("IQ2_XS", 256, (2, 64, 8)),
    18: ("IQ3_XXS", 256, (2, 96)),
    19: ("IQ1_S", 256, (2, 32, 16)),
    21: ("IQ3_S", 256, (2, 64, 8, 32, 4)),
    22: ("IQ2_S", 256, (2, 64, 8, 8)),
    29: ("IQ1_M", 256, (32, 16, 8)),
    34: ("TQ1_0", 256, (48, 4, 2)),
    35: ("TQ2_0", 256, (64, 2)),
    40: ("NVFP4", 64, (4, 32)),
}


def test_each_type_is_read_or_says_why_not_and_has_the_bytes_that_its_parts_take():
    refused = {number: (one.name, one.size, one.nbytes) for number, one in BLOCKS.items() if one.refusal is not None}
    assert refused == {number: (name, size, sum(parts)) for number, (name, size, parts) in REFUSED.items()}
    for block in BLOCKS.values():
        raw = torch.randint(0, 200, (2, 3, block.nbytes), dtype=torch.uint8)
        if block.refusal is not None:
            assert block.refusal.startswith("its weights are not 16 levels times a scale; take the model's Q4_K_M")
            assert block.packed is None
            assert block.dense is None
        elif block.format is None:
            assert block.dense(raw).shape == (2, 3, block.size)
        else:
            assert block.packed(raw).shape == (2, 3, block.size * get_format(block.format).bits // 8)
            assert block.decoded_block_scales(raw).shape == (2, 3, block.size // 32)


def numbers(*values):
    return list(torch.tensor(values).half().view(torch.uint8))


def test_types_of_two_and_three_bits_by_hand():
    """As the loops of ggml's dequantize_row_q2_K and its sibling have it; samples/types.gguf has the other types."""
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
    for kind, values, expected in ((10, q2, first), (11, q3, second)):
        raw = torch.tensor([0, *map(int, values)], dtype=torch.uint8)[1:]  # at an odd address, as a file may have it
        found = BLOCKS[kind].dense(raw[None, None])[0, 0]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)
