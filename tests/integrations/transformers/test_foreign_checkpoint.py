"""Folders that other programs quantized load with their codes as they are: the values are those that they mean."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2LMHeadModel, GptOssConfig

import lowmem
from lowmem import EightBit, FourBit
from lowmem.integrations.transformers import LowmemConfig, from_exact
from lowmem.integrations.transformers.pretrained_folder import import_foreign_folder
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.io.shards import verify_and_map_lowmem_model
from lowmem.nn.adapter_bank import unadapted_parameter
from tests.integrations.transformers import folders
from tests.integrations.transformers.folders import IDS, assert_same, change_config, change_weights, load
from tests.integrations.transformers.foreign import METHODS, values, write_foreign


def assert_exact(model: torch.nn.Module, dense: torch.nn.Module) -> None:
    found, wanted = values(model), values(dense)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    with torch.no_grad():
        outputs = model(IDS).logits, dense(IDS).logits
    assert float((outputs[0] - outputs[1]).norm()) < 1e-5 * float(outputs[1].norm())


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "llama") for method in METHODS), ("awq", "mixtral"), ("gptq", "gpt2")]
)
def test_codes_are_kept_and_saved_and_loaded_again(tmp_path, method, kind):
    """Rows of separate experts become one stack, as transformers makes it; Conv1D's are stored transposed."""
    folder = write_foreign(tmp_path, method, kind)
    model = from_exact(folder)
    assert_exact(model, load(tmp_path / "dense"))
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same(again, model)
    assert "technique" not in json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]


def test_the_bytes_are_those_of_lowmem_quantize(tmp_path):
    for method in METHODS:
        folder = write_foreign(tmp_path / method, method)
        import_foreign_checkpoint(folder, tmp_path / "a.safetensors")
        file = verify_and_map_lowmem_model(tmp_path / "a.safetensors")
        model = from_exact(folder)
        lowmem.save(model, tmp_path / "b.safetensors")
        other = verify_and_map_lowmem_model(tmp_path / "b.safetensors")
        assert other.metadata["layers"] == file.metadata["layers"]
        assert other.tensors.keys() == file.tensors.keys()
        assert all(torch.equal(value, other.tensors[name]) for name, value in file.tensors.items())


