import os

import numpy as np
import pytest

from tests.kernels.triton.interpreter import mend

if os.environ.get("TRITON_INTERPRET") == "1":
    mend()


@pytest.fixture(autouse=True)
def no_warnings_of_numpy():
    """Let numbers become infinite and NaN without a word, as on a GPU: the interpreter computes with numpy."""
    with np.errstate(all="ignore"):
        yield
