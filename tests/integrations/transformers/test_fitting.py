"""A config.json of another model, or without sizes, is refused before what it describes is allocated."""

import json
import resource
import time

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

import torch
from transformers import AutoModelForSequenceClassification

from lowmem import FourBit
from lowmem.errors import FileError
from lowmem.integrations.transformers import LowmemConfig
from lowmem.integrations.transformers.folder import load_folder, quantize_folder
from lowmem.integrations.transformers.saving import config_of
from tests.integrations.transformers.folders import SIZES, load, write
from tests.integrations.transformers.foreign import write_foreign


def edit(folder, **changes):
    """Change keys of a config; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_config_without_sizes_is_refused_in_little_memory(tmp_path):
    """The defaults of a Llama take 27 GB."""
    no_sizes = dict.fromkeys([*SIZES, "head_dim"])
    write(tmp_path / "dense", "llama")
    load(tmp_path / "dense", quantization_config=LowmemConfig(FourBit())).save_pretrained(tmp_path / "small")
    foreign = write_foreign(tmp_path / "other", "gptq")
    before = resident()
    for folder, config in (
        (tmp_path / "dense", LowmemConfig(FourBit())),
        (tmp_path / "small", None),
        (foreign, LowmemConfig("exact")),
    ):
        edit(folder, **no_sizes)
        with pytest.raises(ValueError, match="or missing: get|config is of another model"):
            # transformers takes None for "not quantized", whatever config.json says.
            load(folder, **({} if config is None else {"quantization_config": config}))
        with pytest.raises(FileError, match="or missing: get|config is of another model"):
            load_folder(folder, config)
    with pytest.raises(FileError, match="sizes are another model's, or missing"):
        load_folder(tmp_path / "dense")
    with pytest.raises(FileError, match="sizes are another model's, or missing"):
        quantize_folder(tmp_path / "dense", tmp_path / "out", FourBit())
    assert not (tmp_path / "out").exists()
    assert resident() - before < 2**28


def test_layers_without_end_and_sizes_without_bounds_are_refused_at_once(tmp_path):
    folder = write(tmp_path / "dense", "llama")
    start = time.process_time()
    for changes in (
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 2**62}},
        {"num_hidden_layers": 2, "text_config": None, "vocab_size": 2**62},
        {"vocab_size": 258, "hidden_size": 2**40},
        {"hidden_size": 64, "intermediate_size": 2**33},
    ):
        edit(folder, **changes)
        with pytest.raises(FileError, match="cannot (read|load)"):
            quantize_folder(folder, tmp_path / "out", FourBit())
    assert time.process_time() - start < 60


def test_a_new_head_is_no_other_model(tmp_path):
    folder = write(tmp_path, "llama")
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=LowmemConfig(FourBit()))
    assert config_of(model) is not None
    assert type(model.score) is torch.nn.Linear
