"""A batch is a Tensor, positional arguments, or keyword arguments; anything else is refused before the model runs."""

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowmem import FourBit, calibrate
from lowmem.transforms.calibration.model_runs import linear_layers_in_fast_dtype, run_batch


class Sum(nn.Module):
    def forward(self, first, second=0.0):
        return first + 2 * second


def test_a_model_is_called_with_each_kind_of_batch():
    x = torch.ones(2)
    batches = (x, (x, x), [x, x], {"first": x, "second": x}, UserDict(first=x))
    assert [float(run_batch(Sum(), batch)[0]) for batch in batches] == [1, 3, 3, 3, 1]
    with pytest.raises(TypeError, match="a batch is a str; it must be a Tensor, a tuple or list"):
        run_batch(Sum(), "words")


class RecordedLinearDtypes(TorchFunctionMode):
    """The dtypes of the weights that torch multiplies with."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            self.dtypes.append(args[1].dtype)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_in_float16_compute_in_float32_inside_the_block(bias):
    """Few processors multiply in float16, and so it counts as slow on all."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 8, bias, dtype=torch.float16), torch.randn(3, 24, dtype=torch.float16)
    with RecordedLinearDtypes() as seen, linear_layers_in_fast_dtype(layer), torch.no_grad():
        inside = layer(x)
    assert seen.dtypes == [torch.float32]
    exact = nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    assert inside.dtype is torch.float16
    # One rounding of the result, of at most half a unit in the last place, and those of float32 sums
    assert ((inside.double() - exact).abs() <= 2**-11 * exact.abs() + 2**-15).all()
    assert "forward" not in vars(layer)
    with linear_layers_in_fast_dtype(layer), pytest.raises(RuntimeError, match="same dtype|Half"):
        layer(x.float())


def test_fast_dtypes_and_forwards_of_users_stay():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.float16))
    layers[1].forward = lambda x: x + 1
    with linear_layers_in_fast_dtype(layers):
        assert "forward" not in vars(layers[0])
        assert torch.equal(layers[1](torch.ones(8)), torch.full((8,), 2.0))


def test_a_model_in_float16_is_calibrated_by_products_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).half()
    with RecordedLinearDtypes() as seen:
        calibrate(model, [torch.randn(64, 32).half()], FourBit(embeddings="4bit"))
    assert seen.dtypes
    assert torch.float16 not in seen.dtypes
    assert model[2].quantized.method == "calibrated"
    assert model(torch.randn(2, 32).half()).dtype is torch.float16
