"""Makes PyTorch models small: half precision, 4-bit block-wise quantization, LoRA and QLoRA."""

from lowmem.blockwise import QuantizedTensor, quantize
from lowmem.formats import FORMATS, Format
from lowmem.packing import pack, unpack
from lowmem.version import __version__

__all__ = ["FORMATS", "Format", "QuantizedTensor", "__version__", "pack", "quantize", "unpack"]
