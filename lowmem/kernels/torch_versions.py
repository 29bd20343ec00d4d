"""What differs between the versions of torch that serve, and questions to its compiler that do not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
"""The version of torch, as (major, minor)."""

_F = TypeVar("_F", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Whether torch.export records a graph."""
    if TORCH >= (2, 12):
        return torch.compiler.is_exporting()
    # Earlier Dynamo says True of any graph
    return bool(torch.compiler._is_exporting_flag)


def is_exporting_without_dynamo() -> bool:
    """Whether torch.export records a graph by running the model, as it does unless strict=True."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def disable_dynamo(function: Any) -> None:
    """Let Dynamo run a function, and what it calls, as it is: after a graph break it would compile each of them.

    ``torch.compiler.disable`` does so, too, but imports the whole compiler.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))


def mark_constant_in_graphs(function: _F) -> _F:
    """Let Dynamo call a function while it records, and record the result as a constant.

    ``torch.compiler.assume_constant_result`` does no more, and imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
