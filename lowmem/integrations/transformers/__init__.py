"""lowmem in Hugging Face transformers: models are quantized while they load, and saved as folders.

Importing this module registers the quantizer, so that ``from_pretrained`` loads the folders that ``save_pretrained``
writes of a converted model::

    import lowmem.integrations.transformers
    from lowmem.integrations.transformers import LowmemConfig

    config = LowmemConfig(lowmem.FourBit("nf4"))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(small)

``lowmem.convert`` imports it where a model is one of transformers. Nothing of transformers is replaced: the quantizer
is registered as others are, and a converted model gets a class of its own, under the name of its class.

It may import what its parent folder may, and that. Begin with ``quantizer.py``.
"""
# ruff: noqa: E402

from lowmem.integrations.transformers import transformers_version

# Before anything of transformers is imported that older versions do not have
transformers_version.check_transformers_version()

from lowmem.integrations.transformers.attention_interface import ATTENTION
from lowmem.integrations.transformers.block_recognition import find_blocks
from lowmem.integrations.transformers.foreign_checkpoint import from_exact
from lowmem.integrations.transformers.key_value_cache import KeyValueCache, cached_bytes
from lowmem.integrations.transformers.key_value_cache import (
    in_place_cache_hook_or_none as in_place_cache_hook_or_none,
)
from lowmem.integrations.transformers.quantization_config import METHOD, LowmemConfig
from lowmem.integrations.transformers.quantizer import LowmemQuantizer, adopt
from lowmem.integrations.transformers.text_tokenizer import TextTokenizer

__all__ = [
    "ATTENTION",
    "METHOD",
    "KeyValueCache",
    "LowmemConfig",
    "LowmemQuantizer",
    "TextTokenizer",
    "adopt",
    "cached_bytes",
    "find_blocks",
    "from_exact",
]
