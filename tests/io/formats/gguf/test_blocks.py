"""Block types of GGUF. ``tox -e formats`` holds them against the package gguf, as the samples do here."""

import torch

from lowmem.io.formats.gguf.blocks import BLOCKS
from lowmem.quant.tensor import QuantizedTensor

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
            assert block.packed(raw).shape == (2, 3, block.size // 2)
            assert block.scales(raw).shape == (2, 3, block.size // 32)


def test_types_of_one_scale_by_hand():
    """ggml: the weight j has the code qs[j] & 15, and j + 16 has qs[j] >> 4. Numbers in 16 bits have no codes."""
    d, m = -0.5, 0.75
    half = [int(byte) for byte in torch.tensor([d, m]).half().view(torch.uint8)]
    codes = [(7 * j + j // 16) % 16 for j in range(32)]  # each twice
    packed = [low | high << 4 for low, high in zip(codes[:16], codes[16:], strict=True)]
    signed = [*range(-128, 0, 9), *range(1, 128, 8), 127]
    e2m1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for kind, raw, expected in (
        (0, torch.tensor([-1 / 3]).view(torch.uint8).tolist(), torch.tensor([-1 / 3]).tolist()),
        (1, half[:2], [d]),
        (30, [0x40, 0xC0], [-3.0]),  # bfloat16
        (2, [*half[:2], *packed], [d * (code - 8) for code in codes]),
        (3, [*half, *packed], [d * code + m for code in codes]),
        (20, [*half[:2], *packed], [d * IQ4_NL[code] for code in codes]),
        (39, [129, *packed], [4 * e2m1[code % 8] * (1 if code <= 8 else -1) for code in codes]),  # 2 ** (129 - 127)
        (8, [*half[:2], *(one % 256 for one in signed[:32])], [d * one for one in signed[:32]]),
    ):
        block, found = BLOCKS[kind], weights(kind, raw)
        assert len(raw) == block.nbytes, block.name
        assert found.tolist() == expected, block.name
        assert torch.equal(found.signbit(), torch.tensor(expected).signbit()), block.name
    assert BLOCKS[2].packed(torch.tensor([*half[:2], *packed], dtype=torch.uint8)).tolist() == packed


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
        assert len(raw) == BLOCKS[kind].nbytes
        torch.testing.assert_close(weights(kind, raw), torch.tensor(expected), rtol=1e-6, atol=1e-6)


IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


def weights(kind, values):
    """Return the weights of one block, of bytes that lie at an odd address, as those of a file may."""
    block, raw = BLOCKS[kind], torch.tensor([0, *map(int, values)], dtype=torch.uint8)[1:][None, None]
    if block.format is None:
        return block.dense(raw)[0, 0].float()
    offsets = [] if block.offsets is None else [block.offsets(raw)]
    encoding = "float32_offsets" if offsets else "float32"
    scales = torch.cat([block.scales(raw), *offsets], dim=-1).flatten(1)
    shape = torch.Size((1, block.size))
    return QuantizedTensor(
        block.packed(raw).flatten(1), scales, shape, block.format, 32, encoding, "imported"
    ).dequantize()[0]
