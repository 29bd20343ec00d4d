"""Which layers techniques treat in ways of their own: output layers, embeddings, routers, what stays in float32."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn

from lowmem.transforms.registry import expert_count, layer_name, module_paths


def output_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that compute a language model's logits, each with the reason why it counts as one.

    These are what a ``get_output_embeddings()`` of the model or of a module in it returns, as Hugging Face models
    have it; every layer that shares a weight with that; and every linear layer whose weight is tied to an embedding.
    An adapter over them is as large as the vocabulary.
    """
    found = module_paths(model)
    why: dict[nn.Module, str] = {}
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):  # how models say that they have none
                continue
            if isinstance(head, nn.Module):
                why |= dict.fromkeys(head.modules(), "it is the model's output layer")
    why |= _sharing(found, why, "its weight is that of the output layer `{}`")
    embeddings = [module for module in found if isinstance(module, nn.Embedding)]
    tied = _sharing(found, embeddings, "its weight is tied to the embedding `{}`")
    return {module: reason for module, reason in tied.items() if isinstance(module, nn.Linear)} | why


def embeddings_and_outputs(model: nn.Module) -> dict[nn.Module, str]:
    """Return what ``FourBit`` keeps in 8 bits, with the reason: embeddings, output layers, what shares a weight."""
    found = module_paths(model)
    kinds = (nn.Embedding, nn.EmbeddingBag)
    why: dict[nn.Module, str] = {module: "it is an embedding" for module in found if isinstance(module, kinds)}
    why |= {module: reason for module, reason in output_layers(model).items() if module not in why}
    while more := _sharing(found, why, "its weight is that of `{}`"):
        why |= more
    return why


def _sharing(found: Mapping[nn.Module, list[str]], known: Collection[nn.Module], reason: str) -> dict[nn.Module, str]:
    """Return the other modules that share a weight with a known one, each with the reason; ``{}`` is a path."""
    named = {key: layer_name(found[one][0]) for one in found if one in known for key in layer_weights(one)}
    others = [module for module in found if module not in known]
    return {one: reason.format(named[key]) for one in others for key in layer_weights(one) if key in named}


def float32_patterns(model: nn.Module, dtype: torch.dtype | None) -> list[str]:
    """Return the patterns of what a model of transformers keeps in float32 where it is loaded in ``dtype``.

    A model names them for float16, as T5 names ``wo``, or for bfloat16, too.
    """
    names = ["_keep_in_fp32_modules_strict"] if dtype in (torch.float16, torch.bfloat16) else []
    names += ["_keep_in_fp32_modules"] if dtype is torch.float16 else []
    return [pattern for name in names for pattern in getattr(model, name, None) or ()]


def kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> list[tuple[nn.Module, str]]:
    """Return the modules and names of the parameters that match ``float32_patterns`` of the model or a part of it."""
    found = []
    for root in model.modules():
        patterns = "|".join(one.replace("*", ".*") for one in float32_patterns(root, dtype))
        for path, module in root.named_modules() if patterns else ():
            found += [(module, name) for name in module._parameters if re.search(patterns, f"{path}.{name}")]
    return found


def routers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the linear layers beside a mixture with an output for each expert, with the reason."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        counts = {expert_count(name, child) for name, child in parent.named_children()} - {None}
        for child in parent.children():
            if isinstance(child, nn.Linear) and child.out_features in counts:
                found[child] = "it chooses experts"
    return found


def layer_weights(module: nn.Module) -> set[int]:
    """Return the ids of a layer's own parameters without the bias."""
    return {id(p) for name, p in module._parameters.items() if p is not None and not name.startswith("bias")}
