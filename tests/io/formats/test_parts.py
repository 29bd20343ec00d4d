"""The parts of a layer are named in errors, and read by their last names."""

import pytest
import torch
from safetensors.torch import save_file

from lowmem.io.formats.parts import Parts
from lowmem.io.source import Source


def test_parts_of_a_layer_and_of_a_model_that_is_one(tmp_path):
    save_file({"a.x": torch.ones(2), "a.y": torch.zeros(3), "x": torch.ones(1)}, tmp_path / "in")
    with Source(tmp_path / "in") as source:
        parts = Parts.of(source, "a", "F", ("x",), ("y", "z"))
        assert (parts.names, parts.nbytes, set(parts.specs)) == ({"a.x", "a.y"}, 20, {"x", "y"})
        assert parts.read("y").tolist() == [0, 0, 0]
        assert parts.name("weight") == "a.weight"
        assert Parts.of(source, "", "F", ("x",)).names == {"x"}
        parts.check(True)
        with pytest.raises(ValueError, match=r"parts of the layer 'a' of F do not fit: x torch.float32 \(2,\), y"):
            parts.check(False)
        with pytest.raises(ValueError, match="the layer 'a' of F lacks 'a.z'; get it again"):
            Parts.of(source, "a", "F", ("z",))
        found = parts.refused("K", (2,), "it is odd")
        assert (found.name, found.shape, found.kind, found.nbytes, found.refusal) == (
            "a.weight",
            (2,),
            "K",
            20,
            "it is odd",
        )
