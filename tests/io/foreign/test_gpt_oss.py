"""Experts of gpt-oss: parts that do not fit each other are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.errors import FileError
from lowmem.io.foreign.recognize import open_foreign

PARTS = load_file(Path(__file__).parent / "samples" / "gpt-oss.safetensors")
BLOCKS, SCALES = "experts.down_proj_blocks", "experts.down_proj_scales"


def test_parts_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for message, changed in {
        "do not fit": {BLOCKS: PARTS[BLOCKS][..., :8].contiguous()},
        r"scales.*do not fit": {SCALES: PARTS[SCALES][:1]},
        "exponents are bytes": {SCALES: PARTS[SCALES].int()},
        "exponent of 255": {SCALES: torch.full_like(PARTS[SCALES], 255)},
    }.items():
        save_file({**PARTS, **changed}, path)
        with pytest.raises(FileError, match=message), open_foreign(path) as file:
            file.tensors["experts.down_proj"].read()


def test_blocks_without_scales_are_a_tensor_like_another(tmp_path):
    save_file({BLOCKS: PARTS[BLOCKS]}, tmp_path / "a.safetensors")
    with open_foreign(tmp_path / "a.safetensors") as file:
        assert file.kind == "safetensors"
