"""torch's default dtype and device are the user's: lowmem computes the same bits under any of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowmem
from tests import defaults

# Classes of results, of layers and of errors.
NO_CALLS = {
    *("FORMATS", "VARIANTS", "__version__", "BigNet", "build"),  # below
    *("AdaptedWeight", "Conv4Bit", "Embedding4Bit", "Embedding8Bit", "Exported", "FileError", "Format", "HalfConv"),
    *("HalfEmbedding", "HalfLinear", "LayerSummary", "Linear4Bit", "Linear8Bit", "LoRALinear", "MergeReport"),
    *("MergedLayer", "Outcome", "Plan", "QuantizedTensor", "Step", "StoredTensor", "Summary", "Texts"),
    "TrainingMemory",
}


def check(*given):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.defaults", *given],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "GOMP_SPINCOUNT": "0"},  # threads of small products would spin
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    skipped = ran.stdout.count("fails there by itself")
    assert skipped <= len(defaults.STEPS_OF_ADAMW) * ("meta" in given)
    assert ran.stdout.count("the same") + skipped == len(given) * len(defaults.CALLS)


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("given", [("float16", "meta"), ("bfloat16",), ("float64",)], ids="-".join)
def test_results_do_not_depend_on_the_defaults_of_torch(given):
    check(*given)


def test_every_public_call_is_tried():
    tried = set(re.findall(r"[A-Za-z]\w+", Path(defaults.__file__).read_text("utf8")))
    assert set(lowmem.__all__) - NO_CALLS <= tried
    assert set(lowmem.__all__) >= NO_CALLS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dense_modules_are_made_with_the_defaults_of_torch(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert {one.dtype for one in lowmem.BigNet().parameters()} == {dtype}
        assert {one.dtype for one in lowmem.build("bignet").parameters()} == {dtype}
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert all(one.is_meta for one in lowmem.BigNet().parameters())
