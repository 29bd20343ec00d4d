"""Folders of PEFT: what PEFT wrote is computed as PEFT does, and what is wrong with others is said in time.

``samples/peft`` was written by PEFT itself, with the outputs that it computes: ``python -m tests.formats``.
"""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import nn

import lowmem
from lowmem import FileError, FourBit, Half, LoRA, adapter_layers, convert, load_adapter, save_adapter
from tests import refusing
from tests.io.formats.peft_model import TOKENS, filled, parts

SAMPLE = Path(__file__).parents[1] / "samples" / "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def refused(path, message, model=None):
    model = parts() if model is None else model
    with refusing.refused(model, FileError, message) as caught:
        load_adapter(model, path)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 700 + len(str(path))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **fields):
    """Write the sample's config, with other values."""
    content = json.loads((SAMPLE / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **fields}))


def test_an_adapter_of_peft_computes_what_peft_computes():
    expected = load((SAMPLE / "outputs.safetensors").read_bytes())["outputs"]
    model = load_adapter(parts(), SAMPLE)
    assert lowmem.adapter_names(model) == ["default"]
    assert set(adapter_layers(model, "default")) == {"embed", "fc", "conv", "experts.up", "experts.down"}
    with torch.no_grad():
        found, base = model(TOKENS), parts()(TOKENS)
    assert (found - expected).abs().max() < 1e-12
    assert (base - expected).abs().max() > 0.1
    trained = {name for name, one in model.named_parameters() if one.requires_grad and "lora" not in name}
    assert trained == {"head.weight", "head.bias", "conv.bias", "fc.bias"}


def test_its_values_replace_those_of_an_adapter_that_is_there(folder):
    model = load_adapter(parts(), folder, "mine")
    expected = state_of(model)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.zero_()
    load_adapter(model, folder, "mine")
    assert all(torch.equal(value, expected[key]) for key, value in state_of(model).items())
    load_adapter(model, folder, "second")
    assert lowmem.adapter_names(model) == ["mine", "second"]
    change(folder, lora_alpha=4)
    refused(folder, "has an adapter 'default' of other layers", load_adapter(parts(), SAMPLE))


