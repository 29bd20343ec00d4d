"""A config's claims against the formats of tensors; whole folders are in test_hostile_folders.py."""

import pytest

from lowmem.io.formats.foreign import one_of
from lowmem.io.formats.registry import FOREIGN


def test_values_of_other_types_are_no_match():
    """1 is no True, and True no 1."""
    for format, claim in (
        ("bitsandbytes", {"load_in_4bit": 1}),
        ("awq", {"bits": True}),
        ("awq", {"bits": 4.0}),
        ("gptq", {"checkpoint_format": ["gptq"]}),
        ("compressed-tensors", {"format": {}}),
    ):
        with pytest.raises(ValueError, match=f"says {next(iter(claim))}=.* lowmem reads no such {format}"):
            FOREIGN[format].check_config(claim, {"compressed-tensors"})
    assert one_of(1, None)(1)
    assert one_of(1, None)(None)
    assert not one_of(1)(True)


def test_a_config_may_say_nothing_and_what_is_unknown():
    for format in FOREIGN.values():
        format.check_config({}, set())
        format.check_config({"of tomorrow": 1}, set())
