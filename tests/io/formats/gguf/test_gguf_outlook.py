"""What export will make of a model is known before it is stored: the outlook agrees with the export that follows."""

import json

import pytest
import torch

import lowmem
from lowmem import Budget, EightBit, FourBit, Half
from lowmem.errors import FileError
from lowmem.io.formats.gguf.gguf_outlook import LLAMA_CPP, GGUFOutlook, gguf_outlook
from lowmem.nn.techniques import embedding_and_output_technique
from lowmem.quant.tensor import QuantizedTensor
from tests.io.formats.folders import CONFIG, fourbit, weights_of, write_folder
from tests.io.formats.gguf.test_gguf_tokenizer_fields import bytes_bpe

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer is written")

TECHNIQUES = {
    "llama.cpp": LLAMA_CPP,
    "q4_0": FourBit("q4_0", embeddings="q8_0"),
    "alike": FourBit("iq4_nl", embeddings="4bit"),
    "offsets": FourBit("uint4", embeddings="4bit"),
    "q8_0": EightBit(format="q8_0"),
    "half": Half(torch.bfloat16),
    "dense": None,
    "default": FourBit(),
    "int8 at the ends": FourBit("iq4_nl"),
    "fp4": FourBit("fp4", embeddings="4bit"),
    "other blocks": FourBit("iq4_nl", 16, embeddings="q8_0"),
    "other scales": FourBit("q4_0", scales="float32", embeddings="q8_0"),
    "int8": EightBit(),
}
EXACT = ["llama.cpp", "q4_0", "alike", "offsets", "q8_0", "half", "dense"]


def stored_weights(dense, technique):
    """Return what a technique stores of the weights of a llama."""
    ends = embedding_and_output_technique(technique) if isinstance(technique, FourBit) else technique
    return {
        name: values
        if values.dim() == 1 or technique is None
        else (ends if name.startswith(("lm_head", "model.embed")) else technique).store(values)
        for name, values in dense.items()
    }


@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_outlook_of_a_dense_folder_is_what_becomes_of_it(name, tmp_path):
    dense = weights_of(torch.Tensor.clone)
    outlook = gguf_outlook(write_folder(tmp_path / "dense", dense), TECHNIQUES[name])
    stored = write_folder(tmp_path / "stored", stored_weights(dense, TECHNIQUES[name]))
    assert (outlook.refusal, outlook.like) == (None, None)
    assert (outlook.inexact is None) == (name in EXACT)
    assert (gguf_outlook(stored, None).inexact is None) == (name in EXACT)
    if name in EXACT:
        rows = lowmem.export(stored, tmp_path / "out.gguf")
        assert all(row.error is None for row in rows)
        outlook.check_exact(stored, "store")
        return
    with pytest.raises(FileError, match="--requantize writes what is nearest"):
        lowmem.export(stored, tmp_path / "out.gguf")
    with pytest.raises(FileError, match=r"cannot store '.*weight is in .*; leave --for llama.cpp out$"):
        outlook.check_exact(stored, "store")


def test_a_budget_stores_what_gguf_does_not_hold(tmp_path):
    folder = write_folder(tmp_path / "dense", weights_of(torch.Tensor.clone))
    assert "no type with the levels of bof4s" in gguf_outlook(folder, Budget(5.0)).inexact


def test_rows_that_are_no_multiple_of_32_are_not_exact(tmp_path):
    config = {**CONFIG, "intermediate_size": 100}
    folder = write_folder(tmp_path / "in", weights_of(torch.Tensor.clone, config), config)
    assert "down_proj.weight is in iq4_nl, block_size=32" in gguf_outlook(folder, LLAMA_CPP).inexact
    assert "rows of 100 are no multiple of 32" in gguf_outlook(folder, LLAMA_CPP).inexact
    assert gguf_outlook(folder, None) == GGUFOutlook()


