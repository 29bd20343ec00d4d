"""Shards a model's weights among processes, by FSDP2 (Zhao et al., PyTorch FSDP, arXiv 2304.11277): each has its rows
of every weight, and a step gathers blocks. Packed codes stay uint8: no cast touches them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parameter import is_lazy

from lowmem.kernels.torch_versions import TORCH
from lowmem.nn.module_class import change_class_and_attributes
from lowmem.nn.sharded_parameters import imported_dtensor_types, is_fsdp2_module
from lowmem.nn.stored_module import StoredModule
from lowmem.resident import trim_heap_unless_small
from lowmem.transforms.model_checks import check_model_is_changeable
from lowmem.transforms.module_registry import check_is_module, layer_display_name

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

_FSDP = "torch.distributed.fsdp"
_OF_FSDP = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")  # its attributes


def shard(model: M, mesh: DeviceMesh | None = None, *, mp_policy: MixedPrecisionPolicy | None = None) -> M:
    """Let each process keep its part of a model's weights, gradients and optimizer state, in FSDP2::

        torch.distributed.init_process_group()  # torchrun has started this process
        model = lowmem.convert(make(), lowmem.FourBit("nf4"), lowmem.LoRA())
        lowmem.shard(model)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    PyTorch's ``fully_shard`` is called on each block, then on the model. Blocks are the layers of an
    ``nn.ModuleList`` or ``nn.Sequential`` that has several of one type; one that shares a parameter with the rest of
    the model stays with the rest. Codes, scales and 16-bit weights are cut by rows, bit for bit. Weights of
    ``lowmem.load`` are mapped from the file, and only this process's rows are read. Convert a model before, prepare
    it before or after, and make the optimizer after.

    In each step every process has to call the model once for each of its batches, and gradients are averaged over
    processes. Call blocks as modules (``block(x)``), so that FSDP2 notices. ``lowmem.gather`` returns all of it.

    Args:
        model: with values, on one device.
        mesh: of one dimension, or of two, which replicate and shard; None takes all processes, on the model's device.
        mp_policy: FSDP2's mixed precision. It casts dense floating parameters, and adapters, when they are gathered.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module, or the mesh is none.
        RuntimeError: no process group is initialized; or the model has packed codes, and torch is older than 2.12.
        ValueError: a mesh of more dimensions, or without this process; a model that is sharded already, that
            DistributedDataParallel, FSDP1 or DeepSpeed's ZeRO-3 has, whose parameters lack values, train as scalars
            or train in several dtypes in one block, or 16-bit weights that ``mp_policy`` would cast. The model is
            left as it was.
    """
    _check_not_wrapped_or_sharded(model)
    check_model_is_changeable("shard", model)
    _check_process_group_initialized("shard")
    from torch.distributed.fsdp import fully_shard

    mesh = _checked_mesh(mesh) if mesh is not None else _mesh_of_all_processes(model)
    units: list[nn.Module] = [*shardable_blocks(model), model]
    _check_shardable_parameters(model, units, mp_policy)
    scalars = {
        parameter for parameter in model.parameters() if parameter.dim() == 0
    }  # frozen ones, which FSDP2 does not take
    options: dict[str, Any] = {"mesh": mesh} | ({"ignored_params": scalars} if scalars else {})
    if mp_policy is not None:
        options["mp_policy"] = mp_policy
    stored = [module for module in model.modules() if isinstance(module, StoredModule)]
    for module in stored:
        for name in module.forms:
            module.stored_tensor(name)  # which notices a cast of a module that shares the weight
    for module in stored:
        module._kept.clear()  # it would keep the whole weight
    for unit in units:
        fully_shard(unit, **options)
    trim_heap_unless_small(model)
    return model


def gather(model: M) -> M | None:
    """Return a whole copy of a sharded model in rank 0, on the CPU, and None elsewhere; all processes must call it.

    Packed bytes are those that the model had before ``shard``. The sharded model stays as it is::

        whole = lowmem.gather(model)
        if whole is not None:
            lowmem.save_adapter(whole, "adapter.safetensors")

    Args:
        model: that ``shard``, or FSDP2's ``fully_shard``, has cut; not inside a step, between forward and backward.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: no process group is initialized.
        ValueError: the model is not sharded.
    """
    check_is_module(model)
    _check_process_group_initialized("gather")
    for module in model.modules():
        if is_fsdp2_module(module):
            module.reshard()  # type: ignore[operator]  # the root keeps its weights whole after a forward
    sharded = imported_dtensor_types()
    if not any(isinstance(sharded_parameter, sharded) for sharded_parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} is not sharded: each process has all of it, so take it as it is")
    main = distributed.get_rank() == 0
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        sharded_parameter: Any = parameter
        whole: Any = sharded_parameter.detach()
        whole = whole.full_tensor() if isinstance(sharded_parameter, sharded) else whole.clone()
        if main:
            known[id(sharded_parameter)] = nn.Parameter(whole.cpu(), requires_grad=sharded_parameter.requires_grad)
    if not main:
        return None
    with _without_fsdp_classes_and_hooks(model):
        copied = copy.deepcopy(model, known)
    return copied.cpu()


def _check_process_group_initialized(function_name: str) -> None:
    """Raise a RuntimeError unless this process has joined others; ``function_name`` is the function that needs it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            f"{function_name}: this process knows of no others: start the program with torchrun, and call "
            f"torch.distributed.init_process_group() before lowmem.{function_name}"
        )


