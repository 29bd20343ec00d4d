"""Folders whose index, weights and config.json disagree are refused, which transformers fills with random numbers."""

import json

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoConfig, AutoModel, Qwen2ForCausalLM, SwinModel, T5ForConditionalGeneration

import lowmem
from lowmem import FourBit, Half, LoRA
from lowmem.errors import FileError
from lowmem.integrations.transformers import LowmemConfig
from lowmem.integrations.transformers.folder import load_folder
from lowmem.io.model_folder import refuse_layers
from tests.integrations.transformers.folders import assert_same, load, write

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folders(tmp_path):
    """Return a dense folder, and the same model stored, both in shards."""
    dense = write(tmp_path / "dense", "llama", max_shard_size="60kB")
    load(dense, quantization_config=LowmemConfig(FourBit("nf4"))).save_pretrained(
        tmp_path / "small", max_shard_size="20kB"
    )
    return dense, tmp_path / "small"


def test_an_index_that_differs_from_its_shards_is_refused(folders):
    for folder, asked in zip(folders, ({"quantization_config": LowmemConfig(FourBit("nf4"))}, {}), strict=True):
        good = json.loads((folder / INDEX).read_text())
        names = good["weight_map"]
        files = list(names.values())
        shared = [name for name in sorted(names) if files.count(names[name]) > 1]  # alone, its file would be missing
        first, others = shared[0], names.keys() - {shared[0]}
        elsewhere = next(file for file in names.values() if file != names[first])
        for changed, says in (
            ({name: names[name] for name in others}, f"its index differ in tensor '{first}'"),
            (names | {first: elsewhere}, f"its index differ in tensor '{first}'"),
            (names | {"new.weight": elsewhere}, "its index differ in tensor 'new.weight'"),
            (names | {first: f"../{folder.name}/{names[first]}"}, "which is no file beside it"),
        ):
            (folder / INDEX).write_text(json.dumps({**good, "weight_map": changed}))
            with pytest.raises(FileError, match=says):
                load(folder, **asked)
        (folder / INDEX).write_text(json.dumps(good))
        load(folder, **asked)


def test_what_no_config_tells_how_it_is_stored_is_refused(folders, tmp_path):
    dense, small = folders
    config = json.loads((small / "config.json").read_text())
    record = config["quantization_config"]
    ends, layers = record["layers"]  # those in 8 bits, and the rest
    assert ends["names"] == ["model.embed_tokens", "lm_head"]
    fewer = [name for name in layers["names"] if "mlp" not in name]
    for changed, says in (
        (
            {**record, "layers": [ends, {**layers, "names": fewer}]},
            "say how its tensor 'model.layers.0.mlp.down_proj.weight'",
        ),
        ({**record, "layers": []}, "say how its tensor 'lm_head.weight'"),
        (None, "ignore_mismatched_sizes"),
        ({**record, "quant_method": "lowmen"}, "ignore_mismatched_sizes"),
    ):
        (small / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        with pytest.raises((ValueError, RuntimeError), match=says):
            load(small)
    for changed, says in (
        (None, "are stored by lowmem, and its config.json does not say how"),
        ({**record, "quant_method": "lowmen"}, "cannot read .*small"),
    ):
        (small / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        with pytest.raises(FileError, match=says):
            load_folder(small)
    load(dense, quantization_config=LowmemConfig(Half())).save_pretrained(tmp_path / "half")
    half = json.loads((tmp_path / "half" / "config.json").read_text())
    half.pop("quantization_config")
    (tmp_path / "half" / "config.json").write_text(json.dumps(half))
    wanted = lowmem.convert(load(dense), Half())
    assert_same(load(tmp_path / "half"), lowmem.restore(wanted))  # rounded weights are whole ones, too


def test_layers_without_end_are_refused_at_once(folders):
    dense, small = folders
    for folder, asked in ((dense, {"quantization_config": LowmemConfig(FourBit("nf4"))}), (small, {})):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**63}))
        with pytest.raises(ValueError, match="num_hidden_layers=9223372036854775808, more than 4096: get it again"):
            load(folder, **asked)


def test_counts_of_any_name_are_refused_before_a_model_is_made_of_them(tmp_path):
    """A Qwen's config itself lists the kind of each layer: the commands read config.json before transformers does."""
    folder = write(tmp_path / "dense", "llama")
    config = json.loads((folder / "config.json").read_text())
    for kind, name, value in (
        (Qwen2ForCausalLM, "num_hidden_layers", 2**63),
        (T5ForConditionalGeneration, "num_decoder_layers", 2**40),
        (SwinModel, "depths", [1, 2**40]),
    ):
        described = json.dumps({"model_type": kind.config_class.model_type, name: value})
        (tmp_path / "config.json").write_text(described)
        for called in (kind, AutoModel) if kind is not Qwen2ForCausalLM else ():
            with pytest.raises(ValueError, match=f"config.json says {name}=.*, more than 4096: get it again"):
                called.from_pretrained(tmp_path, quantization_config=LowmemConfig(FourBit("nf4")))
        (folder / "config.json").write_text(json.dumps({**config, **json.loads(described)}))
        with pytest.raises(FileError, match=f"{name}=.*get it again"):
            load_folder(folder, LowmemConfig(FourBit("nf4")))
    refuse_layers({"max_window_layers": 4096})


def test_sizes_named_after_layers_are_no_counts_of_them():
    """A Gemma 3n has 262,144 of them."""
    sizes = {"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 8192}
    for name in ("gemma3n", "gemma4"):
        config = AutoConfig.for_model(name).to_dict()
        config["text_config"] |= sizes
        refuse_layers(config)
    others = {"layer_rope_theta": 10_000, "ffn_dim_per_layer": [8192, 16_384], "layer_list_out_channels": [5000]}
    refuse_layers(others)


def test_adapted_weights_and_experts_are_told(tmp_path):
    model = load(write(tmp_path / "dense", "mixtral"), quantization_config=LowmemConfig(FourBit("nf4")))
    adapted = lowmem.add_adapter(model, "a", LoRA(2), where=lambda path, _: "experts" in path or "q_proj" in path)
    adapted.save_pretrained(tmp_path / "a")
    assert_same(load(tmp_path / "a"), adapted)


def test_pickles_are_refused(tmp_path):
    """transformers reads them where a folder has no safetensors."""
    model = load(write(tmp_path, "llama"))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for asked in (LowmemConfig(Half()), LowmemConfig(FourBit("nf4"))):
        with pytest.raises(
            FileError, match=r"pytorch_model.bin': lowmem reads safetensors only, and executed nothing"
        ):
            load(tmp_path, quantization_config=asked)
    assert_same(load(tmp_path), model)
