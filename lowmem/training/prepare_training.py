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
from lowmem.errors import is_one_of, short_repr
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.call_context import can_bypass_autograd
from lowmem.nn.lora_forward import LINEAR
from lowmem.nn.module_class import change_class_and_attributes, derived_class
from lowmem.nn.stored_module import StoredModule
from lowmem.resident import raise_heap_trim_threshold
from lowmem.training.activation_compression import compressed_activations
from lowmem.training.fused import FusionSpec, GatedMLPSpec, LayerNormSpec, fuse, mlp_children_except_linears
from lowmem.training.fusion_recognition import probe_fusion_spec_or_reason
from lowmem.training.lazy_logits import make_logits_lazy
from lowmem.training.prepared_module import (
    PreparedModule,
    PreparedModuleReport,
    is_prepared,
    release_prepared_modules,
    trainable_parameters_or_raise,
    unprepared_shallow_copy,
)
from lowmem.transforms.layer_roles import output_layer_reason_by_module
from lowmem.transforms.model_checks import check_not_prepared
from lowmem.transforms.module_registry import all_paths_by_module, check_is_module, layer_display_name

M = TypeVar("M", bound=nn.Module)

_MODES = "fast", "lean"
# The function that releases what prepare_training prepared
_RELEASE = "release_training"


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
        chunk: rows whose logits exist at once; on a GPU they may be more, up to a 64th of its memory.

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
    check_is_module(model)
    if not is_one_of(memory, _MODES):
        raise ValueError(f'memory={short_repr(memory)} must be "fast" or "lean"')
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk={short_repr(chunk)} must be a number of rows, at least 1")
    patterns = list(output) if isinstance(output, Iterable) and not isinstance(output, str) else [output]
    if not all(isinstance(item, str) for item in patterns):
        raise TypeError(f"output={short_repr(output)} must be glob patterns of paths, such as output='head'")
    _check_can_prepare_training(model)
    paths = all_paths_by_module(model).items()
    check_not_prepared(
        "prepare_training", {item: aliases[0] for item, aliases in paths if not is_prepared(item, _RELEASE)}
    )
    before = [(item, type(item), dict(vars(item))) for item in model.modules()]
    release_training(model)
    try:
        layers = (
            _match_output_layers_or_raise(model, patterns) if patterns else _logits_layers_without_embeddings(model)
        )
        lazy = [item for item in layers if _lazy_logits_refusal_or_none(item) is None]
        dtype, lean = _bfloat16_for_logits_if_fast(model), memory == "lean"
        for module, how in _fusion_specs_by_module(model, lean).items():
            fuse(module, how)
        for layer in lazy:
            make_logits_lazy(layer, chunk, dtype)
        if lean:
            change_class_and_attributes(model, _compressed_activations_subclass(cast(Any, type(model))))
    except BaseException:
        for item, kind, own in before:
            change_class_and_attributes(item, kind, own)
        raise
    # "lean" returns freed pages instead, which keeps its peak low
    if not lean:
        raise_heap_trim_threshold()
    return model


def _fusion_specs_by_module(model: nn.Module, lean: bool) -> dict[nn.Module, FusionSpec]:
    """Return the modules that can be fused, without the activations of gated MLPs, whose fused forward skips them."""
    specs = {
        module: how
        for module in model.modules()
        if (how := probe_fusion_spec_or_reason(module)) is not None and not isinstance(how, str)
    }
    inner = {
        child
        for module, how in specs.items()
        if isinstance(how, GatedMLPSpec)
        for child in mlp_children_except_linears(module, how)
    }
    mlps = {module: replace(how, again=lean) for module, how in specs.items() if isinstance(how, GatedMLPSpec)}
    return {module: how for module, how in (specs | mlps).items() if module not in inner}


def release_training(model: M) -> M:
    """Undo ``prepare_training``; a model that is not prepared stays as it is.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: the class of a prepared module was changed since, as by a parametrization; the model is left as
            it was.
    """
    check_is_module(model)
    release_prepared_modules(model, _RELEASE)
    return model


def training_report(model: nn.Module) -> dict[str, str]:
    """Return what ``prepare_training`` did to each module, by path ("" is the model), and why it left others alone.

    Of modules that were left as they are, output layers and those that look like RMS norms or gated MLPs are listed.
    The text of a module on another device than the CPU says that plain torch computes it there. ``print`` shows one
    line for all layers of a role.

    Raises:
        TypeError: the model is not a module.
    """
    check_is_module(model)
    report = PreparedModuleReport()
    left = _logits_layers_without_embeddings(model)
    prepared = any(is_prepared(module, _RELEASE) for module in model.modules())
    for module, paths in all_paths_by_module(model).items():
        if is_prepared(module, _RELEASE):
            report[paths[0]] = _report_text(module, module.non_cpu_device_or_none(model))
        elif prepared and isinstance(why := probe_fusion_spec_or_reason(module), str):
            report[paths[0]] = f"as before: {why}"
        elif module in left and (reason := _lazy_logits_refusal_or_none(module)) is not None:
            report[paths[0]] = f"logits as before: {reason}"
    return report


