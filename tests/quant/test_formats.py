"""Formats are data that hold their own promises."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem import FORMATS, quantize
from lowmem.quant.formats import EIGHT_BIT, IMPORTED, Format, get_format
from lowmem.quant.packing import CODE_WIDTHS, check_block_size
from lowmem.quant.scale_encodings import ENCODINGS
from lowmem.quant.scale_search import least_error_scales, nearest_codes

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@every_format
def test_defaults_are_valid_and_the_key_is_the_name(form):
    check_block_size(form.block_size)
    assert form.scales in ENCODINGS
    assert FORMATS[form.name] is form
    assert form.levels[form.zero_code] == min(form.levels, key=abs)


@every_format
def test_boundaries_choose_the_nearest_level(form):
    values = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    levels = torch.tensor(form.levels, dtype=torch.float64)
    codes = torch.bucketize(values, torch.tensor(form.boundaries, dtype=torch.float64))
    nearest = (values[:, None] - levels).abs().amin(-1)
    torch.testing.assert_close((values - levels[codes]).abs(), nearest, rtol=0, atol=1e-15)


@every_format
def test_half_gap_is_reached_and_never_exceeded_between_the_ends(form):
    values = torch.linspace(form.levels[0], form.levels[-1], 40001, dtype=torch.float64)
    nearest = (values[:, None] - torch.tensor(form.levels, dtype=torch.float64)).abs().amin(-1)
    assert 0.999 * form.half_gap < float(nearest.max()) <= form.half_gap * (1 + 1e-12)


@every_format
def test_the_largest_weight_has_a_level_of_its_own(form):
    """A signed scale brings it to the upper end; a scale without a sign brings it to either end."""
    assert form.levels[-1] == 1
    assert form.end == (1 if not form.signed else -form.levels[0])


def test_the_numbers_of_each_format():
    assert FORMATS["int4"].levels[0] == -1
    assert FORMATS["int4"].levels[8] == pytest.approx(1 / 15)
    assert FORMATS["nf4"].levels[7] == 0
    assert FORMATS["nf4"].levels[13] == 0.5626170039176941
    assert [6 * level for level in FORMATS["fp4"].levels[8:]] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FORMATS["int4"].levels[FORMATS["int4"].zero_code] == -1 / 15
    assert {FORMATS[name].levels[FORMATS[name].zero_code] for name in ("nf4", "fp4", "bof4s")} == {0}
    defaults = {"int4": (16, "float16"), "nf4": (64, "double"), "fp4": (32, "float16"), "bof4s": (64, "double")}
    defaults |= {"q4_0": (32, "float16"), "iq4_nl": (32, "float16"), "uint4": (32, "float16_offsets")}
    defaults |= {"bnb_fp4": (64, "float32"), "int8": (64, "double"), "q8_0": (32, "float16")}
    assert get_format("int8").levels == tuple((code - 128) / 127 for code in range(256))
    assert get_format("q8_0").levels == tuple(range(-128, 128))
    for name, (block_size, scales) in defaults.items():
        assert (get_format(name).block_size, get_format(name).scales) == (block_size, scales)
        assert get_format(name).signed == get_format(name).search == (name in ("bof4s", "q4_0", "iq4_nl"))


def test_bof4s_is_what_normal_weights_ask_for():
    """Each level but the zero and the one is the mean of what falls to it, weighted by the scale squared."""
    form = FORMATS["bof4s"]
    weight = torch.randn(2**15, form.block_size, generator=torch.Generator().manual_seed(0))
    scales = least_error_scales(weight, form, form.block_size, 1e30)  # (rows, 1)
    codes = nearest_codes(weight, scales, form, form.block_size).int().flatten()
    count = scales.square().expand_as(weight).flatten()
    sums = torch.zeros(16).index_add_(0, codes, (weight / scales).flatten() * count)
    means = sums / torch.zeros(16).index_add_(0, codes, count)
    torch.testing.assert_close(means / means[15], torch.tensor(form.levels), rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    "levels", [(0.0,) * 15, tuple(reversed(FORMATS["nf4"].levels)), (*FORMATS["nf4"].levels[:15], 1.5)]
)
def test_wrong_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels="):
        Format("bad", levels, 16, "float16", "test")


def test_levels_that_do_not_reach_the_ends_are_refused_but_for_those_of_ggml():
    short_below, short_above = (-0.7, *FORMATS["nf4"].levels[1:]), (*FORMATS["nf4"].levels[:15], 0.9)
    for levels, signed in ((short_below, False), (short_above, False), (short_above, True)):
        with pytest.raises(ValueError, match=r"levels=.* must end at 1, and begin at -1 unless signed=True: divide"):
            Format("bad", levels, 16, "float16", "test", signed)
    assert Format("good", short_below, 16, "float16", "test", signed=True).end == 0.7
    assert Format("good", short_above, 16, "float16", "test", ggml_divisor=8.0).end == 0.9


def test_bits_follow_from_the_number_of_levels():
    for form in (*FORMATS.values(), *IMPORTED.values(), *EIGHT_BIT.values()):
        assert len(form.levels) == 2**form.bits
        assert form.width is CODE_WIDTHS[form.bits]
        assert form.width.is_centered == (form.name in EIGHT_BIT)
    with pytest.raises(ValueError, match="must be 16 or 256 ascending numbers"):
        Format("bad", tuple(code / 8 for code in range(8)), 32, "float16", "test")


def test_what_differs_between_widths_is_asked_of_their_objects_alone():
    """A comparison of bits with a number would be one more place that a new width has to change."""
    folder = Path(lowmem.__file__).parent
    asked = [
        f"{path.relative_to(folder)}: {line.strip()}"
        for path in sorted(folder.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bbits\s*(==|!=)\s*\d", line)
    ]
    assert asked == []


@pytest.mark.parametrize("name", ["int3", "", None, ["nf4"]])
def test_an_unknown_format_lists_the_choices(name):
    with pytest.raises(ValueError, match="int4, nf4, fp4"):
        get_format(name)


def test_formats_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["nf4"].block_size = 8
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["nf4"]


def test_of_two_equal_levels_one_code_is_chosen():
    """The boundary between the zeros of fp4 is the one before them: whatever is nearest to zero has one code."""
    for form in FORMATS.values():
        for code in range(1, 15):
            if form.levels[code] == form.levels[code + 1]:
                assert form.boundaries[code] == form.boundaries[code - 1]
    assert len(set(FORMATS["fp4"].levels)) == 15


def test_imported_formats_have_their_programs_levels_and_keep_their_bound():
    """Their levels are what they are: q4_0 and iq4_nl have none at 1, the largest that a scale can be divided by."""
    assert IMPORTED["q4_0"].levels == tuple((code - 8) / 8 for code in range(16))
    iq4_nl = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    assert [128 * level for level in IMPORTED["iq4_nl"].levels] == iq4_nl
    assert IMPORTED["uint4"].levels == tuple(code / 16 for code in range(16))
    bnb_fp4 = [0, 0.0625, 2, 3, 4, 6, 8, 12]
    assert IMPORTED["bnb_fp4"].levels == tuple(m / 12 for m in (*(-m for m in reversed(bnb_fp4)), *bnb_fp4))
    assert not {*IMPORTED} & {*FORMATS}
    for name in IMPORTED:
        for weight in (torch.randn(9, 100), torch.zeros(2, 64), torch.full((2, 33), -3.0), torch.ones(3, 5)):
            stored = quantize(weight, name)
            assert ((weight - stored.dequantize()).abs() <= stored.error_bound()).all(), name
            assert stored.method == ("search" if IMPORTED[name].search else "absmax")
    with pytest.raises(ValueError, match="q4_0, iq4_nl, uint4, bnb_fp4"):
        get_format("q4_1")


@pytest.mark.parametrize("format", EIGHT_BIT)
def test_the_8_bit_code_0_is_never_chosen(format):
    weight = torch.tensor([[-3.0, 3.0, -2.9, 0.0, 1.0, -1.0, 0.5, 2.0], [-5.0, 0, 0, 0, 0, 0, 0, 5.0]])
    for scales in ENCODINGS:
        codes = quantize(weight, format, block_size=8, scales=scales).packed
        assert int(codes.min()) == 1
        assert int(codes.max()) == 255
