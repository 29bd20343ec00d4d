"""Every reader reads a file whose bytes, numbers, names or JSON were changed, or refuses it in a line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import FourBit, LoRA
from lowmem.finetuning.text_examples import read_examples
from lowmem.finetuning.training_state import SavedState, States
from lowmem.io.adapter_files import load_adapter, save_adapter
from lowmem.io.checkpoint import load, save
from lowmem.io.convert_checkpoint import convert_checkpoint
from lowmem.io.formats.gguf.gguf_metadata import gguf_model_fields, read_copyable_gguf_metadata
from lowmem.io.formats.lazy_model import open_lazy_model
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.report.relative_speeds import read_relative_speeds_and_machine
from lowmem.testing.gate_verdicts import FigureComparison, GateVerdict, read_verdict, write_verdict
from lowmem.testing.memory_baseline import BaselineKey, read_baseline_figures, write_baseline_figures
from lowmem.tools.fit_classifier_data import load_train_test_split
from lowmem.transforms.calibration.resume_files import FinishedUnitFiles
from tests import fuzzing
from tests.fuzzing import Reader
from tests.io.formats import peft_model
from tests.io.formats.folders import CONFIG
from tests.io.formats.test_hostile_folders import CONFIGS, parts_of
from tests.io.formats.test_hostile_folders import write as write_shards
from tests.io.formats.written import gguf, read_all

SAMPLES = Path(__file__).parent / "io/formats/samples"
SAMPLED = sorted(file.name for file in SAMPLES.iterdir() if file.suffix in (".safetensors", ".gguf"))
KEY = BaselineKey("portable", "2.13", 2)
FIELDS = {
    "general.architecture": "llama",
    **gguf_model_fields(CONFIG),
    "general.alignment": b"\4\0\0\0\x20\0\0\0",
    "tokenizer.ggml.tokens": ["a", "b"],
}


def small():
    return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False))


def converted(*techniques):
    torch.manual_seed(0)
    return lowmem.convert(small(), *techniques) if techniques else small()


def dense(folder):
    save_file({f"{name}": value for name, value in small().state_dict().items()}, folder / "model.safetensors")


def two_shards(folder):
    dense(folder)
    convert_checkpoint(folder / "model.safetensors", folder / "a.safetensors", FourBit("nf4"), shard_bytes=300)
    (folder / "model.safetensors").unlink()


def foreign(kind):
    def make(folder):
        save_file({name: part.contiguous() for name, part in parts_of(kind).items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIGS[kind]}))

    return make


def gptq_shards(folder):
    folder.rmdir()
    write_shards(folder, "gptq")


def sample(name):
    return lambda folder: shutil.copy(SAMPLES / name, folder / name)


def llama(folder):
    kinds = [
        ("token_embd.weight", (32, 32), 1),
        ("blk.0.attn_q.weight", (32, 32), 2),
        ("output_norm.weight", (32,), 0),
    ]
    tensors, at = [], 0
    for name, shape, kind in kinds:
        tensors.append((name, shape, kind, at))
        at += 2048
    (folder / "a.gguf").write_bytes(gguf(FIELDS, tensors, bytes(at)))


def read_foreign(folder):
    files = sorted(folder.iterdir())
    path = files[0] if len(files) == 1 else folder
    read_all(path)
    import_foreign_checkpoint(path, folder.with_suffix(".out"), requantize=FourBit("nf4"))


def read_stored(folder):
    with open_lazy_model(folder / "m.safetensors") as model:
        for weight in model.weights.values():
            weight.weight_in_model_layout()


def stored(folder):
    model = converted(FourBit("nf4", block_size=8))
    save(model, folder / "m.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


def like(folder):
    path = folder / "a.gguf"
    with path.open("rb") as file:
        read_copyable_gguf_metadata(path, file).check_matches_config(CONFIG)


class Bytes:
    """A tokenizer of bytes."""

    end = 0

    def encode(self, text, special):
        return list(text.encode())

    def chat(self, messages):
        return [(one["content"], one["role"] == "assistant") for one in messages]


def texts(folder):
    lines = [{"text": "abc"}, {"prompt": "a", "completion": "b"}]
    lines += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))


def verdict(folder):
    rows = [FigureComparison("a", "b", 1.0, 2.0, 1.5, 1.0, 2.0, "grew", "it grew"), FigureComparison("c", "")]
    write_verdict(folder / "v.json", GateVerdict("memory", False, "a", "b", {"cpu": "x", "n": 2}, rows, ["note"]))


def run_of_benchmarks(folder):
    bench = {
        "fullname": "t.py::test_inference[nf4-batch8]",
        "extra_info": {"reference_seconds": 1.0},
        "stats": {"min": 0.5},
    }
    (folder / "run.json").write_text(json.dumps({"benchmarks": [bench, bench], "machine_info": {"cpu": "x"}}))


def state(folder):
    tensors = {"losses": torch.zeros(3), "parameters.a": torch.ones(2, 2), "optimizer.a.step": torch.ones(1)}
    States(folder, {"rank": 4}).save(SavedState(2, tensors, {"evaluations": []}))


def read_state(folder):
    saved = States(folder, {"rank": 4}).newest()
    if saved is not None:
        saved.tensors_with_prefix("parameters")


def unit(folder):
    FinishedUnitFiles(folder, "d").save_unit(0, {"a": torch.ones(3)}, {"loss": 1.0, "names": ["a"]})


READERS = {
    "model": Reader(lambda f: save(converted(FourBit("nf4", block_size=8)), f / "m"), lambda f: load(f / "m", small)),
    "adapted model": Reader(
        lambda f: save(converted(FourBit("int4"), LoRA(2)), f / "m"), lambda f: load(f / "m", small)
    ),
    "model of shards": Reader(two_shards, lambda f: load(f / "a.safetensors.index.json", small)),
    "adapter": Reader(
        lambda f: save_adapter(converted(LoRA(2)), f / "a"), lambda f: load_adapter(converted(), f / "a")
    ),
    "checkpoint": Reader(
        dense,
        lambda f: convert_checkpoint(f / "model.safetensors", f.with_suffix(".out"), FourBit("nf4")),
        (ValueError,),  # nothing to convert, or a weight that cannot be
    ),
    **{kind: Reader(foreign(kind), read_foreign) for kind in CONFIGS},
    "gptq in shards": Reader(gptq_shards, read_foreign),
    **{name: Reader(sample(name), read_foreign) for name in SAMPLED},
    "gguf": Reader(llama, read_foreign),
    "gguf like": Reader(llama, like),
    "peft": Reader(
        lambda f: shutil.copytree(SAMPLES / "peft", f, dirs_exist_ok=True),
        lambda f: load_adapter(peft_model.parts(), f),
    ),
    "stored": Reader(stored, read_stored),
    "baseline": Reader(
        lambda f: write_baseline_figures(f / "b.json", KEY, {"a": {"x_bytes": 1, "y_bytes": 2}}),
        lambda f: read_baseline_figures(f / "b.json", KEY),
    ),
    "verdict": Reader(verdict, lambda f: read_verdict(f / "v.json")),
    "run of benchmarks": Reader(run_of_benchmarks, lambda f: read_relative_speeds_and_machine(f / "run.json")),
    "training state": Reader(state, read_state),
    "texts": Reader(texts, lambda f: read_examples(f / "a.jsonl", Bytes(), 8)),
    "arrays": Reader(
        lambda f: np.savez(f / "a.npz", x=np.ones((6, 3)), y=np.arange(6) % 2),
        lambda f: load_train_test_split(str(f / "a.npz"), 0),
        (ValueError,),
    ),
    "finished unit": Reader(unit, lambda f: FinishedUnitFiles(f, "d").load_unit_or_none(0)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
@fuzzing.fuzzed
def test_a_changed_file_is_read_or_refused(name, tmp_path_factory, seed):
    fuzzing.run(READERS[name], name, tmp_path_factory.getbasetemp(), seed)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_no_number_of_a_header_is_allocated_before_it_is_checked(name, tmp_path):
    fuzzing.run_large(READERS[name], tmp_path / "files")