def _report_text(module: PreparedModule, fallback_device: torch.device | None) -> str:
    """Return what was done to a module; ``fallback_device`` is one where plain torch serves."""
    if fallback_device is None:
        return str(module.report_note)
    if isinstance(getattr(module, "fused_as", None), LayerNormSpec):
        return f"as before on {fallback_device}: layer norms are fused on CPUs alone"
    return f"{module.report_note}; by plain torch on {fallback_device}"


def _bfloat16_for_logits_if_fast(model: nn.Module) -> torch.dtype | None:
    """Return bfloat16 if a stored layer computes in it and its device is fast at it; else None."""
    asked = any(
        form.compute_dtype is torch.bfloat16 and kernels.fast_bfloat16(next(module.parameters()))
        for module in model.modules()
        if isinstance(module, StoredModule)
        for form in module.forms.values()
    )
    return torch.bfloat16 if asked else None


class _CompressedActivationsModel(PreparedModule):
    """Base of models whose forward runs in ``compressed_activations``."""

    report_note = "what autograd saves is kept in 8 bits"
    prepared_attributes = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the model without this class, and give it to the copy."""
        make, *arguments = cast(Any, unprepared_shallow_copy(self).__reduce_ex__(protocol))
        return functools.partial(_make_with_compressed_activations, make), *arguments


def _make_with_compressed_activations(make: Any, *arguments: Any) -> Any:
    model = make(*arguments)
    change_class_and_attributes(model, _compressed_activations_subclass(cast(Any, type(model))))
    return model


@functools.cache
def _compressed_activations_subclass(model_class: type[Any]) -> Any:
    """Return a subclass of a model's class whose forward has the same signature, which Trainers inspect."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(
            self, _CompressedActivationsModel
        ):  # released since, but accelerate kept this function in the instance
            return type(self).forward(self, *args, **kwargs)
        if not (self.training and torch.is_grad_enabled() and can_bypass_autograd()):
            return model_class.forward(self, *args, **kwargs)
        with compressed_activations(self):
            return model_class.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, model_class.forward)
    # A signature instead of ``__wrapped__``: accelerate unwraps that, and would call the forward without compression.
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    return derived_class(model_class, _CompressedActivationsModel, plain_class=model_class, forward=forward)


def _logits_layers_without_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the layers that compute logits, without embeddings that share their weight and without children."""
    candidates = output_layer_reason_by_module(model)
    inside = {
        part
        for layer in candidates
        if _has_lowmem_or_peft_adapter(layer)
        for part in layer.modules()
        if part is not layer
    }
    tables = nn.Embedding, nn.EmbeddingBag
    return [
        layer
        for layer in candidates
        if layer not in inside
        and not isinstance(layer, tables)
        and (_has_lowmem_or_peft_adapter(layer) or layer._parameters)
    ]


def _has_lowmem_or_peft_adapter(layer: nn.Module) -> bool:
    """Whether a layer has an adapter, from lowmem or PEFT."""
    return isinstance(layer, AdaptedModule) or isinstance(getattr(layer, "base_layer", None), nn.Module)


def _lazy_logits_refusal_or_none(layer: nn.Module) -> str | None:
    """Return why an output layer's logits cannot be lazy, or None."""
    kind = type(layer)
    if _has_lowmem_or_peft_adapter(layer):
        return "the layer has an adapter"
    if kind not in LINEAR:
        return f"{kind.__name__} is no plain linear layer"
    if "forward" in vars(layer):
        return "the layer has a forward of its own, which another library has put into it"
    if getattr(layer, "compute_dtype", None) is not None:
        return "the layer has a compute_dtype of its own"
    return None


def _match_output_layers_or_raise(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    paths = all_paths_by_module(model)
    matched_layers = []
    for pattern in patterns:
        named = [layer for layer, aliases in paths.items() if any(fnmatchcase(path, pattern) for path in aliases)]
        layers = [layer for layer in named if _lazy_logits_refusal_or_none(layer) is None]
        if not layers:
            why = (
                f"; {layer_display_name(paths[named[0]][0])}: {_lazy_logits_refusal_or_none(named[0])}"
                if named
                else ""
            )
            raise ValueError(
                f"output: pattern {short_repr(pattern)} matches no linear layer of {type(model).__name__}{why}; "
                "check the "
                "pattern"
            )
        matched_layers += layers
    return matched_layers


def _check_can_prepare_training(model: nn.Module) -> None:
    """Raise a ValueError for a model that cannot be trained, or prepared any more."""
    trainable_parameters_or_raise(model)
    for path, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{layer_display_name(path.rpartition('.')[0])} is lazy and has no shape yet: call the model once "
                "before "
                "prepare_training"
            )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} was made inside torch.inference_mode(), whose tensors cannot train: make it "
            "outside"
        )
    if "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__} has a forward of its own, which another library has put into it: prepare the "
            "model before, as before accelerate.prepare"
        )
