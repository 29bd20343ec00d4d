"""Without transformers no test is collected but those of its absence; its progress bars would hide what fails."""

import os

import pytest

from tests.conftest import refused, results  # noqa: F401 - fixtures of commands

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

try:
    transformers = pytest.importorskip("transformers", "5.24")
except pytest.skip.Exception:
    # test_transformers_version.py says what to install.
    collect_ignore_glob = ["test_[!t]*.py", "test_text_*.py", "test_training.py"]
else:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def small(tmp_path):
    """Return a folder of stored weights, beside the dense one."""
    from lowmem import FourBit
    from lowmem.integrations.transformers import LowmemConfig
    from tests.integrations.transformers.folders import load, write

    model = load(write(tmp_path / "dense"), quantization_config=LowmemConfig(FourBit("nf4")))
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"
