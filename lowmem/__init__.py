"""Makes PyTorch models small: half precision, 4-bit block-wise quantization, LoRA and QLoRA."""

from lowmem.bignet import BigNet
from lowmem.blockwise import QuantizedTensor, quantize
from lowmem.conv import Conv4Bit, HalfConv
from lowmem.convert import convert, merge
from lowmem.embedding import Embedding4Bit, HalfEmbedding
from lowmem.formats import FORMATS, Format
from lowmem.fourbit import FourBit, Linear4Bit
from lowmem.half import Half, HalfLinear
from lowmem.kernels import backend
from lowmem.lora import LoRA, LoRALinear
from lowmem.packing import pack, unpack
from lowmem.variants import VARIANTS, build
from lowmem.version import __version__

__all__ = [
    "FORMATS",
    "VARIANTS",
    "BigNet",
    "Conv4Bit",
    "Embedding4Bit",
    "Format",
    "FourBit",
    "Half",
    "HalfConv",
    "HalfEmbedding",
    "HalfLinear",
    "Linear4Bit",
    "LoRA",
    "LoRALinear",
    "QuantizedTensor",
    "__version__",
    "backend",
    "build",
    "convert",
    "merge",
    "pack",
    "quantize",
    "unpack",
]
