"""What PEFT cannot do with stored modules is refused before get_peft_model returns; with dense ones it works."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")

import peft
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

import lowmem
from lowmem import FourBit, Half, LoRA
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import IDS, load, write
from tests.integrations.transformers.test_training import trainer

pytestmark = pytest.mark.filterwarnings(  # those of PEFT are not ours
    "default::FutureWarning", "default::DeprecationWarning", "default::UserWarning", "default::RuntimeWarning"
)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def stored(folder, technique=None, **more):
    return load(folder, quantization_config=LowmemConfig(technique or FourBit("nf4"), **more))


def experts_config():
    return peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)


def randomize(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def assert_trains(model, count):
    """The loss changes so many parameters."""
    model(IDS, labels=IDS).loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == count
    assert all(one.grad is not None and one.grad.any() for one in trained)


@pytest.mark.parametrize("made", ["loaded", "converted"])
def test_stored_experts_are_not_passed_over(tmp_path, made):
    folder = write(tmp_path / "dense", "mixtral")
    model = stored(folder) if made == "loaded" else lowmem.convert(load(folder), FourBit("nf4"))
    says = r"target_parameters=.* names model.layers.0.mlp.experts.gate_up_proj, which is stored.*skip='\*experts'"
    with pytest.raises(ValueError, match=says):
        peft.get_peft_model(model, experts_config())
    some = load(folder, quantization_config=LowmemConfig(FourBit("nf4"), skip="model.layers.0.mlp.experts"))
    with pytest.raises(ValueError, match="model.layers.1.mlp.experts.gate_up_proj, which is stored"):
        peft.get_peft_model(some, experts_config())  # PEFT does not even warn
    injected = peft.inject_adapter_in_model(experts_config(), stored(folder))  # no module of PEFT holds the model
    with pytest.raises(ValueError, match="names model.layers.0.mlp.experts.gate_up_proj, which is stored"):
        injected(IDS)
    with pytest.raises(ValueError, match="names model.layers.0.mlp.experts.gate_up_proj, which is stored"):
        trainer(injected, tmp_path / "run")
    later = peft.get_peft_model(stored(folder), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    later(IDS)
    later.add_adapter("later", experts_config())  # PEFT adds it without a word, and without one of the experts
    with pytest.raises(ValueError, match="names model.layers.0.mlp.experts.gate_up_proj, which is stored"):
        later(IDS)


def test_dense_models_with_tied_embeddings_are_left_to_peft():
    """PEFT registers None as the original of an embedding that is tied."""
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    tokens = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(BartForConditionalGeneration(config), tokens)
    assert model(input_ids=torch.tensor([[1, 2]]), decoder_input_ids=torch.tensor([[1]])).logits.isfinite().all()


def test_both_remedies_train_the_experts_and_read_each_other_s_folders(tmp_path):
    folder = write(tmp_path / "dense", "mixtral")
    model = randomize(peft.get_peft_model(stored(folder, skip="*experts"), experts_config()))
    assert_trains(model, 12)
    trainer(model, tmp_path / "run")
    model.eval().save_pretrained(tmp_path / "peft")
    own = lowmem.load_adapter(stored(folder, skip="*experts"), tmp_path / "peft")
    # the same products in float32: sums in another order
    torch.testing.assert_close(own(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert len(lowmem.adapter_names(lowmem.load_adapter(stored(folder), tmp_path / "peft"))) == 1
    chosen = lambda path, _: path.endswith(("q_proj", "experts"))  # noqa: E731
    model = randomize(lowmem.add_adapter(stored(folder), "tuned", LoRA(2), where=chosen))
    assert_trains(model, 12)
    lowmem.save_adapter(model, tmp_path / "own", format="peft")
    again = peft.PeftModel.from_pretrained(lowmem.restore(stored(folder)), tmp_path / "own")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gate_up_proj, which is stored"):
        peft.PeftModel.from_pretrained(stored(folder), tmp_path / "own")


@pytest.mark.parametrize("technique", [FourBit("nf4"), Half()])
@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1]}],
)
def test_a_stored_module_is_not_trained_whole(tmp_path, technique, more):
    """In 16 bits PEFT would train an embedding that gets no gradients."""
    model = stored(write(tmp_path, "llama"), technique)
    with pytest.raises(
        ValueError, match=r"Wrapper of PEFT trains a \w+ whole, which stores weight.*skip='\*lm_head'"
    ):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **more))


def test_a_dense_module_is_trained_whole(tmp_path):
    model = stored(write(tmp_path, "llama"), skip=["*lm_head", "*embed_tokens"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    assert_trains(randomize(peft.get_peft_model(model, config)), 6)


@pytest.mark.parametrize("kind", ["llama", "tied llama"])
def test_prompts_are_learned_beside_a_dense_embedding_alone(tmp_path, kind):
    folder = write(tmp_path, kind)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"dense embedding .* model.embed_tokens is stored.*skip='\*embed_tokens'"):
        peft.get_peft_model(stored(folder), config)
    assert_trains(peft.get_peft_model(stored(folder, skip="*embed_tokens"), config), 1)


def test_prompts_are_learned_beside_a_stored_embedding_that_peft_finds_by_its_name():
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    model = lowmem.convert(BertModel(BertConfig(vocab_size=258, **sizes)), FourBit("nf4"))
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    peft.get_peft_model(model, config)(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state.sum()


def convolutions(dims, groups, technique):
    """Two stored convolutions in float64, in which no kernel's order of sums shows, and inputs."""
    conv = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
    torch.manual_seed(0)
    first, second = conv(8, 16, 3, padding=1, groups=groups), conv(16, 8, 3, stride=2, groups=groups)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    return lowmem.convert(model, technique).double(), torch.randn(2, 8, *[5] * dims, dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "technique", [Half(torch.bfloat16), Half(torch.float16), lowmem.EightBit(), FourBit()], ids=str
)
def test_peft_adapts_stored_convolutions_as_dense_ones(dims, groups, technique):
    model, x = convolutions(dims, groups, technique)
    before, dense = model(x), lowmem.restore(convolutions(dims, groups, technique)[0])
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=groups == 1)
    adapted, twin = (peft.get_peft_model(one, config).double() for one in (model, dense))
    torch.testing.assert_close(adapted(x), before)
    state = {name: torch.randn_like(one) / 9 for name, one in peft.get_peft_model_state_dict(twin).items()}
    for one in (adapted, twin):
        peft.set_peft_model_state_dict(one, state)
    outputs = [one(x) for one in (adapted, twin)]
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], before)
    for out in outputs:
        out.square().sum().backward()
    grads, others = (
        {name: one.grad for name, one in found.named_parameters() if one.requires_grad} for found in (adapted, twin)
    )
    assert len(grads) == len(state)
    assert all(one.any() for one in grads.values())
    torch.testing.assert_close(grads, others)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), before)


