"""Perplexity and divergence are those of the definition, in float64."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from lowmem import FourBit
from lowmem.__main__ import main
from lowmem.integrations.transformers import text_comparison
from lowmem.integrations.transformers.pretrained_folder import quantize_folder
from lowmem.integrations.transformers.text_comparison import bootstrap_95_interval_or_none, compare_folders_on_text
from tests.integrations.transformers.folders import SIZES, change_config, load, write
from tests.integrations.transformers.tokens import write_tokenizer

TEXT = "Weights are levels times scales, and each error is bounded. " * 3


@pytest.fixture
def folders(tmp_path):
    write_tokenizer(write(tmp_path / "in"))
    quantize_folder(tmp_path / "in", tmp_path / "out", FourBit("nf4"))
    return tmp_path / "in", tmp_path / "out"


def test_scores_are_those_of_the_definition(folders):
    base, other = compare_folders_on_text([*folders], TEXT)
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


def test_one_layer_in_the_others_place_loses_what_the_model_with_it_alone_does(folders):
    base, other = compare_folders_on_text([*folders], TEXT, layers=True)
    assert base.layers == ()
    assert len(other.layers) == 2 * 7 + 2  # the head is tied to the embedding, and replaced on its own
    assert [one.loss for one in other.layers] == sorted((one.loss for one in other.layers), reverse=True)
    worst = other.layers[0]
    dense, stored = (load(folder) for folder in folders)
    changed = load(folders[0])
    parent, _, name = worst.path.rpartition(".")
    setattr(changed.get_submodule(parent), name, stored.get_submodule(worst.path))
    tokens = torch.tensor([2 + sorted(map(chr, _alphabet())).index(_shown(byte)) for byte in TEXT.encode()])
    divergence = count = 0
    with torch.no_grad():
        for window in tokens.split(64):
            first, second = (one(window[None]).logits[0, :-1].double().log_softmax(-1) for one in (dense, changed))
            divergence += float((first.exp() * (first - second)).sum())
            count += len(window) - 1
    assert worst.loss == pytest.approx(divergence / count, abs=5e-6)
    assert (other.ratio, base.ratio) == (pytest.approx(other.perplexity / base.perplexity), 1)
    assert other.divergence_interval[0] <= other.divergence <= other.divergence_interval[1]
    assert other.ratio_interval[0] <= other.ratio <= other.ratio_interval[1]
    assert 0 <= other.agreement_interval[0] <= other.agreement <= other.agreement_interval[1] <= 1
    assert (base.agreement, base.agreement_interval) == (1, None)


def test_encoders_are_compared_by_the_mean_of_their_hidden_states_without_padding(tmp_path, capsys):
    torch.manual_seed(1)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    quantize_folder(tmp_path / "in", tmp_path / "out", FourBit("nf4"))
    text = tmp_path / "text.txt"
    text.write_text("One paragraph.\n\nA second one, which\nis longer.\n\n\n" + "long " * 40)
    base, other = compare_folders_on_text([tmp_path / "in", tmp_path / "out"], text.read_text(), layers=True)
    assert (base.paragraphs, base.cosine, base.cosine_interval) == (3, pytest.approx(1), None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "in")
    cosines = []
    for paragraph in ("One paragraph.", "A second one, which is longer.", "long " * 39 + "long"):
        given = tokenizer(paragraph, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            means = [
                BertModel.from_pretrained(tmp_path / name).eval()(**given).last_hidden_state[0].double().mean(0)
                for name in ("in", "out")
            ]
        cosines.append(float(torch.nn.functional.cosine_similarity(*means, dim=0)))
    assert other.cosine == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert other.lowest == pytest.approx(min(cosines), abs=1e-6)
    assert other.cosine_interval[0] <= other.cosine <= other.cosine_interval[1]
    assert other.layers[0].loss > other.layers[-1].loss >= 0
    argv = ["compare", str(tmp_path / "in"), str(tmp_path / "out"), "--text", str(text), "--layers"]
    assert main([*argv, "--tolerance", "1e-9"]) == 1
    shown = capsys.readouterr()
    assert "Cosine" in shown.out
    assert other.layers[0].path in shown.out
    assert "by 1 - cosine =" in shown.err


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


def test_a_model_beside_itself_has_a_row_of_its_own(folders):
    first, same, other = compare_folders_on_text([folders[0], folders[0], folders[1]], TEXT)
    assert (same.model, same.divergence, same.ratio, same.agreement) == (first.model, 0, 1, 1)
    assert other.divergence > 0


def test_predictions_that_are_no_numbers_are_no_likeness(folders, tmp_path, capsys):
    """Nor is a token that both models exclude a difference: 0 log 0 is 0."""
    broken = load(folders[0])
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    write_tokenizer(tmp_path / "nan")
    broken.save_pretrained(tmp_path / "nan")
    (text := tmp_path / "text.txt").write_text(TEXT)
    argv = ["compare", str(folders[0]), str(tmp_path / "nan"), "--text", str(text)]
    assert main(argv) == 1
    assert "by nan nats a token, which is not finite" in capsys.readouterr().err
    _, other = compare_folders_on_text([folders[1], tmp_path / "nan"], TEXT, layers=True)
    assert math.isnan(other.divergence)
    assert [one.path for one in other.layers if math.isnan(one.loss)] == ["model.layers.1.mlp.down_proj"]
    assert math.isnan(other.layers[0].loss)
    without = torch.tensor([[0.5, -math.inf, 1], [2, -math.inf, 0]]).log_softmax(-1)
    assert text_comparison._summed_kl_without_last_token(without, without) == 0


def test_what_cannot_be_compared_is_one_line(folders, tmp_path, refused):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff")

    def told(*names):
        return refused("compare", *names, "--text", text)

    assert "it is no UTF-8 text, from byte 0" in told(*folders)
    text.write_text("a")
    assert "1 tokens, of which none can be predicted" in told(*folders)
    text.write_text(TEXT)
    assert "model='bignet' is no folder" in told("bignet", folders[0])
    assert "at least one other folder" in told(folders[0])
    assert "it has no tokenizer" in told(write(tmp_path / "bare"), folders[0])
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 258}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    for names in ((tmp_path / "t5", folders[0]), (folders[0], tmp_path / "t5")):
        assert "a T5ForConditionalGeneration is an encoder and a decoder" in told(*names)
    change_config(folders[1], architectures=["LlamaModel"])
    assert "a LlamaModel predicts no tokens" in told(*folders)
    assert "its embeddings" not in told(folders[1], folders[0])


def test_an_interval_holds_the_mean_of_the_source_nineteen_times_in_twenty():
    """Of 400 texts of 30 parts 380 are expected, or some fewer since parts are few: 340 are five deviations below."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        counts = torch.randint(50, 100, (30,), generator=generator)
        sums = counts * (1 + torch.randn(30, generator=generator))
        low, high = bootstrap_95_interval_or_none(sums, counts)
        held += low <= 1 <= high
    assert 340 <= held <= 392


def test_a_function_of_the_mean_moves_an_interval_s_ends_and_one_part_has_none():
    sums, counts = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0])
    low, high = bootstrap_95_interval_or_none(sums, counts)
    assert (low, high) == (1.0, 2.0)  # the least and the largest mean of a part
    assert bootstrap_95_interval_or_none(sums, counts, torch.exp) == pytest.approx(
        (torch.tensor([low, high]).double().exp()).tolist()
    )
    assert bootstrap_95_interval_or_none(sums, counts) == (low, high)
    assert bootstrap_95_interval_or_none(sums[:1], counts[:1]) is None
