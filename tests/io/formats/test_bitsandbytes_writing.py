"""Ours -> bitsandbytes -> ours gives the same values, and the same codes and scales; what is impossible says why."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowmem import quantize
from lowmem.io.formats.bitsandbytes import BLOCKS, PACKING, pack, pack_again
from lowmem.io.formats.codes import codes_of
from lowmem.io.formats.recognize import open_foreign
from lowmem.quant.scales import ENCODINGS
from tests import strategies
from tests.io.formats.layers import as_read, same_bits, sizes
from tests.rounding import default_dtype

SAMPLES = Path(__file__).parent / "samples"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(
    st.sampled_from(["nf4", "bnb_fp4"]),
    sizes(32),
    strategies.few_rows,
    st.sampled_from(sorted(ENCODINGS)),
    st.sampled_from(strategies.KINDS),
    strategies.seeds,
)
def test_a_round_trip_keeps_codes_scales_and_values(tmp_path_factory, name, size, rows, scales, kind, seed):
    columns, block = size
    stored = quantize(strategies.make_weight(kind, (rows, columns), 0, seed), name, block_size=block, scales=scales)
    packed = pack(stored, DTYPES[seed % 3])
    found = as_read(packed, tmp_path_factory.mktemp("packed") / "a.safetensors")
    assert found.format == name
    assert torch.equal(codes_of(found), codes_of(stored))
    assert same_bits(found.dequantize(), stored.dequantize())
    assert found.block_size in BLOCKS or found.block_size == columns
    if block == found.block_size:
        assert torch.equal(found.packed, stored.packed)
        assert torch.equal(found.encoding.decode(found.scales), stored.encoding.decode(stored.scales))
    (state,) = (part for part_name, part in packed.parts.items() if "quant_state" in part_name)
    state = json.loads(bytes(state.tolist()))
    assert state["dtype"] == str(DTYPES[seed % 3]).removeprefix("torch.")
    assert state["shape"] == [rows, columns]
    # The kernels of bitsandbytes for the CPU are wrong where blocks run over the ends of rows.
    assert columns % state["blocksize"] == 0
    assert state["blocksize"] in BLOCKS


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_is_written_with_the_same_bytes(tmp_path, kind):
    written = load_file(SAMPLES / f"bitsandbytes-{kind}.safetensors")
    with open_foreign(SAMPLES / f"bitsandbytes-{kind}.safetensors") as file, default_dtype(torch.bfloat16):
        packed = pack(file.tensors["layer.weight"].read(), torch.float32)
    assert written.keys() == {f"layer.{name}" for name in packed.parts}
    for name, part in packed.parts.items():
        if "quant_state" in name:
            assert json.loads(bytes(part.tolist())) == json.loads(bytes(written[f"layer.{name}"].tolist()))
        else:
            assert torch.equal(part, written[f"layer.{name}"]), name


def test_what_it_cannot_hold_says_why():
    weight = torch.randn(4, 96)
    for stored, why in (
        (quantize(weight, "bof4s"), "levels are those of bof4s"),
        (quantize(weight, "int4"), "levels are those of int4"),
        (quantize(weight, "nf4", block_size=16), "rows of 96 in blocks of 16 have no blocks of 32 to 4096"),
        (quantize(weight[:, :80], "nf4"), "rows of 80 in blocks of 64"),
        (quantize(weight, "nf4", scales="float32_offsets"), "its blocks have offsets"),
    ):
        with pytest.raises(ValueError, match=why):
            pack(stored, torch.float32)


@given(strategies.few_rows, st.integers(1, 100), st.sampled_from(strategies.KINDS), strategies.seeds)
def test_quantizing_again_takes_any_shape_and_says_what_the_values_become(
    tmp_path_factory, rows, columns, kind, seed
):
    """Of rows that no block divides the blocks run over the flattened weight, as bitsandbytes' own do."""
    weight = strategies.make_weight(kind, (rows, columns), 0, seed)
    packed, after = pack_again(weight, torch.float32)
    empty, _ = pack_again(weight.to("meta"), torch.float32)
    assert {name: (part.shape, part.dtype) for name, part in packed.parts.items()} == {
        name: (part.shape, part.dtype) for name, part in empty.parts.items()
    }
    values = after if isinstance(after, torch.Tensor) else after.dequantize()
    assert values.shape == weight.shape
    codes = torch.stack([packed.parts["weight"] >> 4, packed.parts["weight"] & 15], -1).flatten()
    size = 64 if columns % 64 == 0 or columns % 32 else 32
    scales = packed.parts["weight.absmax"].repeat_interleave(size)[: weight.numel()]
    levels = packed.parts["weight.quant_map"][codes.int()][: weight.numel()]
    assert same_bits((levels * scales).view(weight.shape), values.contiguous())
    assert packed.parts["weight"].shape == (math.ceil(weight.numel() / 2), 1)


def test_patterns_of_dense_layers_take_no_packed_one():
    """transformers takes a pattern for a name's beginning, up to a dot, and for its end."""
    config = PACKING.config(
        {"a.fc1": "nf4", "b.proj": "fp4", "c.d": "fp4"}, ["fc1", "a", "head", "x.y"], torch.float16
    )
    assert config["llm_int8_skip_modules"] == ["^fc1$", "^a$", "head", "x.y"]
    assert config["bnb_4bit_quant_type"] == "fp4"
    assert config["bnb_4bit_compute_dtype"] == "float16"
