"""Weights of other programs, the parts of their layers, and a config's claims of both."""

import pytest
import torch
from safetensors.torch import save_file

from lowmem.io.formats.foreign_format import LayerTensors, LazyForeignTensor, exact_match_predicate
from lowmem.io.formats.format_registry import FOREIGN_FORMATS
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint


def test_a_weight_that_says_its_form_is_not_read_for_it():
    assert LazyForeignTensor("a", (2,), "b", 4, lambda: 1 / 0, lambda: torch.int8).storage_form() is torch.int8


def test_the_parts_of_a_layer_are_named_in_errors(tmp_path):
    save_file({"a.x": torch.ones(2), "a.y": torch.zeros(3), "x": torch.ones(1)}, tmp_path / "in")
    with SafetensorsCheckpoint(tmp_path / "in") as source:
        parts = LayerTensors.from_checkpoint(source, "a", "F", ("x",), ("y", "z"))
        assert (parts.tensor_names, parts.nbytes, set(parts.specs)) == ({"a.x", "a.y"}, 20, {"x", "y"})
        assert parts.read_part("y").tolist() == [0, 0, 0]
        assert LayerTensors.from_checkpoint(source, "", "F", ("x",)).tensor_names == {
            "x"
        }  # a model that is one layer
        parts.raise_parts_error_unless(True)
        with pytest.raises(ValueError, match=r"parts of the layer 'a' of F do not fit: x torch.float32 \(2,\), y"):
            parts.raise_parts_error_unless(False)
        with pytest.raises(ValueError, match="the layer 'a' of F lacks 'a.z'; get it again"):
            LayerTensors.from_checkpoint(source, "a", "F", ("z",))
        found = parts.refused_tensor_of_weight("K", (2,), "it is odd")
        shown = (found.name, found.shape, found.kind, found.nbytes, found.refusal)
        assert shown == ("a.weight", (2,), "K", 20, "it is odd")
        for read in (found.storage_form, found.read):
            with pytest.raises(ValueError, match=r"^'a\.weight' in K cannot be kept exactly: it is odd$"):
                read()


def test_values_of_other_types_are_no_match():
    for format, claim in (
        ("bitsandbytes", {"load_in_4bit": 1}),
        ("awq", {"bits": True}),
        ("awq", {"bits": 4.0}),
        ("gptq", {"checkpoint_format": ["gptq"]}),
        ("compressed-tensors", {"format": {}}),
    ):
        with pytest.raises(ValueError, match=f"says {next(iter(claim))}=.* lowmem reads no such {format}"):
            FOREIGN_FORMATS[format].check_config_settings(claim, {"compressed-tensors"})
    assert exact_match_predicate(1, None)(1)
    assert exact_match_predicate(1, None)(None)
    assert not exact_match_predicate(1)(True)


def test_a_config_may_say_nothing_and_what_is_unknown():
    for format in FOREIGN_FORMATS.values():
        format.check_config_settings({}, set())
        format.check_config_settings({"of tomorrow": 1}, set())
