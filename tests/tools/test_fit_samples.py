"""`lowmem fit --keep` and `--samples`: adapters of moments, and answers to held-out prompts in the model card."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem.__main__ import main
from lowmem.finetuning import loop
from lowmem.finetuning.text_examples import Example
from lowmem.integrations.transformers.text_generation import open_model_and_tokenizer
from lowmem.tools import fit_language
from lowmem.tools.fit_samples import (
    evenly_spaced_steps,
    examples_with_prompts,
    generate_answers,
    samples_markdown,
    samples_record,
)
from tests.tools.test_fit_language import Killed

ARGV = ["fit", "llama", "--data", "data.jsonl", "--length", "64", "--rank", "4", "--lr", "0.02", "--steps", "8"]


def test_moments_divide_the_steps_into_equal_parts():
    assert evenly_spaced_steps(8, 3) == {2, 4, 6}
    assert evenly_spaced_steps(100, 1) == {50}
    assert evenly_spaced_steps(3, 9) == {1, 2}
    assert evenly_spaced_steps(1, 2) == evenly_spaced_steps(8, 0) == set()


@pytest.mark.parametrize("memory", ["fast", "lean", "plain"])
def test_answers_to_held_out_prompts_are_in_the_card(memory, place, capsys):
    argv = [*ARGV, "--eval-share", "0.2", "--samples", "2", "--memory", memory, "--save", "out", "--json"]
    assert main(argv) == 0
    told = capsys.readouterr()
    samples = json.loads(told.out)["samples"]
    assert len(samples) == 2
    for sample in samples:
        assert sample["answers"].keys() == {"0", "4", "8"}
        assert sample["answers"]["0"] != sample["answers"]["8"]
    card = Path("out", "README.md").read_text()
    for number, sample in enumerate(samples, 1):
        assert f"    {sample['prompt'].splitlines()[0]}" in card
        assert f"**Answer of the data**\n\n    {sample['expected']}" in card
        assert f"sample {number} after 4 steps: " in told.err
    assert "**Answer after 8 steps**" in card
    assert json.loads(Path("out", "training.json").read_text())["run"]["samples"] == 2


def test_adapters_of_moments_are_kept_and_generate_opens_them(place, capsys, monkeypatch):
    calls = []

    def recording(model, tokenizer, *asked):
        calls.append((*asked, generate_answers(model, tokenizer, *asked)))
        return calls[-1][-1]

    monkeypatch.setattr(fit_language, "generate_answers", recording)
    # Of a run that was killed before its first state
    Path("out.training", "checkpoints", "step-1").mkdir(parents=True)
    assert main([*ARGV, "--keep", "3", "--eval-share", "0.2", "--samples", "1", "--save", "out"]) == 0
    folders = [f"out/checkpoints/step-{step}" for step in (2, 4, 6)]
    assert sorted(path.as_posix() for path in Path("out").glob("checkpoints/*")) == folders
    assert not Path("out.training").exists()
    weights = {Path(folder, "adapter_model.safetensors").read_bytes() for folder in (*folders, "out")}
    assert len(weights) == 4
    [sample] = json.loads(Path("out", "training.json").read_text())["samples"]
    assert sample["answers"].keys() == {"0", "2", "4", "6", "8"}
    for folder, (*asked, answers) in zip((*folders, "out"), calls[1:], strict=True):
        assert generate_answers(*open_model_and_tokenizer(Path(folder)), *asked) == answers, folder
    for folder in folders:
        assert json.loads(Path(folder, "training.json").read_text())["steps"] == int(folder[-1])
        capsys.readouterr()
        assert main(["generate", folder, "--prompt", "item", "--max-new-tokens", "4", "--temperature", "0"]) == 0


def test_a_run_that_goes_on_has_the_same_checkpoints_and_answers(place, monkeypatch):
    argv = [*ARGV, "--keep", "3", "--eval-share", "0.2", "--samples", "2", "--save-every", "1"]
    assert main([*argv, "--save", "whole"]) == 0
    step = loop._FineTuningRun._train_step

    def ending(self, number):
        step(self, number)
        if number == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop._FineTuningRun, "_train_step", ending)
        with pytest.raises(Killed):
            main([*argv, "--save", "parts"])
    assert Path("parts.training", "checkpoints", "step-4", "adapter_config.json").exists()
    assert main(["fit", "llama", "--data", "data.jsonl", "--save", "parts", "--resume"]) == 0
    files = sorted(path.relative_to("whole") for path in Path("whole").rglob("*") if path.is_file())
    assert len([path for path in files if path.name == "adapter_model.safetensors"]) == 4
    for path in files:
        if path != Path("README.md"):  # which has the command
            assert Path("parts", path).read_bytes() == Path("whole", path).read_bytes(), path


def test_prompts_of_a_file_are_answered_and_those_without_are_refused(place, refused, capsys):
    Path("asked.jsonl").write_text('{"prompt": "7 and 7 is ", "completion": "14"}\n')
    assert main([*ARGV, "--samples", "asked.jsonl", "--save", "out"]) == 0
    [sample] = json.loads(Path("out", "training.json").read_text())["samples"]
    assert sample["expected"].startswith("14")
    assert "7 and 7 is" in sample["prompt"]
    argv = ["fit", "llama", "--data", "text.txt"]
    told = "--samples=3 needs examples with prompts: hold some out with --eval-share or --eval-data"
    assert told in refused(*argv, "--samples", "3", "--eval-share", "0")
    assert told in refused(*argv, "--samples", "3", "--eval-data", "text.txt")
    assert "'0' must be a positive integer" in refused(*argv, "--samples", "0")
    assert "cannot read 'none.csv'" in refused(*argv, "--samples", "none.csv")
    assert "--keep writes into OUT: name OUT with --save" in refused(*argv, "--keep", "3")
    for option in (["--keep", "3", "--save", "new"], ["--samples", "3"]):
        assert f"{option[0]} needs a whole model in one process" in refused(*argv, *option, "--shard")


def test_prompts_end_before_what_is_learned_and_texts_are_no_markup():
    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            return " ".join(map(str, tokens))

    text = Example.of([1, 2, 3], [True, True, True])
    chat = Example.of([1, 2, 3, 4, 5, 6, 7], [False, False, True, True, False, False, True])
    assert examples_with_prompts([text, chat, chat], 1) == (chat,)
    [sample] = samples_record([chat], Tokenizer(), {"0": ["# a\n```"]})
    assert sample == {"prompt": "1 2", "expected": "3 4", "answers": {"0": "# a\n```"}}
    assert "**Answer after 0 steps**\n\n    # a\n    ```" in samples_markdown([sample])
    assert samples_markdown([]) == ""
