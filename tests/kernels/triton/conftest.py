import os

import numpy as np
import pytest

from lowmem.kernels import gpu
from tests.kernels.triton.interpreter import mend

if os.environ.get("TRITON_INTERPRET") == "1":
    mend()


@pytest.fixture(autouse=True)
def no_warnings_of_numpy():
    """Let numbers become infinite and NaN without a word, as on a GPU: the interpreter computes with numpy."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def no_kernel_is_refused():
    """The interpreter's errors are Triton's, for which plain torch would serve in place of the kernel."""
    yield
    assert gpu._refused_kernels == {}
