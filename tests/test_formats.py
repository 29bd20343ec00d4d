"""Formats are data that hold their own promises."""

import dataclasses

import pytest
import torch

from lowmem import FORMATS
from lowmem.formats import Format, get_format
from lowmem.packing import check_block_size
from lowmem.scales import ENCODINGS

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@every_format
def test_levels_are_sixteen_ascending_and_reach_both_ends(form):
    assert len(form.levels) == 16
    assert list(form.levels) == sorted(form.levels)
    assert (form.levels[0], form.levels[-1]) == (-1, 1)


@every_format
def test_defaults_are_valid_and_the_key_is_the_name(form):
    check_block_size(form.block_size)
    assert form.scales in ENCODINGS
    assert FORMATS[form.name] is form


@every_format
def test_boundaries_choose_the_nearest_level(form):
    values = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    levels = torch.tensor(form.levels, dtype=torch.float64)
    codes = torch.bucketize(values, torch.tensor(form.boundaries, dtype=torch.float64))
    nearest = (values[:, None] - levels).abs().amin(-1)
    torch.testing.assert_close((values - levels[codes]).abs(), nearest, rtol=0, atol=1e-15)


@every_format
def test_max_distance_is_reached_and_never_exceeded(form):
    values = torch.linspace(-1, 1, 40001, dtype=torch.float64)
    nearest = (values[:, None] - torch.tensor(form.levels, dtype=torch.float64)).abs().amin(-1)
    assert 0.999 * form.max_distance < float(nearest.max()) <= form.max_distance


def test_the_numbers_of_each_format():
    assert FORMATS["int4"].levels[0] == -1
    assert FORMATS["int4"].levels[8] == pytest.approx(1 / 15)
    assert FORMATS["nf4"].levels[7] == 0
    assert FORMATS["nf4"].levels[13] == 0.5626170039176941
    assert [6 * level for level in FORMATS["fp4"].levels[8:]] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize(("name", "level"), [("nf4", 0.0), ("fp4", 0.0), ("int4", -1 / 15)])
def test_zero_code_is_the_level_that_zero_gets(name, level):
    assert FORMATS[name].levels[FORMATS[name].zero_code] == level


def test_a_format_that_stops_short_of_one_counts_its_ends():
    half = Format("half", tuple(i / 30 for i in range(16)), 16, "float16", "test")
    assert half.max_distance == 1


@pytest.mark.parametrize(
    "levels", [(0.0,) * 15, tuple(reversed(FORMATS["nf4"].levels)), (*FORMATS["nf4"].levels[:15], 1.5)]
)
def test_wrong_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels="):
        Format("bad", levels, 16, "float16", "test")


@pytest.mark.parametrize("name", ["int8", "", None, ["nf4"]])
def test_an_unknown_format_lists_the_choices(name):
    with pytest.raises(ValueError, match="int4, nf4, fp4"):
        get_format(name)


def test_formats_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["nf4"].block_size = 8
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["nf4"]
