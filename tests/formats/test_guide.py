"""The programs of guides run as they are written, on SmolLM2, or with its tokenizer."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.__main__ import main
from lowmem.integrations.transformers.tokenizing import tokenizer_of
from tests.formats.smollm2 import smollm2
from tests.integrations.transformers.folders import load
from tests.integrations.transformers.foreign import write_foreign

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "other-programs.md"


def test_the_programs_and_the_command(tmp_path, monkeypatch, capsys):
    write_foreign(tmp_path, "gptq").rename(tmp_path / "quantized")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    shutil.copy(smollm2(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf8")
    short, program = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    space = {"__name__": "guide"}
    exec(compile(short, str(PAGE), "exec"), space)
    assert "stored in q4_0" in repr(space["model"])
    assert main(command.split()[1:]) == 0
    capsys.readouterr()
    exec(compile(program, str(PAGE), "exec"), space)
    generated, difference, sizes = capsys.readouterr().out.strip().rsplit("\n", 2)
    assert "The capital of France is Paris" in generated
    assert float(difference.rpartition(" ")[2]) < 1e-5
    assert int(sizes.split()[0]) < 0.2 * int(sizes.split()[-1])
    (inline,) = re.findall(r"`(from_exact\([^`]*\))` loads the same", text)
    model = eval(inline, space)
    assert (model(**space["prompt"]).logits == space["model"](**space["prompt"]).logits).all()
    assert model.lm_head.forms["weight"].format == "q8_0"
    (options,) = re.findall(r"`(--include[^`]*)`", text)
    assert main([*command.split()[1:3], "small", *shlex.split(options)]) == 0
    assert "quantized 1, with an error of up to 0.0" in capsys.readouterr().out
    assert load("small").model.embed_tokens.forms["weight"].format == "bof4s"


def test_fine_tuning_with_a_tokenizer_that_a_package_ships(tmp_path, monkeypatch, capsys):
    """The program of the guide to Hugging Face, which runs with a tokenizer of bytes in its own test."""
    tokenizer = tokenizer_of(smollm2())
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "texts.txt").write_text("\n".join(f"Today is day {n}, and it rains." for n in range(8)))
    monkeypatch.chdir(tmp_path)
    page = PAGE.with_name("hugging-face.md")
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf8"), flags=re.DOTALL)
    space = {"__name__": "guide"}
    exec(compile(program, str(page), "exec"), space)
    assert "The weather" in capsys.readouterr().out  # and what a random model says, of any lines
    assert len(space["prompt"]["input_ids"][0]) < len("The weather")
