"""A unit's file is whole or not there, and belongs to one calibration."""

import errno
import os

import pytest
import torch
from torch import nn

from lowmem.errors import FileError
from lowmem.transforms.calibration.resume_files import FinishedUnitFiles, calibration_digest

TENSORS = {"0.packed": torch.arange(6, dtype=torch.uint8).view(2, 3), "0.bias": torch.ones(2, dtype=torch.bfloat16)}


def test_a_unit_comes_back_with_its_record(tmp_path):
    units = FinishedUnitFiles(tmp_path / "a" / "b", "digest")
    assert units.load_unit_or_none(3) is None
    units.save_unit(3, TENSORS, [{"why": None}])
    tensors, record = FinishedUnitFiles(tmp_path / "a" / "b", "digest").load_unit_or_none(3)
    assert record == [{"why": None}]
    assert all(torch.equal(tensors[name], one) and tensors[name].dtype == one.dtype for name, one in TENSORS.items())
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["unit-00003.safetensors"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    units = FinishedUnitFiles(tmp_path, "digest")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=f"^cannot write '{tmp_path}': No space left; make room on its disk, or choose"):
        units.save_unit(0, TENSORS, [])
    assert list(tmp_path.iterdir()) == []
    assert units.load_unit_or_none(0) is None


def test_files_of_another_calibration_or_damaged_ones_are_refused(tmp_path):
    FinishedUnitFiles(tmp_path, "one").save_unit(0, TENSORS, [])
    with pytest.raises(FileError, match=r"cannot resume .*unit-00000.* another model, other batches or settings"):
        FinishedUnitFiles(tmp_path, "other").load_unit_or_none(0)
    path = tmp_path / "unit-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"unit-00000.*it is damaged .*: remove it"):
        FinishedUnitFiles(tmp_path, "one").load_unit_or_none(0)


def test_a_byte_that_changed_and_a_file_of_another_unit_are_damage(tmp_path):
    units = FinishedUnitFiles(tmp_path, "one")
    units.save_unit(0, TENSORS, [])
    path = tmp_path / "unit-00000.safetensors"
    data = bytearray(path.read_bytes())
    path.rename(tmp_path / "unit-00001.safetensors")
    with pytest.raises(FileError, match=r"unit-00001.*it is damaged .*: remove it"):
        units.load_unit_or_none(1)
    for place in (-1, -7):  # of either tensor
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[len(data) + place + 1 :])
        with pytest.raises(FileError, match=r"unit-00000.*it is damaged \(its digest differs\): remove it"):
            units.load_unit_or_none(0)


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file' is a file: name a folder"):
        FinishedUnitFiles(tmp_path / "file", "one")


def test_the_digest_tells_models_batches_and_settings_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(3, 4)
    found = {calibration_digest(model, [x], "a"), calibration_digest(model, [x], "a")}
    assert len(found) == 1
    found |= {
        calibration_digest(model, [x], "b"),
        calibration_digest(model, [x, x], "a"),
        calibration_digest(model, [x.double()], "a"),
        calibration_digest(model, [(x, 1)], "a"),
        calibration_digest(model, [(x, 2)], "a"),
        calibration_digest(model, [{"input": x}], "a"),
        calibration_digest(model, [{"other": x}], "a"),
    }
    model[1].running_mean[0] = 1
    found.add(calibration_digest(model, [x], "a"))
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    found.add(calibration_digest(model, [x], "a"))
    assert len(found) == 10
