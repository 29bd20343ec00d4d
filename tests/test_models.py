"""Models by name: variants, a user's own factory, and both together."""

import argparse

import pytest
import torch

from lowmem import Linear4Bit
from lowmem.__main__ import main
from lowmem.tools import models

FACTORY = """
import torch
from torch import nn

class Holder:
    model = staticmethod(lambda: nn.Sequential(nn.Linear(12, 3)))

def small():
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))

def fails():
    raise RuntimeError("no weights\\nat all")

def wrong():
    return 3

number = 4

def exits():
    raise SystemExit(3)

class Asserts(nn.Module):
    def forward(self, x):
        assert x.shape[-1] == 3

class Key(nn.Module):
    def forward(self, x):
        return {}["missing"]
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "user_models.py").write_text(FACTORY)
    (tmp_path / "broken_models.py").write_text("1 / 0")
    yield "user_models"
    __import__("sys").modules.pop("user_models", None)


def test_a_factory_is_found_in_the_working_directory_and_seeded(user_module):
    one, two = (models.make_model(f"{user_module}:small", seed=4) for _ in range(2))
    assert torch.equal(one[0].weight, two[0].weight)
    assert models.make_model(f"{user_module}:Holder.model")[0].out_features == 3


def test_a_variant_applies_to_a_factory(user_module):
    model = models.make_model(f"{user_module}:small@low_precision")
    assert type(model[0]) is type(model[2]) is Linear4Bit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_module:small", "cannot import 'missing_module': ModuleNotFoundError"),
        ("broken_models:small", "cannot import 'broken_models': ZeroDivisionError"),
        ("user_models:nothing", "'user_models' has no 'nothing'"),
        ("user_models:", "'user_models' has no ''"),
        ("user_models:number", "it is a int, not a callable"),
        ("user_models:fails", "calling it failed: RuntimeError: no weights"),
        ("user_models:exits", "calling it failed: SystemExit: 3"),
        ("user_models:wrong", "it returned a int, not a torch.nn.Module"),
        ("user_models:small@q4", "variant='q4' is unknown"),
        ("q4", "variant='q4' is unknown"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_a_wrong_name_says_what_is_wrong(name, message):
    with pytest.raises(ValueError, match=message):
        models.make_model(name)


def test_a_failing_call_names_the_model_and_the_remedy():
    with pytest.raises(
        ValueError, match=r"model='mine' cannot take this input: RuntimeError: mat1 and mat2.*check the input"
    ):
        models.run_model("mine", lambda: torch.nn.Linear(3, 3)(torch.ones(1, 4)))


@pytest.mark.parametrize("name", ["Asserts", "Key"])
@pytest.mark.parametrize("command", ["stats", "compare"])
def test_a_model_that_fails_in_any_way_is_one_line(user_module, name, command, capsys):
    assert main([command, f"{user_module}:{name}", f"{user_module}:{name}"]) == 2
    shown = capsys.readouterr().err
    assert f"model='{user_module}:{name}' cannot take this input" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64"])
def test_input_has_the_shape_and_dtype_that_were_asked_for(dtype):
    parser = argparse.ArgumentParser()
    models.add_input_arguments(parser)
    arguments = parser.parse_args(["--batch", "2", "--input-shape", "3,4", "--input-dtype", dtype])
    x = models.make_input(arguments)
    assert x.shape == (2, 3, 4)
    assert str(x.dtype) == f"torch.{dtype}"
    assert torch.equal(x, models.make_input(arguments))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "a", "²"])
def test_positive_int_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a positive integer"):
        models.positive_int(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "a"])
def test_positive_float_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a positive number"):
        models.positive_float(text)


def test_numbers_that_are_fine():
    assert (models.positive_int("12"), models.positive_float("1e-3")) == (12, 0.001)
