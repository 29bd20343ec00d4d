"""Experts of gpt-oss: their values by hand; parts that do not fit each other are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.errors import FileError
from lowmem.io.formats.recognize import open_foreign
from lowmem.nn.stored import FourBitForm

PARTS = load_file(Path(__file__).parent / "samples" / "gpt-oss.safetensors")
BLOCKS, SCALES = "experts.down_proj_blocks", "experts.down_proj_scales"


def test_parts_that_do_not_fit_are_refused(tmp_path):
    """Of parts that do, each value is that of its half of a byte, times 2 ** (exponent - 127)."""
    path = tmp_path / "a.safetensors"
    save_file(PARTS, path)
    with open_foreign(path) as file:
        assert sorted(file.tensors) == ["experts.bias", "experts.down_proj"]
        found = file.tensors["experts.down_proj"]
        assert (found.name, found.shape, found.kind) == ("experts.down_proj", (2, 4, 64), "MXFP4")
        assert (found.nbytes, found.transposed, found.refusal) == (2 * 4 * 2 * 17, True, None)
        assert found.kept() == FourBitForm("fp4", 32, "float32", "imported", transposed=True)
        values = found.read().dequantize()
    e2m1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    powers = [2.0 ** (exponent - 127) for exponent in PARTS[SCALES].flatten().tolist()]
    halves = [half for byte in PARTS[BLOCKS].flatten().tolist() for half in (byte & 15, byte >> 4)]
    expected = [(1 - half // 8 * 2) * e2m1[half % 8] * powers[at // 32] for at, half in enumerate(halves)]
    assert values.flatten().tolist() == expected
    save_file({BLOCKS: PARTS[BLOCKS][1].clone(), SCALES: PARTS[SCALES][1].clone()}, path)
    with open_foreign(path) as file:  # one matrix
        assert file.tensors["experts.down_proj"].shape == (4, 64)
        assert torch.equal(file.tensors["experts.down_proj"].read().dequantize(), values[1])
    for message, changed in (
        ("do not fit", {BLOCKS: PARTS[BLOCKS][..., :8].contiguous()}),
        (r"scales.*do not fit", {SCALES: PARTS[SCALES][:1]}),
        ("do not fit", {SCALES: PARTS[SCALES][..., None].clone()}),
        ("do not fit", {BLOCKS: PARTS[BLOCKS][0, 0].clone(), SCALES: PARTS[SCALES][0, 0].clone()}),
        ("do not fit", {BLOCKS: PARTS[BLOCKS][:0], SCALES: PARTS[SCALES][:0]}),
        ("exponents are bytes", {SCALES: PARTS[SCALES].int()}),
        ("exponent of 255", {SCALES: torch.full_like(PARTS[SCALES], 255)}),
    ):
        save_file({**PARTS, **changed}, path)
        with pytest.raises(FileError, match=message), open_foreign(path) as file:
            file.tensors["experts.down_proj"].read()


def test_blocks_without_scales_are_a_tensor_like_another(tmp_path):
    """So are blocks that are no bytes, and bytes of another name, whatever scales they have."""
    codes, scales = PARTS[BLOCKS], PARTS[SCALES].float()
    for parts in ({BLOCKS: codes}, {BLOCKS: codes.float(), SCALES: scales}, {"a": codes, "a_scales": scales}):
        save_file(parts, tmp_path / "a.safetensors")
        with open_foreign(tmp_path / "a.safetensors") as file:
            assert file.kind == "safetensors"
            assert file.tensors.keys() == parts.keys()
