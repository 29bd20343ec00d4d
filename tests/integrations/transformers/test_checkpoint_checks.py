"""Folders whose index, weights and config.json disagree are refused, which transformers fills with random numbers."""

import json
import time

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPTJConfig,
    Qwen2ForCausalLM,
    SwinModel,
    T5ForConditionalGeneration,
)

import lowmem
from lowmem import FourBit, Half, LoRA
from lowmem.errors import FileError
from lowmem.integrations.transformers import LowmemConfig, from_exact
from lowmem.integrations.transformers.pretrained_folder import load_folder, quantize_folder
from lowmem.io.model_folder import check_layer_and_expert_counts
from tests.fuzzing import bounded
from tests.integrations.transformers.folders import SIZES, assert_same, change_config, load, write
from tests.integrations.transformers.foreign import write_foreign

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
    record = change_config(small)["quantization_config"]
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
        change_config(small, quantization_config=changed)
        with pytest.raises((ValueError, RuntimeError), match=says):
            load(small)
    for changed, says in (
        (None, "are stored by lowmem, and its config.json does not say how"),
        ({**record, "quant_method": "lowmen"}, "cannot read .*small"),
    ):
        change_config(small, quantization_config=changed)
        with pytest.raises(FileError, match=says):
            load_folder(small)
    load(dense, quantization_config=LowmemConfig(Half())).save_pretrained(tmp_path / "half")
    change_config(tmp_path / "half", quantization_config=None)
    wanted = lowmem.convert(load(dense), Half())
    assert_same(load(tmp_path / "half"), lowmem.restore(wanted))  # rounded weights are whole ones, too


def test_counts_of_any_name_are_refused_before_a_model_is_made_and_sizes_are_not(tmp_path):
    """A Qwen's config itself lists the kind of each layer: the commands read config.json before transformers does."""
    folder = write(tmp_path / "dense", "llama")
    for kind, name, value in (
        (Qwen2ForCausalLM, "num_hidden_layers", 2**63),
        (T5ForConditionalGeneration, "num_decoder_layers", 2**40),
        (SwinModel, "depths", [1, 2**40]),
    ):
        described = {"model_type": kind.config_class.model_type, name: value}
        (tmp_path / "config.json").write_text(json.dumps(described))
        for called in (kind, AutoModel) if kind is not Qwen2ForCausalLM else ():
            with pytest.raises(ValueError, match=f"config.json says {name}=.*, more than 4096: get it again"):
                called.from_pretrained(tmp_path, quantization_config=LowmemConfig(FourBit("nf4")))
        before = change_config(folder, **described)
        with pytest.raises(FileError, match=f"{name}=.*get it again"):
            load_folder(folder, LowmemConfig(FourBit("nf4")))
        change_config(folder, **{name: None, **before})
    check_layer_and_expert_counts({"max_window_layers": 4096})
    check_layer_and_expert_counts(
        {"layer_rope_theta": 10_000, "ffn_dim_per_layer": [8192, 16_384], "layer_list_out_channels": [5000]}
    )
    sizes = {"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 8192}  # of a Gemma 3n
    for name in ("gemma3n", "gemma4"):
        config = AutoConfig.for_model(name).to_dict()
        config["text_config"] |= sizes
        check_layer_and_expert_counts(config)


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


def test_a_config_without_sizes_is_refused_in_little_memory(tmp_path):
    """The defaults of a Llama take 27 GB."""
    no_sizes = dict.fromkeys([*SIZES, "head_dim"])
    write(tmp_path / "dense", "llama")
    load(tmp_path / "dense", quantization_config=LowmemConfig(FourBit())).save_pretrained(tmp_path / "small")
    write_foreign(tmp_path / "other", "gptq")
    for name, config in {"dense": LowmemConfig(FourBit()), "small": None, "other/foreign": None}.items():
        folder, call = tmp_path / name, from_exact if name == "other/foreign" else load
        change_config(folder, **no_sizes)
        with bounded(), pytest.raises(ValueError, match="or missing: get|config is of another model"):
            call(folder, **({} if config is None else {"quantization_config": config}))
        with bounded(), pytest.raises(FileError, match="or missing: get|config is of another model|: get both again"):
            load_folder(folder, config)
    shapes = r"'lm_head.weight' has the shape \(258, 64\), and by its config.json \(32000, 4096\): get both again"
    with bounded(), pytest.raises(FileError, match=shapes):
        load_folder(tmp_path / "dense")
    with bounded(), pytest.raises(FileError, match=shapes):
        quantize_folder(tmp_path / "dense", tmp_path / "out", FourBit())
    assert not (tmp_path / "out").exists()


def test_layers_without_end_and_sizes_without_bounds_are_refused_at_once(tmp_path):
    folder = write(tmp_path / "dense", "llama")
    start = time.process_time()
    for changes in (
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 2**62}},
        {"num_hidden_layers": 2, "text_config": None, "vocab_size": 2**62},
        {"vocab_size": 258, "hidden_size": 2**40},
        {"hidden_size": 64, "intermediate_size": 2**33},
    ):
        change_config(folder, **changes)
        with pytest.raises(FileError, match="cannot (read|load)"):
            quantize_folder(folder, tmp_path / "out", FourBit())
    assert time.process_time() - start < 60


def test_buffers_and_experts_without_end_are_refused_before_they_are_made(tmp_path):
    """A GPT-J computes a table of its positions, which are in no tensor."""
    config = GPTJConfig(vocab_size=258, n_embd=64, n_layer=1, n_head=4, n_positions=64, rotary_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for changes, says in (
        ({"n_positions": 2**28}, "computes 8589934592 bytes of buffers, as .*embed_positions"),
        ({"n_positions": 64, "num_experts": 2**20}, "num_experts=1048576, more than 4096"),
    ):
        change_config(tmp_path, **changes)
        with bounded(), pytest.raises(FileError, match=says):
            load_folder(tmp_path)
