"""A config's claims against the formats of tensors; whole folders are in test_hostile_folders.py."""

import pytest

from lowmem.io.formats.claims import METHODS, check_claims
from lowmem.io.formats.recognize import READERS


def test_every_reader_has_its_method():
    assert METHODS.keys() == READERS.keys()


def test_other_known_methods_contradict_and_unknown_ones_do_not():
    for kind, method in METHODS.items():
        label = {kind: {"compressed-tensors"}}
        check_claims(label, {"quant_method": method})
        check_claims(label, {"quant_method": "of tomorrow"})
        check_claims(label, {})
        check_claims({}, {"quant_method": method})
        for other in set(METHODS.values()) - {method}:
            with pytest.raises(ValueError, match=f"config.json says quant_method='{other}'"):
                check_claims(label, {"quant_method": other})


def test_values_of_other_types_are_no_match():
    """1 is no True, and True no 1."""
    for kind, claim in (
        ("bitsandbytes", {"load_in_4bit": 1}),
        ("awq", {"bits": True}),
        ("awq", {"bits": 4.0}),
        ("gptq", {"checkpoint_format": ["gptq"]}),
        ("compressed-tensors", {"format": {}}),
    ):
        with pytest.raises(ValueError, match=next(iter(claim))):
            check_claims({kind: {"compressed-tensors"}}, claim)
