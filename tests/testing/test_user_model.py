"""What fails in a user's model is one line that says what, how and where."""

import pytest
import torch
from torch import nn

from lowmem.testing.memory import memory_figures
from lowmem.testing.user_model import ModelError, exceptions_as_model_errors

X = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (nn.Linear, (X,), "the model must be a torch.nn.Module, found the class Linear: call it"),
        (None, (X,), "the model must be a torch.nn.Module, found NoneType"),
        (nn.Linear(64, 4, device="meta"), (X,), "weight is on the meta device, without values: load the model first"),
        (nn.Linear(64, 4), (X.to("meta"),), "an input is on the meta device"),
        (nn.Linear(64, 4), (), r"the forward of Linear fails on the example input: TypeError: .*missing 1 required"),
        (
            nn.Linear(63, 4),
            (X,),
            r"forward of Linear fails on the example input: RuntimeError: .*mat1 and mat2 .*63x4\)$",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line_that_says_why(model, inputs, said):
    with pytest.raises(ModelError, match=said) as raised:
        memory_figures(model, *inputs)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


def test_the_innermost_line_of_the_user_s_own_code_that_failed_is_named():
    def cut(x):
        return x.reshape(-1, 3)

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(cut(x))

    with pytest.raises(ModelError, match=r"invalid for input of size 128 \(test_user_model.py:\d+ in cut\)$"):
        memory_figures(Own(64, 4), X)


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration()])
def test_a_model_that_ends_the_program_or_an_iterator_fails(error):
    """As ``next(self.parameters())`` in a model that has none: contextlib takes it for the end of a generator."""
    with (
        pytest.raises(ModelError, match=f"it fails on the example input: {type(error).__name__}"),
        exceptions_as_model_errors("it"),
    ):
        raise error


def test_an_interruption_is_not_the_models_failure():
    with pytest.raises(KeyboardInterrupt), exceptions_as_model_errors("it"):
        raise KeyboardInterrupt
