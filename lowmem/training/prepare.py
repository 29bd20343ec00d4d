"""``prepare_training`` reduces the memory of a model's training steps, and ``release_training`` undoes it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lowmem import kernels
from lowmem.errors import is_one_of, show
from lowmem.nn.adapted_forward import LINEAR
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.calls import is_plain_call
from lowmem.nn.module_class import change_class, derived_class
from lowmem.nn.stored_module import StoredModule
from lowmem.resident import keep_freed_memory
from lowmem.training.activations import compressed_activations
from lowmem.training.fused import GatedMLP, How, LayerNorm, activations, fuse
from lowmem.training.logits import delay_logits
from lowmem.training.prepared_module import (
    PreparedModule,
    is_prepared,
    plain_copy,
    release_modules,
    trained_parameters,
)
from lowmem.training.recognize import recognize
from lowmem.transforms.refusals import refuse_prepared
from lowmem.transforms.registry import check_module, layer_name, module_paths
from lowmem.transforms.roles import output_layers

M = TypeVar("M", bound=nn.Module)

_MODES = "fast", "lean"
_RELEASE = "release_training"  # the function that releases what prepare_training prepared


def prepare_training(model: M, memory: str = "fast", *, output: str | Iterable[str] = (), chunk: int = 256) -> M:
    """Make the training steps of a model take less memory; the model is used as before.

    - "fast" and "lean": ``torch.nn.functional.cross_entropy`` of the output layers' logits computes these in chunks
      of rows (``linear_cross_entropy``), whether the model, a Trainer or your own loop calls it; any other function
      gets whole logits. The chunks are multiplied in bfloat16 if that is the ``compute_dtype`` of the model's stored
      layers and the processor has instructions for it. RMS norms, gated MLPs and activations, recognized by what they
      compute, save only their inputs for backward and recompute the rest. Adapted layers recompute the outputs of
      these and of layer norms instead of saving them. With glibc, the process keeps up to 64 MiB that a step has
      freed for the next one, also after ``release_training``.
    - "lean": also, tensors that autograd saves in forward are kept in 8 bits (``compressed_activations``), and gate
      and up layers of gated MLPs are called again in backward, as in a checkpoint. Both cost time.

    ``training_report`` says what was done to each module. In evaluation, without gradients, compiled or exported, the
    model behaves as before. Second derivatives of the loss (``create_graph=True``) and writes to logits are errors,
    and so are, in backward, in-place writes to the input of a fused module, as with any function that saves its
    input. Call ``release_training`` before the model is converted further or pickled.

    Args:
        model: has parameters that train.
        memory: "fast" or "lean".
        output: glob patterns of the paths of output layers; empty: what ``get_output_embeddings()`` of the model
            returns, and linear layers whose weight is tied to an embedding.
        chunk: rows whose logits exist at once.

    Returns:
        The model, changed in place. Calling this again replaces the earlier preparation.

    Raises:
        TypeError: the model is not a module, or ``output`` is not a pattern or an iterable of patterns.
        ValueError: an unknown ``memory``, a chunk below 1, a pattern that matches no linear layer, a model without
            parameters that train, with a forward that another library has replaced, or whose parameters are
            inference tensors or lazy. The model is left as it was.
        RuntimeError: the class of a prepared module was changed since (see ``release_training``), or the model is
            prepared for inference.
    """
    check_module(model)
    if not is_one_of(memory, _MODES):
        raise ValueError(f'memory={show(memory)} must be "fast" or "lean"')
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk={show(chunk)} must be a number of rows, at least 1")
    patterns = list(output) if isinstance(output, Iterable) and not isinstance(output, str) else [output]
    if not all(isinstance(one, str) for one in patterns):
        raise TypeError(f"output={show(output)} must be glob patterns of paths, such as output='head'")
    _check(model)
    paths = module_paths(model).items()
    refuse_prepared("prepare_training", {one: found[0] for one, found in paths if not is_prepared(one, _RELEASE)})
    before = [(one, type(one), dict(vars(one))) for one in model.modules()]
    release_training(model)
    try:
        layers = _named_layers(model, patterns) if patterns else _outputs(model)
        lazy = [one for one in layers if _reason(one) is None]
        dtype, lean = _logits_dtype(model), memory == "lean"
        for module, how in _fusable(model, lean).items():
            fuse(module, how)
        for layer in lazy:
            delay_logits(layer, chunk, dtype)
        if lean:
            change_class(model, _compressing(cast(Any, type(model))))
    except BaseException:
        for one, kind, own in before:
            change_class(one, kind, own)
        raise
    if not lean:  # "lean" returns freed pages instead, which keeps its peak low
        keep_freed_memory()
    return model


def _fusable(model: nn.Module, lean: bool) -> dict[nn.Module, How]:
    """Return the modules that can be fused, without the activations of gated MLPs, whose fused forward skips them."""
    found = {one: how for one in model.modules() if (how := recognize(one)) is not None and not isinstance(how, str)}
    inner = {child for one, how in found.items() if isinstance(how, GatedMLP) for child in activations(one, how)}
    mlps = {one: replace(how, again=lean) for one, how in found.items() if isinstance(how, GatedMLP)}
    return {one: how for one, how in (found | mlps).items() if one not in inner}


def release_training(model: M) -> M:
    """Undo ``prepare_training``; a model that is not prepared stays as it is.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: the class of a prepared module was changed since, as by a parametrization; the model is left as
            it was.
    """
    check_module(model)
    release_modules(model, _RELEASE)
    return model


def training_report(model: nn.Module) -> dict[str, str]:
    """Return what ``prepare_training`` did to each module, by path ("" is the model), and why it left others alone.

    Of modules that were left as they are, output layers and those that look like RMS norms or gated MLPs are listed.
    The text of a module on another device than the CPU says that plain torch computes it there.

    Raises:
        TypeError: the model is not a module.
    """
    check_module(model)
    report = {}
    left = _outputs(model)
    prepared = any(is_prepared(module, _RELEASE) for module in model.modules())
    for module, paths in module_paths(model).items():
        if is_prepared(module, _RELEASE):
            report[paths[0]] = _note(module, module.device_of_plain_torch(model))
        elif prepared and isinstance(why := recognize(module), str):
            report[paths[0]] = f"as before: {why}"
        elif module in left and (reason := _reason(module)) is not None:
            report[paths[0]] = f"logits as before: {reason}"
    return report


def _note(module: PreparedModule, device: torch.device | None) -> str:
    """Return what was done to a module; ``device`` is one where plain torch serves."""
    if device is None:
        return str(module.note)
    if isinstance(getattr(module, "fused_as", None), LayerNorm):
        return f"as before on {device}: layer norms are fused on CPUs alone"
    return f"{module.note}; by plain torch on {device}"


def _logits_dtype(model: nn.Module) -> torch.dtype | None:
    """Return bfloat16 if a stored layer computes in it and its device is fast at it; else None."""
    asked = any(
        form.compute_dtype is torch.bfloat16 and kernels.fast_bfloat16(next(module.parameters()))
        for module in model.modules()
        if isinstance(module, StoredModule)
        for form in module.forms.values()
    )
    return torch.bfloat16 if asked else None


class _Compressing(PreparedModule):
    """Base of models whose forward runs in ``compressed_activations``."""

    note = "what autograd saves is kept in 8 bits"
    prepared_attributes = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the model without this class, and give it to the copy."""
        make, *arguments = cast(Any, plain_copy(self).__reduce_ex__(protocol))
        return functools.partial(_compressed, make), *arguments


