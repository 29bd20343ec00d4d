"""Models by name: variants, a user's own factory, and both together."""

import pytest
import torch

from lowmem import Linear4Bit
from lowmem.__main__ import main
from lowmem.tools import named_models

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

class Exits(nn.Module):
    def forward(self, x):
        raise SystemExit(0)

class Base(BaseException):
    pass

def base():
    raise Base("odd")

def lines():
    raise ValueError("first\\nsecond \\x1b[31m")

def no_memory():
    raise MemoryError

def no_tensor_memory():
    return nn.Linear(2**40, 2**40)

def interrupted():
    raise KeyboardInterrupt

class Overrides(nn.Module):
    def named_modules(self, *args, **options):
        raise LookupError("not listed")

class Meta(type):
    def __getattr__(cls, name):
        raise LookupError("no attributes")

class Odd(metaclass=Meta):
    pass
"""


@pytest.fixture
def user_models(user_module):
    user_module("user_models", FACTORY)
    user_module("broken_models", "1 / 0")
    return "user_models"


def test_a_factory_is_found_in_the_working_directory_and_seeded(user_models):
    one, two = (named_models.build_or_load_named_model(f"{user_models}:small", seed=4) for _ in range(2))
    assert torch.equal(one[0].weight, two[0].weight)
    assert named_models.build_or_load_named_model(f"{user_models}:Holder.model")[0].out_features == 3


def test_a_variant_applies_to_a_factory(user_models):
    model = named_models.build_or_load_named_model(f"{user_models}:small@low_precision")
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
        ("q4", r"model='q4' is no variant, and no folder here: name a variant .*a GGUF file, owner/name of the Hub"),
        ("absent.safetensors", "model='absent.safetensors' is no folder: name a variant .*, a folder, a GGUF"),
        ("user_models.py", "model='user_models.py' is a file: name a variant"),
        ("", "variant='' is unknown: choose from"),
        ("user_models:small@", "variant='' is unknown: choose from"),
        (":small", "cannot import '': ValueError: Empty module name"),
        ("user_models:base", "calling it failed: Base: odd"),
        ("user_models:lines", "calling it failed: ValueError: first$"),
        ("user_models:no_memory", "calling it failed: out of memory"),
        ("user_models:no_tensor_memory", "calling it failed: "),
        ("user_models:Overrides@half_precision", "cannot be built: LookupError: not listed"),
        ("user_models:Odd.make", "looking up 'Odd.make' failed: LookupError: no attributes"),
    ],
)
@pytest.mark.usefixtures("user_models")
def test_a_wrong_name_says_what_is_wrong(name, message, refused):
    with pytest.raises(ValueError, match=message) as raised:
        named_models.build_or_load_named_model(name)
    assert len(str(raised.value)) < 250
    assert not any(word in str(raised.value) for word in (".cpp", "Exception raised"))
    refused("stats", name)


def test_a_factory_that_is_interrupted_is_an_interrupt(user_models, capsys):
    assert main(["stats", f"{user_models}:interrupted"]) == 130
    assert "interrupted; what was not finished is not there" in capsys.readouterr().err


def test_a_working_directory_that_is_gone_is_not_looked_into(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert named_models.build_or_load_named_model("torch.nn:ReLU").training
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["Asserts", "Key", "Exits"])
@pytest.mark.parametrize("command", ["stats", "compare"])
def test_a_model_that_fails_in_any_way_is_one_line(user_models, name, command, refused):
    told = refused(command, f"{user_models}:{name}", f"{user_models}:{name}")
    assert f"model='{user_models}:{name}' cannot take this input" in told


TOKENS = """
import torch
from torch import nn

lm = lambda: nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, ids):
        return self.layer(self.layer.weight[ids])

class OneHot(Table):
    def forward(self, ids):
        return self.layer(nn.functional.one_hot(ids, 4).float())

class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(10, 4), nn.Embedding(8, 4)
    def forward(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[-1]))

class Named(Short):
    def forward(self, *, input_ids):
        return super().forward(input_ids)
"""
IDS = "it takes ids: --input-dtype int64 --input-shape N"


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("lm", [], IDS),
        ("lm@low_precision", [], IDS),
        ("lm@half_precision", [], IDS),
        ("Table", [], IDS),
        ("OneHot", [], IDS),
        ("Short", ["--input-dtype", "int64"], "--input-shape N"),
        ("Named", ["--input-dtype", "int64"], "make a module that passes it on"),
        ("Named", [], "make a module that passes it on"),
    ],
)
@pytest.mark.parametrize("command", ["stats", "compare", "report"])
def test_a_model_of_tokens_is_told_the_options_of_its_input(user_module, command, name, options, remedy, refused):
    user_module("token_models", TOKENS)
    model = f"token_models:{name}"
    argv = {
        "stats": ["stats", model],
        "compare": ["compare", model, model],
        "report": ["report", model, "out.html"],
    }[command]
    if "@" not in name or command != "report":  # which takes models without techniques
        assert remedy in refused(*argv, *options)
