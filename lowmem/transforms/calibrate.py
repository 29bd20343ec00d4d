"""Converts a model to 4 bits, with linear layers quantized by GPTQ on sample inputs.

The model runs over the samples once for each layer, up to that layer.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.nn.fourbit import FourBit
from lowmem.quant.tensor import QuantizedTensor
from lowmem.transforms.convert import Store, commit, layers_to_convert, rebuild, weight_key
from lowmem.transforms.gptq import Hessian, prepare_hessian, quantize_gptq
from lowmem.transforms.refusals import refuse_layers
from lowmem.transforms.registry import layer_name, parameters_to_store

__all__ = ["calibrate", "check_batch", "evaluation_mode", "run_batch"]

_DEFAULT = FourBit()


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    technique: FourBit = _DEFAULT,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    damping: float = 0.01,
) -> nn.Module:
    """Convert a model to 4 bits as ``convert`` does, with linear layers calibrated on sample inputs.

    GPTQ, arXiv 2210.17323: minimizes ``|X W^T - X W_q^T|^2`` for the inputs X of each layer, instead of the error of
    each weight. Layers are quantized in the order of their calls, each on inputs that the quantized layers before it
    compute. The model runs over all batches once for each layer, up to that layer; layers with the same input share
    a run. Peak memory is the Hessian of one layer's inputs, float32 (in, in), and a few copies of it.

    The model runs in evaluation mode without gradients. Every row of an input counts, padding included. Embeddings,
    convolutions and linear layers with a shared weight are quantized by their weights alone, and so are, with a
    warning, layers that no batch reaches. Scales are searched for, unless ``search=False``.

    Args:
        model: any module; the root itself can be the layer.
        batches: typical inputs of the model, a few thousand rows in all, the same at each iteration (a list, a
            DataLoader). Each is a Tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        technique: how to store; of several formats each layer gets the one with the least weighted error.
        where: called with (path, module); a layer is taken only where it returns True, for all its paths.
        skip: glob patterns of paths to leave as they are.
        damping: above 0, added to the Hessian's diagonal, as a fraction of its mean; more trusts the inputs less.

    Returns:
        The model, changed in place; or the new layer, when the root itself was the layer. Calibrated layers have
        ``quantized.method == "calibrated"``.

    Raises:
        TypeError: batches that can be iterated only once, a batch of another type, or a technique but FourBit.
        ValueError: no batches, a bad damping, or what ``convert`` rejects.

        After any error, also one of the model's own, the model is unchanged.

    Warns:
        UserWarning: layers that no batch reached, or whose inputs were all zero or not finite.
    """
    _check_arguments(batches, technique, damping)
    technique = replace(technique, search=technique.search is not False)
    candidates = layers_to_convert(model, (technique,), where, skip)
    refuse_layers("calibrate", candidates)
    layers: list[Any] = list(candidates)
    held = Counter(weight_key(layer._parameters[name]) for layer in layers for name in parameters_to_store(layer))
    linear = [layer for layer in layers if type(layer) is nn.Linear and held[weight_key(layer.weight)] == 1]
    store, replacements = Store(), dict[nn.Module, nn.Module]()
    uncalibrated: dict[nn.Module, str] = {}  # and why

    with evaluation_mode(model) as override_forward:

        def replace_layer(layer: nn.Module, store_by: Callable[[Any], Callable[[Tensor, str], Any]]) -> None:
            replacements[layer] = rebuild(layer, (technique,), candidates[layer], {}, store_by)
            override_forward(layer, replacements[layer])

        for layer in layers:
            if layer not in linear:
                replace_layer(layer, store.by)
        groups, calls = _group_by_input(model, batches, linear)
        for group in groups:
            hessian = prepare_hessian(_mean_gram(model, batches, group[0], calls[group[0]]), damping)
            for layer in group:
                if hessian is None:
                    uncalibrated[layer] = "its inputs are all zero, or hold NaN or infinite values"
                    replace_layer(layer, store.by)
                else:
                    replace_layer(layer, _gptq_store(hessian))
            del hessian  # before the next one is computed
        for layer in linear:
            if layer not in replacements:
                uncalibrated[layer] = "no batch reached it"
                replace_layer(layer, store.by)
    if uncalibrated:
        named = "; ".join(f"{layer_name(candidates[layer])}: {why}" for layer, why in uncalibrated.items())
        warnings.warn(f"layers were quantized by their weights alone ({named})", UserWarning, stacklevel=2)
    return commit(model, replacements)


def _check_arguments(batches: object, technique: object, damping: object) -> None:
    if type(technique) is not FourBit:
        raise TypeError(f"technique={technique!r} must be a FourBit; convert applies the others")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping={damping!r} must be a number above 0; 0.01 suits most models")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be read only once; pass a list of it: list(batches)"
        )
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of batches, if only of one: [batch]")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[Callable[[nn.Module, nn.Module], None]]:
    """Put the model in evaluation mode, yield a function that overrides a layer's forward; undo both."""
    modes = {module: module.training for module in model.modules()}
    forwards: dict[nn.Module, Any] = {}
    fused = torch.backends.mha.get_fastpath_enabled()

    def override_forward(layer: nn.Module, other: nn.Module) -> None:
        forwards[layer] = vars(layer).get("forward")
        vars(layer)["forward"] = other.forward

    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # which bypasses the linear layers of encoder layers
        with torch.no_grad():
            yield override_forward
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for layer, forward in forwards.items():
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward
        for module, training in modes.items():
            module.training = training


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch, as ``calibrate`` takes them, and return its output.

    Raises:
        TypeError: a batch of another type.
    """
    check_batch(batch)
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def check_batch(batch: Any) -> None:
    """Raise unless a batch is of a type that ``run_batch`` takes.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; it must be a Tensor, a tuple or list of the model's arguments, or "
            "a mapping of its keyword arguments"
        )


