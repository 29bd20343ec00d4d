"""A model of transformers computes the same bits under any default dtype and device of torch."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("default", ["bfloat16", "meta", "float64"])
def test_attention_caches_and_blocks_do_not_depend_on_the_defaults_of_torch(default):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.integrations.transformers.other_defaults", default],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
