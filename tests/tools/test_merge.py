"""``lowmem merge``."""

import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, LoRA
from lowmem.__main__ import main
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.tools import merge as tools_merge
from lowmem.tools import output

MODELS = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

def other():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 9))

def rounded():
    return make().to(torch.bfloat16)

def batch():
    return torch.ones(3, 64)

def wide():
    return {"input": torch.ones(3, 65)}

def text():
    return "text"
"""


def make():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture(autouse=True)
def files(tmp_path, user_module):
    """A 4-bit base, an adapter that was trained on it, and the folder that a model's module lies in."""
    user_module("merge_models", MODELS)
    torch.manual_seed(0)
    model = lowmem.convert(make(), FourBit())
    lowmem.save(model, "base.safetensors")
    lowmem.add_adapter(model, "mine", LoRA(4, 2.0), skip="0")
    nn.init.normal_(model[2].lora_b)
    lowmem.save_adapter(model, "adapter.safetensors")
    return tmp_path


BASIC = ["merge", "base.safetensors", "adapter.safetensors", "out.safetensors", "--model", "merge_models:make"]


def expected(to="same format"):
    model = lowmem.load_adapter(lowmem.load("base.safetensors", make), "adapter.safetensors")
    return lowmem.merge(model, to, report=True)


def test_a_merge_that_takes_long_prints_lines(monkeypatch, capfd):
    read, said = tools_merge.load_adapter, []

    def slow(*arguments):
        for _ in range(6000):  # until a line is printed
            said.append(capfd.readouterr().err)
            if said[-1]:
                break
            time.sleep(0.01)
        return read(*arguments)

    monkeypatch.setattr(tools_merge, "load_adapter", slow)
    monkeypatch.setattr(output, "SECONDS_APART", 0.01)
    assert main(BASIC) == 0
    assert said[-1].startswith("merge: 0:0")


def test_merge_writes_the_merged_model_and_prints_the_report(files, capsys):
    assert main(BASIC) == 0
    shown = capsys.readouterr()
    model, report = expected()
    assert [row.path for row in report] == ["2"]
    figures = [line.split() for line in shown.out.splitlines() if "mine" in line]
    assert figures == [["2", "mine", f"{report[0].before:.4g}", f"{report[0].after:.4g}"]]
    assert shown.err == "saved out.safetensors\n"
    merged = lowmem.load("out.safetensors", make)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged.state_dict().items())
    assert type(merged[2]) is type(model[2]) is lowmem.Linear4Bit


def test_a_target_that_another_command_writes_is_refused(refused):
    with exclusive_write_lock(Path("out.safetensors")):
        assert f"'out.safetensors' is being written by process {os.getpid()} of " in refused(*BASIC)


def test_json_and_another_dtype(files, capsys):
    assert main([*BASIC, "--to", "bfloat16", "--json", "--at-most", "0.01"]) == 0
    model, report = expected(torch.bfloat16)
    document = json.loads(capsys.readouterr().out)
    row = {"path": "2", "adapters": ["mine"], "before": report[0].before, "after": report[0].after}
    none = {"output_before": None, "output_after": None}
    assert document == {"layers": [row | none], **none}

    def mixed():
        made = make()
        made[2].to(torch.bfloat16)
        return made

    merged = lowmem.load("out.safetensors", mixed)
    assert type(merged[2]) is nn.Linear
    assert torch.equal(merged[2].weight, model[2].weight)


def test_a_merge_above_at_most_fails_prints_the_report_and_writes_nothing(files, capsys):
    (files / "out.safetensors").write_bytes(b"kept")
    assert main([*BASIC, "--at-most", "1e-3"]) == 1
    shown = capsys.readouterr()
    assert "mine" in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith("lowmem merge: 2 has a relative error of 0.")
    assert ", above 0.001; nothing was written" in line
    assert (files / "out.safetensors").read_bytes() == b"kept"


