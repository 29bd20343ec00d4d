"""Turns failures of a user's model into ModelErrors, which differ from a failing gate."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lowmem.errors import error_type_and_first_line, truncated_error_line
from lowmem.measure import tensors_in

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[1])


class ModelError(RuntimeError):
    """The user's model cannot be measured on its input; the message is one line."""


def check_model_and_inputs(model: object, *inputs: Any) -> None:
    """Raise a ModelError if a model is no module, or it or an input is on the meta device."""
    if not isinstance(model, nn.Module):
        raise ModelError(truncated_error_line(f"the model must be a torch.nn.Module, found {_type_text(model)}"))
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in [*named, *(("an input", tensor) for tensor in tensors_in(inputs))]:
        if not is_lazy(tensor) and tensor.is_meta:
            raise ModelError(
                truncated_error_line(f"{name} is on the meta device, without values: load the model first")
            )


def _type_text(value: object) -> str:
    """Return the type of a value for errors; passing the class instead of a model is a common mistake."""
    if isinstance(value, type):
        return f"the class {value.__name__}: call it"
    return type(value).__name__


@contextmanager
def exceptions_as_model_errors(operation_name: str) -> Iterator[None]:
    """Turn any exception of the block into a ModelError with the exception and its line in the user's code.

    Args:
        operation_name: of the code in the block, for the message.
    """
    try:
        yield
    except StopIteration as error:
        # No ``from error``: contextlib re-raises it if it is the cause of a RuntimeError
        raise _model_error(operation_name, error) from None
    except (Exception, SystemExit) as error:
        # A model may call sys.exit
        raise _model_error(operation_name, error) from error


def _model_error(operation_name: str, error: BaseException) -> ModelError:
    return ModelError(
        truncated_error_line(
            f"{operation_name} fails on the example input: "
            f"{error_type_and_first_line(error)}{_user_code_location_text(error)}"
        )
    )


def _user_code_location_text(error: BaseException) -> str:
    """Return the innermost line outside torch and lowmem where an error was raised; "" if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not any(path.is_relative_to(package) for package in _LIBRARIES):
            return f" ({path.name}:{frame.lineno} in {frame.name})"
    return ""