def test_scales_of_stored_weights_are_read(tmp_path):
    """The form does not say whether GGUF holds them."""
    for number, factor in enumerate((1.0, 1 + 2**-20)):
        weights = weights_of(fourbit("q4_0"))
        name = "model.layers.0.mlp.up_proj.weight"
        made = weights[name]
        weights[name] = QuantizedTensor(
            made.packed, made.scales.float() * factor, made.shape, "q4_0", 32, "float32", "imported"
        )
        inexact = gguf_outlook(write_folder(tmp_path / str(number), weights), None).inexact
        assert (inexact is None) == (factor == 1)
        assert factor == 1 or "up_proj.weight is in q4_0" in inexact
        assert factor == 1 or "whose scales GGUF does not hold" in inexact


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is no architecture .*: it writes llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None is no architecture"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"intermediate_size": 64}, r"ffn_down.weight has the shape \(64, 96\), and config.json says \(64, 64\)"),
        ({"num_hidden_layers": 2}, "it has no weight for blk.1."),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer"),
    ],
)
def test_a_model_that_is_not_written_is_refused_with_the_error_of_its_export(changes, why, tmp_path):
    folder = write_folder(tmp_path / "in", weights_of(torch.Tensor.clone), {**CONFIG, **changes})
    for technique in (LLAMA_CPP, None):
        outlook = gguf_outlook(folder, technique)
        with pytest.raises(FileError, match=why):
            outlook.check_exact(folder, "store")
        assert outlook.description().startswith(f"no export to GGUF: cannot export '{folder}': ")
    with pytest.raises(FileError) as error:
        lowmem.export(folder, tmp_path / "out.gguf", dtype=torch.float32)
    assert str(error.value) == outlook.refusal


def test_what_needs_an_existing_file_is_told(tmp_path):
    folder = write_folder(tmp_path / "in", weights_of(torch.Tensor.clone))
    (folder / "tokenizer.json").write_text(json.dumps(bytes_bpe()))
    assert gguf_outlook(folder, LLAMA_CPP) == GGUFOutlook()
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    outlook = gguf_outlook(folder, LLAMA_CPP)
    assert (outlook.refusal, outlook.inexact) == (None, None)
    assert "export needs --like GGUF, since cannot export" in outlook.description()
    weights = weights_of(torch.Tensor.clone)
    parts = {part: weights.pop(f"model.layers.0.{part}.weight") for part in PHI3_MISSING}
    weights["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat([parts[p] for p in PHI3_MISSING[:3]])
    weights["model.layers.0.mlp.gate_up_proj.weight"] = torch.cat([parts[p] for p in PHI3_MISSING[3:]])
    folder = write_folder(tmp_path / "phi3", weights, {**CONFIG, "model_type": "phi3"})
    outlook = gguf_outlook(folder, LLAMA_CPP)
    assert (outlook.refusal, outlook.inexact) == (None, None)
    assert "export needs --like GGUF, since the config of a phi3" in outlook.description()


PHI3_MISSING = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]


def test_the_line_names_the_option_where_the_base_is_not_exact(tmp_path):
    folder = write_folder(tmp_path / "in", weights_of(torch.Tensor.clone))
    told = gguf_outlook(folder, FourBit()).description()
    assert told.endswith("; --for llama.cpp trains on a base that is")
    assert "\n" not in told
    assert "exact, so that llama.cpp computes with the weights" in gguf_outlook(folder, LLAMA_CPP).description()
    stored = write_folder(tmp_path / "stored", weights_of(fourbit("nf4")))
    told = gguf_outlook(stored, None).description()
    assert told.endswith("levels of nf4; --for llama.cpp with the dense model trains on a base that is")
    config = {**CONFIG, "intermediate_size": 100}
    folder = write_folder(tmp_path / "100", weights_of(torch.Tensor.clone, config), config)
    assert gguf_outlook(folder, FourBit()).description().endswith("; --format dense trains on a base that is")
    (tmp_path / "a.gguf").touch()
    assert gguf_outlook(tmp_path / "a.gguf", None) == GGUFOutlook()


def test_a_folder_that_another_program_quantized_is_not_written(tmp_path):
    folder = write_folder(tmp_path / "in", weights_of(torch.Tensor.clone))
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "'gptq' quantized it: make it lowmem's first" in gguf_outlook(folder, None).refusal


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_an_end_that_is_tied_is_not_written(tied, tmp_path):
    config = {**CONFIG, "tie_word_embeddings": tied}
    folder = write_folder(tmp_path / "in", weights_of(torch.Tensor.clone, config), config)
    for target in ("lm_head", "embed_tokens", "model.embed*", "*"):
        refusal = gguf_outlook(folder, LLAMA_CPP, (target,)).refusal
        assert (refusal is not None) == tied
        assert not tied or "leave it out of --target" in refusal
    assert gguf_outlook(folder, LLAMA_CPP, ("q_proj", "mlp.*")) == GGUFOutlook()
