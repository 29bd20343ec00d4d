"""Adapters as GGUF: ``<name>.lora_a`` is A (rank, in) and ``<name>.lora_b`` is B (out, rank), in float32.

llama.cpp scales each product by ``alpha / rank``, with one alpha for all layers. Where lowmem's scaling is another
(rank-stabilized, or another alpha), the difference is folded into B. The rows of B of the query and key projections
are in the order of the weights' rows. A of the input embedding is transposed: its rows are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.io.formats.gguf.gguf_file import GGUFTensorInfo, GGUFValue, encode_metadata_field, write_new_gguf_file
from lowmem.io.formats.gguf.gguf_metadata import ARCHITECTURES, gguf_architecture_of_model_type_or_raise
from lowmem.io.formats.gguf.gguf_tensor_names import GGUFTransformersNameMap, tensor_name_map_from_metadata
from lowmem.nn.adapter import Adapter
from lowmem.transforms.adapter_placement import adaptable_module_and_name_by_path
from lowmem.transforms.layer_roles import output_layer_reason_by_module
from lowmem.transforms.module_registry import all_paths_by_module, layer_display_name

# The type of GGUF
F32 = 0


def write_gguf_adapter(
    path: Path, model: nn.Module, adapter_name: str, adapters_by_path: Mapping[str, Adapter]
) -> None:
    """Write an adapter, by place, as llama.cpp loads it, for a model of transformers of the llama family.

    Raises:
        ValueError: an architecture or layer that GGUF has no form of, a B that exceeds float32, or parameters of the
            base that train beside the adapter.
    """
    names, alpha = _checked_llama_family_name_map(model), _most_common_usable_alpha(adapters_by_path)
    _check_base_is_frozen(model)
    places, outputs, is_tied = (
        adaptable_module_and_name_by_path(model),
        output_layer_reason_by_module(model),
        _has_tied_embeddings(model),
    )
    tensors: dict[str, Tensor] = {}
    for place, adapter in adapters_by_path.items():
        module, _ = places[place]
        try:
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                raise ValueError(f"llama.cpp adapts no {type(module).__name__}")
            written = names.gguf_name(f"{place}.weight")
            if is_tied and (module in outputs or adapter.rows_are_read):
                raise ValueError("its weight is that of the other end of the model, and llama.cpp makes one of both")
            a, b = _lora_a_and_scaled_reordered_b(names, written, adapter, alpha)
        except ValueError as reason:
            raise ValueError(
                f"{layer_display_name(place)}: {reason}; leave it out with where= or skip=, or merge the adapter"
            ) from None
        tensors |= {f"{written}.lora_a": a, f"{written}.lora_b": b}
    fields: dict[str, GGUFValue] = {
        "general.architecture": names.architecture,
        "general.type": "adapter",
        "general.name": adapter_name,
        "general.file_type": F32,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    write_new_gguf_file(
        path,
        {key: encode_metadata_field(key, value) for key, value in fields.items()},
        [GGUFTensorInfo(key, tuple(value.shape), F32) for key, value in tensors.items()],
        ((key, value.flatten().view(torch.uint8)) for key, value in tensors.items()),
    )


def _checked_llama_family_name_map(model: nn.Module) -> GGUFTransformersNameMap:
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    try:
        architecture = gguf_architecture_of_model_type_or_raise({"model_type": kind})
    except ValueError:
        what = type(model).__name__ if kind is None else f"{type(model).__name__} ({kind})"
        raise ValueError(
            f"{what} has no names in GGUF that lowmem knows, which are those of {', '.join(ARCHITECTURES)} in "
            "transformers; save the adapter with format='peft'"
        ) from None
    heads = {"head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads}
    numbers = {f"{architecture}.attention.{key}": number for key, number in heads.items()}
    return tensor_name_map_from_metadata({"general.architecture": architecture, **numbers})


def _check_base_is_frozen(model: nn.Module) -> None:
    """Raise if parameters of the base train beside the adapter: the file would leave out what they have learned."""
    for module, paths in all_paths_by_module(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                raise ValueError(
                    f"{layer_display_name(paths[0])}: its {name} trains beside the adapter, and a GGUF file has the "
                    "adapter "
                    f"alone: freeze it, {name}.requires_grad_(False), or merge the adapter and export the whole model"
                )


def _has_tied_embeddings(model: Any) -> bool:
    """Whether the output layer of a model has the weight of its input embedding."""
    ends: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if None in ends:
        return False
    input_ids, output_ids = ({id(part) for part in end._parameters.values()} - {id(None)} for end in ends)
    return bool(input_ids & output_ids)


def _most_common_usable_alpha(adapters_by_path: Mapping[str, Adapter]) -> float:
    """Return the alpha, exact in float32, with which most scalings need no change of B."""
    wanted = Counter(adapter.scaling * adapter.rank for adapter in adapters_by_path.values()).most_common(1)[0][0]
    alpha = torch.tensor(wanted, dtype=torch.float32, device="cpu").item()
    # llama.cpp takes a zero for no alpha
    return alpha if 1e-20 < alpha < 1e20 else 1.0


def _lora_a_and_scaled_reordered_b(
    names: GGUFTransformersNameMap, weight_name: str, adapter: Adapter, file_alpha: float
) -> tuple[Tensor, Tensor]:
    """Return A and B as the file has them, contiguous in float32."""
    a, b = (part.detach().cpu() for part in (adapter.lora_a, adapter.lora_b))
    folded = (b.double() * (adapter.scaling / (file_alpha / adapter.rank))).float()
    if b.isfinite().all() and not folded.isfinite().all():
        raise ValueError("its B exceeds float32 with the scaling folded in: scale it down")
    order = names.file_rows_in_model_order_or_none(weight_name, folded.shape[0])
    if order is not None:
        folded = torch.empty_like(folded).index_copy_(0, order, folded)
    return (a.mT if adapter.rows_are_read else a).float().contiguous(), folded
