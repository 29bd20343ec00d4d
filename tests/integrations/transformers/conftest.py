"""Quiet: progress bars and reports of transformers would hide what fails."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

try:
    import transformers
except ImportError:  # the tests are skipped, and say why
    pass
else:
    transformers.utils.logging.disable_progress_bar()
