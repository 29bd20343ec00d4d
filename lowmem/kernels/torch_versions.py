"""What older versions of torch that serve lack, in one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

__all__ = [
    "TORCH",
    "ask_classes_in_graphs",
    "constant_in_graphs",
    "exports_without_dynamo",
    "is_exporting",
    "leave_to_eager",
    "outside_of_graphs",
    "register_vmap",
]

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
"""The version of torch, as (major, minor)."""

_F = TypeVar("_F", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Whether torch.export records a graph; False where torch cannot tell, before 2.7."""
    if TORCH >= (2, 12):
        return torch.compiler.is_exporting()
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))  # earlier Dynamo says True of any graph


def exports_without_dynamo() -> bool:
    """Whether torch.export records a graph by running the model, as it does unless strict=True; False before 2.9."""
    return TORCH >= (2, 9) and torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def outside_of_graphs(function: _F) -> _F:
    """Run a function eagerly where torch's compiler cannot take stored tensors into a graph, before 2.9.

    Where it is called, the graph ends and the next one begins, as with ``torch.compiler.disable``. That imports the
    whole compiler, and serves only where the older way to do it is gone.
    """
    if TORCH >= (2, 9):
        return function
    frames = torch._C._dynamo.eval_frame
    if not hasattr(frames, "skip_code"):
        return torch.compiler.disable(function)  # type: ignore[no-any-return]

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        compiler = frames.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            frames.set_eval_frame(compiler)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    frames.skip_code(run.__code__)  # type: ignore[attr-defined]
    return cast(_F, run)


def leave_to_eager(function: Any) -> None:
    """Let Dynamo run a function, and what it calls, as it is: after a graph break it would compile each of them."""
    dynamo: Any = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "set_code_exec_strategy"):
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    elif hasattr(dynamo, "skip_code"):  # of the function alone, in older versions
        dynamo.skip_code(function.__code__)


def constant_in_graphs(function: _F) -> _F:
    """Let Dynamo call a function while it records, and record the result as a constant.

    ``torch.compiler.assume_constant_result`` does no more, and imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_vmap(operator: Any, rule: Callable[..., Any], library: torch.library.Library) -> None:
    """Let vmap compute an operator by a rule; before 2.5, and without one, it loops over the examples and warns."""
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(operator, rule, lib=library)


@constant_in_graphs
def ask_classes_in_graphs() -> bool:
    """Let Dynamo ask the class of a tensor where eager torch does, and it would not: of writes, and of ``abs``.

    It has a list of the functions for which it asks, which lacks ``torch.relu_`` and its like. To be called in a
    graph that is being recorded, where Dynamo has been imported.
    """
    import torch._dynamo.variables as variables

    asked: set[Any] = getattr(variables.torch, "get_overridable_functions", set)()
    asked.update(one for name in dir(torch) if _is_write(name) and callable(one := getattr(torch, name)))
    kind: Any = variables.torch_function.TensorWithTFOverrideVariable
    if hasattr(kind, "nb_absolute_impl"):
        kind.nb_absolute_impl = lambda self, tx: self.call_method(tx, "__abs__", [], {})
    return True


def _is_write(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
