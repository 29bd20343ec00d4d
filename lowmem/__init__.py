"""Makes PyTorch models small: half precision, 4-bit block-wise quantization, LoRA and QLoRA."""
# ruff: noqa: E402

from lowmem import startup

startup.guard_imports()  # before torch is imported

from lowmem.adapter_files import load_adapter, save_adapter
from lowmem.adapters import (
    activate,
    active_adapters,
    adapter_layers,
    adapter_names,
    add_adapter,
    deactivate,
    delete_adapter,
    merge_adapter,
    unmerge_adapter,
)
from lowmem.bignet import BigNet
from lowmem.blockwise import QuantizedTensor
from lowmem.calibrate import calibrate
from lowmem.checkpoint import load, save
from lowmem.conv import Conv4Bit, HalfConv
from lowmem.convert import convert
from lowmem.embedding import Embedding4Bit, HalfEmbedding
from lowmem.formats import FORMATS, Format
from lowmem.fourbit import FourBit, Linear4Bit
from lowmem.half import Half, HalfLinear
from lowmem.header import FileError
from lowmem.kernels import backend
from lowmem.lora import LoRA, LoRALinear
from lowmem.merge import merge
from lowmem.packing import pack, unpack
from lowmem.quantizing import quantize
from lowmem.summary import LayerSummary, Summary, summary
from lowmem.variants import VARIANTS, build
from lowmem.version import __version__

__all__ = [
    "FORMATS",
    "VARIANTS",
    "BigNet",
    "Conv4Bit",
    "Embedding4Bit",
    "FileError",
    "Format",
    "FourBit",
    "Half",
    "HalfConv",
    "HalfEmbedding",
    "HalfLinear",
    "LayerSummary",
    "Linear4Bit",
    "LoRA",
    "LoRALinear",
    "QuantizedTensor",
    "Summary",
    "__version__",
    "activate",
    "active_adapters",
    "adapter_layers",
    "adapter_names",
    "add_adapter",
    "backend",
    "build",
    "calibrate",
    "convert",
    "deactivate",
    "delete_adapter",
    "load",
    "load_adapter",
    "merge",
    "merge_adapter",
    "pack",
    "quantize",
    "save",
    "save_adapter",
    "summary",
    "unmerge_adapter",
    "unpack",
]
