"""A source is a file or the shards of an index, with names that a model can have."""

import os

import pytest
import safetensors.torch
import torch

from lowmem import FourBit
from lowmem.errors import FileError
from lowmem.io.convert_checkpoint import convert_checkpoint
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.safetensors_checkpoint import SafetensorsFile
from lowmem.io.safetensors_header import TensorSpec

STATE = {"codes": torch.arange(7, dtype=torch.uint8), "bias": torch.tensor([0.25, -1.0]), "empty": torch.zeros(3, 0)}


def test_a_checkpoint_of_any_origin_is_read_a_tensor_at_a_time(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(STATE, path, {"format": "pt"})
    with SafetensorsFile(path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.specs == {name: TensorSpec.from_tensor(tensor) for name, tensor in STATE.items()}
        assert all(torch.equal(checkpoint.read_tensor(name), STATE[name]) for name in reversed(checkpoint.specs))
        with pytest.raises(KeyError):
            checkpoint.read_tensor("missing")


def test_a_checkpoint_that_is_cut_while_it_is_open_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(10**5)}, path)
    with SafetensorsFile(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileError, match="cannot read .*: it was cut after it was opened, in tensor 'a'; get it"):
            checkpoint.read_tensor("a")
    reason = "no valid safetensors file: the tensors take .* get it again"
    with pytest.raises(FileError, match=reason), SafetensorsFile(path):
        pass


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    safetensors.torch.save_file({}, tmp_path / "empty")
    (tmp_path / "i.index.json").write_text('{"weight_map": {"a": "empty"}}')
    for source in ("empty", "i.index.json"):
        with pytest.raises(
            FileError, match=r"cannot read '.*empty': it holds no tensors; name a checkpoint that has"
        ):
            convert_checkpoint(tmp_path / source, tmp_path / "out", FourBit())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", ".qweight", ".weight_packed", "a..weight", "a."])
def test_a_name_with_an_empty_part_is_no_tensor_s(name, tmp_path):
    """A reader that joins a path and a part would take ``.weight`` for ``weight``."""
    scales = {"scales": torch.ones(1, 8).half(), "qzeros": torch.zeros(1, 1).int(), "weight_scale": torch.ones(8, 1)}
    safetensors.torch.save_file({name: torch.zeros(8, 1).int(), **scales}, tmp_path / "in")
    for reader in (lambda path: convert_checkpoint(path, tmp_path / "out", FourBit()), open_foreign_checkpoint):
        with pytest.raises(FileError, match=f"its tensor '{name}' has a name that no model's has; get it again"):
            reader(tmp_path / "in")
