"""``lowmem export --for`` and llama.cpp: the tokens of conversations, and logits of base and adapter."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")
pytest.importorskip("gguf", reason="gguf is not installed: tox -e formats")
pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not installed: tox -e formats")

import lowmem
from lowmem.__main__ import main
from lowmem.integrations.transformers.chat_template import ChatTemplate
from lowmem.integrations.transformers.exported_prompts import ExportedTokenizer, compared_prompts
from lowmem.integrations.transformers.ollama_template import derive_ollama_template
from lowmem.integrations.transformers.text_generation import end_token_ids, open_model_and_tokenizer
from tests.formats.llama_cpp import llama_cpp
from tests.formats.test_export_gguf import in_8_bits, with_gelu_of_ggml
from tests.integrations.transformers.folders import SIZES
from tests.integrations.transformers.test_chat_template import FAMILIES, KWARGS, family
from tests.integrations.transformers.test_text_generation import write_family

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


def write_model(folder, tokenizer):
    """Write a tiny llama with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_makes_the_tokens_of_the_training_of_conversations(name, tmp_path):
    tokenizer = family(name)
    write_model(tmp_path / "in", tokenizer)
    lowmem.export(tmp_path / "in", tmp_path / "out.gguf")
    template = ChatTemplate(tokenizer, KWARGS.get(name))
    beginning = ExportedTokenizer(tmp_path / "out.gguf").beginning
    derived = derive_ollama_template(template)
    with llama_cpp(tmp_path / "out.gguf") as loaded:
        for prompt in compared_prompts(template, "Be kind."):
            text = template.text(prompt.messages, prompt.tools, add_generation_prompt=True)
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert loaded.tokens(text.removeprefix(beginning)) == expected, prompt.name
            if not prompt.tools:
                assert loaded.tokens(derived.render(prompt.messages).removeprefix(beginning)) == expected, prompt.name
            begin = tokenizer.bos_token_id
            assert expected[:2].count(begin) == text.startswith(tokenizer.bos_token), prompt.name


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_base_and_adapter_compute_in_llama_cpp_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("llama"), family("qwen3"))
    rows = [
        {"messages": [{"role": "user", "content": f"after {n}?"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(16)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--steps", "8", "--lr", "0.01", "--for", "llama.cpp", "--save", "tuned", "--eval-share", "0"]
    assert main(["fit", "llama", "--data", "rows.jsonl", "--system", "Be brief.", *options]) == 0
    assert main(["export", "tuned", "out", "--for", "llama.cpp"]) == 0
    assert main(["export", "tuned", "one", "--for", "llama.cpp", "--merge", "--dtype", "f32"]) == 0
    model, tokenizer = open_model_and_tokenizer(Path("tuned"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "after 40?"}]
    text = ChatTemplate(tokenizer).text(messages, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        tuned = model(torch.tensor([tokens])).logits[0]
        lowmem.deactivate(model, lowmem.adapter_names(model)[0])
        plain = model(torch.tensor([tokens])).logits[0]
    assert distance(tuned, plain) > 0.01  # it has learned something
    with llama_cpp(Path("one.gguf")) as loaded:
        assert loaded.tokens(text) == tokens
        assert distance(loaded.logits(tokens), tuned) < 1e-5
    with llama_cpp(Path("out.gguf")) as loaded:
        assert loaded.tokens(text) == tokens
        # Without and with the adapter, llama.cpp rounds activations to 8 bits for products with stored weights
        of_rounding = distance(loaded.logits(tokens), plain)
        loaded.adapt(Path("out-adapter.gguf"))
        assert of_rounding < 0.05
        assert distance(loaded.logits(tokens), tuned) < 2 * of_rounding


def round_inputs_as_ggml(model):
    """Let stored layers round their inputs to 8 bits, and a Gemma take its activation from the table of ggml."""
    for path, module in model.named_modules():
        if path.endswith(("_proj", "lm_head")):
            module.register_forward_pre_hook(lambda _, given: (in_8_bits(given[0]),))
    return with_gelu_of_ggml(model)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_llama_cpp_answers_what_was_trained_with_the_same_tokens(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_family(Path("base"), name)
    if name == "gemma3":
        config = json.loads(Path("base/config.json").read_text())
        config["query_pre_attn_scalar"] = config["head_dim"]  # which llama.cpp computes
        Path("base/config.json").write_text(json.dumps(config))
    Path("rows.jsonl").write_text(json.dumps({"prompt": "Tea?", "completion": "Yes."}))
    options = ["--steps", "60", "--lr", "0.01", "--batch-size", "1", "--accumulate", "1", "--for", "llama.cpp"]
    assert main(["fit", "base", "--data", "rows.jsonl", *options, "--save", "tuned"]) == 0
    assert main(["export", "tuned", "out", "--for", "llama.cpp"]) == 0
    model, tokenizer = open_model_and_tokenizer(Path("tuned"))
    text = ChatTemplate(tokenizer).text([{"role": "user", "content": "Tea?"}], add_generation_prompt=True)
    prompt = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    ends = end_token_ids(model.generation_config, tokenizer, chat=True)
    made = model.generate(prompt, do_sample=False, max_new_tokens=40, eos_token_id=ends)
    start, tokens = prompt.shape[1], made[0].tolist()
    assert tokenizer.decode(tokens[start:], skip_special_tokens=True).endswith("Yes.")
    with torch.no_grad():
        exact = model(made).logits[0].double()
        rounded = round_inputs_as_ggml(model)(made).logits[0].double()
    with llama_cpp(Path("out.gguf")) as loaded:
        loaded.adapt(Path("out-adapter.gguf"))
        found = loaded.logits(tokens).double()
        assert loaded.greedy(tokens[:start], len(tokens) - start) == tokens
    assert distance(rounded, exact) > 0
    assert distance(found, exact) < 2 * distance(rounded, exact)
    first, second = exact[start - 1 : -1].topk(2).values.T
    difference = 2 * (rounded - exact)[start - 1 : -1].abs().amax()
    assert (first - second).min() > 2 * difference
