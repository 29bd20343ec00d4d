"""Hypothesis profiles (``HYPOTHESIS_PROFILE=ci`` or ``nightly`` is another than the default), and the gate."""

import os
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from benchmarks.gate import pytest_addoption, pytest_configure  # noqa: F401 - hooks

pytest_plugins = ["benchmarks.latency.plugin", "benchmarks.report"]  # --against, --report

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=40, **_COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, print_blob=True, **_COMMON)
# Said in full: where the variable CI is set, hypothesis's own defaults are fixed examples and no database.
settings.register_profile(
    "nightly",
    max_examples=2000,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(Path(__file__).parent / ".hypothesis" / "examples"),
    print_blob=True,
    **_COMMON,
)
# Of faults and mutants (tests.faults), as fixed examples: shrinking one that fails takes minutes.
settings.register_profile(
    "faults", max_examples=60, derandomize=True, phases=(Phase.explicit, Phase.generate), **_COMMON
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
