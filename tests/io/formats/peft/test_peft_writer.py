"""What is written for PEFT: a config that means the same there, and what PEFT has no form of is refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowmem
from lowmem import Half, LoRA, adapter_layers, convert, load_adapter, save_adapter
from tests.io.formats.peft_model import TOKENS, Parts, parts


def adapted(*places, technique=None, base=None):
    model = convert(base or parts(), technique or LoRA(2, 6), where=lambda path, _: path in places)
    for one in adapter_layers(model, "default").values():
        nn.init.normal_(one.lora_b)
    return model


def written(model, folder, **options):
    save_adapter(model, folder, format="peft", **options)
    assert sorted(one.name for one in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return json.loads((folder / "adapter_config.json").read_text())


def trains(*names):
    def change(model):
        for name in names:
            dict(model.named_parameters())[name].requires_grad_()

    return change


def test_a_config_names_layers_by_full_paths(tmp_path):
    config = written(adapted("inner.fc", "conv", "experts"), tmp_path / "a")
    assert config["target_modules"] == ["conv", "inner.fc"]
    assert config["target_parameters"] == ["experts.down", "experts.up"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 6, False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert (config["bias"], config["peft_type"], config["fan_in_fan_out"]) == ("none", "LORA", False)
    assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == {
        f"base_model.model.{path}.lora_{part}.weight"
        for path in ("conv", "inner.fc", "experts", "experts.base_layer")
        for part in "AB"
    }


class Stack(nn.Module):
    """Layers of two projections each, and modules elsewhere that have the names in ``others``."""

    def __init__(self, *others):
        super().__init__()
        names = ("q_proj", "v_proj")
        self.layers = nn.ModuleList(nn.ModuleDict({one: nn.Linear(8, 8) for one in names}) for _ in range(3))
        self.vision = nn.ModuleDict({one: nn.Linear(8, 8) for one in others})


@pytest.mark.parametrize(
    ("others", "left_out", "targets"),
    [
        ((), (), ["q_proj", "v_proj"]),
        (("head",), (), ["q_proj", "v_proj"]),
        (("v_proj",), (), ["layers.0.v_proj", "layers.1.v_proj", "layers.2.v_proj", "q_proj"]),
        ((), ("layers.1.q_proj",), ["layers.0.q_proj", "layers.2.q_proj", "v_proj"]),
        (("layers",), (), ["q_proj", "v_proj"]),
    ],
)
def test_names_stand_for_paths_where_they_mean_the_same_modules(tmp_path, others, left_out, targets):
    def takes(path, _):
        return path.startswith("layers.") and path not in left_out

    model = convert(Stack(*others), LoRA(2), where=takes)
    assert written(model, tmp_path / "a")["target_modules"] == targets
    loaded = load_adapter(Stack(*others), tmp_path / "a")
    assert adapter_layers(loaded, "default").keys() == adapter_layers(model, "default").keys()


def test_names_are_not_taken_for_what_has_another_name_as_its_path(tmp_path):
    """A name is the end of all paths, also of modules in several places and of those that no adapter takes."""
    model = Stack("norm")
    model.vision["q_proj"] = nn.LayerNorm(8)
    model.also = model.vision["norm"]
    model.vision["also"] = nn.ModuleDict({"v_proj": model.vision["norm"]})
    convert(model, LoRA(2), where=lambda path, _: path.endswith(("q_proj", "v_proj")) and "layers" in path)
    paths = [f"layers.{number}.{name}" for number in range(3) for name in ("q_proj", "v_proj")]
    assert written(model, tmp_path / "a")["target_modules"] == paths


def test_a_path_that_ends_another_one_is_written_as_a_pattern(tmp_path):
    config = written(adapted("fc", "head"), tmp_path / "a")
    assert config["target_modules"] == "fc|head"
    loaded = load_adapter(parts(), tmp_path / "a")
    assert set(adapter_layers(loaded, "default")) == {"fc", "head"}


def test_ranks_and_alphas_of_single_layers_are_patterns_of_whole_paths(tmp_path):
    technique = LoRA(2, 6, ranks={"inner.fc": 3}, alphas={"head": 5, "experts.up": None}, rank_stabilized=True)
    config = written(adapted("inner.fc", "head", "conv", "experts", technique=technique), tmp_path / "a")
    assert config["rank_pattern"] == {r"^inner\.fc": 3}
    assert config["alpha_pattern"] == {"^head": 5, r"^experts\.up": 2}
    assert config["use_rslora"] is True
    model = lowmem.add_adapter(
        adapted("fc"), "default", LoRA(4, 6, rank_stabilized=True), where=lambda p, _: p == "conv"
    )
    config = written(model, tmp_path / "b")
    assert (config["use_rslora"], config["alpha_pattern"]) == (False, {"^conv": 12.0})


def test_dropouts_that_peft_has_no_form_of_warn(tmp_path):
    assert written(adapted("fc", technique=LoRA(2, dropout=0.25)), tmp_path / "a")["lora_dropout"] == 0.25
    model = lowmem.add_adapter(adapted("fc", "conv"), "default", LoRA(2, dropout=0.5), where=lambda p, _: p == "head")
    with pytest.warns(
        UserWarning, match="PEFT has one for all layers: lora_dropout=0 is written, not 0, 0.5"
    ) as told:
        save_adapter(model, tmp_path / "b", format="peft")
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="none where parameters are adapted: lora_dropout=0 is written, not 0.1"):
        save_adapter(adapted("experts", technique=LoRA(2, dropout=0.1)), tmp_path / "c", format="peft")


def test_what_trains_of_the_base_is_written_with_the_adapter(tmp_path):
    model = adapted("fc", "attention")
    trains("norm.weight", "head.weight", "head.bias", "fc.bias", "attention.in_proj_bias")(model)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.5)
    config = written(model, tmp_path / "a")
    assert config["modules_to_save"] == ["norm", "head"]
    assert config["bias"] == "lora_only"
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "a" / "adapter_model.safetensors")}
    assert {key for key in keys if "lora" not in key} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias", "fc.base_layer.bias",
        "attention.base_layer.in_proj_bias",
    }  # fmt: skip
    loaded = load_adapter(parts(), tmp_path / "a")
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    model.conv.bias.requires_grad_()
    assert written(model, tmp_path / "b")["bias"] == "all"
    load_adapter(parts(), tmp_path / "b")


class Bare(nn.Module):
    """Has a parameter of its own, and paths of which one is the end of another."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.layout = nn.ModuleDict({"out": nn.Linear(4, 4)})
        self.block = nn.ModuleDict({"experts": Parts().experts})
        self.experts = Parts().experts


