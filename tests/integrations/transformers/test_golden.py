"""Folders, adapters and states that an earlier lowmem wrote: transformers, PEFT and `lowmem fit` load them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowmem.integrations.transformers
from lowmem.__main__ import main
from lowmem.finetuning.training_state import FILES
from tests import golden
from tests.golden.language_models import OPTIONS, write_folders
from tests.io.formats import peft_model
from tests.test_golden import NEWEST, WRITTEN, layout_of


@pytest.fixture(params=WRITTEN, ids=lambda path: path.name)
def folder(request):
    return request.param


@pytest.mark.parametrize(("name", "as_saved"), [("folder", "model of the folder"), ("adapted", "adapted")])
def test_folders_load(folder, name, as_saved):
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    assert golden.values(model) == json.loads((folder / "values.json").read_text())[as_saved]
    assert lowmem.adapter_names(model) == ["first"] * (name == "adapted")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, which calls what transformers will remove
def test_peft_loads_its_folder(folder):
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    theirs = peft.PeftModel.from_pretrained(peft_model.parts().float(), folder / "peft")
    ours = lowmem.load_adapter(peft_model.parts().float(), folder / "peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(peft_model.TOKENS), ours(peft_model.TOKENS))


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS[:2]], ids=["as started", "resume alone"])
def test_a_run_of_the_command_goes_on_from_its_state(options, folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    before = load_file(folder / "fit.training" / FILES[1])["losses"].tolist()
    assert main(["fit", "folder", *options, "--save", "fit", "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["losses"]
    assert (found[: golden.STEP], len(before), len(found)) == (before, golden.STEP, 4)


def test_a_layout_that_changes_has_another_version(tmp_path):
    """Where this fails, raise the version of what changed, keep the reader of the earlier one, add golden files."""
    write_folders(tmp_path)
    for name in ("folder", "adapted"):
        assert layout_of(tmp_path / name / "model.safetensors") == layout_of(NEWEST / name / "model.safetensors")
        configs = [json.loads((place / name / "config.json").read_text()) for place in (tmp_path, NEWEST)]
        now, then = (config["quantization_config"] for config in configs)
        assert {**now, "notice": ""} == {**then, "notice": ""}
    for name in FILES:
        now, then = (layout_of(place / "fit.training" / name) for place in (tmp_path, NEWEST))
        assert (now[1], now[0].keys()) == (then[1], then[0].keys())
