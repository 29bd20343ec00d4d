"""Which layers techniques treat in ways of their own: output layers, embeddings, routers, what stays in float32."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn

from lowmem.transforms.module_registry import all_paths_by_module, expert_count_or_none, layer_display_name


def output_layer_reason_by_module(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that compute a language model's logits, each with the reason why it counts as one.

    These are what a ``get_output_embeddings()`` of the model or of a module in it returns, as Hugging Face models
    have it; every layer that shares a weight with that; and every linear layer whose weight is tied to an embedding.
    An adapter over them is as large as the vocabulary.
    """
    paths_by_module = all_paths_by_module(model)
    why: dict[nn.Module, str] = {}
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):
                # How models say that they have none
                continue
            if isinstance(head, nn.Module):
                why |= dict.fromkeys(head.modules(), "it is the model's output layer")
    why |= _weight_sharing_reason_by_module(paths_by_module, why, "its weight is that of the output layer `{}`")
    embeddings = [module for module in paths_by_module if isinstance(module, nn.Embedding)]
    tied = _weight_sharing_reason_by_module(paths_by_module, embeddings, "its weight is tied to the embedding `{}`")
    return {module: reason for module, reason in tied.items() if isinstance(module, nn.Linear)} | why


def embedding_or_output_reason_by_module(model: nn.Module) -> dict[nn.Module, str]:
    """Return what ``FourBit`` keeps in 8 bits, with the reason: embeddings, output layers, what shares a weight."""
    paths_by_module = all_paths_by_module(model)
    kinds = (nn.Embedding, nn.EmbeddingBag)
    why: dict[nn.Module, str] = {
        module: "it is an embedding" for module in paths_by_module if isinstance(module, kinds)
    }
    why |= {module: reason for module, reason in output_layer_reason_by_module(model).items() if module not in why}
    while more := _weight_sharing_reason_by_module(paths_by_module, why, "its weight is that of `{}`"):
        why |= more
    return why


def _weight_sharing_reason_by_module(
    paths_by_module: Mapping[nn.Module, list[str]], weight_owners: Collection[nn.Module], reason_template: str
) -> dict[nn.Module, str]:
    """Return the other modules that share a weight with a known one, each with the reason; ``{}`` is a path."""
    named = {
        key: layer_display_name(paths_by_module[layer][0])
        for layer in paths_by_module
        if layer in weight_owners
        for key in weight_parameter_ids(layer)
    }
    other_modules = [module for module in paths_by_module if module not in weight_owners]
    return {
        layer: reason_template.format(named[key])
        for layer in other_modules
        for key in weight_parameter_ids(layer)
        if key in named
    }


def float32_name_patterns(model: nn.Module, load_dtype: torch.dtype | None) -> list[str]:
    """Return the patterns of what a model of transformers keeps in float32 where it is loaded in ``load_dtype``.

    A model names them for float16, as T5 names ``wo``, or for bfloat16, too.
    """
    names = ["_keep_in_fp32_modules_strict"] if load_dtype in (torch.float16, torch.bfloat16) else []
    names += ["_keep_in_fp32_modules"] if load_dtype is torch.float16 else []
    return [pattern for name in names for pattern in getattr(model, name, None) or ()]


def module_name_pairs_kept_in_float32(
    model: nn.Module, load_dtype: torch.dtype | None
) -> list[tuple[nn.Module, str]]:
    """Return modules and names of parameters that match ``float32_name_patterns`` of the model or a part of it."""
    modules_and_names = []
    for root in model.modules():
        patterns = "|".join(pattern.replace("*", ".*") for pattern in float32_name_patterns(root, load_dtype))
        for path, module in root.named_modules() if patterns else ():
            modules_and_names += [
                (module, name) for name in module._parameters if re.search(patterns, f"{path}.{name}")
            ]
    return modules_and_names


def router_reason_by_module(model: nn.Module) -> dict[nn.Module, str]:
    """Return the linear layers beside a mixture with an output for each expert, with the reason."""
    reasons: dict[nn.Module, str] = {}
    for parent in model.modules():
        counts = {expert_count_or_none(name, child) for name, child in parent.named_children()} - {None}
        for child in parent.children():
            if isinstance(child, nn.Linear) and child.out_features in counts:
                reasons[child] = "it chooses experts"
    return reasons


def weight_parameter_ids(module: nn.Module) -> set[int]:
    """Return the ids of a layer's own parameters without the bias."""
    return {id(p) for name, p in module._parameters.items() if p is not None and not name.startswith("bias")}
