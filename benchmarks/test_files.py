"""Saving, loading and converting on disk, beside a copy of the float32 weights in memory."""

import pytest
import safetensors.torch
import torch

import lowmem
from benchmarks.cases import FILE_LAYERS, dense_model
from lowmem.io.convert_checkpoint import convert_checkpoint
from lowmem.measure import peak_bytes

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3, group="files")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dense checkpoint, the model converted, and a file of that."""
    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = dense_model()
    safetensors.torch.save_file(model.state_dict(), directory / "dense")
    lowmem.convert(model, lowmem.FourBit("nf4"))
    lowmem.save(model, directory / "converted")
    return directory, model


@pytest.fixture(scope="module")
def copy():
    weights = torch.ones(FILE_LAYERS, 1024, 1024)
    out = torch.empty_like(weights)
    return lambda: out.copy_(weights)


def figures(written, run):
    """Return the peak of the call, and the bytes of the file."""
    return {"peak_bytes": peak_bytes(run), "stored_bytes": written.stat().st_size}


def test_save(memory_gate, timed, files, copy):
    directory, model = files
    memory_gate.counted(lambda: figures(directory / "saved", lambda: lowmem.save(model, directory / "saved")))
    timed(lambda: lowmem.save(model, directory / "saved"), reference=copy)
    assert (directory / "saved").read_bytes() == (directory / "converted").read_bytes()


def test_load(memory_gate, timed, files, copy):
    directory, model = files
    converted = directory / "converted"
    memory_gate.counted(lambda: figures(converted, lambda: lowmem.load(converted, dense_model)))
    loaded = timed(lambda: lowmem.load(directory / "converted", dense_model), reference=copy)
    x = torch.ones(1, 1024)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("search", [False, True], ids=["absmax", "search"])
def test_convert_checkpoint(memory_gate, timed, files, copy, search):
    directory, _ = files
    run = lambda: convert_checkpoint(directory / "dense", directory / "out", lowmem.FourBit("nf4", search=search))  # noqa: E731
    run()
    memory_gate.counted(lambda: figures(directory / "out", run))
    rows = timed(run, reference=copy)
    assert sum(row.before_bytes for row in rows) == 4 * FILE_LAYERS * 1024**2
    assert ((directory / "out").read_bytes() == (directory / "converted").read_bytes()) != search
