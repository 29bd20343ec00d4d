"""The programs of the guides to Hugging Face and to fine-tuning run as they are written."""

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e transformers")

import torch

from lowmem.__main__ import main
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer

GUIDES = Path(__file__).parents[3] / "docs" / "guides"
PAGE = GUIDES / "hugging-face.md"


@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning", "default::UserWarning")
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_the_program_and_the_commands(tmp_path, monkeypatch, capsys):
    write_tokenizer(write(tmp_path / "llama"))
    lines = [f"line {n}: weights are levels times scales, and each error has a bound" for n in range(8)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    (tmp_path / "held-out.txt").write_text(" ".join(lines))
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), flags=re.DOTALL)
    assert len([line for line in program.splitlines() if line]) <= 25
    space = {"__name__": "guide"}
    exec(compile(program, str(PAGE), "exec"), space)
    assert "The weather" in capsys.readouterr().out.splitlines()[-1]
    assert space["trainer"].state.global_step == 20
    history = [line["train_loss"] for line in space["trainer"].state.log_history if "train_loss" in line]
    assert history
    assert (tmp_path / "runs" / "checkpoint-10").is_dir()
    commands = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf8"), flags=re.DOTALL)
    for command in "".join(commands).splitlines():
        assert main(command.split()[1:]) == 0


def test_the_guide_to_fine_tuning(tmp_path, monkeypatch, capsys):
    write_tokenizer(write(tmp_path / "llama"))
    lines = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    text = (GUIDES / "fine-tuning.md").read_text(encoding="utf8")
    for command in "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).splitlines():
        assert main(command.split()[1:]) == 0
    assert "tuned is complete already" in capsys.readouterr().err
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    space = {"__name__": "guide"}
    exec(compile(program, "fine-tuning.md", "exec"), space)
    assert space["outcome"].losses[-1] < space["outcome"].losses[0]
    assert (tmp_path / "from-program" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")  # of other packages, as in a user's process
def test_the_guides_run_in_their_order_in_one_folder(tmp_path, monkeypatch, capsys):
    """On one model in bfloat16, without names that collide: fine-tuning, then the use of what was trained."""
    pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    write_tokenizer(write(tmp_path / "llama", "llama", torch.bfloat16))
    lines = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "texts.txt").write_text("\n".join(f"line {n} of the text" for n in range(8)))
    (tmp_path / "held-out.txt").write_text("some other words " * 9)
    monkeypatch.chdir(tmp_path)
    for page in ("hugging-face", "fine-tuning", "use-what-you-trained"):
        text = (GUIDES / f"{page}.md").read_text(encoding="utf8")
        for kind, block in re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL):
            if kind == "python":
                exec(compile(block, page, "exec"), {"__name__": "guide"})
                continue
            for command in block.splitlines():
                assert main(shlex.split(command)[1:]) == 0, command
    assert (tmp_path / "merged.gguf").is_file()