def test_inputs_add_the_errors_of_outputs(files, capsys):
    options = ["--inputs", "merge_models:batch"]
    assert main([*BASIC, *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    model = lowmem.load_adapter(lowmem.load("base.safetensors", make), "adapter.safetensors")
    _, report = lowmem.merge(model, inputs=torch.ones(3, 64), report=True)
    assert document["layers"][0]["output_after"] == report[0].output_after > 0
    figures = {"output_before": report.output_before, "output_after": report.output_after}
    assert {name: document[name] for name in figures} == figures
    (files / "out.safetensors").unlink()
    limit = max(report.worst.largest, report.output_after)
    assert main([*BASIC, *options, "--at-most", f"{limit * 0.999}"]) == 1
    shown = capsys.readouterr()
    assert "whole model" in shown.out
    assert f"a relative error of {limit:.4g}, above" in shown.err
    assert not (files / "out.safetensors").exists()


def test_a_fresh_adapter_gives_a_file_of_the_base_s_bytes(files, capsys):
    model = lowmem.load("base.safetensors", make)
    lowmem.save_adapter(lowmem.add_adapter(model, "fresh", LoRA(2)), "adapter.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*BASIC, "--at-most", "0"]) == 0
    assert (files / "out.safetensors").read_bytes() == (files / "base.safetensors").read_bytes()


def test_no_input_is_overwritten_by_any_name(files, refused):
    (files / "link.safetensors").symlink_to("base.safetensors")
    (files / "other.safetensors").hardlink_to(files / "base.safetensors")
    before = {path.name: path.read_bytes() for path in files.glob("*.safetensors")}
    names = {"base.safetensors": "BASE", "./base.safetensors": "BASE", "link.safetensors": "BASE"}
    names |= {"other.safetensors": "BASE", "adapter.safetensors": "ADAPTER"}
    for out, role in names.items():
        told = refused(*BASIC[:3], out, *BASIC[4:])
        assert told.endswith(f"is {role}, which would be lost: name another place\n")
    assert {path.name: path.read_bytes() for path in files.glob("*.safetensors")} == before


def test_a_folder_in_the_base_or_in_the_adapter_is_refused(files, refused):
    for name in ("base", "adapter"):
        (files / name).mkdir()
        (files / name / "config.json").write_text("{}")
        (files / f"link-{name}").symlink_to(name, target_is_directory=True)
    for out in ("base/out", "./base/a/out", "link-base/out", str(files / "base" / "out")):
        told = refused("merge", "base", "adapter", out)
        assert told.startswith(
            f"lowmem merge: OUT={str(Path(out))!r} lies in BASE='base', which it would change: name"
        )
    assert "lies in ADAPTER='adapter'" in refused("merge", "base", "adapter", "link-adapter/out")
    assert [path.name for path in (files / "base").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--model": "merge_models"}, "--model='merge_models' must be module:factory"),
        ({"--model": "merge_models:none"}, "'merge_models' has no 'none'"),
        ({"--model": "no_such_module:make"}, "cannot import 'no_such_module'"),
        ({"--model": "merge_models:other"}, "2.weight_packed is"),
        ({"base": "missing.safetensors"}, "missing.safetensors"),
        ({"base": "adapter.safetensors"}, "adapter.safetensors"),
        ({"adapter": "base.safetensors"}, "it holds no adapter alone"),
        ({"adapter": "merge_models.py"}, "merge_models.py"),
        ({"out": "no/such/folder/out"}, "no/such/folder"),
        ({"--to": "int8"}, "invalid choice: 'int8'"),
        ({"--inputs": "batch"}, "inputs='batch' must be module:function"),
        ({"--inputs": "merge_models:text"}, "inputs='merge_models:text': it returned a str; it must return a Tensor"),
        ({"--inputs": "merge_models:wide"}, "inputs='merge_models:wide': calling the model failed: "),
        ({"--at-most": "-1"}, "must be a number of at least 0"),
        ({"base": ""}, "'' must be the name of a file"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_overwrite_nothing(files, options, message, refused):
    (files / "out.safetensors").write_bytes(b"kept")
    given = {"base": BASIC[1], "adapter": BASIC[2], "out": BASIC[3], "--model": BASIC[5], **options}
    flags = [part for name, value in given.items() if name.startswith("--") for part in (name, value)]
    names = sorted(path.name for path in files.iterdir())
    assert message in refused("merge", given["base"], given["adapter"], given["out"], *flags)
    assert (files / "out.safetensors").read_bytes() == b"kept"
    assert sorted(path.name for path in files.iterdir() if path.name != "__pycache__") == names


def test_an_adapter_of_another_base_is_refused(files, refused):
    torch.manual_seed(1)
    lowmem.save(lowmem.convert(make(), FourBit()), "base.safetensors")
    assert "it was trained on another base" in refused(*BASIC)
    assert not (files / "out.safetensors").exists()


def test_one_of_several_adapters_of_a_folder_is_merged(files, refused):
    model = lowmem.load_adapter(lowmem.load("base.safetensors", make), "adapter.safetensors")
    lowmem.add_adapter(model, "default", LoRA(2))
    for name, folder in (("default", "several"), ("mine", "several/mine")):
        lowmem.save_adapter(model, folder, name, format="peft")
    (files / "several" / "checkpoint-1").mkdir()  # of Trainer
    for name in ("adapter_config.json", "trainer_state.json"):
        (files / "several" / "checkpoint-1" / name).write_text("{}")
    merge = ["merge", "base.safetensors", "several", "out.safetensors", *BASIC[4:]]
    assert "'several' has several adapters: choose one of default, mine with --adapter" in refused(*merge)
    assert "--adapter='x' is no adapter of 'several', which has default, mine" in refused(*merge, "--adapter", "x")
    assert main([*merge, "--adapter", "mine"]) == 0
    assert main([*BASIC[:3], "one.safetensors", *BASIC[4:], "--adapter", "mine"]) == 0
    assert (files / "one.safetensors").read_bytes() == (files / "out.safetensors").read_bytes()
    assert "which has mine" in refused(*BASIC, "--adapter", "default")


def test_a_folder_of_peft_is_merged_as_the_file_is(files, refused):
    model = lowmem.load_adapter(lowmem.load("base.safetensors", make), "adapter.safetensors")
    lowmem.save_adapter(model, "folder", format="peft")
    options = ["--model", "merge_models:make", "--to", "float32"]
    for adapter, out in (("adapter.safetensors", "one.safetensors"), ("folder", "two.safetensors")):
        assert main(["merge", "base.safetensors", adapter, out, *options]) == 0
    assert (files / "one.safetensors").read_bytes() == (files / "two.safetensors").read_bytes()
    (files / "folder" / "adapter_model.safetensors").rename(files / "folder" / "adapter_model.bin")
    for adapter, why in (
        ("folder", "adapter_model.bin is a pickle, which could run code: lowmem executed nothing; load it in PEFT"),
        ("folder/adapter_config.json", "it is a part of a folder of PEFT: name the folder, 'folder'"),
    ):
        assert why in refused("merge", "base.safetensors", adapter, "three.safetensors", *options)
    assert not (files / "three.safetensors").exists()


@pytest.mark.parametrize("base", ["dense", "stored", "model.gguf"])
def test_a_folder_and_its_adapter_need_no_factory(base, tmp_path, capsys, refused):
    """In its own format, or dense for transformers alone, with the tokenizer beside."""
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    from lowmem.integrations.transformers.text_generation import open_model_and_tokenizer
    from tests.integrations.transformers.folders import IDS, load, write
    from tests.integrations.transformers.tokens import write_tokenizer

    write_tokenizer(write(tmp_path / "dense", "llama"))
    assert main(["quantize", "dense", "stored"]) == 0
    if base == "model.gguf":
        assert main(["export", "stored", base, "--requantize"]) == 0
    model, _ = open_model_and_tokenizer(Path(base))
    lowmem.add_adapter(model, "default", LoRA(4))
    for name, value in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(value, std=0.1)
    lowmem.save_adapter(model, "adapter", format="peft")
    expected = model(IDS).logits
    capsys.readouterr()
    assert main(["merge", base, "adapter", "merged", "--to", "float32"]) == 0
    merged = load("merged")
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert "quantization_config" not in json.loads(Path("merged", "config.json").read_text())
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert Path("merged", "tokenizer.json").is_file()
    assert main(["merge", base, "adapter", "same"]) == 0
    same = load("same")
    assert type(same.model.layers[0].mlp.up_proj.weight) is (nn.Parameter if base == "dense" else lowmem.StoredTensor)
    assert (same(IDS).logits - expected).norm() < 0.5 * expected.norm()
    assert "'same' exists" in refused("merge", base, "adapter", "same")
    assert "leave it out" in refused("merge", base, "adapter", "new", "--model", "merge_models:make")
    if base == "stored":
        model.save_pretrained("adapted")
        told = refused("merge", "adapted", "adapter", "new")
        assert "BASE='adapted' has an adapter already, 'default', which would be merged, too" in told
        assert not Path("new").exists()


def test_a_model_file_needs_the_factory_of_its_model(refused):
    assert "name what makes its model, --model module:factory" in refused(*BASIC[:4])
