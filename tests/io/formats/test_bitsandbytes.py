"""bitsandbytes: what is read and written is exact, and what cannot be says why and names the tensor."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowmem import quantize
from lowmem.errors import FileError
from lowmem.io.formats.bitsandbytes import BLOCKS, PACKING, pack_exactly, packed_nf4_and_requantized_weight
from lowmem.io.formats.code_conversion import unpacked_codes
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.quant.scale_encodings import ENCODINGS
from tests import strategies
from tests.io.formats.written import as_read, opened, read_all, same_bits, sizes
from tests.rounding import default_dtype

SAMPLES = Path(__file__).parent / "samples"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def load(name="bitsandbytes-nf4-double"):
    return load_file(SAMPLES / f"{name}.safetensors")


def with_state(parts, **changes):
    state = {**json.loads(parts[STATE].numpy().tobytes()), **changes}
    return {**parts, STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}


def test_blocks_over_the_ends_of_rows_are_exact_in_their_common_divisor_or_refused(tmp_path):
    """16 rows of 64 in blocks of 64, read as other shapes: blocks lie otherwise, the values do not."""
    with opened(tmp_path, load()) as file:
        values = file.tensors["layer.weight"].read().dequantize().flatten()
    sizes = {(8, 128): 64, (32, 32): 32, (2, 16, 32): 32, (64, 16): 16, (128, 8): 8, (1024,): 64}
    for shape, size in sizes.items():
        with opened(tmp_path, with_state(load(), shape=shape)) as file:
            weight = file.tensors["layer.weight"].read()
            assert (tuple(weight.shape), weight.block_size) == (shape, size)
            assert torch.equal(weight.dequantize().flatten(), values)
    for shape in ([256, 4], [1024, 1]):
        with opened(tmp_path, with_state(load(), shape=shape)) as file:
            tensor = file.tensors["layer.weight"]
            assert "run over the ends of rows" in tensor.refusal
            assert torch.equal(tensor.values().flatten(), values)


def test_codes_may_be_stored_in_any_dtype(tmp_path):
    parts = load()
    stored = parts["layer.weight"].flatten().view(torch.bfloat16)[:, None]
    with (
        opened(tmp_path, {**parts, "layer.weight": stored.contiguous()}) as file,
        open_foreign_checkpoint(SAMPLES / "bitsandbytes-nf4-double.safetensors") as same,
    ):
        read, want = (one.tensors["layer.weight"].read() for one in (file, same))
        assert torch.equal(read.packed, want.packed)
        assert torch.equal(read.scales, want.scales)


def test_what_does_not_fit_is_refused_with_the_tensor(tmp_path):
    parts = load()
    absmax = parts["layer.weight.absmax"]
    cases = {
        "save before": {**parts, "layer.weight.absmax": absmax.bfloat16()},
        "lacks": {name: value for name, value in parts.items() if not name.endswith("nested_absmax")},
        "other levels": {**parts, "layer.weight.quant_map": parts["layer.weight.quant_map"].flip(0) * 0.5},
        "do not fit": with_state(parts, shape=[16, 66]),
        "get it again": with_state(parts, blocksize=0),
        "must be a number": with_state(parts, nested_offset="1"),
        "JSON": {**parts, STATE: torch.zeros(5, dtype=torch.uint8)},
        "in bytes": {**parts, STATE: torch.zeros(5, dtype=torch.int32)},
        "'nf3'": {name.replace("__nf4", "__nf3"): value for name, value in parts.items()},
        "256 of": {**parts, "layer.weight.nested_quant_map": torch.zeros(3)},
        "'layer.weight': it holds .* NaN": {**parts, "layer.weight.nested_absmax": torch.full((1,), torch.nan)},
    }
    for message, changed in cases.items():
        with pytest.raises(FileError, match=message), opened(tmp_path, changed) as file:
            file.tensors["layer.weight"].read()


def test_sizes_that_a_file_claims_allocate_nothing(tmp_path):
    """A block of 2^62 scales, or of as many weights, is read without repeating one that often; or refused."""
    path = tmp_path / "a.safetensors"
    for claim, message in (
        ({"nested_blocksize": 2**62}, None),
        ({"blocksize": 2**62}, "of torch.uint8 are needed"),
        ({"shape": [2**31, 2**31]}, "do not fit"),
        ({"shape": [2**64]}, "get it again"),
        ({"nested_offset": 1e300}, "too large for float32"),
    ):
        save_file(with_state(load(), **claim), path)
        error = read_all(path)
        assert error is None if message is None else message in error
    one_block = {**with_state(load("bitsandbytes-nf4"), blocksize=2**62), "layer.weight.absmax": torch.ones(1)}
    with opened(tmp_path, one_block) as file:
        assert float(file.tensors["layer.weight"].read().dequantize().abs().max()) == 1


def test_its_8_bits_are_refused_with_how_to_go_on(tmp_path):
    parts = {"layer.weight": torch.zeros(4, 8, dtype=torch.int8), "layer.SCB": torch.ones(4)}
    message = r"'layer.SCB' belongs to a format .*: take the folder that it was made from"
    with pytest.raises(FileError, match=message), opened(tmp_path, parts):
        pass


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
    packed = pack_exactly(stored, DTYPES[seed % 3])
    found = as_read(packed, tmp_path_factory.mktemp("packed") / "a.safetensors")
    assert found.format == name
    assert torch.equal(unpacked_codes(found), unpacked_codes(stored))
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
    with open_foreign_checkpoint(SAMPLES / f"bitsandbytes-{kind}.safetensors") as file, default_dtype(torch.bfloat16):
        packed = pack_exactly(file.tensors["layer.weight"].read(), torch.float32)
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
            pack_exactly(stored, torch.float32)


@given(strategies.few_rows, st.integers(1, 100), st.sampled_from(strategies.KINDS), strategies.seeds)
def test_quantizing_again_takes_any_shape_and_says_what_the_values_become(
    tmp_path_factory, rows, columns, kind, seed
):
    """Of rows that no block divides the blocks run over the flattened weight, as bitsandbytes' own do."""
    weight = strategies.make_weight(kind, (rows, columns), 0, seed)
    packed, after = packed_nf4_and_requantized_weight(weight, torch.float32)
    empty, _ = packed_nf4_and_requantized_weight(weight.to("meta"), torch.float32)
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
