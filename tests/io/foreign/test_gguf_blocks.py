"""Block types of GGUF. ``tox -e formats`` holds them against the package gguf, as the samples do here."""

import torch

from lowmem.io.foreign.gguf_blocks import BLOCKS
from lowmem.quant.tensor import QuantizedTensor


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


def test_types_of_two_to_six_bits_by_hand():
    """As the loops of ggml's dequantize_row_q2_K and its siblings have it."""
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
    q4, q5, q6, xs = (
        [int(one) for one in torch.randint(0, 256, (n,), generator=generator)] for n in (140, 172, 208, 134)
    )
    small = [int(one) for one in torch.randint(0, 256, (20,), generator=generator)]
    fourth, fifth, sixth, nonlinear = [], [], [0.0] * 256, []
    for n in range(8):  # 32 weights each
        scale, least = q4[n] & 63, q4[n + 4] & 63
        if n >= 4:
            scale, least = q4[n + 4] & 15 | (q4[n - 4] >> 6) << 4, q4[n + 4] >> 4 | (q4[n] >> 6) << 4
        q5[:12] = q4[:12]
        ls = xs[2 + n // 2] >> 4 * (n % 2) & 15 | ((xs[0] | xs[1] << 8) >> 2 * n & 3) << 4
        for at in range(32):
            nibble = 4 * (n % 2)
            fourth.append(d * scale * (q4[12 + 32 * (n // 2) + at] >> nibble & 15) - dmin * least)
            high = (q5[12 + at] >> n & 1) << 4
            fifth.append(d * scale * (q5[44 + 32 * (n // 2) + at] >> nibble & 15 | high) - dmin * least)
            nonlinear.append(d * (ls - 32) * IQ4_NL[xs[6 + 16 * n + at % 16] >> 4 * (at // 16) & 15])
            half, quarter = n // 4, n % 4  # of 128 weights
            code = q6[64 * half + at + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
            code |= (q6[128 + 32 * half + at] >> 2 * quarter & 3) << 4
            signed = q6[192 + 8 * half + 2 * quarter + at // 16]
            sixth[32 * n + at] = d * (signed - 256 * (signed > 127)) * (code - 32)
    fives = [
        small[4 + at % 16] >> 4 * (at // 16) & 15 | (int.from_bytes(bytes(small[:4]), "little") >> at & 1) << 4
        for at in range(32)
    ]
    both, one = numbers(0.37, -0.021), numbers(0.37)
    for kind, raw, expected in (
        (10, q2, first),
        (11, q3, second),
        (12, [*both, *q4], fourth),
        (13, [*both, *q5], fifth),
        (14, [*q6, *one], sixth),
        (23, [*one, *xs], nonlinear),
        (6, [*one, *small], [d * (code - 16) for code in fives]),
        (7, [*both, *small], [d * code + dmin for code in fives]),
    ):
        block = BLOCKS[kind]
        raw = torch.tensor([int(byte) for byte in raw], dtype=torch.uint8)[None, None]
        assert raw.shape[-1] == block.nbytes
        found = block.dense(raw)[0, 0] if block.format is None else in_levels(block, raw)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


def in_levels(block, raw):
    """Return the weights of one block of 4-bit codes."""
    offsets = [] if block.offsets is None else [block.offsets(raw)]
    encoding = "float32_offsets" if offsets else "float32"
    scales = torch.cat([block.scales(raw), *offsets], dim=-1).flatten(1)
    shape = torch.Size((1, block.size))
    return QuantizedTensor(
        block.packed(raw).flatten(1), scales, shape, block.format, 32, encoding, "imported"
    ).dequantize()[0]
