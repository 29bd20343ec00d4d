"""A folder is calibrated on a text or on the model's own, by the command, too; else an error of one line says why."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import lowmem
from lowmem import Budget, FourBit, calibrate
from lowmem.__main__ import main
from lowmem.integrations.transformers.folder_calibration import (
    SELF_CALIBRATED_RATIO,
    UNCALIBRATED_RATIO,
    calibration_batches,
)
from lowmem.transforms.calibration.self_generated_text import self_generated_token_batches
from tests.integrations.transformers.folders import CONFIGS, assert_same, load, write
from tests.integrations.transformers.tokens import write_tokenizer

TEXT = "\n\n".join(f"Paragraph {number}: " + "what is said of it, and more. " * 9 for number in range(90))
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "vocab_size": 258}
pytestmark = pytest.mark.filterwarnings("ignore:fewer rows than columns:UserWarning")  # so small are models and texts


@pytest.fixture
def source(tmp_path):
    folder = write(tmp_path / "in")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def inside(model):
    return [
        module for module in model.modules() if hasattr(module, "quantized") and isinstance(module, torch.nn.Linear)
    ]


@pytest.mark.filterwarnings("ignore:layers were quantized by their weights alone .*Experts")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_models_own_text_calibrates_it(tmp_path, kind):
    """With its cache the model generates what it does without; blocks are found in each."""
    folder = write(tmp_path / "in", kind)
    write_tokenizer(folder)
    model, tokenizer = load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batches = self_generated_token_batches(model, tokenizer, 0, 1.0)
    assert torch.cat(batches).shape == (32, 64)  # as many positions as the model has
    calls = []
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    if kind == "gpt2":  # of which linear layers are Conv1D
        return
    calibrate(model, batches, FourBit("nf4"))
    assert len(calls) <= 1 + 4 * len(batches)
    assert all(layer.quantized.method == "calibrated" for layer in inside(model) if layer is not model.lm_head)


def test_the_command_calibrates_on_a_text_and_goes_on_after_an_end(source, text, tmp_path, results):
    out = tmp_path / "out"
    asked = ["--calibrate", str(text), "--resume", str(tmp_path / "done"), "--format", "bof4s", "--block-size", "32"]
    rows = results("quantize", str(source), str(out), *asked)
    assert any(row["converted"] and "q_proj" in row["name"] for row in rows)
    model = load(source, dtype="auto").eval()
    batches = calibration_batches(model, AutoTokenizer.from_pretrained(source), TEXT)
    assert all(batch.shape[1] == 64 for batch in batches)  # as many positions as the model has
    assert sum(len(batch) for batch in batches) == 32
    expected = calibrate(model, batches, FourBit("bof4s", block_size=32))
    assert_same(load(out), expected)
    assert load(out).model.layers[0].mlp.up_proj.quantized.method == "calibrated"
    assert len(list((tmp_path / "done").iterdir())) == 2
    results("quantize", str(source), str(tmp_path / "again"), *asked)
    assert_same(load(tmp_path / "again"), expected)


def test_the_command_calibrates_without_data_and_by_columns_alone(source, tmp_path):
    assert main(["quantize", str(source), str(tmp_path / "own"), "--calibrate", "self"]) == 0
    asked = ["--calibrate", "self", "--diagonal", "--exclude", "*down_proj"]
    assert main(["quantize", str(source), str(tmp_path / "weighed"), *asked]) == 0
    tokenizer = AutoTokenizer.from_pretrained(source)
    expected = calibrate(load(source, dtype="auto"), "self", FourBit(), tokenizer=tokenizer)
    assert_same(load(tmp_path / "own"), expected)
    weighed = load(tmp_path / "weighed").model.layers[0].mlp
    assert weighed.up_proj.quantized.method == "search"
    assert type(weighed.down_proj) is torch.nn.Linear


def test_the_command_calibrates_on_random_tokens(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--calibrate", "random"]) == 0
    assert "--calibrate self" not in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(source)
    expected = calibrate(load(source, dtype="auto"), "random", FourBit(), tokenizer=tokenizer, tokens=4096)
    assert_same(load(tmp_path / "out"), expected)


def test_the_command_without_calibration_names_it_with_its_gain_and_its_time(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "--calibrate self" in line]
    assert len(lines) == 1
    assert "takes about 1 s of CPU time" in lines[0]
    figures = re.search(r"from ([\d.]+) to ([\d.]+) times the dense model's", lines[0]).groups()
    assert figures == (f"{UNCALIBRATED_RATIO:.3f}", f"{SELF_CALIBRATED_RATIO:.3f}")
    assert main(["quantize", str(source), str(tmp_path / "eight"), "--format", "int8"]) == 0
    assert "--calibrate" not in capsys.readouterr().err  # 8 bits are not calibrated


def test_the_gain_that_the_command_names_is_the_guides():
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "calibration.md").read_text(encoding="utf8")
    table = guide.partition("<!-- python -m benchmarks.quality --calibrated people zitate -->\n")[2]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.partition("<!-- end -->")[0].splitlines()]
    column = next(row for row in rows if "Calibrated on" in row).index("manual: perplexity / dense")
    by_data = {row[1]: row[column] for row in rows}
    assert by_data["none"] == f"{UNCALIBRATED_RATIO:.3f}"
    assert by_data["`self`, 4096 tokens"] == f"{SELF_CALIBRATED_RATIO:.3f}"


def test_the_command_divides_bits_by_the_text_and_calibrates(source, text, tmp_path, capsys):
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), "--calibrate", str(text), "--bits", "6", "--verbose"])
        == 0
    )
    out = capsys.readouterr().out
    assert "of --bits 6" in out
    assert re.search(r"saves \d+\.\d\d%", out)  # the rest of the reason may be wrapped
    model = load(source, dtype="auto").eval()
    batches = calibration_batches(model, AutoTokenizer.from_pretrained(source), TEXT)
    assert_same(load(tmp_path / "out"), calibrate(model, batches, Budget(6)))
    formats = {layer.quantized.format for layer in inside(model)}
    assert formats == {"bof4s", "int8"}


def test_an_encoder_reads_paragraphs_that_are_padded_and_masked(tmp_path, text, refused, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=258, max_position_embeddings=128, **sizes)).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    model, tokenizer = load(tmp_path / "in", as_class=BertForMaskedLM), AutoTokenizer.from_pretrained(tmp_path / "in")
    batches = calibration_batches(model, tokenizer, TEXT)
    assert sum(len(batch["input_ids"]) for batch in batches) == 64
    assert all("attention_mask" in batch for batch in batches)
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--calibrate", str(text)]) == 0
    made = load(tmp_path / "out", as_class=BertForMaskedLM)
    assert made.bert.encoder.layer[1].output.dense.quantized.method == "calibrated"
    assert "BertForMaskedLM generates no text" in refused(
        "quantize", tmp_path / "in", tmp_path / "own", "--calibrate", "self"
    )
    assert not (tmp_path / "own").exists()
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "random"), "--calibrate", "random"]) == 0
    expected = calibrate(model, "random", FourBit(), tokenizer=tokenizer)
    assert_same(load(tmp_path / "random", as_class=BertForMaskedLM), expected)
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "plain")]) == 0
    assert "--calibrate" not in capsys.readouterr().err  # it writes no text


def test_a_warning_is_a_line_of_the_command(tmp_path, text, capsys):
    write_tokenizer(write(tmp_path / "in", "gpt2"))
    assert (
        main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--calibrate", str(text), "--diagonal"]) == 0
    )
    err = capsys.readouterr().err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "layers were quantized by their weights alone (transformer.h.0.attn.c_attn" in notes[0]
    assert "UserWarning" not in err


def test_what_cannot_be_calibrated_is_an_error_and_nothing_is_written(source, text, tmp_path, refused):
    def told(*options):
        return refused("quantize", source, tmp_path / "out", *options)

    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "short.txt': it has too few tokens" in told("--calibrate", tmp_path / "short.txt")
    assert "bytes.txt': it is no UTF-8 text, from byte 0" in told("--calibrate", tmp_path / "bytes.txt")
    assert "is no file: name a text, self or random" in told("--calibrate", tmp_path / "gone.txt")
    assert "--calibrate chooses codes of 4 bits" in told("--calibrate", text, "--format", "int8")
    T5ForConditionalGeneration(T5Config(**T5, num_layers=1)).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    for asked in (text, "self"):
        line = refused("quantize", tmp_path / "t5", tmp_path / "out", "--calibrate", asked)
        assert "a T5ForConditionalGeneration is an encoder and a decoder, and a text feeds one alone" in line
    (source / "tokenizer.json").unlink()
    assert "no tokenizer that transformers can load" in told("--calibrate", "self")
    assert not (tmp_path / "out").exists()


def test_blocks_of_an_encoder_that_hand_on_more_than_hidden_states():
    """T5's first block computes the bias of positions for all others, and the model hands it on."""
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**T5, num_layers=3, feed_forward_proj="gated-gelu")).eval()
    batches = [torch.randint(0, 258, (4, 30), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    seen, calls = [], []
    last = model.encoder.block[2].layer[0].SelfAttention.q
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model.encoder.block[1].layer[0].SelfAttention.q.register_forward_pre_hook(lambda *_: calls.append(1))
    calibrate(model, batches, FourBit("nf4"))
    assert len(calls) == 2 + 2 * len(batches)
    calibrated = seen[-3:]
    seen.clear()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    assert all(torch.equal(*both) for both in zip(seen, calibrated, strict=True))
    assert lowmem.summary(model)
