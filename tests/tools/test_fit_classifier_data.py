"""Data is split by the seed alone, and wrong arrays are named."""

import os
import re
import sys
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch

from lowmem.tools.fit_classifier_data import load_train_test_split
from lowmem.version import install_command
from tests.fuzzing import bounded


def saved(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")


@pytest.mark.parametrize(("name", "examples"), [("synthetic", 1000), ("digits", 1797)])
def test_the_seed_decides_the_split(name, examples):
    one, two, other = load_train_test_split(name, 1), load_train_test_split(name, 1), load_train_test_split(name, 2)
    assert len(one.test_x) == len(one.test_y) == round(0.2 * examples)
    assert len(one.train_x) + len(one.test_x) == examples
    assert one.train_x.shape[1:] == one.test_x.shape[1:] == (1024,)
    assert one.classes == 10
    assert torch.equal(one.train_x, two.train_x)
    assert torch.equal(one.test_y, two.test_y)
    assert not torch.equal(one.train_y, other.train_y)


def test_digits_are_the_real_pictures_resized():
    from sklearn.datasets import load_digits

    data = load_train_test_split("digits", 0)
    every = torch.cat([data.train_x, data.test_x])
    assert every.amin() >= -1
    assert every.amax() <= 1
    assert sorted(torch.cat([data.train_y, data.test_y]).tolist()) == sorted(load_digits().target.tolist())
    means = torch.from_numpy(load_digits().data).mean(1) / 8 - 1
    torch.testing.assert_close(every.mean(1).double().sort().values, means.sort().values, atol=1e-5, rtol=0)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=re.escape(install_command("digits"))):
        load_train_test_split("digits", 0)


def test_arrays_that_claim_more_than_the_file_holds_are_refused_before_they_are_made(tmp_path):
    path = tmp_path / "data.npz"
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 4), }"
    for shape, size in ((2**40, 8), (2, 2**30)):
        with ZipFile(path, "w", ZIP_DEFLATED) as file:
            file.writestr("x.npy", (header % shape).ljust(127) + b"\n" + bytes(8))
            file.writestr("y.npy", (header % 2).ljust(127) + b"\n" + bytes(8))
            file.getinfo("x.npy").file_size += size - 8  # in the directory of the archive alone
        with bounded(), pytest.raises(ValueError, match=r"data\.npz': x\.npy claims \d+ bytes.*; save it again"):
            load_train_test_split(str(path), 0)


def test_shapes_are_compared_before_zeros_are_unpacked(tmp_path, monkeypatch):
    """A mebibyte of compressed zeros may be a gibibyte."""
    np.savez_compressed(tmp_path / "data.npz", x=np.zeros((2**12, 2**8)), y=GOOD_Y)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="x holds 4096 examples and y 10; both must have the same number"):
        load_train_test_split(str(tmp_path / "data.npz"), 0)