def test_transposed_convolutions_are_as_unknown_to_peft_as_dense_ones():
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = torch.nn.Sequential(torch.nn.ConvTranspose1d(8, 8, 3))
    for one in (lowmem.convert(model, FourBit()), lowmem.restore(model)):
        with pytest.raises(ValueError, match="Target module ConvTranspose1d.* is not supported"):
            peft.get_peft_model(one, config)


@pytest.mark.parametrize("technique", [Half(), lowmem.EightBit(), FourBit()], ids=str)
@pytest.mark.parametrize(
    ("target", "options", "named"),
    [
        ("embed", {"use_dora": True}, r"DoRA \(use_dora=True\) of embeddings and Conv1D.*skip="),
        ("linear", {"use_dora": True}, r"DoRA \(use_dora=True\) of embeddings and Conv1D.*skip="),
        ("linear", {"init_lora_weights": "pissa"}, r"PiSSA of Conv1D.*skip="),
    ],
)
def test_options_of_peft_that_take_a_transposed_weight_are_named(technique, target, options, named):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(10, 16), "linear": Conv1D(16, 16)})
    lowmem.convert(model, technique, where=lambda path, module: True)
    with pytest.raises(RuntimeError, match=named):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target], **options))


def test_stored_biases_are_named():
    model = lowmem.convert(torch.nn.ModuleDict({"fc": torch.nn.Linear(16, 16)}), Half())
    with pytest.raises(RuntimeError, match="PEFT's bias='lora_only' trains biases: choose bias='none'"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"], bias="lora_only"))