_ENGINES = {
    "FullyShardedDataParallel": " (FSDP1), which joins parameters into one of one dtype, and packed codes have their "
    "own: make the model without it",
    "DeepSpeedEngine": ", whose ZeRO-3 knows no packed codes: make the model without DeepSpeed",
    "DistributedDataParallel": ", which keeps the whole model in each process: give the model inside (model.module)",
}


def _check_not_wrapped_or_sharded(model: nn.Module) -> None:
    """Raise a ValueError for a model that another engine has, or that is sharded already."""
    sharded = imported_dtensor_types()
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        for kind in type(module).__mro__:
            if kind.__name__ in _ENGINES:
                raise ValueError(
                    f"{layer_display_name(path)} is a {kind.__name__}{_ENGINES[kind.__name__]}: shard is FSDP2"
                )
        for name, parameter in module._parameters.items():
            if isinstance(parameter, sharded):
                place = layer_display_name(f"{path}.{name}".lstrip("."))
                raise ValueError(f"{place} is sharded already (a DTensor): call shard once, with a whole model")


def shardable_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, in the order of its modules: see ``shard``."""
    candidates = [block for block in dict.fromkeys(_iterate_outermost_repeated_layers(model)) if block is not model]
    # In how many blocks, or outside of all, a parameter is
    owners: Counter[int] = Counter()
    inside = {module for block in candidates for module in block.modules()}
    outside = {id(p) for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    for block in candidates:
        owners.update({id(p) for p in block.parameters()})
    return [
        block for block in candidates if all(owners[id(p)] == 1 and id(p) not in outside for p in block.parameters())
    ]


def _iterate_outermost_repeated_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost layers that are in one list with others of their type, and have parameters."""
    layers: list[nn.Module] = [layer for layer in model.children() if next(layer.parameters(), None) is not None]
    types = Counter(type(layer) for layer in layers)
    blocks = [layer for layer in layers if types[type(layer)] > 1 and type(layer).forward is not nn.Module.forward]
    if not isinstance(model, nn.ModuleList | nn.Sequential):
        blocks = []
    composed = [layer for layer in blocks if next(layer.children(), None) is not None]
    # Norms between blocks are not worth a gathering of their own
    blocks = composed or blocks
    for layer in layers:
        if layer in blocks:
            yield layer
        else:
            yield from _iterate_outermost_repeated_layers(layer)


