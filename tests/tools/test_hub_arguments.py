"""Commands take a model by its name on the Hub, here a local server of its protocol, and paths never reach it."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import urllib.request
from io import StringIO
from pathlib import Path

import pytest
from torch import nn

import lowmem
from lowmem.__main__ import main
from lowmem.io.hub_names import MODEL_KINDS, HubName
from lowmem.tools.hub_arguments import fetch_model, parse_model_path
from tests.test_guides import write_chat_model
from tests.test_readme import ON_YOUR_DATA, ROOT

FIT = ["--data", "text.txt", "--length", "48", "--steps", "2", "--lr", "0.01"]


@pytest.fixture
def hub(place, monkeypatch):
    """A Hub with the model me/llama, which is nowhere else."""
    from tests.integrations.transformers.hub import serve_hub, use_hub

    with serve_hub() as hub:
        use_hub(monkeypatch, hub, place / "home")
        Path("llama").rename("offered")
        hub.commit = hub.add("me/llama", place / "offered")
        yield hub


def test_what_is_exactly_an_owner_and_a_name_is_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(parse_model_path("me/llama"), HubName)
    for path in ("./me/llama", "me/llama/", "me//llama", "~/llama", "me/llama.gguf", "llama"):
        assert not isinstance(parse_model_path(path), HubName)
    Path("me/llama").mkdir(parents=True)
    assert parse_model_path("me/llama") == Path("me/llama")
    with pytest.raises(argparse.ArgumentTypeError):
        parse_model_path("")


def test_a_path_stays_as_it_is_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/llama").mkdir(parents=True)
    assert fetch_model(Path("me/llama")) == Path("me/llama")
    with pytest.raises(ValueError, match=r"--revision='v1' applies to a name on the Hub, owner/name, and 'llama' is"):
        fetch_model(Path("llama"), "v1")


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        (["generate", "helper", "--prompt", "a"], "MODEL"),
        (["generate", "llama", "--base", "helper", "--prompt", "a"], "--base"),
        (["quantize", "helper", "out"], "IN"),
        (["merge", "helper", "llama", "out"], "BASE"),
        (["merge", "llama", "helper", "out"], "ADAPTER"),
        (["serve", "helper"], "FOLDER"),
        (["export", "adapter", "out.gguf", "--base", "helper"], "--base"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_model_that_is_not_here_is_named_by_its_argument_with_what_it_may_be(place, refused, command, argument):
    if command[1] == "adapter":
        model = lowmem.add_adapter(nn.Sequential(nn.Linear(8, 8)), "default", lowmem.LoRA(2))
        lowmem.save_adapter(model, "adapter", format="peft", base_name="llama")
    said = refused(*command)
    kinds = "a folder or owner/name of the Hub" if argument == "FOLDER" else f"{MODEL_KINDS}, or a safetensors file"
    assert f"{argument}='helper' is no file or folder here: name {kinds}" in said


def test_every_command_names_the_same_kinds_of_a_model(place, refused):
    for command in (["fit", "helper", *FIT], ["stats", "helper"], ["generate", "text.txt", "--prompt", "a"]):
        assert MODEL_KINDS in refused(*command)


def test_a_name_that_no_file_has_is_told_with_the_systems_reason(refused):
    pytest.importorskip("transformers", reason="generate needs transformers")
    assert "cannot read 'aaaa" in refused("generate", "a" * 300, "--prompt", "a")


@pytest.mark.parametrize("command", ["generate", "fit"])
def test_help_says_what_sets_the_number_of_threads(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "OMP_NUM_THREADS=N in the environment sets the number of threads" in " ".join(
        capsys.readouterr().out.split()
    )


def test_an_adapter_names_its_base_and_commit_and_answers_from_the_cache(hub, capsys, monkeypatch):
    from huggingface_hub import constants

    assert main(["fit", "me/llama", *FIT, "--save", "tuned"]) == 0
    told = capsys.readouterr().err
    config = json.loads(Path("tuned", "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/llama", hub.commit)
    assert json.loads(Path("tuned", "training.json").read_text())["base"] == "me/llama"
    assert "base_model: me/llama\n" in Path("tuned", "README.md").read_text()
    assert "\nnext: lowmem generate tuned --prompt TEXT\n" in told
    assert told.endswith("\nnext: lowmem export tuned tuned.gguf --requantize\n")
    hub.requests.clear()
    hub.add("me/llama", Path("elsewhere"))  # the branch moves, and the adapter's base does not
    generate = ["generate", "tuned", "--prompt", "item 3", "--max-new-tokens", "2"]
    assert main(generate) == 0
    assert main(["merge", "me/llama", "tuned", "merged", "--revision", hub.commit]) == 0
    assert hub.requests == []
    assert "note:" not in capsys.readouterr().err
    assert main(["export", "tuned", "tuned.gguf", "--requantize"]) == 0
    assert "the adapter says" not in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["fit", "me/llama", *FIT, "--revision", hub.commit, "--save", "tuned", "--resume"]) == 0


def test_a_base_that_is_not_in_the_cache_is_fetched_for_its_adapter(hub, place, capsys, monkeypatch):
    from huggingface_hub import constants

    assert main(["fit", "me/llama", *FIT, "--save", "tuned"]) == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "empty"))
    assert main(["generate", "tuned", "--prompt", "item 3", "--max-new-tokens", "2"]) == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert main(["generate", "tuned", "--prompt", "item 3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("lowmem generate: cannot find the base of 'tuned': model='me/llama' is no file or folder")
    assert f"`hf download me/llama --revision {hub.commit}` fetches it" in told
    assert main(["generate", "tuned", "--base", "offered", "--prompt", "item 3", "--max-new-tokens", "2"]) == 0


def test_an_adapter_of_the_hub_is_taken_with_its_base(hub, place, capsys):
    assert main(["fit", "me/llama", *FIT, "--save", "tuned"]) == 0
    capsys.readouterr()
    generate = ["--prompt", "item 3", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["generate", "tuned", *generate]) == 0
    expected = capsys.readouterr().out
    Path("tuned").rename("offered adapter")
    hub.add("me/tuned", place / "offered adapter")
    assert main(["generate", "me/tuned", *generate]) == 0
    assert capsys.readouterr().out == expected
    assert main(["merge", "me/llama", "me/tuned", "merged"]) == 0


def test_a_plan_fetches_the_config_alone(hub, results):
    (plan,) = results("stats", "me/llama", "--plan")
    assert plan["model"] == "me/llama"
    assert hub.fetched() == sorted({path.name for path in Path("offered").iterdir()} - {"model.safetensors"})
    (other,) = results("stats", "./offered", "--plan")
    assert {**plan, "model": None} == {**other, "model": None}


def test_examples_are_shown_without_the_weights(hub, results):
    shown = results("fit", "me/llama", "--data", "data.jsonl", "--show", "1")
    assert len(shown["examples"]) == 1
    assert "tokenizer.json" in hub.fetched()
    assert "model.safetensors" not in hub.fetched()


def test_a_plan_of_a_stored_model_has_its_weights(hub, results, place):
    assert main(["quantize", "offered", "small"]) == 0
    hub.add("me/small", place / "small")
    (plan,) = results("stats", "me/small", "--plan")
    (other,) = results("stats", "./small", "--plan")
    assert {**plan, "model": None} == {**other, "model": None}


def test_models_of_the_hub_are_compared_and_quantized(hub, place, results):
    assert main(["quantize", "me/llama", "small", "--revision", "main"]) == 0
    hub.add("me/small", place / "small")
    names = ["me/llama", "me/small"]
    found = results("compare", *names, "--text", "text.txt")
    assert [score["model"] for score in found] == names
    other = results("compare", "./offered", "./small", "--text", "text.txt")
    assert [score["perplexity"] for score in found] == [score["perplexity"] for score in other]


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "{}", *FIT],
        ["generate", "{}", "--prompt", "a"],
        ["generate", "offered", "--base", "{}", "--prompt", "a"],
        ["quantize", "{}", "out"],
        ["merge", "{}", "offered", "out"],
        ["merge", "offered", "{}", "out"],
        ["serve", "{}"],
        ["stats", "{}", "--plan"],
        ["compare", "{}", "offered", "--text", "text.txt"],
        ["export", "{}", "out.gguf"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_paths_never_reach_the_network(hub, refused, command):
    for path in ("./me/missing", "me/missing/", "~/missing", "me/llama/model", "../me", "me/missing.gguf"):
        refused(*(word.format(path) for word in command))
    assert hub.requests == []


def test_options_are_checked_before_anything_is_fetched(hub, refused):
    refused("generate", "me/llama", "--prompt", "a", "--system", "b")
    refused("fit", "me/llama")
    Path("there").mkdir()
    for options in (
        ["--dry-run", "--device", "cuda"],
        ["--resume"],
        ["--keep-base"],
        ["--timeout", "3"],
        ["--eval-share", "2"],
        ["--dropout", "1"],
        ["--from", "missing"],
        ["--data", "missing.jsonl"],
        ["--data", "a.doc"],
        ["--eval-data", "missing.jsonl"],
        ["--chat-template", "missing.jinja"],
        ["--columns", "prompt=a", "prompt=b"],
        ["--save", "there"],
    ):
        refused("fit", "me/llama", *FIT, *options)
    refused("compare", "me/llama", "me/llama", "--text", "text.txt", "--batch", "2")
    refused("stats", "me/llama", "--plan", "--device", "cuda")
    refused("quantize", "me/llama", "out", "--format", "int8", "--search")
    refused("merge", "me/llama", "offered", "out", "--inputs", "nothing")
    assert hub.requests == []


def test_a_revision_of_what_is_no_name_of_the_hub_is_refused(hub, refused):
    for command in (
        ["fit", "offered", *FIT],
        ["generate", "offered", "--prompt", "a"],
        ["quantize", "offered", "out"],
        ["merge", "offered", "offered", "out"],
        ["serve", "offered"],
        ["stats", "offered", "--plan"],
        ["compare", "offered", "offered", "--text", "text.txt"],
    ):
        assert "--revision='v1' applies to a name on the Hub" in refused(*command, "--revision", "v1")
    assert "only --text takes these" in refused("compare", "bignet", "qlora", "--revision", "v1")
    assert "--revision does not apply to model='bignet'" in refused("fit", "bignet", "--revision", "v1")


def test_what_the_hub_refuses_is_one_line(hub, refused):
    hub.gated.add("me/llama")
    told = refused("generate", "me/llama", "--prompt", "a")
    assert f"it is gated: accept its terms at {hub.address}/me/llama, and log in" in told
    assert "has no such model" in refused("fit", "me/missing", *FIT)
    assert "has no revision 'v9' of it" in refused("quantize", "me/llama", "out", "--revision", "v9")


@pytest.mark.processes(keep=1)
def test_a_process_finds_the_mirror_by_its_environment(hub, place):
    command = [sys.executable, "-m", "lowmem", "generate", "me/llama", "--prompt", "item", "--max-new-tokens", "2"]
    environment = {**os.environ, **hub.environment(place / "other")}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "other" / "hub" / "models--me--llama" / "snapshots" / hub.commit / "config.json").is_file()
    offline = subprocess.run(
        [*command[:4], "me/other", *command[5:]],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (offline.returncode, offline.stderr.count("\n")) == (2, 1), offline.stderr
    assert "the network is off (HF_HUB_OFFLINE); `hf download me/other` fetches it" in offline.stderr


@pytest.mark.processes
def test_a_model_of_the_hub_is_served_under_its_name(hub, place, monkeypatch):
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed: tox -e transformers")
    from tests.tools import test_serve

    monkeypatch.setattr(test_serve.os, "environ", {**os.environ, **hub.environment(place / "other")})
    monkeypatch.setattr(test_serve, "OFFLINE", "0")
    with test_serve.serving("me/llama", "--revision", hub.commit) as port:
        with urllib.request.urlopen(f"http://localhost:{port}/v1/models") as answer:
            assert [one["id"] for one in json.load(answer)["data"]] == ["me/llama"]
        body = json.dumps({"prompt": "item", "max_tokens": 2, "model": "me/llama"})
        assert test_serve._asked(port, "/v1/completions", body)[0] == 200


def test_the_commands_of_the_readme_run(hub, place, capsys, monkeypatch):
    pytest.importorskip("gguf", reason="export --for ollama needs gguf: tox -e notebook")
    write_chat_model(place / "chat")
    hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", place / "chat")
    Path("examples").symlink_to(ROOT / "examples")
    assert [line.split()[1] for line in ON_YOUR_DATA] == ["fit", "fit", "generate", "export"]
    for line in ON_YOUR_DATA:
        monkeypatch.setattr("sys.stdin", StringIO("Do I need a GPU?\n"))
        assert main(shlex.split(line)[1:]) == 0
    kinds = "data: examples/questions.csv: 54 prompt and completion in the chat template"
    printed = capsys.readouterr().out
    assert kinds in printed
    assert printed.endswith("ollama create helper -f helper.Modelfile\nollama run helper\n")