def test_a_file_keeps_its_pairs_and_shapes(tmp_path):
    x = np.arange(40 * 6, dtype=np.uint8).reshape(40, 2, 3)
    y = x[:, 0, 0] // 6 % 4
    data = load_train_test_split(saved(tmp_path, x=x, y=y), 0)
    assert data.train_x.shape == (32, 2, 3)
    assert data.test_x.shape == (8, 2, 3)
    assert data.classes == 4
    for part_x, part_y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert torch.equal(part_x[:, 0, 0].long() // 6 % 4, part_y)


GOOD_X, GOOD_Y = np.ones((10, 4)), np.arange(10) % 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD_X}, "it holds x; arrays x and y are needed"),
        ({}, "it holds nothing; arrays x and y are needed"),
        ({"x": GOOD_X, "labels": GOOD_Y}, "it holds x, labels; arrays x and y are needed"),
        ({"x": GOOD_X, "y": GOOD_Y[:-1]}, "x holds 10 examples and y 9"),
        ({"x": GOOD_X[0], "y": GOOD_Y}, r"x.shape=\(4,\), dtype=float64 must be numbers"),
        ({"x": GOOD_X.astype(complex), "y": GOOD_Y}, "dtype=complex128 must be numbers"),
        ({"x": GOOD_X.astype(str), "y": GOOD_Y}, "must be numbers"),
        ({"x": GOOD_X, "y": GOOD_Y.astype(float)}, "dtype=float64 must be integer classes"),
        ({"x": GOOD_X, "y": GOOD_Y[:, None]}, r"y.shape=\(10, 1\)"),
        ({"x": GOOD_X[:4], "y": GOOD_Y[:4]}, "4 examples are too few"),
        ({"x": GOOD_X * np.nan, "y": GOOD_Y}, "x holds values that are NaN"),
        ({"x": GOOD_X * 1e300, "y": GOOD_Y}, "beyond float32"),
        ({"x": GOOD_X, "y": GOOD_Y - 1}, "y holds classes from -1 to 0"),
        ({"x": GOOD_X, "y": 2 * GOOD_Y - 1}, "y holds classes from -1 to 1"),
        ({"x": GOOD_X, "y": GOOD_Y * 0}, "y holds classes from 0 to 0"),
        ({"x": GOOD_X, "y": GOOD_Y * 10**9}, "y holds classes from 0 to 1000000000"),
        ({"x": np.array([[None]] * 10), "y": GOOD_Y}, r"dtype=object must be numbers .*; save x.astype\('float32'\)"),
        (
            {"x": GOOD_X, "y": np.array([None] * 10)},
            r"dtype=object must be integer classes .*; save y",
        ),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=f"data='.*data.npz': .*{message}"):
        load_train_test_split(saved(tmp_path, **arrays), 0)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut", b"\x80\x04.", b"\x1b[31m" * 1000])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ValueError, match="data='.*data.npz': it is no .npz file; save x and y with numpy.savez"):
        load_train_test_split(str(tmp_path / "data.npz"), 0)


def test_an_npz_whose_arrays_are_damaged_or_hostile_is_one_line(tmp_path, refused):
    path = tmp_path / "data.npz"
    np.savez(path, x=GOOD_X, y=GOOD_Y)
    damaged = path.read_bytes().replace(b"NUMPY", b"XUMPY")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 9), }".ljust(118)
    start = b"\x93NUMPY\x01\x00v\x00"
    members = [{"x.npy": x, "y.npy": x} for x in (start + header, start[:6], b"", start + b"{" * 118)]
    for contents in (*members, {"\x1b[31m\n[bold]": b""}):
        with ZipFile(path, "w") as file:
            for name, content in contents.items():
                file.writestr(name, content)
        assert refused("fit", "lora", "--data", path).startswith("lowmem fit: data=")
    path.write_bytes(damaged)
    assert refused("fit", "lora", "--data", path).startswith("lowmem fit: data=")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has none in its file system")
def test_a_pipe_a_folder_and_a_device_are_refused_at_once(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "directory.npz").mkdir()
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    for name in ("pipe", "directory", "device", "loop"):
        path = str(tmp_path / f"{name}.npz")
        why = "Too many levels" if name == "loop" else "it is a directory, a device or a pipe; name a regular file"
        with pytest.raises(OSError, match=f"cannot read '{path}': {why}"):
            load_train_test_split(path, 0)
        refused("fit", "lora", "--data", path)


def test_an_npy_array_under_the_name_of_an_npz_is_named(tmp_path):
    np.save(tmp_path / "data.npy", GOOD_X)
    (tmp_path / "data.npy").rename(tmp_path / "data.npz")
    with pytest.raises(ValueError, match="data='.*data.npz': it is a single array"):
        load_train_test_split(str(tmp_path / "data.npz"), 0)


def test_unknown_data_lists_the_choices():
    with pytest.raises(ValueError, match="data='mnist' is unknown: choose synthetic, digits"):
        load_train_test_split("mnist", 0)


def test_a_missing_file_is_an_os_error():
    with pytest.raises(OSError, match=r"missing\.npz"):
        load_train_test_split("missing.npz", 0)
