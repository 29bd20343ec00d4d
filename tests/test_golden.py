"""Files of every kind that an earlier lowmem wrote are loaded, with the values that they had."""

import hashlib
import json
import shutil
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lowmem
from lowmem.finetuning.training_state import FILES, States, load_model_and_optimizer_state, named_trainable_parameters
from lowmem.testing.memory_baseline import read_baseline_figures
from tests import golden
from tests.io.formats import peft_model

WRITTEN = sorted(path for path in golden.FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__")
NEWEST = WRITTEN[-1]
DIGESTS = {
    "0.1.0/adapted/config.json": "59af6f73c754b47c",
    "0.1.0/adapted/generation_config.json": "92a5c418526e535f",
    "0.1.0/adapted/model.safetensors": "99de610de3c542df",
    "0.1.0/bitsandbytes-fp4-double.safetensors": "3aac8246c082424a",
    "0.1.0/compressed-tensors-asymmetric.safetensors": "cb3993f01e2295bd",
    "0.1.0/first.adapter.safetensors": "8ddc6c93b021287e",
    "0.1.0/fit.training/state-0.safetensors": "c8eca278ee9c9e7b",
    "0.1.0/fit.training/state-1.safetensors": "89e71cf1bd82fb02",
    "0.1.0/folder/config.json": "83e976f1dd5f844d",
    "0.1.0/folder/generation_config.json": "92a5c418526e535f",
    "0.1.0/folder/model.safetensors": "c3ca51bd42776a1e",
    "0.1.0/folder/tokenizer.json": "fce0d651a9f4ddc3",
    "0.1.0/folder/tokenizer_config.json": "d9f784ad1d2fa207",
    "0.1.0/gpt-oss.safetensors": "fb4d4a0a14ef0bee",
    "0.1.0/gptq.safetensors": "2e5ef127ffd45909",
    "0.1.0/model.safetensors": "1ec67856ba5f33dc",
    "0.1.0/peft/adapter_config.json": "d61009272d996340",
    "0.1.0/peft/adapter_model.safetensors": "5ad1b495dd178dc2",
    "0.1.0/portable-torch2.13.json": "3e672c27ddb6ca44",
    "0.1.0/second.adapter.safetensors": "c23f68d6c964a3e2",
    "0.1.0/shards-00001-of-00002.safetensors": "36c657fcef349979",
    "0.1.0/shards-00002-of-00002.safetensors": "4ddb32f40a0539d1",
    "0.1.0/shards.safetensors.index.json": "273e99ccf7a87db1",
    "0.1.0/text.txt": "5bfca00843c02399",
    "0.1.0/training/state-0.safetensors": "bed08b1dfa25b329",
    "0.1.0/training/state-1.safetensors": "30d766709004b295",
    "0.1.0/types.safetensors": "468c9cdf719cf2bf",
    "0.1.0/values.json": "211f861a0f1346e5",
}


@pytest.fixture(params=WRITTEN, ids=lambda path: path.name)
def folder(request):
    return request.param


@pytest.fixture
def values(folder):
    return json.loads((folder / "values.json").read_text())


def test_the_files_are_those_that_were_written():
    """A digest that differs is a file that was written again: restore it. A new folder adds its own."""
    files = [path for folder in WRITTEN for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(golden.FOLDER).as_posix(): path.read_bytes() for path in files}
    assert {name: hashlib.sha256(content).hexdigest()[:16] for name, content in sorted(found.items())} == DIGESTS


def test_a_model_loads(folder, values):
    model = lowmem.load(folder / "model.safetensors", golden.Parts)
    assert golden.values(model) == values["model.safetensors"]
    assert model.head.weight is model.embedding.weight or torch.equal(model.head.weight, model.embedding.weight)
    assert lowmem.adapter_names(model) == ["first", "second"]


def test_files_that_need_no_model_have_their_values(folder, values):
    named = values.keys() - {"model.safetensors", "model of the folder", "adapted"}
    assert {"shards.safetensors.index.json", "types.safetensors", "folder"} <= named
    for name in named:
        assert golden.plain_values(folder / name) == values[name], name


def test_shards_load(folder):
    model = lowmem.load(folder / "shards.safetensors.index.json", golden.Parts)
    stored = {path for path, module in model.named_modules() if hasattr(module, "forms")}
    assert {"bof4s", "int4", "head", "embedding"} <= stored


@pytest.mark.parametrize("name", ["first", "second"])
def test_adapters_load_onto_their_base(folder, name):
    model = lowmem.load(folder / "model.safetensors", golden.Parts)
    lowmem.delete_adapter(model, name)
    lowmem.load_adapter(model, folder / f"{name}.adapter.safetensors")
    saved = load_file(folder / f"{name}.adapter.safetensors")
    layers = lowmem.adapter_layers(model, name)
    assert saved.keys() == {f"{path}.{part}" for path in layers for part in ("lora_a", "lora_b")}
    for path, adapter in layers.items():
        assert torch.equal(adapter.lora_a, saved[f"{path}.lora_a"]), path
        assert torch.equal(adapter.lora_b, saved[f"{path}.lora_b"]), path


def test_a_folder_of_peft_loads(folder):
    expected, found = golden.with_adapter(peft_model.parts().float()), peft_model.parts().float()
    lowmem.load_adapter(found, folder / "peft")
    layers = lowmem.adapter_layers(expected, "default")
    assert lowmem.adapter_layers(found, "default").keys() == layers.keys()
    for path, adapter in lowmem.adapter_layers(found, "default").items():
        assert torch.equal(adapter.lora_a, layers[path].lora_a), path
        assert torch.equal(adapter.lora_b, layers[path].lora_b), path
        assert adapter.scaling == layers[path].scaling


def test_a_run_goes_on_from_its_state(folder, tmp_path):
    shutil.copytree(folder / "training", tmp_path / "training")
    made = golden.learner()
    before = load_file(folder / "training" / FILES[1])
    found = golden.train(made, tmp_path / "training", tmp_path)
    assert found.losses[: golden.STEP] == before["losses"].tolist()
    assert len(found.losses) == golden.SETTINGS.steps
    optimizer = torch.optim.AdamW(named_trainable_parameters(made).values())
    load_model_and_optimizer_state(States(folder / "training", golden.ORIGIN).newest(), made, optimizer)
    for name, parameter in named_trainable_parameters(made).items():
        assert torch.equal(parameter, before[f"parameters.{name}"]), name
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, before[f"optimizer.{name}.{key}"]), (name, key)


def test_baselines_are_read(folder):
    assert read_baseline_figures(golden.KEY.file_path(folder), golden.KEY) == golden.FIGURES


def layout_of(path):
    """Return what a file says beside values and digests."""
    if path.suffix == ".json":
        return shape_of(json.loads(path.read_text()))
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata().get("lowmem", "{}"))
        tensors = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {**record, **({"base": ""} if "base" in record else {})}, tensors


def shape_of(document):
    """Return a JSON document with the kinds of its values in place of these."""
    if isinstance(document, Mapping):
        return {key: shape_of(value) for key, value in document.items()}
    return type(document).__name__


@pytest.mark.filterwarnings("ignore::lowmem.io.formats.requantization.GrowthWarning")
def test_a_layout_that_changes_has_another_version(tmp_path):
    """Where this fails, raise the version of what changed, keep the reader of the earlier one, add golden files."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "files").mkdir()
    golden.write(tmp_path / "files", tmp_path / "scratch")
    files = [path for path in (tmp_path / "files").rglob("*") if path.is_file() and path.parent.name != "peft"]
    assert len(files) >= 13
    for path in files:
        name = path.relative_to(tmp_path / "files")
        assert layout_of(path) == layout_of(NEWEST / name), name
