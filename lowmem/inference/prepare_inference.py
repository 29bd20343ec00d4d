"""``prepare_inference`` makes a model's calls without gradients faster, and ``release_inference`` undoes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.compiler import is_compiling

from lowmem.inference.norms_and_mlps import (
    NativeGatedMLP,
    NativeRMSNorm,
    gated_mlp_layers,
    unsupported_layer_reason_or_none,
)
from lowmem.nn.call_context import has_customized_call
from lowmem.resident import trim_heap_unless_small
from lowmem.training.fused import GatedMLPSpec, RMSNormSpec
from lowmem.training.fusion_recognition import probe_fusion_spec_or_reason
from lowmem.training.prepared_module import (
    PreparedModule,
    PreparedModuleReport,
    prepend_prepared_class,
    release_prepared_modules,
    unprepared_shallow_copy,
)
from lowmem.transforms.model_checks import check_not_prepared
from lowmem.transforms.module_registry import all_paths_by_module, check_is_module
from lowmem.transforms.module_replacement import iterate_integrations_or_warn

M = TypeVar("M", bound=nn.Module)


class InferenceModule(PreparedModule):
    """Base of modules that are computed in one call where nothing records gradients."""

    released_by: ClassVar[str] = "release_inference"
    prepared_attributes = ("in_one_call",)
    in_one_call: Callable[[Any, Mapping[str, Any]], Tensor | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute it in one call where that takes the arguments; else run the module's own forward."""
        result = None if len(args) != 1 or self.training or is_compiling() else self.in_one_call(args[0], kwargs)
        return super().forward(*args, **kwargs) if result is None else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the plain module: the call has handles of memory of this one."""
        make, *arguments = cast(Any, unprepared_shallow_copy(self).__reduce_ex__(protocol))
        # Not __newobj__ itself, for which pickle demands the class of this module
        return partial(make), *arguments


def prepare_inference(model: M) -> M:
    """Make calls of a model that record no gradients faster, as in ``generate``; the model is used as before.

    RMS norms and gated MLPs whose layers store their weights are recognized by what they compute, and are computed by
    the kernel in C. In a model of transformers a whole block (norm, attention and its projections, norm, gated MLP
    and both sums) is one call, if trial runs with random tokens show that it computes just that. Keys and values grow
    in place: the model gets a forward pre-hook, which replaces empty layers of the ``DynamicCache`` that ``generate``
    makes. Other caches are used as before. Outputs differ from before by rounding errors only. Active adapters in
    float32 are added in the same call. Modules stay where they are: one that has hooks or was replaced is called as
    before, and so is everything in training and on other devices than CPUs.

    Blocks compute what transformers' attention functions ``"sdpa"`` and ``"eager"`` and lowmem's own do. With another
    one, also one that is registered anew under these names, they run as before. For blocks that are left,
    ``model.set_attn_implementation("lowmem")`` lets C compute the attention of few tokens.

    The trial cannot see what a module does after more calls than it made, at batches, lengths, positions or values
    that it did not try, or by a function of its code that is replaced later.

    ``inference_report`` says what was done to each module. Call ``release_inference`` before the model is converted
    further. Copies and pickles of the model are not prepared.

    Args:
        model: in evaluation or training mode; the trial runs it in evaluation mode.

    Returns:
        The model, changed in place. Calling this again prepares it anew.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: the model is prepared for training, or the class of a prepared module was changed since.
    """
    check_is_module(model)
    release_inference(model)
    check_not_prepared(
        "prepare_inference", {module: paths[0] for module, paths in all_paths_by_module(model).items()}
    )
    parts = {
        item: how
        for item in model.modules()
        if isinstance(how := probe_fusion_spec_or_reason(item, False), RMSNormSpec | GatedMLPSpec)
    }
    calls: dict[nn.Module, Any] = {
        item: NativeRMSNorm(item, how)
        if isinstance(how, RMSNormSpec)
        else unsupported_layer_reason_or_none(item, gated_mlp_layers(item, how)) or NativeGatedMLP(item, how)
        for item, how in parts.items()
    }
    others = list(iterate_integrations_or_warn(model, "blocks stay as they are", "Norms and MLPs are prepared"))
    blocks = chain.from_iterable(item.find_blocks(model, parts).items() for item in others)
    reasons = _LEFT[model] = {}
    try:
        # A block watches the classes of its prepared parts
        for item, call in chain(calls.items(), blocks):
            if isinstance(call, str):
                reasons[item] = call
            else:
                prepend_prepared_class(item, InferenceModule, in_one_call=call)
        for owner, hook in filter(None, (item.in_place_cache_hook_or_none(model) for item in others)):
            _HOOKS[owner] = hook, owner.register_forward_pre_hook(hook, with_kwargs=True)
    except BaseException:
        release_inference(model)
        raise
    trim_heap_unless_small(model)
    return model


def release_inference(model: M) -> M:
    """Undo ``prepare_inference``; a model that is not prepared stays as it is.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: the class of a prepared module was changed since, as by a parametrization; the model is left as
            it was.
    """
    check_is_module(model)
    release_prepared_modules(model, InferenceModule.released_by)
    _LEFT.pop(model, None)
    for hook_and_handle in filter(None, [_HOOKS.pop(module, None) for module in model.modules()]):
        hook_and_handle[1].remove()
    return model


def inference_report(model: nn.Module) -> dict[str, str]:
    """Return what ``prepare_inference`` did to each module, by path ("" is the model), and why it left others alone.

    Of modules that were left as they are, those that look like RMS norms, gated MLPs or blocks are listed. A prepared
    module is called as before on other devices than CPUs, and where a module inside it has hooks; its text says so.
    The text of a model of transformers says in which ways of generating keys and values grow in place. ``print``
    shows one line for all layers of a role.

    Raises:
        TypeError: the model is not a module.
    """
    check_is_module(model)
    reasons, report = _LEFT.get(model, {}), PreparedModuleReport()
    for module, paths in all_paths_by_module(model).items():
        if module in _HOOKS:
            left = f"as before: {reasons[module]}; " if module in reasons else ""
            report[paths[0]] = f"{left}{_HOOKS[module][0]}"
        elif isinstance(module, InferenceModule):
            device = module.non_cpu_device_or_none(model)
            text = str(module.in_one_call if device is None else f"as before on {device}: C computes on CPUs")
            observed = any(
                has_customized_call(submodule) for submodule in module.modules() if submodule is not module
            )
            report[paths[0]] = "as before: a module inside it has hooks" if observed else text
        elif module in reasons:
            report[paths[0]] = f"as before: {reasons[module]}"
    return report


# Models: why modules were left
_LEFT: WeakKeyDictionary[nn.Module, dict[nn.Module, str]] = WeakKeyDictionary()
# Models of libraries: their forward pre-hook, whose str() is reported, and its handle
_HOOKS: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()