RANKS, ALPHAS = st.integers(1, 5), st.one_of(st.none(), st.integers(1, 9), st.floats(1e-3, 1e3))
PLACES = ["embed", "fc", "inner.fc", "conv", "experts", "attention", "head"]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(PLACES), min_size=1, unique=True),
    st.lists(st.tuples(RANKS, ALPHAS), min_size=7, max_size=7),
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.sampled_from([(), (Half(),), (FourBit("nf4", block_size=8),)]),
)
@example(["fc"], [(2, 3.5)] * 7, [True] * 7, ())  # of which "inner.fc" ends alike
def test_bits_of_a_b_and_scale_come_back(tmp_path, places, sizes, stabilized, base):
    model = convert(parts().float(), *base, where=lambda *_: True) if base else parts()
    kept = copy.deepcopy(model)
    for place, (rank, alpha), rs in zip(places, sizes, stabilized, strict=False):
        rs = rs if base else stabilized[0]  # all alike, or not
        lowmem.add_adapter(
            model, "default", LoRA(rank, alpha, rank_stabilized=rs), where=lambda p, m, at=place: p == at
        )
    own = adapter_layers(model, "default")
    for one in own.values():
        nn.init.normal_(one.lora_a)
        nn.init.normal_(one.lora_b)
    target = tmp_path / str(len(list(tmp_path.iterdir())))
    save_adapter(model, target, format="peft")
    found = adapter_layers(load_adapter(kept, target), "default")
    assert found.keys() == own.keys()
    for place, one in own.items():
        same = found[place]
        assert torch.equal(one.lora_a, same.lora_a)
        assert torch.equal(one.lora_b, same.lora_b)
        alike = len({part.technique.rank_stabilized for part in own.values()}) == 1
        assert one.scaling == same.scaling if alike else abs(one.scaling / same.scaling - 1) < 1e-15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0 must be a positive integer"),
        ({"r": 10**18}, r"at rank 10{18}"),
        ({"r": 3}, "at rank 3"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a positive number"),
        ({"lora_dropout": 1}, "lora_dropout=1 must be at least 0 and below 1"),
        ({"use_rslora": 1}, "use_rslora=1 must be true or false"),
        ({"bias": "some"}, "bias='some' is none of none, all, lora_only"),
        ({"bias": "none"}, "its tensor .*bias' is one of the base, as that of a resized vocab"),
        ({"rank_pattern": []}, r"rank_pattern=\[\] must be an object"),
        ({"rank_pattern": {"fc": 2.0}}, "rank_pattern of 'fc'=2.0 must be"),
        ({"rank_pattern": {r"(?=fc)": 2}}, r"rank_pattern has the regular expression '\(\?=fc\)'"),
        ({"alpha_pattern": {"(.*)*" * 300: 2}}, "alpha_pattern has the regular expression.*name the layers by"),
        ({"rank_pattern": {".*a" * 2000: 2}}, "rank_pattern has too many patterns with .* or |: name the layers by"),
        ({"alpha_pattern": {"fc": -1}}, "alpha_pattern of 'fc'=-1 must be a positive number"),
        ({"target_modules": [1]}, r"target_modules=\[1\] must be a list of names"),
        ({"target_modules": ["fc", "conv"]}, "embed.* belongs to nothing|embed.* is one of the base"),
        ({"target_modules": ["fc", "conv", "embed"], "exclude_modules": None}, "lacks the tensor .*inner.fc"),
        ({"target_modules": ["fc", "conv", "embed", "norm"]}, "norm is a LayerNorm: PEFT does not adapt such"),
        ({"target_modules": ["nothing"], "target_parameters": None}, "names no layer of the model: it is of another"),
        ({"target_parameters": "experts.up"}, "target_parameters='experts.up' must be a list"),
        ({"target_parameters": ["norm.weight"]}, "norm, in a LayerNorm here"),
        ({"modules_to_save": ["fc"]}, "lacks the tensor base_model.model.fc.weight"),
        ({"layers_to_transform": ["1"]}, r"layers_to_transform=\['1'\] must be numbers of layers"),
        ({"peft_type": "IA3"}, "is of the type 'IA3', and lowmem loads LORA; merge it in PEFT, merge_and_unload"),
        ({"peft_type": None}, "names no peft_type"),
        ({"\x1b[2J" * 500: 3}, r"'\\x1b\[2J.*' *=3 is something that lowmem does not know|x1b"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 must be a string"),
    ],
)  # fmt: skip
def test_a_config_that_says_something_else_is_refused(folder, fields, message):
    change(folder, **fields)
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.lora_A.weight", None, r"lacks the tensor .*fc.lora_A.weight, which its config leads to"),
        ("head.bias", None, "lacks the tensor .*head.bias"),
        ("../x.lora_A.weight", torch.ones(1), r"\.\./x.* belongs to nothing"),
        ("inner.fc.lora_A.weight", torch.ones(2, 8), "inner.fc.* belongs to nothing"),
        ("norm.weight", torch.ones(8), "norm.weight' is one of the base"),
        ("fc.lora_B.bias", torch.ones(8), "is a lora_B.bias, of which lowmem has no form"),
        ("fc.lora_magnitude_vector", torch.ones(8), "is a lora_magnitude_vector"),
        ("fc.lora_A.weight", torch.ones(2, 9), r"\(2, 9\) in it; the model takes \(2, 8\)"),
        ("fc.lora_A.weight", torch.ones(16), r"\(16,\) in it; the model takes \(2, 8\)"),
        ("fc.lora_A.weight", torch.ones(2, 8, dtype=torch.int64), "int64 .* takes .* floating point"),
        ("fc.lora_A.weight", torch.ones(2, 8, dtype=torch.bool), "bool .* takes .* floating point"),
        ("head.weight", torch.ones(5, 8), r"\(5, 8\) in it; the model takes \(4, 8\)"),
        ("embed.base_layer.weight", torch.ones(20, 8), "trained on another base: embed"),
        ("embed.base_layer.weight", torch.ones(21, 8), "trained on another base: embed"),
        ("embed.base_layer.weight", torch.full((20, 8), torch.nan), "trained on another base: embed"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, name, value, message):
    tensors = load((SAMPLE / WEIGHTS).read_bytes())
    if value is None:
        del tensors[PREFIX + name]
    else:
        tensors[PREFIX + name] = value
    save_file(tensors, folder / WEIGHTS)
    refused(folder, message)


def test_files_without_names_of_peft_are_refused(folder):
    save_file({}, folder / WEIGHTS)
    refused(folder, "lacks the tensor")
    save_file({"fc.lora_A.weight": torch.ones(2, 8)}, folder / WEIGHTS)
    refused(folder, "'fc.lora_A.weight' does not begin with base_model.model., as PEFT's do")


def test_a_copy_of_the_embedding_that_the_adapter_changes_is_compared_and_left_out(folder):
    tensors = load((folder / WEIGHTS).read_bytes())  # load_file may map the file, which is written over below
    expected = load((folder / "outputs.safetensors").read_bytes())["outputs"]
    for rounded in (parts().embed.weight.detach(), parts().embed.weight.detach().bfloat16()):
        save_file({**tensors, f"{PREFIX}embed.base_layer.weight": rounded}, folder / WEIGHTS)
        with torch.no_grad():
            assert (load_adapter(parts(), folder)(TOKENS) - expected).abs().max() < 1e-12
    stored = convert(parts().float(), FourBit("nf4", block_size=8), where=lambda path, _: path == "embed")
    load_adapter(stored, folder)
    save_file({**tensors, f"{PREFIX}embed.base_layer.weight": -rounded}, folder / WEIGHTS)
    refused(folder, "another base: embed", convert(parts().float(), FourBit("nf4"), where=lambda p, _: p == "embed"))


