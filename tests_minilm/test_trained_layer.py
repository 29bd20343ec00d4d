"""What the page ``docs/four-bits.md`` shows of trained models is what ``benchmarks.trained_layer`` measures."""

import json

import pytest

from benchmarks import trained_layer


def test_the_stored_figures_are_those_of_the_models(tmp_path):
    pytest.importorskip("gguf", reason="the tokenizer is in a GGUF file: tox -e minilm")
    stored = json.loads(trained_layer.FILE.read_text())
    assert trained_layer.layer() == stored["layer"]
    assert trained_layer.conversation(tmp_path) == stored["conversation"]