@pytest.mark.parametrize(
    ("places", "change", "message"),
    [
        (["fc"], trains("scale"), "scale trains, and PEFT cannot save parameters of the model itself: freeze it"),
        (["fc"], trains("fc.weight"), "fc: its weight trains, and PEFT cannot train a weight beside its adapter"),
        (["fc"], trains("out.weight"), "out: its weight trains, and PEFT would take layout for it, whose path"),
        (["experts"], None, "block.experts.* ends as a parameter that the adapter changes, and PEFT would adapt it"),
    ],
)
def test_what_peft_would_read_otherwise_is_refused_by_name(tmp_path_factory, places, change, message):
    folder = tmp_path_factory.mktemp("a") / "adapter"
    model = convert(Bare(), LoRA(2), where=lambda path, _: path in places)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, folder, format="peft")
    assert list(folder.parent.iterdir()) == []


def test_what_peft_cannot_adapt_is_refused_and_nothing_is_written(tmp_path):
    model = convert(parts(), LoRA(2), where=lambda path, _: path.startswith("attention"))
    with pytest.raises(ValueError, match=r"attention.out_proj is a Non.*: PEFT has no working adapter of out_proj"):
        save_adapter(model, tmp_path / "a", format="peft")
    with pytest.raises(ValueError, match="PEFT does not adapt a model that is a layer itself"):
        save_adapter(convert(nn.Linear(4, 4), LoRA(2)), tmp_path / "a", format="peft")
    with pytest.raises(ValueError, match="format='PEFT' is none of lowmem, peft, gguf"):
        save_adapter(model, tmp_path / "a", format="PEFT")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = adapted("head")
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it or choose another name"):
        save_adapter(model, tmp_path / "a", format="peft")
    with pytest.raises(OSError, match="cannot write .*choose a directory that can be written"):
        save_adapter(model, tmp_path / "no" / "a", format="peft")

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem.io.formats.peft.peft_writer.write_atomically", fails)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path / "b", format="peft")
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_a_base_is_named_as_in_a_hub_and_not_by_a_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    public = ("hub/model-1.5", "gpt2")
    for number, name in enumerate((*public, "here", str(tmp_path), "../a", "")):
        model = adapted("head")
        model.config = SimpleNamespace(_name_or_path=name)
        config = written(model, tmp_path / str(number))
        assert config["base_model_name_or_path"] == (name if name in public else None)
        assert str(tmp_path) not in (tmp_path / str(number) / "adapter_config.json").read_text()


