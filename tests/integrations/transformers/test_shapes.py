"""A config.json of another model, or without sizes, is refused before what it describes is allocated."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTJConfig

from lowmem import FourBit
from lowmem.errors import FileError
from lowmem.integrations.transformers import LowmemConfig, from_exact
from lowmem.integrations.transformers.folder import load_folder, quantize_folder
from lowmem.integrations.transformers.saving import config_of
from tests.fuzzing import bounded
from tests.integrations.transformers.folders import SIZES, load, write
from tests.integrations.transformers.foreign import write_foreign
from tests.profiled import ONE_THREAD

ROOT = Path(__file__).parents[3]


def edit(folder, **changes):
    """Change keys of a config; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


PEAK = """
import sys
from pathlib import Path
from tests.integrations.transformers.test_shapes import assert_refused
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
assert_refused(Path(sys.argv[1]))
print(peak() - before)
"""


def assert_refused(folder):
    """Assert that nothing loads the configs of a folder, which say no sizes."""
    configs = {"dense": LowmemConfig(FourBit()), "small": None, "other/foreign": None}
    for name, config in configs.items():
        call = from_exact if name == "other/foreign" else load
        with pytest.raises(ValueError, match="or missing: get|config is of another model"):
            call(folder / name, **({} if config is None else {"quantization_config": config}))
        with pytest.raises(FileError, match="or missing: get|config is of another model"):
            load_folder(folder / name, config)
    with pytest.raises(FileError, match="sizes are another model's, or missing"):
        load_folder(folder / "dense")
    with pytest.raises(FileError, match="sizes are another model's, or missing"):
        quantize_folder(folder / "dense", folder / "out", FourBit())
    assert not (folder / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the high-water mark of a process by itself")
def test_a_config_without_sizes_is_refused_in_little_memory(tmp_path):
    """The defaults of a Llama take 27 GB."""
    no_sizes = dict.fromkeys([*SIZES, "head_dim"])
    write(tmp_path / "dense", "llama")
    load(tmp_path / "dense", quantization_config=LowmemConfig(FourBit())).save_pretrained(tmp_path / "small")
    write_foreign(tmp_path / "other", "gptq")
    for name in ("dense", "small", "other/foreign"):
        edit(tmp_path / name, **no_sizes)
    shown = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=ONE_THREAD,
        cwd=ROOT,
    )
    assert int(shown.stdout) < 2**28


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


def test_buffers_and_experts_without_end_are_refused_before_they_are_made(tmp_path):
    """A GPT-J computes a table of its positions, which are in no tensor."""
    config = GPTJConfig(vocab_size=258, n_embd=64, n_layer=1, n_head=4, n_positions=64, rotary_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for changes, says in (
        ({"n_positions": 2**28}, "computes 8589934592 bytes of buffers, as .*embed_positions"),
        ({"n_positions": 64, "num_experts": 2**20}, "num_experts=1048576, more than 4096"),
    ):
        edit(tmp_path, **changes)
        with bounded(), pytest.raises(FileError, match=says):
            load_folder(tmp_path)


def test_a_new_head_is_no_other_model(tmp_path):
    folder = write(tmp_path, "llama")
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=LowmemConfig(FourBit()))
    assert config_of(model) is not None
    assert type(model.score) is torch.nn.Linear