def _checked_mesh(mesh: Any) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh={mesh!r} must be a DeviceMesh: torch.distributed.init_device_mesh('cuda', (processes,)), or None"
        )
    named = mesh.mesh_dim_names is not None
    if mesh.ndim not in (1, 2) or (mesh.ndim == 2 and not named):
        raise ValueError(
            f"mesh of shape {tuple(mesh.shape)}{'' if named else ' without names'} must have one dimension, or two "
            "named ones, which replicate and shard: take a part of it, as mesh['shard']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh={mesh} is without this process, rank {distributed.get_rank()}: do not call shard here"
        )
    return mesh


def _mesh_of_all_processes(model: nn.Module) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return init_device_mesh(device.type if device.type != "meta" else "cpu", (distributed.get_world_size(),))


def _check_shardable_parameters(model: nn.Module, units: list[nn.Module], mp_policy: Any) -> None:
    """Raise a ValueError for what FSDP2 would refuse later, or compute otherwise."""
    paths = {module: path for path, module in model.named_modules()}
    for path, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{layer_display_name(path)} is lazy and has no shape yet: call the model once before shard"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{layer_display_name(path)} is on the meta device and has no values: load them before shard"
            )
        if parameter.dim() == 0 and parameter.requires_grad:
            raise ValueError(
                f"{layer_display_name(path)} is a scalar that trains, which FSDP2 cannot cut: make it a vector of "
                "one "
                "number, or freeze it"
            )
        if TORCH < (2, 12) and parameter.dim() and not parameter.is_floating_point():
            raise RuntimeError(
                f"{layer_display_name(path)} is {parameter.dtype}, and FSDP2 shards integers from torch 2.12 on: "
                "this is "
                f"torch {torch.__version__}, install a newer one"
            )
    cast = getattr(mp_policy, "param_dtype", None)
    for module in paths if cast is not None else ():
        names = module.part_parameter_names if isinstance(module, StoredModule) else ()
        for name in (item for item in names if item.endswith("_rounded")):
            stored = getattr(module, name).dtype
            if stored is not cast:
                raise ValueError(
                    f"{layer_display_name(paths[module])} is stored in {stored}, and param_dtype={cast} would cast "
                    "it: store "
                    "it in that dtype, or leave param_dtype out"
                )
    known: set[nn.Parameter] = set()
    for unit in units:
        trained = [item for item in unit.parameters() if item.requires_grad and item not in known]
        known.update(trained)
        if len({item.dtype for item in trained}) > 1:
            dtypes = ", ".join(sorted({str(item.dtype) for item in trained}))
            raise ValueError(
                f"{layer_display_name(paths[unit])} trains parameters in {dtypes}, and FSDP2 joins the gradients of "
                "a block: "
                "let them train in one dtype"
            )


@contextmanager
def _without_fsdp_classes_and_hooks(model: nn.Module) -> Iterator[None]:
    """Take FSDP2's classes, states and hooks, which cannot be copied, off a model for the time of the context."""
    from torch.distributed.fsdp import FSDPModule

    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, kind, attributes in before:
            plain = next(base_class for base_class in kind.__mro__ if not issubclass(base_class, FSDPModule))
            left = {
                name: _value_without_fsdp_hooks(name, value)
                for name, value in attributes.items()
                if not name.startswith(_OF_FSDP)
            }
            change_class_and_attributes(module, plain, left)
        yield
    finally:
        for module, kind, attributes in before:
            change_class_and_attributes(module, kind, attributes)


def _value_without_fsdp_hooks(attribute_name: str, value: Any) -> Any:
    """Return a dictionary of hooks without the engine's, or any other attribute as it is."""
    if not attribute_name.endswith("_hooks") or not isinstance(value, dict):
        return value
    copied = copy.copy(value)
    for key, hook in value.items():
        if str(getattr(hook, "__module__", "")).startswith(_FSDP):
            del copied[key]
    return copied