def test_one_of_several_adapters_and_a_wrapped_model(tmp_path):
    model = lowmem.add_adapter(adapted("head"), "other", LoRA(3), where=lambda path, _: path == "conv")
    assert written(nn.DataParallel(model), tmp_path / "a", name="other")["target_modules"] == ["conv"]
    half = convert(parts().float(), Half(), where=lambda path, _: path in ("fc", "conv", "embed", "experts"))
    loaded = load_adapter(half, tmp_path / "a", "new")
    assert lowmem.adapter_names(loaded) == ["new"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.bn(self.fc(x))


def blocks(count=2):
    torch.manual_seed(0)
    return nn.ModuleDict({"bn": nn.BatchNorm1d(8), **{f"b{number}": Block() for number in range(count)}}).eval()


def ran(model, names):
    for name in names:
        model[name].train()(torch.randn(32, 8) + 3)
    return model.eval()


def test_running_statistics_that_training_changed_are_modules_to_save(tmp_path):
    model = ran(convert(blocks(), LoRA(2)), ["bn", "b0", "b1"])
    config = written(model, tmp_path / "a")
    assert config["modules_to_save"] == ["bn", "b0.bn", "b1.bn"]
    assert config["target_modules"] == ["fc"]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.b0.bn.running_mean"], model["b0"].bn.running_mean)
    assert {name.removeprefix("base_model.model.bn.") for name in tensors if ".model.bn." in name} == {
        *nn.BatchNorm1d(8).state_dict()
    }
    loaded = load_adapter(blocks(), tmp_path / "a").eval()
    x = torch.randn(4, 8)
    assert torch.equal(loaded["b1"](x), model["b1"](x))
    lowmem.deactivate(loaded)
    assert torch.equal(loaded["b1"](x), blocks()["b1"](x))
    again = load_adapter(convert(blocks(), LoRA(2)), tmp_path / "a", name="other")
    assert torch.equal(again["b1"].bn.running_var, model["b1"].bn.running_var)


def test_running_statistics_that_stay_are_not_written_and_mixed_ones_are_refused(tmp_path):
    assert written(convert(blocks(), LoRA(2)), tmp_path / "a")["modules_to_save"] is None
    model = ran(convert(blocks(), LoRA(2)), ["bn"])
    with pytest.raises(
        ValueError, match=r"bn: training changed its \w+, and PEFT would take b0.bn for it.*lowmem's format"
    ):
        save_adapter(model, tmp_path / "b", format="peft")
    save_adapter(model, tmp_path / "c")
