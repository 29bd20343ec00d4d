"""A batch is a Tensor, positional arguments, or keyword arguments; anything else is refused before the model runs."""

from collections import UserDict

import pytest
import torch
from torch import nn

from lowmem.transforms.calibration.model_runs import run_batch


class Sum(nn.Module):
    def forward(self, first, second=0.0):
        return first + 2 * second


def test_a_model_is_called_with_each_kind_of_batch():
    x = torch.ones(2)
    batches = (x, (x, x), [x, x], {"first": x, "second": x}, UserDict(first=x))
    assert [float(run_batch(Sum(), batch)[0]) for batch in batches] == [1, 3, 3, 3, 1]
    with pytest.raises(TypeError, match="a batch is a str; it must be a Tensor, a tuple or list"):
        run_batch(Sum(), "words")
