"""The formats of other programs that lowmem reads and writes: one line each."""

from __future__ import annotations

from lowmem.io.formats import bitsandbytes, compressed_tensors, gptq, mxfp4
from lowmem.io.formats.foreign import Foreign, Target
from lowmem.io.formats.gguf.container import MAGIC
from lowmem.io.formats.gguf.reading import read_gguf
from lowmem.io.formats.gguf.writing import write_gguf

_GGUF = Foreign("gguf", magic=MAGIC, open=read_gguf, target=Target(write_gguf, ".gguf", ("like", "dtype")))

FOREIGN: dict[str, Foreign] = {
    one.name: one
    for one in (
        _GGUF,
        bitsandbytes.FORMAT,
        mxfp4.FORMAT,
        gptq.GPTQ,
        gptq.AWQ,
        compressed_tensors.FORMAT,
    )
}
"""By the name of the format. Safetensors checkpoints are searched in this order."""