def write_gpt_oss(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a folder of gpt-oss with experts in MXFP4; return it, and the codes' values by the model's names."""
    folders.CONFIGS["gpt-oss"] = GptOssConfig(
        **folders.SIZES | {"intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2, head_dim=16
    )
    folders.write(folder, "gpt-oss")
    state = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        rows = (levels[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)
        expected[name] = rows.mT.contiguous()
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder, expected


def test_experts_of_gpt_oss_are_stored_as_the_transpose_that_the_file_has(tmp_path):
    folder, expected = write_gpt_oss(tmp_path / "foreign")
    model = from_exact(folder, dtype=torch.float32)
    found = values(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    dense = lowmem.restore(from_exact(folder, dtype=torch.float32))
    for how in ("eager", "batched_mm", "grouped_mm"):
        for one in (model, dense):
            one.set_experts_implementation(how)
        assert_exact(model, dense)
    assert not model.model.layers[0].mlp.experts.dequantized_by
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", dtype=torch.float32), model)


def test_a_model_in_half_precision_presents_its_own_dtype_and_keeps_the_values(tmp_path):
    folder = write_foreign(tmp_path, "gptq", dtype=torch.bfloat16)
    model = from_exact(folder, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16 == model.dtype
    stored = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(layer.weight.dequantize(torch.float32), stored.float())


def test_the_class_may_be_named_and_one_without_the_head_leaves_its_weights(tmp_path):
    model = from_exact(write_foreign(tmp_path, "awq"), AutoModel)
    assert sorted(values(model)) == sorted(values(AutoModel.from_pretrained(tmp_path / "dense")))
    model = from_exact(write_foreign(tmp_path / "gpt2", "gptq", "gpt2"), GPT2LMHeadModel)
    assert model.transformer.h[0].attn.c_attn.forms["weight"].transposed
    assert model.lm_head.weight is model.transformer.wte.weight


def test_adapters_train_on_what_was_kept(tmp_path):
    model = from_exact(write_foreign(tmp_path, "gptq desc_act"))
    before = model.model.layers[0].mlp.up_proj.weight.dequantize()
    model = lowmem.convert(model, lowmem.LoRA(2))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(unadapted_parameter(model.model.layers[0].mlp.up_proj, "weight").dequantize(), before)


def test_what_cannot_be_exact_is_refused_with_how_to_go_on(tmp_path):
    folder = write_foreign(tmp_path / "a", "gptq")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    uneven = torch.tensor([0] * 31 + [1] * 33, dtype=torch.int32).flip(0)
    save_file(state | {f"{name}.g_idx": uneven}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{name}.weight, GPTQ: its groups do not have 32.*lowmem quantize.*--requant"
    ):
        from_exact(folder)
    mixed = {
        f"{name}.g_idx": torch.arange(64, dtype=torch.int32) // 32,
        f"{name}.qweight": torch.zeros(8, 80, dtype=torch.int32),
        f"{name}.qzeros": torch.full((2, 10), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.ones(2, 80, dtype=torch.float16),
    }
    save_file(state | mixed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight is \(80, 64\) in .* and the model's is \(96, 64\)"):
        from_exact(folder)
    save_file(state | {"lm_head.weight": torch.ones(9, 64)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight is \(9, 64\) in .* and the model's is \(258, 64\)"):
        from_exact(folder)
    dense = folders.write(tmp_path / "b", "llama")
    with pytest.raises(ValueError, match=r"no 4-bit weights.*LowmemConfig\(FourBit"):
        from_exact(dense)
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        from_exact(dense)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_codes_of_which_config_json_says_nothing_are_not_left_for_random_numbers(tmp_path, method):
    """Of these weights a model would find none in the folder, and quantize new ones."""
    folder = write_foreign(tmp_path, method)
    change_config(folder, quantization_config=None)
    with pytest.raises(ValueError, match=r"would be quantized a second time: .*from_exact\(folder\) keeps"):
        load(folder, quantization_config=LowmemConfig(FourBit("nf4")))


def test_what_is_asked_for_is_quantized_while_the_rest_is_kept(tmp_path):
    """Codes are those of ``convert``, also of a dense Conv1D, which lies otherwise than one in 4 bits, and ties."""
    folder, out = write_foreign(tmp_path, "gptq", "gpt2"), tmp_path / "out"
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    name = "transformer.h.1.attn.c_proj"  # as many rows as columns
    state = load_file(folder / "model.safetensors")
    state = {key: value for key, value in state.items() if not key.startswith(f"{name}.") or key.endswith("bias")}
    save_file(state | {f"{name}.weight": dense[f"{name}.weight"]}, folder / "model.safetensors", {"format": "pt"})
    rows = {
        row.name: row
        for row in import_foreign_folder(folder, out, include=["*.c_proj.weight", "*wte*"], technique=FourBit("nf4"))
    }
    model, kept = load(out), from_exact(folder)
    chosen = (name, "transformer.wte")
    expected = lowmem.convert(
        load(tmp_path / "dense"),
        FourBit("nf4", embeddings="4bit"),
        where=lambda path, _: path in (*chosen, "lm_head"),
    )
    wanted = values(kept) | {f"{path}.weight": values(expected)[f"{path}.weight"] for path in (*chosen, "lm_head")}
    found = values(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {key for key, row in rows.items() if row.error is not None} == {f"{path}.weight" for path in chosen}
    for path in chosen:
        assert rows[f"{path}.weight"].error == expected.get_submodule(path).weight_error
    with pytest.raises(ValueError, match="pattern 'x' matches no tensor"):
        import_foreign_folder(folder, tmp_path / "other", include=["x"], technique=EightBit())
    assert not (tmp_path / "other").exists()


def test_what_is_refused_is_quantized_again_when_asked(tmp_path):
    """Zero points times float32 scales; experts become one stack, of which the largest error is told."""
    folder, out = write_foreign(tmp_path, "awq", "mixtral"), tmp_path / "out"
    state = load_file(folder / "model.safetensors")
    change_weights(folder, {name: value.float() for name, value in state.items() if name.endswith(".scales")})
    with pytest.raises(lowmem.FileError, match="more bits than float32; and .* more; .*IN OUT --requantize"):
        import_foreign_folder(folder, out)
    assert not out.exists()
    rows = import_foreign_folder(folder, out, requantize=FourBit("nf4"))
    again = {row.name for row in rows if row.error is not None}
    model, dense = load(out), load(tmp_path / "dense")
    expected = lowmem.convert(dense, FourBit("nf4"), where=lambda path, _: ".layers." in path and "gate" not in path)
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"} <= again
    found, wanted = values(model), values(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(0.05 < row.error < 0.15 for row in rows if row.name in again)


def test_experts_that_differ_in_form_are_refused(tmp_path):
    folder = write_foreign(tmp_path, "awq", "mixtral")
    state = load_file(folder / "model.safetensors")
    key = next(name for name in state if "experts.1" in name and name.endswith(".qzeros"))
    change_weights(folder, {key: torch.full_like(state[key], -2004318072)})
    with pytest.raises(ValueError, match="is stored in uint4.* in q4_0, .*are one weight in MixtralForCausalLM"):
        from_exact(folder)
    folder = write_foreign(tmp_path / "by activations", "gptq desc_act", "mixtral")  # each expert has its own order
    with pytest.raises(
        ValueError, match=r"experts.0.w1.weight becomes .*experts.gate_up_proj .*gathered do not surv"
    ):
        from_exact(folder)


def test_nothing_is_quantized_twice(tmp_path):
    """Neither what another program has quantized, nor a GGUF file, nor what lowmem has stored."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e transformers")
    asked = {"quantization_config": LowmemConfig(FourBit("nf4"))}
    with pytest.raises(ValueError, match="is quantized with AwqConfig but you are passing a LowmemConfig"):
        load(write_foreign(tmp_path, "awq"), **asked)
    dense = load(tmp_path / "dense")
    with pytest.raises(ValueError, match="cannot combine Quantization and loading a model from a GGUF file"):
        load(tmp_path / "dense", gguf_file="a.gguf", config=dense.config, **asked)
    lowmem.convert(dense, FourBit("nf4")).save_pretrained(tmp_path / "a")
    with pytest.raises(lowmem.FileError, match="from_pretrained"):
        from_exact(tmp_path / "a")


def test_weights_on_disk_are_refused_and_on_one_device_are_not(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e transformers")
    folder = write_foreign(tmp_path, "gptq")
    for where in ("cpu", {"": "cpu"}, "auto"):
        assert_same(from_exact(folder, device_map=where), from_exact(folder))
    with pytest.raises(ValueError, match="load and save the model without it first"):
        from_exact(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_what_lies_beside_the_weights_is_the_model_s(tmp_path):
    """The generation config, the name, and a dtype that the config does not say."""
    folder = write_foreign(tmp_path, "gptq")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    change_config(folder, dtype=None)
    model, info = from_exact(folder, output_loading_info=True)
    assert model.generation_config.max_new_tokens == 7
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert model.dtype == load_file(folder / "model.safetensors")["model.norm.weight"].dtype
    assert not info["missing_keys"]
