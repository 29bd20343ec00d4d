"""bitsandbytes: what cannot be exact is refused with the reason, and what does not fit names the tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.errors import FileError
from lowmem.io.formats.recognize import open_foreign
from tests.io.formats.written import read_all

SAMPLES = Path(__file__).parent / "samples"
STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def load(name="bitsandbytes-nf4-double"):
    return load_file(SAMPLES / f"{name}.safetensors")


def with_state(parts, **changes):
    state = {**json.loads(parts[STATE].numpy().tobytes()), **changes}
    return {**parts, STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}


def test_blocks_over_the_ends_of_rows_are_exact_in_their_common_divisor_or_refused(tmp_path):
    """16 rows of 64 in blocks of 64, read as other shapes: blocks lie otherwise, the values do not."""
    path = tmp_path / "a.safetensors"
    save_file(load(), path)
    with open_foreign(path) as file:
        values = file.tensors["layer.weight"].read().dequantize().flatten()
    for shape, size in (
        ([8, 128], 64),
        ([32, 32], 32),
        ([2, 16, 32], 32),
        ([64, 16], 16),
        ([128, 8], 8),
        ([1024], 64),
    ):
        save_file(with_state(load(), shape=shape), path)
        with open_foreign(path) as file:
            weight = file.tensors["layer.weight"].read()
            assert (list(weight.shape), weight.block_size) == (shape, size)
            assert torch.equal(weight.dequantize().flatten(), values)
    for shape in ([256, 4], [1024, 1]):
        save_file(with_state(load(), shape=shape), path)
        with open_foreign(path) as file:
            tensor = file.tensors["layer.weight"]
            assert "run over the ends of rows" in tensor.refusal
            assert torch.equal(tensor.values().flatten(), values)


def test_codes_may_be_stored_in_any_dtype(tmp_path):
    parts = load()
    stored = parts["layer.weight"].flatten().view(torch.bfloat16)[:, None]
    save_file({**parts, "layer.weight": stored.contiguous()}, tmp_path / "a.safetensors")
    with (
        open_foreign(tmp_path / "a.safetensors") as file,
        open_foreign(SAMPLES / "bitsandbytes-nf4-double.safetensors") as same,
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
        "NaN": {**parts, "layer.weight.nested_absmax": torch.full((1,), torch.nan)},
    }
    for message, changed in cases.items():
        save_file(changed, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match=message), open_foreign(tmp_path / "a.safetensors") as file:
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
    save_file(one_block, path)
    with open_foreign(path) as file:
        assert float(file.tensors["layer.weight"].read().dequantize().abs().max()) == 1


def test_its_8_bits_are_refused_with_how_to_go_on(tmp_path):
    parts = {"layer.weight": torch.zeros(4, 8, dtype=torch.int8), "layer.SCB": torch.ones(4)}
    save_file(parts, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"'layer.SCB' belongs to a format .*: take the folder that it was made from"):
        open_foreign(tmp_path / "a.safetensors")
