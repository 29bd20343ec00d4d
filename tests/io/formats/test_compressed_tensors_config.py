"""A config that is written is one that its layers can have; whole folders: test_hostile_folders.py."""

import pytest
import torch

from lowmem.io.formats.compressed_tensors_config import check_config, check_scheme, written_config


def test_what_is_written_passes_the_checks_of_what_is_read():
    schemes = {"a": ("pack-quantized", 32, True), "b": ("mxfp4-pack-quantized", 32, True)}
    config = written_config(schemes, ["c"], torch.float32)
    assert (config["format"], config["ignore"]) == ("mixed-precision", ["c"])
    check_config(config, {"compressed-tensors", "MXFP4"})
    for layer in schemes:
        check_scheme(config, layer, 32, (8, 64), has_zeros=False)
    one = written_config({"a": schemes["a"]}, [], torch.float32)
    assert one["format"] == "pack-quantized"
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    with pytest.raises(ValueError, match="says format='pack-quantized', and its tensors are in MXFP4"):
        check_config(one, {"MXFP4"})
    with pytest.raises(ValueError, match="says group_size=32, and 'a' has groups of 16 of its 64 columns"):
        check_scheme(one, "a", 16, (8, 64), has_zeros=False)
    asymmetric = written_config({"a": ("pack-quantized", 32, False)}, [], torch.float32)
    with pytest.raises(ValueError, match="has zero points, and it has none"):
        check_scheme(asymmetric, "a", 32, (8, 64), has_zeros=False)
