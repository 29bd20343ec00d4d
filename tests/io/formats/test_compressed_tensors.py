"""compressed-tensors: other bits, groups and zero points are refused, and parts that do not fit."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.errors import FileError
from tests.io.formats.test_recognize import values_of
from tests.io.formats.written import opened, words

SAMPLES = Path(__file__).parent / "samples"
INT4, MXFP4 = (load_file(SAMPLES / f"compressed-tensors-{kind}.safetensors") for kind in ("int4", "mxfp4"))
SHAPE, SCALE, PACKED, ZEROS, G_IDX = (
    f"layer.weight_{part}" for part in ("shape", "scale", "packed", "zero_point", "g_idx")
)


@contextmanager
def layer(folder, parts, config=None):
    """Write a folder, and open its only weight."""
    with opened(folder, parts, config and {"quant_method": "compressed-tensors", **config}) as file:
        (tensor,) = file.tensors.values()
        assert tensor.name == "layer.weight"
        yield tensor


def refused(folder, message, parts, config=None):
    with pytest.raises(FileError, match=message), layer(folder, parts, config):
        pass


def scheme(**weights):
    return {"config_groups": {"group_0": {"weights": weights}}}


def test_rows_of_any_length_and_a_scale_for_each_row(tmp_path):
    """compressed-tensors pads a row to whole words."""
    for columns, groups in ((44, 1), (64, 1), (64, 4)):
        codes, scales = torch.randint(0, 16, (3, columns)), torch.randn(3, groups)
        padded = torch.nn.functional.pad(codes, (0, -columns % 8))
        with layer(tmp_path, {PACKED: words(padded), SCALE: scales, SHAPE: torch.tensor([3, columns])}) as tensor:
            expected = (codes - 8).float() * scales.repeat_interleave(columns // groups, 1)
            assert torch.equal(tensor.read().dequantize(), expected)


def test_what_is_not_exact_is_refused(tmp_path):
    uneven = torch.tensor([0] * 31 + [1] * 33).int().flip(0)
    one_scale = {PACKED: torch.zeros(4, 2, dtype=torch.int32), SHAPE: torch.tensor([4, 8]), SCALE: torch.ones(1)}
    for message, changed in (
        ("8 bits", {**INT4, PACKED: INT4[PACKED].repeat(1, 2)}),
        ("do not have 32 columns", {**INT4, G_IDX: uneven}),
        ("do not have 32 columns each", {**INT4, G_IDX: uneven.flip(0)}),
        ("8-bit floats", {**MXFP4, SCALE: MXFP4[SCALE].float().to(torch.float8_e4m3fn)}),
        ("no blocks", {**INT4, SCALE: torch.ones(16, 16)}),
        ("it has one scale for the tensor", one_scale),
    ):
        with layer(tmp_path, changed) as tensor:
            assert message in tensor.refusal


def test_zero_points_are_offsets_and_exact_for_scales_of_16_bits(tmp_path):
    zeros = torch.randint(0, 16, (16, 2))
    packed = words(zeros.T.contiguous()).T.contiguous()
    codes = INT4[PACKED].view(torch.uint8)
    codes = torch.stack([codes & 15, codes >> 4], -1).view(16, 64)
    less = codes.int() - zeros.repeat_interleave(32, 1)
    for scales in (INT4[SCALE].half(), INT4[SCALE].bfloat16(), INT4[SCALE]):
        expected = less.float() * scales.float().repeat_interleave(32, 1)
        with layer(tmp_path, {**INT4, SCALE: scales, ZEROS: packed}) as tensor:
            if scales.dtype == torch.float32:
                assert "more bits than float32" in tensor.refusal
                assert torch.equal(tensor.values(), expected)
            else:
                assert tensor.read().format == "uint4"
                assert torch.equal(tensor.read().dequantize(), expected)
    stacked = {name: part[None].repeat(3, *[1] * part.dim()) for name, part in INT4.items()}  # experts
    stacked |= {SHAPE: torch.tensor([3, 16, 64]), SCALE: stacked[SCALE].half(), ZEROS: packed[None].repeat(3, 1, 1)}
    expected = less.float() * INT4[SCALE].half().float().repeat_interleave(32, 1)
    with layer(tmp_path, stacked) as tensor:
        assert torch.equal(tensor.read().dequantize(), expected.expand(3, -1, -1))
    refused(tmp_path, "do not fit", {**INT4, ZEROS: packed[:1].contiguous()})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_8_bits_are_refused_by_name_and_have_values(tmp_path, groups, zeros, form):
    codes = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    scales, points = torch.rand(16, groups), torch.randint(-128, 128, (16, groups), dtype=torch.int8)
    expected = codes.int() - (points.int() if zeros else 0 * points.int()).repeat_interleave(64 // groups, 1)
    expected = expected.float() * scales.repeat_interleave(64 // groups, 1)

    def four(numbers):  # in a word
        return (numbers.int() + 128).to(torch.uint8).clone(memory_format=torch.contiguous_format).view(torch.int32)

    if form == "int-quantized":
        parts = {"layer.weight": codes, ZEROS: points}
    else:
        parts = {PACKED: four(codes), SHAPE: torch.tensor([16, 64]), ZEROS: four(points.T).T.contiguous()}
    if not zeros:
        del parts[ZEROS]
    parts[SCALE] = scales
    refused(tmp_path, "says num_bits=4, and its tensors have 8", parts, {"format": form, **scheme(num_bits=4)})
    with layer(tmp_path, parts, {"format": form, **scheme(num_bits=8)}) as tensor:
        assert (tensor.kind, tensor.shape) == ("compressed-tensors int8", (16, 64))
        assert "it has 8 bits a weight, and 4 are kept" in tensor.refusal
        assert torch.equal(tensor.values(), expected)


def test_a_scale_for_the_whole_tensor_of_8_bits(tmp_path):
    weight = torch.randint(-128, 128, (4, 8), dtype=torch.int8)
    for shape in ((1,), (1, 1)):
        with layer(tmp_path, {"layer.weight": weight, SCALE: torch.full(shape, 0.5)}) as tensor:
            assert torch.equal(tensor.values(), weight / 2)
    for scale in (torch.ones(3, 1), torch.ones(4, 3), torch.ones(4, 1).int(), torch.ones(()), torch.ones(4, 0)):
        refused(tmp_path, "do not fit", {"layer.weight": weight, SCALE: scale})


def test_parts_that_do_not_fit_are_refused(tmp_path):
    for changed in (
        {**INT4, SHAPE: torch.tensor([16, 2**40])},
        {**INT4, SHAPE: torch.tensor([15, 64])},
        {**INT4, SHAPE: torch.tensor([64])},
        {**INT4, SCALE: torch.ones(15, 2)},
        {**INT4, SCALE: torch.ones(16, 3)},
        {**INT4, SCALE: torch.ones(16)},
        {**INT4, PACKED: INT4[PACKED].float()},
        {**MXFP4, SCALE: MXFP4[SCALE][:, :1].contiguous()},
        {PACKED: INT4[PACKED]},
    ):
        refused(tmp_path, "do not fit|lacks|says its shape", changed)


def test_groups_in_the_order_of_activations_are_read_side_by_side(tmp_path):
    groups = (torch.randperm(64) // 32).int()
    with layer(tmp_path, INT4) as tensor:
        codes = tensor.read().dequantize() / INT4[SCALE].float().repeat_interleave(32, -1)
    with layer(tmp_path, {**INT4, G_IDX: groups}) as tensor:
        torch.testing.assert_close(values_of(tensor), codes * INT4[SCALE].float()[:, groups.long()])


def test_8_bit_floats_are_refused_by_name(tmp_path):
    weight, scale = torch.ones(16, 64).to(torch.float8_e4m3fn), torch.ones(16, 1)
    channel = {"format": "float-quantized", **scheme(num_bits=8, type="float", strategy="channel")}
    with layer(tmp_path, {"layer.weight": weight, SCALE: scale}, channel) as tensor:
        assert (tensor.kind, tensor.shape, tensor.values) == ("FP8", (16, 64), None)
        with pytest.raises(FileError, match="'layer.weight' in FP8 cannot be kept exactly: it has 8 bits a weight"):
            tensor.read()
    message = "says format='float-quantized', and its tensors are in compressed-tensors"
    refused(tmp_path, message, INT4, {"format": "float-quantized"})
    message = "'layer.weight_scale_inv' belongs to a format that lowmem does not read"
    refused(tmp_path, message, {"layer.weight": weight, f"{SCALE}_inv": scale})


def test_a_scheme_that_8_bit_integers_and_mxfp4_do_not_have_is_refused(tmp_path):
    plain = {"layer.weight": torch.ones(16, 64, dtype=torch.int8)}
    whole, rows = {**plain, SCALE: torch.ones(1)}, {**plain, SCALE: torch.ones(16, 1)}
    for parts, fields, wrong in (
        (rows, {"num_bits": 8, "strategy": "channel"}, None),
        (rows, {"num_bits": 8, "strategy": "channel", "group_size": 32}, "group_size=32"),
        (rows, {"num_bits": 8, "strategy": "tensor"}, "strategy='tensor'"),
        (whole, {"num_bits": 8, "strategy": "tensor"}, None),
        (whole, {"num_bits": 8, "strategy": "channel"}, "strategy='channel'"),
        (MXFP4, {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, None),
        (MXFP4, {"num_bits": 4, "type": "int"}, "type='int'"),
        (MXFP4, {"num_bits": 4, "type": "float", "group_size": 16}, "group_size=16"),
    ):
        if wrong is not None:
            refused(tmp_path, f"config.json says {wrong}, and ", parts, scheme(**fields))
        else:
            with layer(tmp_path, parts, scheme(**fields)):
                pass
