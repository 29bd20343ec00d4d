"""Settings that are not given follow from the data, or are those of the run that goes on."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

import torch

from lowmem.__main__ import main
from lowmem.finetuning import loop
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.text_examples import Example, Texts
from lowmem.tools import fit, fit_settings
from lowmem.tools.fit_settings import batches_of_default_step, options_of_run
from tests.tools.test_fit_language import Killed


def texts_of(lengths, length):
    examples = [Example(*(torch.zeros(size, dtype=torch.int32) for _ in range(2))) for size in lengths]
    return Texts(examples, "", False, length=length)


def fit_to_json(capsys, *options, data="data.jsonl"):
    assert main(["fit", "llama", "--data", data, *options, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_step_has_about_eight_examples():
    for per_row, batch_size, accumulate in ((1, 4, 2), (2, 4, 1), (3, 2, 1), (4, 2, 1), (8, 1, 1), (20, 1, 1)):
        count = 640 * per_row
        batches = batches_of_default_step(texts_of([4] * count, 4 * per_row), 1)
        assert batches == (batch_size, accumulate), per_row
    assert batches_of_default_step(texts_of([32] * 640, 64), 4) == (1, 1)


def test_a_twentieth_of_the_steps_warms_up(place, capsys):
    options = ["--length", "48", "--steps", "3"]
    for given, warmup, ratio in (
        ([], 0, 0.05),
        (["--warmup", "0"], 0, None),
        (["--warmup", "2"], 2, None),
        (["--warmup-ratio", "0.5"], 0, 0.5),
    ):
        run = fit_to_json(capsys, *options, *given)[0]["run"]
        assert (run["warmup"], run["warmup_ratio"]) == (warmup, ratio), given


def test_settings_of_a_program_keep_their_defaults():
    assert FineTuning() == FineTuning(batch_size=4, accumulate=1, warmup=0, decay="cosine", clip=1.0, lr=2e-4)


def test_a_twentieth_of_a_hundred_examples_and_more_is_held_out_and_said(place, capsys):
    lines = [json.dumps({"prompt": f"{n} is ", "completion": f"{n}"}) for n in range(100)]
    options = ["--length", "48", "--steps", "1"]
    for count, held in ((99, 0), (100, 5)):
        Path("many.jsonl").write_text("\n".join(lines[:count]))
        found, told = fit_to_json(capsys, *options, data="many.jsonl")
        assert found["run"]["examples"] == count - held
        assert found["perplexity"].keys() == ({"stored", "adapted"} if held else set())
        assert ("5 of 100 examples are held out to evaluate on; --eval-share 0 trains on all" in told) is bool(held)
    found, told = fit_to_json(capsys, *options, "--eval-share", "0", data="many.jsonl")
    assert (found["run"]["examples"], found["perplexity"]) == (100, {})
    assert "held out" not in told
    found, told = fit_to_json(capsys, *options, "--eval-data", "data.jsonl", data="many.jsonl")
    assert found["run"]["examples"] == 100
    texts = texts_of([2] * 10_000, 2)
    assert len(fit_settings.split_held_out(texts, None, 0, None)[1].examples) == 200


def test_the_dense_model_is_evaluated_only_where_that_is_asked_for(place, capsys):
    options = ["--length", "48", "--steps", "1", "--eval-share", "0.2"]
    for more, names in (([], {"stored"}), (["--skip-dense"], {"stored"}), (["--compare-dense"], {"dense", "stored"})):
        found, _ = fit_to_json(capsys, *options, *more)
        assert found["perplexity"].keys() == {*names, "adapted"}


def test_the_optimizer_weight_decay_and_the_scale_of_the_adapter_are_options(place, capsys, refused):
    options = ["--length", "48", "--steps", "2", "--lr", "0.01"]
    found, _ = fit_to_json(capsys, *options)
    changes = {"optimizer": "adamw8bit", "weight_decay": "0.5"}
    for name, value in changes.items():
        other, _ = fit_to_json(capsys, *options, fit.option_string(name), value, "--save", name)
        assert str(other["run"][name]) == value
        assert other["losses"][0] == found["losses"][0]
    other, _ = fit_to_json(capsys, *options, "--rslora", "--save", "rslora", "--rank", "4")
    assert other["run"]["rank_stabilized"] is True
    assert json.loads(Path("rslora", "adapter_config.json").read_text())["use_rslora"] is True
    assert "--rslora is that of the adapter" in refused(
        "fit", "llama", "--data", "data.jsonl", "--from", "rslora", "--rslora"
    )
    for name in (*changes, "rslora"):
        assert "is complete already" in fit_to_json(capsys, "--save", name, "--resume")[1]
    told = refused("fit", "llama", "--data", "data.jsonl", "--save", "optimizer", "--resume", "--optimizer", "adamw")
    assert "optimizer was 'adamw8bit' and is None" in told
    assert main(["fit", "llama", "--data", "data.jsonl", *options, "--optimizer", "adamw8bit", "--dry-run"]) == 0
    assert "adamw8bit state" in capsys.readouterr().out


def test_a_run_goes_on_with_the_options_that_it_had(place, capsys, monkeypatch, refused):
    options = ["--length", "40", "--rank", "3", "--alpha", "5", "--target", "q_proj", "--format", "int8"]
    options += ["--dropout", "0.1", "--clip", "0", "--memory", "lean", "--seed", "7", "--epochs", "2"]
    options += ["--accumulate", "2", "--warmup-ratio", "0.2", "--eval-share", "0.2", "--eval-every", "3"]
    whole, _ = fit_to_json(capsys, *options, "--save", "whole")
    step = loop._FineTuningRun._train_step

    def ending(self, number):
        step(self, number)
        if number == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop._FineTuningRun, "_train_step", ending)
        with pytest.raises(Killed):
            main(["fit", "llama", "--data", "data.jsonl", *options, "--save", "parts"])
    capsys.readouterr()
    shutil.copytree("parts.training", "other.training")
    fit_to_json(capsys, "--save", "parts", "--resume")
    assert Path("parts", "training.json").read_bytes() == Path("whole", "training.json").read_bytes()
    weights = "adapter_model.safetensors"
    assert Path("parts", weights).read_bytes() == Path("whole", weights).read_bytes()
    again, told = fit_to_json(capsys, "--save", "parts", "--resume")
    assert "parts is complete already" in told
    assert again["run"] == whole["run"]
    argv = ["fit", "llama", "--data", "data.jsonl", "--save", "other", "--resume"]
    assert "rank was 3 and is 4" in refused(*argv, "--rank", "4")
    assert "epochs was 2 and is None" in refused(*argv, "--steps", "9")
    rows = whole["run"]["rows_of_a_step"]
    other, told = fit_to_json(capsys, "--batch-size", "1", "--save", "other", "--resume")
    assert f"accumulate was 2 until here, and is {rows}" in told
    assert other["losses"] == pytest.approx(whole["losses"], rel=1e-4)


@pytest.fixture
def killed_run(place, capsys, monkeypatch):
    """Return a function that runs a command, which is killed after its fourth step."""
    step = loop._FineTuningRun._train_step

    def ending(self, number):
        step(self, number)
        if number == 3:
            raise Killed

    def run(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(loop._FineTuningRun, "_train_step", ending)
            with pytest.raises(Killed):
                main(["fit", "llama", "--data", "data.jsonl", *argv])
        capsys.readouterr()

    return run


def test_files_that_a_run_had_are_those_of_its_state(killed_run, place, capsys, monkeypatch, refused):
    asked = {"prompt": "7 and 7 is ", "completion": "14"}
    Path("held-out.jsonl").write_text("\n".join(json.dumps({"text": f"item {n} costs {n}"}) for n in range(9)))
    Path("asked.jsonl").write_text(json.dumps(asked))
    assert main(["fit", "llama", "--data", "text.txt", "--length", "48", "--steps", "1", "--save", "start"]) == 0
    options = ["--length", "48", "--epochs", "2", "--eval-data", "held-out.jsonl", "--samples", "asked.jsonl"]
    options += ["--from", "start", "--keep-base", "--base-name", "me/llama"]
    killed_run(*options, "--save", "parts")
    capsys.readouterr()
    for name in ("changed", "others"):
        shutil.copytree("parts.training", f"{name}.training")
    fit_to_json(capsys, *options, "--save", "whole")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    argv = ["fit", "../llama", "--data", "../data.jsonl", "--resume"]
    assert main([*argv, "--save", "../parts"]) == 0
    monkeypatch.chdir(place)
    files = sorted(path.relative_to("whole") for path in Path("whole").rglob("*") if path.is_file())
    assert Path("base/config.json") in files
    for path in files:
        if path != Path("README.md"):  # which has the command
            assert Path("parts", path).read_bytes() == Path("whole", path).read_bytes(), path
    argv = ["fit", "llama", "--data", "data.jsonl", "--resume"]
    Path("held-out.jsonl").rename("moved.jsonl")
    told = refused(*argv, "--save", "changed")
    assert "held-out.jsonl' is not there any more, which the run had: name it with --eval-data" in told
    Path("held-out.jsonl").write_text(json.dumps({"text": "another"}))
    told = refused(*argv, "--save", "changed")
    assert "its held-out text was another, of --eval-data or --eval-share: held_out was " in told
    Path("asked.jsonl").write_text("\n".join(json.dumps(asked | {"prompt": f"{n} and "}) for n in range(2)))
    capsys.readouterr()
    assert main([*argv, "--save", "others", "--eval-data", "moved.jsonl"]) == 0
    samples = json.loads(Path("others", "training.json").read_text())["samples"]
    assert [set(sample["answers"]) for sample in samples] == [{"0", "10", "20"}] * 2
    # What is done needs none of the files
    Path("held-out.jsonl").unlink()
    capsys.readouterr()
    assert main([*argv, "--save", "whole", "--from", "start"]) == 0
    assert "whole is complete already" in capsys.readouterr().err
    assert "began from another adapter: name it with --from ADAPTER" in refused(*argv, "--save", "whole")


def test_a_run_may_go_on_with_more_samples(killed_run, capsys):
    killed_run("--length", "48", "--epochs", "1", "--eval-share", "0.3", "--samples", "1", "--save", "out")
    assert main(["fit", "llama", "--data", "data.jsonl", "--save", "out", "--samples", "3", "--resume"]) == 0
    assert "samples was 1 until here, and is 3" in capsys.readouterr().err
    samples = json.loads(Path("out", "training.json").read_text())["samples"]
    assert [set(sample["answers"]) >= {"0"} for sample in samples] == [True] * 3


def test_an_adapter_that_an_earlier_version_trained_is_complete(place, capsys):
    """Its record has neither the settings nor the defaults of now."""
    options = ["--length", "48", "--batch-size", "4", "--accumulate", "1", "--warmup", "0", "--eval-share", "0"]
    options += ["--chat-template", "none"]
    fit_to_json(capsys, *options, "--save", "out")
    record = json.loads(Path("out", "training.json").read_text())
    now = set(record["run"]) - {"base", "format", "embeddings", "rank", "alpha", "dropout", "targets", "from"}
    now -= {"memory", "length", "data", "examples", "held_out", "steps", "epochs", "batch_size", "accumulate", "lr"}
    now -= {"warmup", "decay", "clip", "weight_decay", "seed", "eval_every", "patience", "save_every", "processes"}
    for name in now - {"device", "rows_of_a_step"}:
        assert record["run"].pop(name) == {"block_size": 32}.get(name)
    Path("out", "training.json").write_text(json.dumps(record))
    for given in ([], ["--length", "48"]):
        _, told = fit_to_json(capsys, *given, "--save", "out", "--resume")
        assert "out is complete already" in told


def test_formats_of_runs_are_options_again():
    run = {"targets": [], "from": None, "clip": None, "prompts": "chat"}
    for written, options in (
        ("bof4s", {}),
        ("nf4", {"format": "nf4"}),
        ("4.4 bits", {"bits": 4.4}),
        ("bfloat16", {"format": "bfloat16"}),
        ("as it is", {"format": "dense"}),
    ):
        assert options_of_run(run | {"format": written}, True) == options | {"clip": 0}
        assert options_of_run(run | {"format": written}, False) == {"clip": 0}
    for_llama_cpp = run | {"format": "iq4_nl", "embeddings": "q8_0"}
    assert options_of_run(for_llama_cpp, True) == {"for": "llama.cpp", "clip": 0}
    assert options_of_run(run | {"format": "iq4_nl", "embeddings": "8bit"}, True) == {"format": "iq4_nl", "clip": 0}
    options = options_of_run(run | {"format": "fp4", "from": "1" * 64, "rank": 4, "seed": 3}, True)
    assert options == {"format": "fp4", "clip": 0, "seed": 3}
    assert options_of_run(run | {"format": "bof4s", "block_size": 32}, True) == {"clip": 0}
    named = options_of_run(run | {"format": "bof4s", "block_size": None}, True)  # whose blocks are the format's
    assert named == {"format": "bof4s", "clip": 0}


def test_alternatives_are_those_of_the_command(refused):
    assert ("steps", "epochs") in fit_settings.ALTERNATIVES  # tests/tools/test_fit_job.py has their error
    for names in set(fit_settings.ALTERNATIVES) - {("steps", "epochs")}:
        values = {"format": "nf4", "shard": None, "replicate": None, "bits": "4"}
        words = [(fit.option_string(name), values.get(name, "1")) for name in names]
        told = refused("fit", "llama", *[word for pair in words for word in pair if word is not None])
        assert "not allowed with argument" in told, names
