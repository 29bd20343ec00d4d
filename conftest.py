"""Hypothesis profiles (``HYPOTHESIS_PROFILE`` names one: ci, full, nightly or faults), and plugins."""

import os
from importlib.metadata import entry_points
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

if all(point.value != "pytest_lowmem" for point in entry_points(group="pytest11")):
    pytest_plugins = ["pytest_lowmem"]  # where lowmem is not installed, as in tox -e asan

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=15, **_COMMON)
for name, examples in (("ci", 15), ("full", 60)):
    settings.register_profile(name, max_examples=examples, derandomize=True, print_blob=True, **_COMMON)
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