def _group_by_input(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[nn.Module]
) -> tuple[list[list[nn.Module]], Counter[nn.Module]]:
    """Return groups of layers that get the same inputs, in call order, and each layer's most calls in one run.

    Raises:
        TypeError: a batch of a wrong kind.
        ValueError: no batches.
    """
    total, most, now = (Counter[nn.Module]() for _ in range(3))
    first: dict[nn.Module, set[nn.Module]] = {}  # for each layer, the first layers that got its inputs
    last: tuple[Tensor, int, nn.Module] | None = None  # the last input, its version, and the first layer that got it

    def see(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal last
        x = args[0] if args else kwargs["input"]
        version = -1 if x.is_inference() else x._version
        if last is None or version < 0 or last[0] is not x or last[1] != version:
            last = x, version, layer
        first.setdefault(layer, set()).add(last[2])
        now[layer] += 1

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        runs = 0
        for batch in batches:
            run_batch(model, batch)
            total += now
            most |= now  # element-wise maximum
            now.clear()
            last, runs = None, runs + 1
    finally:
        for handle in handles:
            handle.remove()
    if not runs:
        raise ValueError("batches is empty: pass one batch at least, or use convert, which needs none")
    groups: dict[nn.Module, list[nn.Module]] = {}
    for layer, leaders in first.items():
        leader = next(iter(leaders))
        together = len(leaders) == 1 and leader in groups and total[leader] == total[layer]
        groups.setdefault(leader if together else layer, []).append(layer)
    return list(groups.values()), most


class _Stop(BaseException):
    """Ends a run of the model after the layer has got its last input; no Exception, which a model might catch."""


def _mean_gram(model: nn.Module, batches: Iterable[Any], layer: Any, calls: int) -> Tensor:
    """Return the mean of ``x^T x`` over the rows x of a layer's inputs: float32 (in, in)."""
    columns = layer.weight.shape[-1]
    sums = torch.zeros(columns, columns, device=layer.weight.device)
    rows = left = 0

    def add(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal rows, left
        x = (args[0] if args else kwargs["input"]).reshape(-1, columns).float()
        sums.addmm_(x.T, x)
        rows, left = rows + len(x), left - 1
        if not left:
            raise _Stop

    handle = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        for batch in batches:
            left = calls
            with suppress(_Stop):
                run_batch(model, batch)
    finally:
        handle.remove()
    return sums.div_(max(1, rows))


def _gptq_store(hessian: Hessian) -> Callable[[FourBit], Callable[[Tensor, str], QuantizedTensor]]:
    """Return a replacement for ``Store.by`` that quantizes by GPTQ."""
    return lambda technique: lambda weight, name: quantize_gptq(weight, technique, hessian)
