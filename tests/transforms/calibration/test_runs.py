"""A batch is a Tensor, positional arguments, or keyword arguments; anything else is refused before the model runs."""

import pytest
import torch
from torch import nn

from lowmem.transforms.calibration.runs import run_batch


class Sum(nn.Module):
    def forward(self, first, second=0.0):
        return first + 2 * second


def test_a_model_is_called_with_each_kind_of_batch():
    x = torch.ones(2)
    found = [run_batch(Sum(), batch) for batch in (x, (x, x), [x, x], {"first": x, "second": x})]
    assert [float(one[0]) for one in found] == [1, 3, 3, 3]
    with pytest.raises(TypeError, match="a batch is a str; it must be a Tensor, a tuple or list"):
        run_batch(Sum(), "words")
