"""Q4_K and IQ4_XS: what the reader of GGUF makes of them is written back with the same codes, scales and offsets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.io.formats.gguf.blocks import BLOCKS, SUPERBLOCKS
from lowmem.io.formats.gguf.superblocks import superblock_rows
from lowmem.quant.tensor import QuantizedTensor
from tests import strategies

ENCODINGS = {"uint4": "float32_offsets", "iq4_nl": "float32"}


def read(format, raw):
    """Return the weight of raw blocks, uint8 (rows, blocks, bytes)."""
    block = BLOCKS[SUPERBLOCKS[format]]
    scales = block.scales(raw).flatten(1)
    parts = scales if block.offsets is None else torch.cat([scales, block.offsets(raw).flatten(1)], dim=-1)
    packed = block.packed(raw).flatten(1)
    shape = torch.Size((len(raw), 2 * packed.shape[1]))
    return QuantizedTensor(packed, parts, shape, format, 32, ENCODINGS[format], "imported")


def random_blocks(format, rows, blocks, seed, least=-30):
    """Return random bytes, whose float16 numbers are finite, of either sign, some zero or subnormal."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(
        0, 256, (rows, blocks, BLOCKS[SUPERBLOCKS[format]].nbytes), generator=generator, dtype=torch.uint8
    )
    for at in (0, 2) if format == "uint4" else (0,):
        sizes = torch.exp2(torch.randint(least, 8, (rows, blocks, 1), generator=generator).float())
        d = (torch.randn(rows, blocks, 1, generator=generator) * sizes).half()
        raw[..., at : at + 2] = d.view(torch.uint8)
    return raw


@given(st.sampled_from([*SUPERBLOCKS]), strategies.few_rows, st.integers(1, 3), st.integers(0, 2**31))
def test_codes_scales_and_offsets_come_back(format, rows, blocks, seed):
    weight = read(format, random_blocks(format, rows, blocks, seed))
    written = superblock_rows(weight)
    found = read(format, written.view(rows, blocks, -1))
    assert torch.equal(found.packed, weight.packed)
    assert torch.equal(found.scales, weight.scales)


def test_the_largest_factor_gives_the_bytes_of_llama_cpp():
    """Its quantizers give the largest scale of a superblock the factor 63, or -32."""
    for format in SUPERBLOCKS:
        raw = random_blocks(format, 4, 2, 0, least=-4)
        if format == "uint4":
            raw[..., 4], raw[..., 8] = raw[..., 4] | 63, raw[..., 8] | 63
        else:
            raw[..., 4], raw[..., 2] = raw[..., 4] & 0xF0, raw[..., 2] & 0xFC  # 0 - 32
        assert torch.equal(superblock_rows(read(format, raw)), raw.flatten(1))


def test_other_scales_are_no_superblocks():
    for format in SUPERBLOCKS:
        weight = read(format, random_blocks(format, 2, 2, 0))
        for column in (0, -1):
            changed = weight.scales.clone()
            changed[1, column] *= 1 + 2**-20
            other = QuantizedTensor(
                weight.packed, changed, weight.shape, format, 32, weight.scale_encoding, "imported"
            )
            assert superblock_rows(other) is None
    short = QuantizedTensor(
        torch.zeros(2, 64).byte(), torch.ones(2, 4), (2, 128), "iq4_nl", 32, "float32", "imported"
    )
    assert superblock_rows(short) is None
    other = QuantizedTensor(torch.zeros(2, 128).byte(), torch.ones(2, 8), (2, 256), "q4_0", 32, "float32", "imported")
    assert superblock_rows(other) is None
    plain = QuantizedTensor(
        torch.zeros(2, 128).byte(), torch.ones(2, 8), (2, 256), "uint4", 32, "float32", "imported"
    )
    assert superblock_rows(plain) is not None  # whose offsets are 0
