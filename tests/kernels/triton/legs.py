"""The two processes of ``tox -e gpu``: Triton's interpreter computes values, and its compiler makes code for GPUs.

``TRITON_INTERPRET=1`` must be set before triton is imported, and an interpreted kernel cannot be compiled.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from lowmem.kernels import gpu, reference
from lowmem.quant.backend import backend_for, set_backend

PINNED = "3.9."


def launches(interpreted: bool) -> ModuleType:
    """Return ``lowmem.kernels.triton.launch``, or skip the module that asks: it needs the other process."""
    triton = pytest.importorskip("triton", reason="triton is not installed, which tox -e gpu installs")
    if not triton.__version__.startswith(PINNED):
        pytest.skip(f"triton {triton.__version__}: tests are of {PINNED}x (tox -e gpu)", allow_module_level=True)
    if (os.environ.get("TRITON_INTERPRET") == "1") != interpreted:
        pytest.skip(f"TRITON_INTERPRET must{'' if interpreted else ' not'} be 1 here", allow_module_level=True)
    return importlib.import_module("lowmem.kernels.triton.launch")


@contextmanager
def serving(device_type: str = "cpu") -> Iterator[gpu.GpuBackend]:
    """Let the GPU's backend serve a device type inside the block, and plain torch dequantize and quantize nothing."""
    before, backend = backend_for(device_type), gpu.GpuBackend()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dequantize", "dequantized_rows", "quantize_rows"):
            patch.setattr(reference, name, None)  # calling it is a TypeError
        set_backend(device_type, backend)
        try:
            yield backend
        finally:
            set_backend(device_type, before)
