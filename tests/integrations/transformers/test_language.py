"""Perplexity and divergence are those of the definition, in float64."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem import FourBit
from lowmem.__main__ import main
from lowmem.integrations.transformers.folder import quantize_folder
from lowmem.integrations.transformers.language import compare_text
from tests.integrations.transformers.folders import load, write
from tests.integrations.transformers.tokens import write_tokenizer

TEXT = "Weights are levels times scales, and each error is bounded. " * 3


@pytest.fixture
def folders(tmp_path):
    write_tokenizer(write(tmp_path / "in"))
    quantize_folder(tmp_path / "in", tmp_path / "out", FourBit("nf4"))
    return tmp_path / "in", tmp_path / "out"


def test_scores_are_those_of_the_definition(folders):
    base, other = compare_text([*folders], TEXT)
    tokens = torch.tensor([2 + sorted(map(chr, _alphabet())).index(_shown(byte)) for byte in TEXT.encode()])
    windows = tokens.split(64)  # max_position_embeddings
    models = [load(folder).double() for folder in folders]
    loss, divergence, count = [0.0, 0.0], 0.0, 0
    for window in windows:
        with torch.no_grad():
            logs = [model(window[None]).logits[0, :-1].log_softmax(-1) for model in models]
        for number, own in enumerate(logs):
            loss[number] -= float(own.gather(1, window[1:, None]).sum())
        divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        count += len(window) - 1
    assert (base.tokens, other.tokens) == (count, count)
    # float32 log-probabilities of 258 tokens near 5.6 are off by a few units in their last place, 5e-7 each
    assert base.perplexity == pytest.approx(math.exp(loss[0] / count), rel=1e-4)
    assert other.perplexity == pytest.approx(math.exp(loss[1] / count), rel=1e-4)
    assert other.divergence == pytest.approx(divergence / count, abs=5e-6)
    assert base.divergence == 0
    assert min(base.tokens_per_second, other.tokens_per_second) > 0


def _alphabet():
    return [ord(_shown(byte)) for byte in range(256)]


def _shown(byte):
    """Return the character that stands for a byte in GPT-2's alphabet: itself, if it is printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printed else chr(256 + [b for b in range(256) if b not in printed].index(byte))


def test_the_command_prints_and_judges(folders, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    argv = ["compare", *map(str, folders), "--text", str(text)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Perplexity" in out
    assert main([*argv, "--tolerance", "0", "--json"]) == 1
    captured = capsys.readouterr()
    base, other = json.loads(captured.out)
    assert base["divergence"] == 0 < other["divergence"]
    assert "nats a token, above --tolerance 0" in captured.err


def test_what_cannot_be_compared_is_one_line(folders, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff")

    def refused(*names):
        assert main(["compare", *map(str, names), "--text", str(text)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "it is no UTF-8 text, from byte 0" in refused(*folders)
    text.write_text("a")
    assert "1 tokens, of which none can be predicted" in refused(*folders)
    text.write_text(TEXT)
    assert "model='bignet' is no folder" in refused("bignet", folders[0])
    assert "at least one other folder" in refused(folders[0])
    assert "it has no tokenizer" in refused(write(tmp_path / "bare"), folders[0])
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    assert "a LlamaModel predicts no tokens" in refused(*folders)
