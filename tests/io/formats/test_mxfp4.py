"""Experts of gpt-oss: their values by hand; parts that do not fit each other are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.errors import FileError
from lowmem.io.formats.mxfp4 import E2M1_CODES, exponents_and_exact_mask, fp4_scales_from_exponents
from lowmem.nn.forms import CodedForm
from lowmem.quant.formats import FORMATS
from tests.io.formats.written import opened

PARTS = load_file(Path(__file__).parent / "samples" / "gpt-oss.safetensors")
E2M1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
BLOCKS, SCALES = "experts.down_proj_blocks", "experts.down_proj_scales"


def test_parts_that_do_not_fit_are_refused(tmp_path):
    """Of parts that do, each value is that of its half of a byte, times 2 ** (exponent - 127)."""
    with opened(tmp_path, PARTS) as file:
        assert sorted(file.tensors) == ["experts.bias", "experts.down_proj"]
        found = file.tensors["experts.down_proj"]
        assert (found.name, found.shape, found.kind) == ("experts.down_proj", (2, 4, 64), "MXFP4")
        assert (found.nbytes, found.transposed, found.refusal) == (2 * 4 * 2 * 17, True, None)
        assert found.storage_form() == CodedForm("fp4", 32, "float32", "imported", transposed=True)
        values = found.read().dequantize()
    powers = [2.0 ** (exponent - 127) for exponent in PARTS[SCALES].flatten().tolist()]
    halves = [half for byte in PARTS[BLOCKS].flatten().tolist() for half in (byte & 15, byte >> 4)]
    expected = [(1 - half // 8 * 2) * E2M1[half % 8] * powers[at // 32] for at, half in enumerate(halves)]
    assert values.flatten().tolist() == expected
    with opened(tmp_path, {BLOCKS: PARTS[BLOCKS][1].clone(), SCALES: PARTS[SCALES][1].clone()}) as file:  # one matrix
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
        with pytest.raises(FileError, match=message), opened(tmp_path, {**PARTS, **changed}) as file:
            file.tensors["experts.down_proj"].read()


def test_blocks_without_scales_are_a_tensor_like_another(tmp_path):
    """So are blocks that are no bytes, and bytes of another name, whatever scales they have."""
    codes, scales = PARTS[BLOCKS], PARTS[SCALES].float()
    for parts in ({BLOCKS: codes}, {BLOCKS: codes.float(), SCALES: scales}, {"a": codes, "a_scales": scales}):
        with opened(tmp_path, parts) as file:
            assert file.kind == "safetensors"
            assert file.tensors.keys() == parts.keys()


def test_every_e2m1_number_times_every_exponent_is_exact_and_keeps_the_sign_of_zero():
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    values[8] = -0.0
    levels = torch.tensor(FORMATS["fp4"].levels)[list(E2M1_CODES)]
    exponents = torch.arange(253, dtype=torch.uint8)
    powers = torch.tensor([2.0 ** (e - 127) for e in range(253)], dtype=torch.float64)
    expected = (values.double() * powers[:, None]).float()
    found = levels * fp4_scales_from_exponents(exponents)[:, None]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    back, fits = exponents_and_exact_mask(fp4_scales_from_exponents(exponents))
    assert torch.equal(back, exponents.int())
    assert fits.all()
    others = torch.tensor([0.0, 5.0, -6.0, 2.0**-127])
    assert exponents_and_exact_mask(others)[1].tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="exponent of 253"):
        fp4_scales_from_exponents(torch.tensor([253], dtype=torch.uint8))
    assert fp4_scales_from_exponents(torch.empty(0, 3, dtype=torch.uint8)).shape == (0, 3)
