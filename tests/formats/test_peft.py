"""Adapters against the real PEFT: what lowmem writes computes the same there, and what PEFT writes the same here.

Outputs are compared in float64, where a wrong scaling, order or layout cannot hide in rounding, and once in float32.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed: tox -e formats")
pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, LlamaConfig, MixtralConfig

from lowmem import FourBit, LoRA, adapter_layers, convert, delete_adapter, load_adapter, restore, save_adapter
from lowmem.errors import FileError
from lowmem.io.formats.peft.peft_reader import adapter_folders_by_name
from tests.io.formats.peft_model import parts

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages

TINY = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = torch.arange(14).view(2, 7) * 3 % 20


EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MODELS = {
    "parts": parts,
    "llama": LlamaConfig(**TINY, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**TINY, **EXPERTS),
    "gpt_oss": GptOssConfig(**TINY, **EXPERTS, head_dim=8),
    "gpt2": GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4),
}
RANKED = {
    "parts": {"alphas": {"*fc": 3}, "ranks": {"inner.*": 4}},
    "llama": {"alphas": {"*.q_proj": 3.5, "*.1.mlp.*": 7}, "ranks": {"*.k_proj": 5}},
    "mixtral": {"alphas": {"*.down_proj": 3}, "ranks": {"*.gate_up_proj": 3}},
    "gpt_oss": {"alphas": {"*.down_proj": 3}, "ranks": {"*.gate_up_proj": 3}},
    "gpt2": {"alphas": {"*.c_attn": 3}, "ranks": {"*.c_proj": 3}},
}


def made(name, seed=0):
    torch.manual_seed(seed)
    if name == "parts":
        return parts().eval().double()
    MODELS[name]._experts_implementation = "eager"  # which knows float64
    return AutoModelForCausalLM.from_config(MODELS[name]).eval().double()


def randomize(model, std=0.2):
    for adapter in adapter_layers(model, "default").values():
        nn.init.normal_(adapter.lora_a, std=std)
        nn.init.normal_(adapter.lora_b, std=std)
    return model


def outputs(model, tokens=TOKENS):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


def assert_near(found, expected, bound=1e-12):
    error = (found - expected).double().abs().max() / expected.abs().max()
    assert error < bound, error


def everything(path, module):
    return "router" not in path and path not in ("", "lm_head", "transformer.wpe", "attention.out_proj")


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same_and_its_own_folder_comes_back(tmp_path, name, stabilized):
    base = made(name)
    model = convert(
        copy.deepcopy(base), LoRA(2, 5, rank_stabilized=stabilized, **RANKED[name]), where=everything
    ).double()
    randomize(model)
    expected = outputs(model)
    assert (expected - outputs(base)).abs().max() > 1e-2
    save_adapter(model, tmp_path / "ours", format="peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", autocast_adapter_dtype=False)
    assert_near(outputs(theirs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(outputs(back), expected)
    own, same = adapter_layers(model, "default"), adapter_layers(back, "default")
    assert own.keys() == same.keys()
    for place, adapter in own.items():
        assert torch.equal(adapter.lora_a, same[place].lora_a)
        assert torch.equal(adapter.lora_b, same[place].lora_b)
        assert adapter.scaling == same[place].scaling


CONFIGS = {  # how PEFT may name the layers of each model
    "parts": [
        {"target_modules": ["fc", "embed", "conv"], "exclude_modules": ["inner.fc"], "lora_alpha": 3.5},
        {"target_modules": r"(inner\.)?f.|head", "use_rslora": True, "rank_pattern": {"^fc": 4, "inner.*": 3}},
        {"target_modules": ["fc"], "modules_to_save": ["head", "embed"], "bias": "lora_only"},
        {"target_modules": ["head"], "target_parameters": ["attention.in_proj_weight"], "bias": "all"},
    ],
    "llama": [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": 0,
         "alpha_pattern": {r"layers\..*k_proj": 3}},
        {"target_modules": r"model\.layers\.\d+\.(mlp|self_attn)\.[qud].*_proj", "exclude_modules": r".*\.0\.[^q]+\w",
         "rank_pattern": {"^model.layers.1.mlp.up_proj": 5, "layers.0.*q_proj|down_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"(.*\.)?0\..*", "modules_to_save": ["lm_head"]},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["(layers|h)"]},
        {"target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": "gaussian"},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"], "trainable_token_indices": None},
    ],
    "mixtral": [
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2,
         "rank_pattern": {"experts.down_proj": 3}, "use_rslora": True},
        {"target_modules": [], "target_parameters": ["1.mlp.experts.down_proj"]},
    ],
    "gpt_oss": [
        {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"], "alpha_pattern": {"o_proj": 1}}
    ],
    "gpt2": [
        {"fan_in_fan_out": True},
        {"target_modules": ["c_attn", "wpe", "mlp.c_proj"], "modules_to_save": ["ln_f"]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes_computes_the_same_here_and_back(tmp_path, name):
    for number, fields in enumerate(CONFIGS[name]):
        torch.manual_seed(number)
        base = made(name)
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**fields), autocast_adapter_dtype=False).eval()
        with torch.no_grad():
            for one in theirs.parameters():
                if one.requires_grad:
                    one.add_(torch.randn_like(one), alpha=0.2)
        expected = outputs(theirs)
        assert (expected - outputs(base)).abs().max() > 1e-2
        theirs.save_pretrained(tmp_path / str(number))
        model = load_adapter(copy.deepcopy(base), tmp_path / str(number))
        assert_near(outputs(model), expected)
        save_adapter(model, tmp_path / f"{number}-ours", format="peft")
        again = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / f"{number}-ours", autocast_adapter_dtype=False
        )
        assert_near(outputs(again), expected)
        assert torch.equal(outputs(load_adapter(copy.deepcopy(base), tmp_path / f"{number}-ours")), outputs(model))


def test_the_adapters_of_one_folder_are_found(tmp_path):
    model = get_peft_model(made("llama"), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    assert adapter_folders_by_name(tmp_path) == {"default": tmp_path, "other": tmp_path / "other"}


REFUSED = {
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "trainable_token_indices": {"trainable_token_indices": {"embed": [1, 2]}},
    "PEFT has no working adapter of out_proj": {"target_modules": ["attention"]},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_form_here_is_refused_by_name(tmp_path, what):
    base = made("parts").float()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**{"target_modules": ["fc"], **REFUSED[what]}))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(FileError, match=what):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("kind", ["IA3Config", "OFTConfig", "LoHaConfig", "AdaLoraConfig", "VeraConfig"])
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, kind):
    options = {"IA3Config": {"feedforward_modules": []}, "OFTConfig": {"oft_block_size": 8}}.get(kind, {})
    options = {"total_step": 10} if kind == "AdaLoraConfig" else options
    config = getattr(peft, kind)(target_modules=["fc"], **options)
    get_peft_model(made("parts").float(), config).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=f"{kind.removesuffix('Config').upper()}', and lowmem loads LORA; merge it"):
        load_adapter(made("parts").float(), tmp_path)


def test_an_adapter_trained_on_four_bits_is_loaded_in_peft_on_the_dequantized_base(tmp_path):
    torch.manual_seed(0)
    model = convert(made("llama").float().train(), FourBit("nf4"), LoRA(4, 8, ranks={"*.mlp.*": 2}))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(40):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    expected = outputs(model.eval())
    save_adapter(model, tmp_path / "adapter", format="peft")
    base = restore(delete_adapter(model, "default"), dtype=torch.float32)
    assert not any("lora" in name for name in base.state_dict())
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert_near(outputs(theirs), expected, 1e-6)
    assert_near(outputs(load_adapter(base, tmp_path / "adapter")), expected, 1e-6)
