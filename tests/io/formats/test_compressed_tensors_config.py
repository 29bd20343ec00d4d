"""A config that is written is one that its layers can have; whole folders: test_hostile_folders.py."""

import pytest
import torch

from lowmem.io.formats.compressed_tensors_config import (
    build_quantization_config,
    check_format_and_schemes,
    check_some_scheme_fits_layer,
)

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def test_what_is_written_passes_the_checks_of_what_is_read():
    schemes = {"a": ("pack-quantized", 32, True), "b": ("mxfp4-pack-quantized", 32, True)}
    config = build_quantization_config(schemes, ["c"], torch.float32)
    assert (config["format"], config["ignore"]) == ("mixed-precision", ["c"])
    found = {group["targets"][0]: group for group in config["config_groups"].values()}
    assert (found["a"]["weights"], found["a"]["format"]) == (INT4, "pack-quantized")
    assert found["b"]["weights"] == {**INT4, "type": "float", "scale_dtype": "torch.uint8"}
    check_format_and_schemes(config, {"compressed-tensors", "MXFP4"})
    for layer in schemes:
        check_some_scheme_fits_layer(config, layer, 32, (8, 64), has_zero_points=False)
    one = build_quantization_config({"a": schemes["a"]}, [], torch.float32)
    settled = {"input_activations": None, "output_activations": None}
    assert one == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4, **settled, "format": "pack-quantized"}},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    with pytest.raises(ValueError, match="says format='pack-quantized', and its tensors are in MXFP4"):
        check_format_and_schemes(one, {"MXFP4"})
    with pytest.raises(ValueError, match="says group_size=32, and 'a' has groups of 16 of its 64 columns"):
        check_some_scheme_fits_layer(one, "a", 16, (8, 64), has_zero_points=False)
    asymmetric = build_quantization_config({"a": ("pack-quantized", 32, False)}, [], torch.float32)
    assert asymmetric["config_groups"]["group_0"]["weights"] == {**INT4, "symmetric": False}
    with pytest.raises(ValueError, match="has zero points, and it has none"):
        check_some_scheme_fits_layer(asymmetric, "a", 32, (8, 64), has_zero_points=False)
