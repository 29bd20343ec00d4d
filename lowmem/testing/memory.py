"""Exact memory figures of a model, after one warm-up and under fixed conditions: the bytes of distinct storages by
category, and the peaks of a forward and a training step beyond model and input."""

from __future__ import annotations

import gc
import random
import sys
from argparse import Namespace
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from os import environ
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowmem import kernels, measure
from lowmem.errors import short_repr
from lowmem.nn.adapter import Adapter
from lowmem.nn.stored_module import StoredModule
from lowmem.testing.memory_baseline import BaselineKey, Figures, check_byte_figures
from lowmem.testing.user_model import check_model_and_inputs, exceptions_as_model_errors

# Fixed, since the kernel's scratch grows with them
THREADS = 2

_CONTAINERS = (list, tuple, set, frozenset, deque)
# Standard library classes that hold users' values
_NAMESPACES = (Namespace, SimpleNamespace, UserDict, UserList)


def memory_figures(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **named: Any
) -> tuple[BaselineKey, Figures]:
    """Measure a model on example inputs. The model is unchanged, except for what its own forward changes.

    Args:
        model: any module, on any device.
        *inputs: positional arguments of its forward.
        loss: returns a scalar for its output; None: the output's ``loss``, or the sum of its tensors.
        **named: keyword arguments of its forward.

    Returns:
        The key of the figures, and the figures in bytes: ``stored_bytes`` and its categories, ``trainable_bytes``
        (the size of the gradients), ``forward_bytes`` and ``step_bytes``.

    Raises:
        ModelError: it is not a module, is on the meta device, or fails on the inputs.
    """
    check_model_and_inputs(model, inputs, named)
    with _fixed_measurement_conditions() as kernel:
        with exceptions_as_model_errors(f"the forward of {type(model).__name__}"):
            forward = [measure.forward_bytes(model, *inputs, **named) for _ in range(2)][1]
        with exceptions_as_model_errors(f"the training step of {type(model).__name__}"):
            step = [measure.backward_bytes(model, *inputs, loss=loss, **named) for _ in range(2)][1]
        with exceptions_as_model_errors(f"counting what {type(model).__name__} stores"):
            figures = stored_figures(model)
    figures |= {"forward_bytes": forward, "step_bytes": step}
    tensors = [*model.parameters(), *model.buffers(), *measure.tensors_in([inputs, named])]
    elsewhere = next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), None)
    return BaselineKey.with_current_torch(elsewhere or kernel, THREADS), figures


def key_and_counted_figures(count_bytes: Callable[[], Mapping[str, int]]) -> tuple[BaselineKey, Figures]:
    """Call a function that counts bytes, under the conditions of ``memory_figures``.

    Args:
        count_bytes: returns the figures in bytes by name, such as ``{"peak_bytes": lowmem.measure.peak_bytes(run)}``.

    Returns:
        The key of the figures, and the figures.

    Raises:
        ValueError: there are no figures, a name does not end in ``_bytes``, or a figure is no number of bytes.
    """
    with _fixed_measurement_conditions() as kernel:
        figures = dict(count_bytes())
    if not figures or not all(str(name).endswith("_bytes") for name in figures):
        raise ValueError(f"figures={short_repr(figures)}: return one or more, each with a name such as peak_bytes")
    check_byte_figures("figures", figures)
    return BaselineKey.with_current_torch(kernel, THREADS), figures


def stored_figures(model: nn.Module) -> Figures:
    """Count the bytes of a model's distinct storages by category.

    Categories are codes of 4 and 8 bits, their scales, adapters, other parameters by dtype, buffers, and attributes.
    The latter are tensors, arrays, bytes and unregistered modules in plain attributes of modules, or in containers,
    namespaces and dataclasses there; of the packed weights of torch.ao, the unpacked bytes count.
    Categories without bytes are left out; ``stored_bytes`` and ``trainable_bytes`` are always present.
    """
    counted: set[int] = set()
    sizes: Figures = {}

    def count_storage_once(category: str, address: int, size: int) -> None:
        if address not in counted and size:
            counted.add(address)
            sizes[f"{category}_bytes"] = sizes.get(f"{category}_bytes", 0) + size

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            for address, size in _iterate_storage_addresses_and_bytes(parameter):
                count_storage_once(_parameter_category(module, name, parameter), address, size)
    for buffer in model.buffers():
        for address, size in _iterate_storage_addresses_and_bytes(buffer):
            count_storage_once("buffers", address, size)
    for value in _iterate_attribute_tensors_and_bytes(model):
        for address, size in _iterate_storage_addresses_and_bytes(value):
            count_storage_once("attributes", address, size)
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad and not is_lazy(p))
    return {**dict(sorted(sizes.items())), "stored_bytes": sum(sizes.values()), "trainable_bytes": trainable}


