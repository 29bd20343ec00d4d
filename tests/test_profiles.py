"""What hypothesis tries where: the same examples in what gates a merge, others every night."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SHOW = (
    "import conftest; from hypothesis import settings; found = settings(); "
    "print(found.derandomize, found.database is not None, found.max_examples, found.deadline)"
)


@pytest.mark.parametrize("ci", ["", "true"], ids=["here", "in CI"])
@pytest.mark.parametrize(
    ("profile", "shown"), [("ci", "True False 60 None"), ("nightly", "False True 2000 None")], ids=["ci", "nightly"]
)
def test_a_profile_is_the_same_wherever_it_runs(profile, shown, ci):
    """Where CI is set, hypothesis's own defaults are others."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {
        "HYPOTHESIS_PROFILE": profile
    }
    environment |= {"CI": ci} if ci else {}
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == shown, done.stderr
