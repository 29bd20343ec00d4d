"""Models to generate text with: where an adapter's base is, and which tokens end a text."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem.errors import FileError
from lowmem.integrations.transformers.text_generation import adapter_base_path, end_token_ids
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer

CHAT = "{% for m in messages %}<s>{{ m['content'] }}<s>\n{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def test_all_tokens_that_end_an_answer_end_it(tmp_path):
    write_tokenizer(write(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = [7, 8]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT
    assert end_token_ids(model, tokenizer, chat=False) == [1, 7, 8]
    assert end_token_ids(model, tokenizer, chat=True) == [0, 1, 7, 8]


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