def _parameter_category(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if (
        isinstance(module, StoredModule)
        and name in module.part_parameter_names
        and name.endswith(("_packed", "_scales"))
    ):
        return "codes" if name.endswith("_packed") else "scales"
    if isinstance(module, Adapter):
        return "adapters"
    return str(parameter.dtype).removeprefix("torch.")


def _iterate_storage_addresses_and_bytes(
    value: Tensor | np.ndarray[Any, Any] | bytes | bytearray,
) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of each storage of a value; sparse tensors and wrapper subclasses have several."""
    if isinstance(value, bytes | bytearray):
        # In CPython the id is the address
        yield id(value), len(value)
    elif isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        yield value.ctypes.data, value.nbytes
    elif is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _iterate_storage_addresses_and_bytes(getattr(value, name))
    elif value.layout is torch.sparse_coo:
        yield from _iterate_storage_addresses_and_bytes(value._indices())
        yield from _iterate_storage_addresses_and_bytes(value._values())
    elif value.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (value.crow_indices(), value.col_indices(), value.values()):
            yield from _iterate_storage_addresses_and_bytes(part)
    elif value.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (value.ccol_indices(), value.row_indices(), value.values()):
            yield from _iterate_storage_addresses_and_bytes(part)
    elif not is_lazy(value):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def _iterate_attribute_tensors_and_bytes(model: nn.Module) -> Iterator[Any]:
    """Yield the tensors, arrays and bytes in plain attributes of a model's modules."""
    registered = set(model.modules())
    seen: set[int] = set()
    # Kept alive, so that no two get the same address
    unpacked: list[Any] = []
    waiting: list[Any] = [vars(module) for module in registered]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | np.ndarray | bytes | bytearray):
            yield value
        elif isinstance(value, nn.Module):
            if value not in registered:
                waiting.append(vars(value))
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, _CONTAINERS):
            waiting.extend(value)
        elif is_dataclass(value) and not isinstance(value, type):
            waiting.extend(getattr(value, field.name, None) for field in fields(value))
        elif isinstance(value, torch.ScriptObject):
            # By torch.ao, say
            packed = cast(Any, value)
            if packed._has_method("__getstate__"):
                unpacked.append(packed.__getstate__())
                waiting.append(unpacked[-1])
        elif isinstance(value, partial):
            waiting.extend((value.func, value.args, value.keywords, vars(value)))
        elif (
            not isinstance(value, type) and hasattr(value, "__dict__") and not _is_standard_library_class(type(value))
        ):
            waiting.append(vars(value))


def _is_standard_library_class(kind: type) -> bool:
    """Whether a class is of the standard library, whose objects (loggers, say) refer to unrelated ones."""
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names and not issubclass(kind, _NAMESPACES)


@contextmanager
def _fixed_measurement_conditions() -> Iterator[str]:
    """Fix all that figures depend on besides the model, and yield the name of the backend: the portable kernel, which
    allocates the same everywhere, or what a variable names. Garbage would be collected at arbitrary times: it is
    not."""
    threads, states = torch.get_num_threads(), (random.getstate(), np.random.get_state())
    collects = gc.isenabled()
    named = bool(environ.get(kernels.VARIABLE)) or "portable" not in kernels.available_cpu_backend_names()
    with torch.random.fork_rng(), nullcontext() if named else kernels.temporary_cpu_backend("portable"):
        try:
            torch.set_num_threads(THREADS)
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            gc.collect()
            gc.disable()
            yield kernels.backend().partition(":")[0]
        finally:
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(cast(Any, states[1]))
            if collects:
                gc.enable()
