"""The folder that `lowmem fit` writes opens with one line, and says how it was made and what comes next."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoModelForCausalLM

import lowmem
from lowmem.__main__ import main
from lowmem.integrations.transformers import LowmemConfig
from lowmem.tools import fit_job
from tests.integrations.transformers.folders import assert_same, load, write
from tests.integrations.transformers.ollama import CHATML
from tests.integrations.transformers.tokens import write_tokenizer
from tests.tools.test_fit_language import fit


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("base", ["dense", "stored"])
def test_the_folder_opens_with_one_line_in_peft_and_transformers(base, place, capsys):
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    folder = "llama"
    if base == "stored":
        folder = "small"
        assert main(["quantize", "llama", "small"]) == 0
    options = [] if base == "stored" else ["--format", "dense"]
    argv = ["fit", folder, "--data", "text.txt", "--length", "48", "--steps", "3", "--lr", "0.01", "--save", "out"]
    assert main([*argv, *options]) == 0
    told = capsys.readouterr().err
    assert json.loads(Path("out", "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / folder
    )
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected = lowmem.load_adapter(load(folder), "out")(ids).logits
        for kind in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
            torch.testing.assert_close(kind.from_pretrained("out")(ids).logits, expected, rtol=1e-4, atol=1e-4)
    commands = re.findall(r"^next: lowmem (.*)$", told, flags=re.MULTILINE)
    assert commands[0] == "generate out --prompt TEXT"  # of plain text no chat was learned
    assert commands[1:] == [f"export out out.gguf {'--requantize' if base == 'stored' else '--for llama.cpp'}"]
    assert main(commands[1].split()) == 0


def test_the_model_card_and_the_record_name_no_path_of_this_machine(place, capsys):
    data = place / "data.jsonl"
    fit(capsys, "--steps", "2", "--eval-share", "0.2", "--save", str(place / "out"), "--resume", data=str(data))
    card = Path("out", "README.md").read_text()
    assert str(place) not in card + Path("out", "training.json").read_text()
    assert "base_model: llama\n" in card
    command = (
        "lowmem fit llama --data data.jsonl --length 48 --rank 4 --lr 0.01 --steps 2 --eval-share 0.2 --save out"
    )
    assert f"```\n{command}\n```" in card
    assert re.search(r"\| Perplexity of the held-out text, adapted \| \d+\.\d{4} \|", card)


def test_the_base_has_the_name_that_is_given(place, capsys):
    argv = ["fit", "llama", "--data", "data.jsonl", "--length", "48", "--steps", "1", "--save", "out"]
    assert main([*argv, "--base-name", "me/llama"]) == 0
    assert json.loads(Path("out", "adapter_config.json").read_text())["base_model_name_or_path"] == "me/llama"
    card = Path("out", "README.md").read_text()
    assert "base_model: me/llama\n" in card
    assert "--base-name me/llama\n" in card
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told == [
        "next: lowmem generate out --base llama --chat", "next: lowmem export out out.gguf --base llama --requantize"
    ]  # fmt: skip
    assert main(told[1].split()[2:]) == 0


@pytest.mark.parametrize("stored", [("--format", "q8_0"), ("--format", "bfloat16"), ("--for", "llama.cpp")])
def test_a_base_that_gguf_holds_exactly_is_not_quantized_again(stored, place, capsys):
    argv = ["fit", "llama", "--data", "text.txt", "--length", "48", "--steps", "1", "--save", "out"]
    assert main([*argv, *stored]) == 0
    assert capsys.readouterr().err.endswith("next: lowmem export out out.gguf --for llama.cpp\n")
    assert main(["export", "out", "out.gguf"]) == 0


@pytest.mark.parametrize("program", ["llama.cpp", "ollama"])
def test_after_chats_the_commands_name_both_programs_that_take_the_base_exactly(program, place, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed: tox -e transformers")
    config = Path("llama", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
    Path("llama", "chat_template.jinja").write_text(CHATML)
    Path("qa.csv").write_text("prompt,completion\n" + "".join(f"{n} and {n}?,{2 * n}\n" for n in range(8)))
    argv = ["fit", "llama", "--data", "qa.csv", "--steps", "1", "--save", "out", "--for", "llama.cpp", "--keep-base"]
    assert main([*argv, "--json"]) == 0
    shown = capsys.readouterr()
    told = [
        "lowmem generate out --chat",
        "lowmem serve out",
        "lowmem export out out.gguf --for llama.cpp  # or --for ollama",
    ]
    assert json.loads(shown.out)["next"] == told
    assert shown.err.splitlines()[-3:] == [f"next: {command}" for command in told]
    words = shlex.split(told[-1], comments=True)
    assert main([*words[1:-1], program]) == 0


def test_an_architecture_that_is_not_written_as_gguf_is_merged(place, capsys):
    write_tokenizer(write(Path("experts"), "mixtral"))
    argv = ["fit", "experts", "--data", "text.txt", "--length", "48", "--steps", "1", "--save", "out"]
    assert main(argv) == 0
    (merge,) = re.findall(r"^next: lowmem (merge .*)$", capsys.readouterr().err, re.MULTILINE)
    assert merge == "merge experts out out-merged --to bfloat16"
    assert main(merge.split()) == 0


def test_the_card_of_an_adapter_of_a_gguf_file_says_how_it_opens(place, capsys):
    assert main(["quantize", "llama", "small"]) == 0
    assert main(["export", "small", "base.gguf", "--requantize"]) == 0
    assert main(["fit", "base.gguf", "--data", "text.txt", "--length", "48", "--steps", "1", "--save", "out"]) == 0
    assert capsys.readouterr().err.endswith("next: lowmem export out out.gguf --for llama.cpp\n")
    card = Path("out", "README.md").read_text()
    assert "AutoModelForCausalLM" not in card
    assert 'load_adapter(from_exact("base.gguf"), "out")' in card
    from lowmem.integrations.transformers import from_exact

    assert lowmem.adapter_names(lowmem.load_adapter(from_exact("base.gguf"), "out")) == ["default"]


def test_a_kept_base_is_the_one_that_trained_and_generate_opens_it(place, capsys):
    options = ["--data", "text.txt", "--length", "48", "--steps", "2", "--lr", "0.01", "--save", "out"]
    assert main(["fit", "llama", *options, "--keep-base"]) == 0
    assert_same(load("out/base"), load("llama", quantization_config=LowmemConfig(lowmem.FourBit())))
    assert Path("out", "base", "tokenizer.json").is_file()
    Path("llama").rename("elsewhere")
    capsys.readouterr()
    assert main(["generate", "out", "--prompt", "item 3", "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr().err
    assert "note:" not in told
    assert "the base of" in refused_by_main(capsys, "generate", "out", "--dense-base", "--prompt", "a")
    assert main(["fit", "elsewhere", *options, "--keep-base", "--resume"]) == 0
    assert "out is complete already\n" in capsys.readouterr().err
    shutil.rmtree("out/base")
    assert main(["fit", "elsewhere", *options, "--keep-base", "--resume"]) == 0
    told = "out is complete already, without the base that --keep-base asks for: remove it to train again\n"
    assert told in capsys.readouterr().err


def refused_by_main(capsys, *argv) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_keeping_a_base_is_refused_where_it_is_not_stored_for_training(place, refused):
    data = ["--data", "text.txt", "--keep-base"]
    assert "name OUT with --save" in refused("fit", "llama", *data)
    told = refused("fit", "llama", *data, "--save", "out", "--format", "dense")
    assert "model='llama' is used as it is: leave it out" in told
    assert main(["quantize", "llama", "small"]) == 0
    assert "model='small' is used as it is" in refused("fit", "small", *data, "--save", "out")
    assert not Path("out").exists()


def test_a_large_base_is_told_of_the_option_that_keeps_it(place, capsys, monkeypatch):
    argv = ["fit", "llama", "--data", "text.txt", "--length", "48", "--steps", "1"]
    monkeypatch.setattr(fit_job, "KEPT_BASE_WEIGHTS", 10**4)
    assert main([*argv, "--save", "out"]) == 0
    assert "--keep-base writes it into OUT" in capsys.readouterr().err
    for more in (["--save", "again", "--keep-base"], ["--save", "third", "--format", "dense"], []):
        assert main([*argv, *more]) == 0
        assert "--keep-base" not in capsys.readouterr().err.replace("--save again --keep-base", "")