def _compressed(make: Any, *arguments: Any) -> Any:
    model = make(*arguments)
    change_class(model, _compressing(cast(Any, type(model))))
    return model


@functools.cache
def _compressing(kind: type[Any]) -> Any:
    """Return a subclass of a model's class whose forward has the same signature, which Trainers inspect."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _Compressing):  # released since, but accelerate kept this function in the instance
            return type(self).forward(self, *args, **kwargs)
        if not (self.training and torch.is_grad_enabled() and is_plain_call()):
            return kind.forward(self, *args, **kwargs)
        with compressed_activations(self):
            return kind.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, kind.forward)
    # A signature instead of ``__wrapped__``: accelerate unwraps that, and would call the forward without compression.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    return derived_class(kind, _Compressing, plain_class=kind, forward=forward)


def _outputs(model: nn.Module) -> list[nn.Module]:
    """Return the layers that compute logits, without embeddings that share their weight and without children."""
    found = output_layers(model)
    inside = {part for one in found if _has_adapter(one) for part in one.modules() if part is not one}
    tables = nn.Embedding, nn.EmbeddingBag
    return [
        one
        for one in found
        if one not in inside and not isinstance(one, tables) and (_has_adapter(one) or one._parameters)
    ]


def _has_adapter(layer: nn.Module) -> bool:
    """Whether a layer has an adapter, from lowmem or PEFT."""
    return isinstance(layer, AdaptedModule) or isinstance(getattr(layer, "base_layer", None), nn.Module)


def _reason(layer: nn.Module) -> str | None:
    """Return why an output layer's logits cannot be lazy, or None."""
    kind = type(layer)
    if _has_adapter(layer):
        return "the layer has an adapter"
    if kind not in LINEAR:
        return f"{kind.__name__} is no plain linear layer"
    if "forward" in vars(layer):
        return "the layer has a forward of its own, which another library has put into it"
    if getattr(layer, "compute_dtype", None) is not None:
        return "the layer has a compute_dtype of its own"
    return None


def _named_layers(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    paths = module_paths(model)
    found = []
    for pattern in patterns:
        named = [one for one, own in paths.items() if any(fnmatchcase(path, pattern) for path in own)]
        layers = [one for one in named if _reason(one) is None]
        if not layers:
            why = f"; {layer_name(paths[named[0]][0])}: {_reason(named[0])}" if named else ""
            raise ValueError(
                f"output: pattern {show(pattern)} matches no linear layer of {type(model).__name__}{why}; check the "
                "pattern"
            )
        found += layers
    return found


def _check(model: nn.Module) -> None:
    """Raise a ValueError for a model that cannot be trained, or prepared any more."""
    trained_parameters(model)
    for path, one in model.named_parameters():
        if is_lazy(one):
            raise ValueError(
                f"{layer_name(path.rpartition('.')[0])} is lazy and has no shape yet: call the model once before "
                "prepare_training"
            )
    if any(one.is_inference() for one in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} was made inside torch.inference_mode(), whose tensors cannot train: make it "
            "outside"
        )
    if "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__} has a forward of its own, which another library has put into it: prepare the "
            "model before, as before accelerate.prepare"
        )
