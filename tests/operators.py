"""What torch expects of an operator of ours."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch


def assert_operator(operator: torch._ops.OpOverload, arguments: Sequence[Any]) -> None:
    """Run torch's checks of the schema, and of gradients, fake tensors and recorded graphs.

    From torch 2.15 on they read ``grad`` of copies that autograd made of the arguments. Torch hides the warning of
    that where it is printed, but not where it is an error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(operator, tuple(arguments))
