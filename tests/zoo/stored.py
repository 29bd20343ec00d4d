"""What a converted model stores: the one place of the zoo that knows the converted layers."""

from collections import Counter

import torch
from torch import Tensor, nn

from lowmem.nn.stored_module import StoredModule


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Return the converted parameters in float32, by their paths in the dense model; tied ones at each path."""
    return {
        f"{path}.{name}".lstrip("."): module.stored_tensor(name).dequantize(torch.float32)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StoredModule)
        for name in module.forms
    }


def numbers(dense: nn.Module, converted: nn.Module) -> tuple[int, Counter[str]]:
    """Return how many numbers of the dense model are stored, and how many are not, by type of module and parameter.

    Tied parameters count once.
    """
    paths = dequantized(converted).keys()
    stored = {id(value) for name, value in dense.named_parameters(remove_duplicate=False) if name in paths}
    kept: Counter[str] = Counter()
    total = 0
    seen = set()
    for module in dense.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) not in seen:
                seen.add(id(value))
                total += value.numel()
                if id(value) not in stored:
                    kept[f"{type(module).__name__}.{name}"] += value.numel()
    return total - kept.total(), kept
