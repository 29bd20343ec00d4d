"""Values of a config are of their type and in their range, or an error names them."""

import pytest

from lowmem.io.formats.gguf.gguf_config_checks import (
    checked_object,
    checked_positive_integer,
    checked_positive_number,
)


def test_a_value_or_its_default_is_returned():
    config = {"layers": 3, "eps": 1, "rope": {"rope_theta": 1.0}, "none": None}
    assert checked_positive_integer(config, "layers") == 3
    assert checked_positive_integer(config, "none", 4) == checked_positive_integer(config, "lacks", 4) == 4
    assert checked_positive_number(config, "eps") == 1.0
    assert checked_object(config, "rope") == {"rope_theta": 1.0}
    assert checked_object(config, "none") == checked_object(config, "lacks") == {}


@pytest.mark.parametrize("value", [None, 0, -1, 2**31, 1.0, True, "3", [3]])
def test_what_is_no_positive_integer_is_named(value):
    with pytest.raises(ValueError, match="layers=.* must be a positive integer; repair config.json"):
        checked_positive_integer({"layers": value}, "layers")


@pytest.mark.parametrize("value", [None, 0, -1.0, 2.0**64, float("nan"), True, "3"])
def test_what_is_no_positive_number_is_named(value):
    with pytest.raises(ValueError, match="eps=.* must be a positive number; name another file"):
        checked_positive_number({"eps": value}, "eps", remedy="; name another file")


@pytest.mark.parametrize("value", [[1], "text", 3])
def test_what_is_no_object_is_named(value):
    with pytest.raises(ValueError, match="rope=.* must be an object; repair config.json"):
        checked_object({"rope": value}, "rope")
