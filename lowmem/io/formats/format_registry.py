"""The formats of other programs that lowmem reads and writes: one line each."""

from __future__ import annotations

from lowmem.io.formats import bitsandbytes, compressed_tensors, gptq_awq, mxfp4
from lowmem.io.formats.foreign_format import ExportTarget, ForeignFormat
from lowmem.io.formats.gguf.gguf_file import MAGIC
from lowmem.io.formats.gguf.gguf_reader import open_gguf_and_list_tensors
from lowmem.io.formats.gguf.gguf_writer import export_gguf

_GGUF = ForeignFormat(
    "gguf", magic=MAGIC, open=open_gguf_and_list_tensors, target=ExportTarget(export_gguf, ".gguf", ("like", "dtype"))
)

FOREIGN_FORMATS: dict[str, ForeignFormat] = {
    foreign_format.name: foreign_format
    for foreign_format in (
        _GGUF,
        bitsandbytes.FORMAT,
        mxfp4.FORMAT,
        gptq_awq.GPTQ,
        gptq_awq.AWQ,
        compressed_tensors.FORMAT,
    )
}
"""By the name of the format. Safetensors checkpoints are searched in this order."""