def test_what_is_stored_here_takes_no_values(folder):
    for technique in (Half(), FourBit("nf4", block_size=8)):
        model = convert(parts().float(), technique, where=lambda path, _: path == "head")
        refused(
            folder, r"holds head whole \(modules_to_save\), and head is stored by lowmem here: leave it as", model
        )
    change(folder, modules_to_save=["head"])
    model = convert(parts().float(), Half(), where=lambda path, _: path == "fc")
    refused(folder, "holds the bias of fc, which is stored in 16 bits here", model)
    refused(folder, "and head is adapted here", convert(parts(), LoRA(2), where=lambda path, _: path == "head"))


def test_modules_that_are_one_here_must_have_equal_values(folder):
    tensors = load((folder / WEIGHTS).read_bytes())

    def tied():
        model = parts()
        model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())
        model.head.bias = nn.Parameter(model.head.bias.detach().clone())
        model.tail = nn.Linear(8, 4).double()
        model.tail.weight = model.head.weight
        return model

    change(folder, modules_to_save=["head", "tail"])
    same = {f"{PREFIX}tail.{name}": tensors[f"{PREFIX}head.{name}"] for name in ("weight", "bias")}
    save_file({**tensors, **{key: value.clone() for key, value in same.items()}}, folder / WEIGHTS)
    model = load_adapter(tied(), folder)
    assert torch.equal(model.tail.weight, tensors[f"{PREFIX}head.weight"])
    assert model.tail.weight is model.head.weight
    save_file({**tensors, **{key: value + 1 for key, value in same.items()}}, folder / WEIGHTS)
    refused(folder, "differ in it, and are one tensor in the model: untie them first", tied())
    change(folder, modules_to_save=["head"])
    save_file(tensors, folder / WEIGHTS)
    refused(folder, r"holds head.weight \(modules_to_save\), which is tail.weight, too, .*untie them first", tied())
    model = tied()
    model.head.load_state_dict({name: tensors[f"{PREFIX}head.{name}"] for name in ("weight", "bias")})
    load_adapter(model, folder)  # the values of all are those that PEFT keeps
    model = parts()
    model.tail = model.head
    refused(folder, r"holds head.weight \(modules_to_save\), which is tail.weight, too", model)


def test_another_architecture_is_refused_by_name(folder):
    narrow = filled(nn.ModuleDict({"fc": nn.Linear(4, 4)}))
    refused(folder, "takes|names|belongs|lacks", narrow)
    refused(folder, "PEFT does not adapt a model that is a layer itself|names no layer|another", nn.Linear(8, 8))
    shared = parts()
    shared.again = shared.fc
    refused(folder, "fc is again, too, of which PEFT would adapt one alone", shared)


def test_without_target_modules_the_tensors_say_what_is_adapted(tmp_path):
    model = convert(parts(), LoRA(2), where=lambda path, _: path in ("fc", "embed", "experts"))
    for one in adapter_layers(model, "default").values():
        nn.init.normal_(one.lora_a)
        nn.init.normal_(one.lora_b)
    save_adapter(model, tmp_path / "a", format="peft")
    for given_as in (None, "all-linear", r"(?!inner)(fc|embed)", "(a*)*b"):
        content = json.loads((tmp_path / "a" / CONFIG).read_text())
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**content, "target_modules": given_as}))
        loaded = load_adapter(parts(), tmp_path / "a")
        assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_a_name_of_another_base_warns(folder):
    class Config:
        _name_or_path = "/models/llama-3-8b/"

    model = parts()
    model.config = Config()
    change(folder, base_model_name_or_path="hub/Llama-3-8B")
    load_adapter(model, folder)
    change(folder, base_model_name_or_path="hub/Qwen")
    with pytest.warns(
        UserWarning, match="trained on 'hub/Qwen', and the model comes from '/models/llama-3-8b/'"
    ) as told:
        load_adapter(model, folder)
    assert told[0].filename == __file__


def test_other_folders_and_files_say_what_they_are(folder, tmp_path):
    for name in (CONFIG, WEIGHTS):
        refused(folder / name, "a part of a folder of PEFT: name the folder, '.*adapter'")
    refused(tmp_path, r"its adapters lie in folders: name one, as '.*adapter'")
    (tmp_path / "gguf").write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "gguf", "it is a GGUF file")
    (folder / WEIGHTS).rename(tmp_path / "kept")
    refused(folder, "it has no adapter_model.safetensors; get it again")
    ran = tmp_path / "ran"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (Path.touch, (ran,))})()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(bomb))
    refused(folder, "adapter_model.bin is a pickle, which could run code: lowmem executed nothing")
    assert not ran.exists()
    (folder / WEIGHTS).write_bytes(pickle.dumps(bomb))
    refused(folder, "executed nothing")
    assert not ran.exists()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(OSError, match="it is a directory"):
        load_adapter(parts(), folder)
    (folder / CONFIG).unlink()
    refused(folder, "it has no adapter_config.json: name a folder that save_pretrained of PEFT")
    (folder / "config.json").write_text("{}")
    refused(folder, "it is a model's folder, without an adapter")
