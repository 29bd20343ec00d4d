"""The example of a language model runs, with few and short rows: what it trains lowers the perplexity."""

import sys

import pytest

pytest.importorskip("gguf", reason="the model is a GGUF file: pip install gguf")

from tests.examples import example
from tests.formats.smollm2 import smollm2


def test_language_model(tmp_path, monkeypatch, capsys):
    smollm2()
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
