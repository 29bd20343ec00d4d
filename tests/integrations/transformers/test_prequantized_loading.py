"""A folder of stored weights is read as it was written; parts and records that do not fit are refused."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import lowmem
from lowmem import FourBit, Half
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import IDS, assert_same, change_config, change_weights, load, write

NAME = "model.layers.1.mlp.up_proj"
BERT = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT |= {"intermediate_size": 96}


INT4 = torch.tensor(list(b"int4, block_size=64, scales=double"), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "made", "says"),
    [
        ("weight_scales", lambda _: None, f"the folder lacks {NAME}.weight_scales"),
        ("weight_packed", lambda _: torch.zeros(96, 8, dtype=torch.uint8), "mismatched"),
        (
            "weight_scales",
            lambda one: one.view(torch.float8_e4m3fn),
            "scales is torch.float8_e4m3fn .* torch.uint8: get",
        ),
        ("_extra_state", lambda _: INT4, "int4"),
    ],
    ids=["none", "another shape", "another dtype", "another format"],
)
def test_a_part_that_does_not_fit_is_refused(small, part, made, says):
    """A byte may be a number of another kind, and codes of another format have the same shape."""
    change_weights(small, {f"{NAME}.{part}": made(load(small).state_dict()[f"{NAME}.{part}"])})
    with pytest.raises((ValueError, RuntimeError), match=says):
        load(small)


def test_16_bits_of_another_dtype_are_refused(tmp_path):
    write(tmp_path / "dense")
    half = load(tmp_path / "dense", quantization_config=LowmemConfig(Half(torch.bfloat16)))
    half.save_pretrained(tmp_path / "half")
    rounded = half.state_dict()[f"{NAME}.weight_rounded"]
    change_weights(tmp_path / "half", {f"{NAME}.weight_rounded": rounded.view(torch.float16)})
    with pytest.raises(ValueError, match=rf"{NAME}.weight_rounded is torch.float16 .* says torch.bfloat16: get it"):
        load(tmp_path / "half")


def test_a_config_that_is_wrong_is_refused(small):
    config = change_config(small)
    for edit, says in (
        (
            lambda c: c.update(layers=[{**c["layers"][0], "names": ["nowhere"]}]),
            "names no module that Llama",
        ),
        (lambda c: c["layers"][0].pop("names"), "without the names of its weights"),
        (lambda c: c["layers"][0].update(format="nf5"), "format='nf5'"),
        (lambda c: c.update(version=7), "upgrade lowmem"),
    ):
        changed = copy.deepcopy(config)
        edit(changed["quantization_config"])
        change_config(small, **changed)
        with pytest.raises(ValueError, match=says):
            load(small)


def test_scales_that_lie_at_odd_addresses_are_read(tmp_path):
    """transformers maps files, in which bytes lie anywhere; float32 scales need addresses that 4 divides."""
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4", 32, "float32"))
    model.save_pretrained(tmp_path / "small")
    change_weights(tmp_path / "small", {"a": torch.zeros(1, dtype=torch.uint8)})
    again = load(tmp_path / "small")
    assert_same(again, model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    scales = [value for name, value in again.named_parameters() if name.endswith("_scales")]
    assert all(value.data_ptr() % 4 == 0 for value in scales)


TECHNIQUES = (FourBit("nf4"), lowmem.EightBit(), Half(torch.bfloat16), Half())


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_a_head_for_other_labels_is_made_anew(tmp_path, technique):
    """Dense and to be trained, as where a dense folder is stored; what the folder has of the same shape is kept."""
    config = BertConfig(**BERT, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    given = {"as_class": BertForSequenceClassification, "num_labels": 7, "ignore_mismatched_sizes": True}
    stored = load(tmp_path / "dense", as_class=BertForSequenceClassification, quantization_config=technique)
    stored.save_pretrained(tmp_path / "stored")
    model = load(tmp_path / "stored", **given)
    other = load(tmp_path / "dense", **given, quantization_config=technique)
    assert type(model.classifier) is type(other.classifier) is torch.nn.Linear
    for name, one in model.classifier.named_parameters():
        wanted = getattr(other.classifier, name)
        assert (one.shape, one.dtype, one.requires_grad) == (wanted.shape, wanted.dtype, wanted.requires_grad)
    assert model.classifier.weight.std() > 0.01
    assert not model.classifier.bias.any()
    assert_same(model.bert, stored.bert)
    model(IDS).logits.sum().backward()
    assert model.classifier.weight.grad.any()
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", as_class=BertForSequenceClassification), model)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "stored", as_class=BertForSequenceClassification, num_labels=7)


def test_tied_weights_for_another_vocabulary_are_refused(small):
    with pytest.raises(ValueError, match=r"embed_tokens.weight_packed' is .* shared with another layer: get both"):
        load(small, vocab_size=300, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("kind", "technique"), [("mixtral", FourBit()), *(("tied llama", one) for one in TECHNIQUES)]
)
def test_a_new_model_of_a_stored_folder_s_config_is_written_and_loaded_as_it_is(tmp_path, kind, technique):
    """It is dense, in float32, and its config says what the folder's said."""
    load(write(tmp_path / "dense", kind), quantization_config=technique).save_pretrained(tmp_path / "stored")
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "stored"))
    made.save_pretrained(tmp_path / "made")
    with pytest.warns(UserWarning, match="are stored, and they are dense: they stay dense"):
        model = load(tmp_path / "made")
    assert_same(model, made)
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()
    assert_same(load(tmp_path / "again"), made)
    assert type(lowmem.convert(model, technique)) is type(load(tmp_path / "stored"))


def test_a_new_model_of_the_config_of_an_adapted_one(tmp_path):
    adapted = lowmem.add_adapter(load(write(tmp_path / "dense")), "tuned", lowmem.LoRA(2))
    adapted.save_pretrained(tmp_path / "adapted")
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "adapted"))
    made.save_pretrained(tmp_path / "made")
    with pytest.warns(UserWarning, match="they are dense"):
        assert_same(load(tmp_path / "made"), made)


def test_a_folder_that_is_stored_in_part_is_no_dense_one(small):
    dense = load(small).dequantize().state_dict()[f"{NAME}.weight"]
    change_weights(small, {f"{NAME}.weight": dense.clone()})
    with pytest.raises(ValueError, match="is stored, and the folder has it dense"):
        load(small)
