"""The hypothesis profile of these runs: fixed examples, and no shrinking of one that fails, which takes minutes.

pytest imports it before the root ``conftest.py``, which loads the profile that ``HYPOTHESIS_PROFILE`` names.
"""

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "faults",
    max_examples=60,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
