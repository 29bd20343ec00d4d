"""Makes PyTorch models small: half precision, 8-bit and 4-bit block-wise quantization, LoRA and QLoRA."""
# ruff: noqa: E402

from lowmem.tools import command_exit

# Before torch is imported
command_exit.install_import_failure_handlers()

from typing import TYPE_CHECKING, Any

from lowmem.bignet import BigNet
from lowmem.distributed.memory_per_rank import bytes_per_rank
from lowmem.distributed.shard import gather, shard
from lowmem.errors import FileError
from lowmem.finetuning.evaluation import perplexity
from lowmem.finetuning.loop import Outcome, Step, finetune
from lowmem.finetuning.packed_rows import Rows
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.text_examples import Example, Texts, read_examples
from lowmem.finetuning.training_state import States
from lowmem.inference.prepare_inference import inference_report, prepare_inference, release_inference
from lowmem.io.adapter_files import load_adapter, save_adapter
from lowmem.io.checkpoint import load, save
from lowmem.io.formats.export_model import export
from lowmem.io.formats.export_results import Exported
from lowmem.kernels import backend
from lowmem.nn.adapted_module import LoRALinear
from lowmem.nn.adapted_weight import AdaptedWeight
from lowmem.nn.cached_keys_and_values import CachedStates
from lowmem.nn.conv import Conv4Bit, HalfConv
from lowmem.nn.dot_product_attention import scaled_dot_product_attention
from lowmem.nn.embedding import Embedding4Bit, Embedding8Bit, HalfEmbedding
from lowmem.nn.linear import HalfLinear, Linear4Bit, Linear8Bit
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA
from lowmem.quant.formats import FORMATS, Format
from lowmem.quant.packing import pack, unpack
from lowmem.quant.quantize_tensor import quantize
from lowmem.quant.tensor import QuantizedTensor
from lowmem.training.activation_compression import compressed_activations
from lowmem.training.adamw_8bit import AdamW8bit
from lowmem.training.chunked_cross_entropy import linear_cross_entropy
from lowmem.training.master_weights import master_weights
from lowmem.training.prepare_training import prepare_training, release_training, training_report
from lowmem.training.selective_checkpoint import keep_products
from lowmem.training.step_in_backward import step_in_backward
from lowmem.training.step_memory import TrainingMemory, training_memory
from lowmem.transforms.calibration.calibrate import calibrate
from lowmem.transforms.convert import convert
from lowmem.transforms.memory_plan import Plan, plan
from lowmem.transforms.merge_adapters import MergedLayer, MergeReport, merge
from lowmem.transforms.model_summary import LayerSummary, Summary, summary
from lowmem.transforms.named_adapters import (
    activate,
    active_adapters,
    adapter_layers,
    adapter_names,
    adapter_parameter_groups,
    add_adapter,
    deactivate,
    delete_adapter,
    merge_adapter,
    unmerge_adapter,
)
from lowmem.transforms.restore_dense import restore
from lowmem.variants import VARIANTS, build
from lowmem.version import __version__

if TYPE_CHECKING:
    from lowmem.integrations.transformers import KeyValueCache as KeyValueCache

__all__ = [
    "FORMATS",
    "VARIANTS",
    "AdamW8bit",
    "AdaptedWeight",
    "BigNet",
    "Budget",
    "CachedStates",
    "Conv4Bit",
    "EightBit",
    "Embedding4Bit",
    "Embedding8Bit",
    "Example",
    "Exported",
    "FileError",
    "FineTuning",
    "Format",
    "FourBit",
    "Half",
    "HalfConv",
    "HalfEmbedding",
    "HalfLinear",
    "LayerSummary",
    "Linear4Bit",
    "Linear8Bit",
    "LoRA",
    "LoRALinear",
    "MergeReport",
    "MergedLayer",
    "Outcome",
    "Plan",
    "QuantizedTensor",
    "Rows",
    "States",
    "Step",
    "StoredTensor",
    "Summary",
    "Texts",
    "TrainingMemory",
    "__version__",
    "activate",
    "active_adapters",
    "adapter_layers",
    "adapter_names",
    "adapter_parameter_groups",
    "add_adapter",
    "backend",
    "build",
    "bytes_per_rank",
    "calibrate",
    "compressed_activations",
    "convert",
    "deactivate",
    "delete_adapter",
    "export",
    "finetune",
    "gather",
    "inference_report",
    "keep_products",
    "linear_cross_entropy",
    "load",
    "load_adapter",
    "master_weights",
    "merge",
    "merge_adapter",
    "pack",
    "perplexity",
    "plan",
    "prepare_inference",
    "prepare_training",
    "quantize",
    "read_examples",
    "release_inference",
    "release_training",
    "restore",
    "save",
    "save_adapter",
    "scaled_dot_product_attention",
    "shard",
    "step_in_backward",
    "summary",
    "training_memory",
    "training_report",
    "unmerge_adapter",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Import ``KeyValueCache`` where it is asked for: it needs transformers, which takes seconds to import."""
    if name == "KeyValueCache":
        from lowmem.integrations.transformers import KeyValueCache

        return KeyValueCache
    raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
