"""What ``convert``, ``restore``, ``merge`` and adapters refuse alike, before they change anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, is_inference_mode_enabled, nn
from torch.nn.parameter import is_lazy

from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.transforms.module_registry import check_is_module, layer_display_name


def check_model_is_changeable(function_name: str, model: nn.Module) -> None:
    """Raise for a model, or a mode, in which the function called ``function_name`` can change nothing: no module,
    inference mode, a wrapper for several processes, which knows the parameters, or DeepSpeed's ZeRO-3."""
    check_is_module(model)
    if is_inference_mode_enabled():
        raise RuntimeError(
            f"{function_name} inside torch.inference_mode() would make weights that autograd cannot use: leave it"
        )
    for path, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{layer_display_name(path)} is partitioned by DeepSpeed's ZeRO-3, which {function_name} cannot "
                "take: do without it, "
                "and share the weights with lowmem.shard(model)"
            )
        if not is_lazy(parameter) and parameter.is_inference():
            raise RuntimeError(
                f"{layer_display_name(path)} was made inside torch.inference_mode(), and autograd cannot use it: "
                "make the "
                "model outside, or take copy.deepcopy(model) outside, whose parameters are ordinary ones"
            )
    for path, module in model.named_modules():
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise ValueError(
                f"{layer_display_name(path)} is a {wrapper}, which keeps the parameters that it was made with: call "
                f"{function_name} "
                "with the model inside (model.module), then wrap it anew"
            )


# By name: importing the second one takes long
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def check_layers_are_changeable(
    function_name: str, layer_paths: Mapping[Any, str], *, allow_meta: bool = False
) -> None:
    """Raise for layers, with their paths, whose own parameters, or adapters, the function ``name`` cannot change.

    They are lazy, sharded, prepared for training, or on the meta device, which is right if ``allow_meta``, as for a
    plan.
    """
    sharded = imported_dtensor_types()
    check_not_prepared(function_name, layer_paths)
    for layer, path in layer_paths.items():
        for parameter_name, parameter in layer.named_parameters(recurse=isinstance(layer, AdaptedModule)):
            place = layer_display_name(f"{path}.{parameter_name}".lstrip("."))
            if is_lazy(parameter):
                name = layer_display_name(path)
                text = f"{name} is lazy and has no shape yet: call the model once before {function_name}"
                raise ValueError(f"{text}, or use skip=" if function_name == "convert" else text)
            if isinstance(parameter, sharded):
                raise ValueError(f"{place} is sharded (a DTensor): call {function_name} before fully_shard")
            if parameter.is_nested:
                text = f"{place} is a nested tensor, no matrix: make it dense before {function_name}"
                raise ValueError(f"{text}, or use skip=" if function_name == "convert" else text)
            if parameter.is_meta and not allow_meta:
                raise ValueError(
                    f"{place} is on the meta device and has no values: load its values before {function_name}"
                )


def check_no_foreign_tensor_class(function_name: str, parameter_path: str, tensor: Tensor, remedy: str) -> None:
    """Raise a ValueError for a parameter at a place whose class computes by itself, as torchao's tensors do.

    It need not have the operators, nor the memory, that the function ``function_name`` reads it by.
    """
    kind: Any = type(tensor)
    if kind.__torch_dispatch__ != Tensor.__torch_dispatch__ and not isinstance(tensor, StoredTensor):
        raise ValueError(
            f"{layer_display_name(parameter_path)} is a {kind.__name__} of {kind.__module__.partition('.')[0]}, "
            f"whose values {function_name} "
            f"cannot read: {remedy}"
        )


def check_not_prepared(function_name: str, path_by_module: Mapping[Any, str]) -> None:
    """Raise a RuntimeError for a module, with its path, that is prepared for training or inference."""
    for module, path in path_by_module.items():
        released_by: str | None = getattr(type(module), "released_by", None)
        if released_by is not None:
            purpose = released_by.removeprefix("release_")
            raise RuntimeError(
                f"{function_name}: {layer_display_name(path)} is prepared for {purpose}: call "
                f"lowmem.{released_by}(model) before, "
                f"and prepare_{purpose} again afterwards"
            )


def is_peft_module(module: nn.Module) -> bool:
    """Whether a module's class is one of PEFT, or derives from one."""
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)


def check_no_peft_conflict(
    model: nn.Module, layers: Collection[nn.Module], *, will_freeze: bool = False, will_merge: bool = False
) -> None:
    """Raise a ValueError if adapters of PEFT would no longer fit: those around ``layers``, which will change.

    All of them would be frozen if that ``will_freeze`` the rest. Without ``layers``, PEFT is why there are none.
    ``will_merge`` tells that adapters will be merged into the layers.
    """
    for path, module in model.named_modules():
        if is_peft_module(module):
            inside = next((inner for inner, layer in module.named_modules(prefix=path) if layer in layers), None)
            if inside is not None or will_freeze or not layers:
                where = f"the model holds {layer_display_name(path)}," if path else "the model is"
                where = (
                    where if inside is None else f"{layer_display_name(inside)} is inside {layer_display_name(path)},"
                )
                remedy = "call merge_and_unload() first"
                if will_merge:
                    lost = "were trained on the weights as they are now" if layers else "are not lowmem's"
                else:
                    lost, remedy = "would be frozen", f"convert the base before get_peft_model, or {remedy}"
                raise ValueError(f"{where} a {type(module).__name__} of PEFT, whose adapters {lost}: {remedy}")


def check_model_not_sharded(function_name: str, model: nn.Module) -> None:
    """Raise a ValueError for a model of which this process has a part, for a function that needs all of it."""
    sharded = imported_dtensor_types()
    for path, parameter in model.named_parameters():
        if isinstance(parameter, sharded):
            raise ValueError(
                f"{layer_display_name(path)} is sharded (a DTensor), and {function_name} needs all of it: call "
                f"lowmem.gather(model) in all processes, and {function_name} with what rank 0 gets"
            )
