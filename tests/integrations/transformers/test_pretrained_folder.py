"""A folder becomes another one, in one piece or not at all; damaged ones are refused. Also from the shell."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import lowmem
from lowmem import FileError, FourBit, Half
from lowmem.__main__ import main
from lowmem.integrations.transformers.pretrained_folder import load_folder, quantize_folder
from tests.integrations.transformers.folders import CONFIGS, IDS, assert_same, change_config, load, write
from tests.integrations.transformers.tokens import write_tokenizer


@pytest.fixture
def source(tmp_path):
    """Return a folder with shards, a tokenizer and more."""
    folder = write(tmp_path / "in", max_shard_size="40KB")
    write_tokenizer(folder)
    (folder / "README.md").write_text("a card")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_equals_convert(tmp_path, kind):
    folder = write(tmp_path / "in", kind, torch.bfloat16)
    rows = quantize_folder(folder, tmp_path / "out", FourBit("nf4"), skip="*norm*" if kind == "llama" else ())
    expected = lowmem.convert(load(folder, dtype="auto"), FourBit("nf4"))
    assert_same(load_folder(tmp_path / "out"), expected)
    layers = {layer.path for layer in lowmem.summary(expected) if layer.converted and layer.shared_with is None}
    stored = {row.name: row for row in rows if row.converted}
    assert {name.rpartition(".")[0] for name in stored} == layers
    for name, row in stored.items():
        assert row.error == expected.get_submodule(name.rpartition(".")[0]).weight_error
        assert row.before_bytes == 2 * torch.Size(row.shape).numel()
    assert sum(row.after_bytes for row in rows) == sum(one.nbytes for one in expected.parameters())
    assert [row.name for row in rows] == sorted(row.name for row in rows)


def test_the_command_writes_what_loads(source, tmp_path, capsys, results):
    out = tmp_path / "out"
    rows = results("quantize", str(source), str(out), "--shard-size", "20KB", "--exclude", "*o_proj")
    assert {row["name"] for row in rows if not row["converted"]} >= {"model.layers.0.self_attn.o_proj.weight"}
    expected = lowmem.convert(load(source), FourBit(), skip="*o_proj")
    assert_same(load(out), expected)
    assert torch.equal(load(out)(IDS).logits, expected(IDS).logits)
    same = {"README.md", "tokenizer.json", "tokenizer_config.json"}
    assert same == {file.name for file in out.iterdir() if (source / file.name).exists()} - {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in same)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert len([*out.glob("*.safetensors")]) > 1

    (row,) = results("stats", str(out))
    assert row["theoretical_bytes"] == lowmem.measure.theoretical_bytes(expected)
    assert row["forward_bytes"] > 0
    assert main(["stats", str(out), "--input-shape", "7", "--input-dtype", "int64"]) == 0
    assert "Linear4Bit" in capsys.readouterr().out
    (step,) = results("stats", str(out), "--training", "adamw8bit", "--rank", "2", "--memory", "fast")
    assert step["weights"] == lowmem.measure.actual_bytes(expected)
    assert step["adapters"] > 0
    assert (
        step["inputs"] == 8 * 64
    )  # as many tokens as the model has positions, which are the labels of its own loss, too


def test_bad_folders_are_one_line(source, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a line has room for short paths alone
    source, out = source.relative_to(tmp_path), Path("out")
    assert "is IN, which would be lost" in refused("quantize", source, source)
    assert "exclude modules of a folder by --exclude" in refused("quantize", source, out, "--include", "*")
    assert "skip='nothing' matches no module" in refused("quantize", source, out, "--exclude", "nothing")

    shard = next(source.glob("*.safetensors"))
    weights = load_file(shard)
    name, value = weights.popitem()
    save_file(weights | {"another": value}, shard, {"format": "pt"})
    assert "it and its index differ in tensor" in refused("quantize", source, out)
    save_file(weights | {name: value}, shard, {"format": "pt"})
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert "are there" in refused("quantize", source, out)
    shard.write_bytes(content)

    config = change_config(source)
    for changed, says in [
        (config | {"architectures": ["os"]}, "architectures names 'os', which transformers"),
        (config | {"quantization_config": {"quant_method": "gptq"}}, "it is quantized by 'gptq' already"),
        ([1], "must be an object"),
        (
            config | {"architectures": ["My"], "auto_map": {"AutoModel": "my.My"}},
            "architectures='My': it needs code",
        ),
        (config | {"architectures": 5}, "architectures=5 must be a list"),
        (config | {"quantization_config": "x"}, "quantization_config='x' must be an object"),
        (config | {"num_hidden_layers": 9}, "it lacks "),
        (config | {"num_hidden_layers": 1}, "it has, and the model has not, "),
        (config | {"num_hidden_layers": 1}, "LowmemConfig(...)).save_pretrained(OUT)"),
    ]:
        (source / "config.json").write_text(json.dumps(changed))
        assert says in refused("quantize", source, out)
    (source / "config.json").write_text("{")
    assert "it is damaged" in refused("quantize", source, out)
    (source / "config.json").unlink()
    assert "it has no config.json" in refused("stats", source)
    (source / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.safetensors*"):
        file.unlink()
    assert "it has no model.safetensors and no model.safetensors.index.json" in refused("quantize", source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_one_at_the_place_meanwhile_stays(source, tmp_path, monkeypatch):
    write_whole = load(source).__class__.save_pretrained

    def save(self, *args, **kwargs):
        write_whole(self, *args, **kwargs)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)
    with pytest.raises(FileExistsError):
        quantize_folder(source, tmp_path / "out", Half())
    assert [*(tmp_path / "out").iterdir()] == []
    assert len([*tmp_path.iterdir()]) == 2


def test_a_stored_folder_is_not_stored_twice(source, tmp_path):
    quantize_folder(source, tmp_path / "out", Half())
    with pytest.raises(FileError, match="quantized by lowmem already; .*if its weights are dense, load it and save"):
        quantize_folder(tmp_path / "out", tmp_path / "twice", FourBit())


def test_a_config_of_wrong_values_is_an_error_of_the_folder(tmp_path):
    folder = write(tmp_path / "in")
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    longrope |= {"short_factor": [1.0] * 8, "long_factor": [1.0]}
    for wrong, told in (
        ({"hidden_size": "32"}, "Validation error for .* expected int, got str"),
        (
            {"num_attention_heads": 0},
            r"config\.json.: transformers cannot build this model \(ZeroDiv.*again$",
        ),
        ({"hidden_size": 2**65}, r"config\.json': transformers cannot build this model \(TypeError: "),
        ({"dtype": "float99"}, r"config\.json': transformers cannot build .*float99"),
        ({"rope_parameters": longrope}, r"rope_parameters\.long_factor=\[1.0\] has 1 factors, and the model 8 freq"),
    ):
        before = change_config(folder, **wrong)
        with pytest.raises(FileError, match=f"^cannot load .*{told}"):
            quantize_folder(folder, tmp_path / "out", FourBit("nf4"))
        assert not (tmp_path / "out").exists()
        change_config(folder, **{**dict.fromkeys(wrong), **before})


def test_ties_of_a_stored_folder_survive_restore(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "in")
    quantize_folder(tmp_path / "in", tmp_path / "out", FourBit("nf4"))
    model = load_folder(tmp_path / "out")
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert ends[0].weight is ends[1].weight
    lowmem.restore(model)
    assert ends[0].weight is ends[1].weight


def test_an_index_beside_a_whole_model_is_refused(source, tmp_path):
    parts = [load_file(file) for file in sorted(source.glob("*.safetensors"))]
    save_file({name: tensor for part in parts for name, tensor in part.items()}, source / "model.safetensors")
    with pytest.raises(FileError, match="index.json, and model.safetensors, too: remove the one"):
        quantize_folder(source, tmp_path / "out", FourBit("nf4"))


def test_other_weights_that_transformers_would_read_are_refused(source, tmp_path):
    """Another file that config.json names, a pickle too; parts that processes wrote; an adapter beside the model."""
    out = tmp_path / "out"
    (source / "adapter_model.bin").write_bytes(b"never read")
    for name in ("adapter_model.bin", "other.safetensors"):
        change_config(source, transformers_weights=name)
        with pytest.raises(FileError, match=f"transformers would read '{name}': remove what is not the model"):
            quantize_folder(source, out, FourBit("nf4"))
    change_config(source, transformers_weights="model.safetensors.index.json")
    assert_same(load_folder(source), load(source))
    save_file({"a": torch.zeros(1)}, source / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(FileError, match="transformers would read 'shard-00000-model-00001-of-00001.safetensors'"):
        load_folder(source)
    (source / "shard-00000-model-00001-of-00001.safetensors").unlink()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FileError, match="it has an adapter .adapter_config.json.: merge it into its base, or name"):
        quantize_folder(source, out, FourBit("nf4"))
    assert not out.exists()


def test_stats_of_few_positions_and_of_an_encoder_with_a_decoder(tmp_path, results):
    """A model gets no more tokens than it has positions, and a decoder gets some, too."""
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).save_pretrained(tmp_path / "t5")
    for folder in (write(tmp_path / "gpt2", "gpt2"), tmp_path / "t5"):
        quantize_folder(folder, tmp_path / f"{folder.name}-4", FourBit("nf4"))
        dense, stored = results("stats", str(folder), f"{folder}-4")
        assert stored["actual_bytes"] < dense["actual_bytes"]
        assert stored["forward_bytes"] > 0
    (step,) = results("stats", f"{tmp_path / 'gpt2'}-4", "--training", "adamw", "--rank", "2")
    assert step["inputs"] == 8 * 64
