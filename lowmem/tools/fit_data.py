"""Data for ``fit``: a synthetic task, scikit-learn's digits, or arrays in an .npz file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from lowmem.bignet import CHANNELS
from lowmem.errors import describe, printable
from lowmem.io.atomic import open_regular
from lowmem.version import install_command

TEST_SHARE = 0.2
_DEFLATE = 1032  # largest compression ratio of deflate
NPY = b"\x93NUMPY"  # first bytes of an .npy file


@dataclass(frozen=True)
class Split:
    """Inputs (examples, ...) in float32 and int64 classes (examples,), split into training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on a device."""
        tensors = self.train_x, self.train_y, self.test_x, self.test_y
        train_x, train_y, test_x, test_y = (one.to(device) for one in tensors)
        return Split(train_x, train_y, test_x, test_y, self.classes)


def load_data(name: str, seed: int) -> Split:
    """Load data, and split it randomly into 80% for training and 20% for the test.

    Args:
        name: "synthetic", "digits", or the path of an .npz file with arrays ``x`` (examples, ...) and
            ``y`` (examples,) of integer classes.
        seed: of the split, and of the synthetic task.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if name == "synthetic":
        x, y = _synthetic(generator)
    elif name == "digits":
        x, y = _digits()
    elif name.endswith(".npz"):
        x, y = _npz(Path(name))
    else:
        raise ValueError(f"data={name!r} is unknown: choose synthetic, digits, or a file whose name ends in .npz")
    order = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
    test, train = order.tensor_split([round(TEST_SHARE * len(x))])
    return Split(x[train], y[train], x[test], y[test], int(y.max()) + 1)


def _synthetic(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (1000, 1024) that are normal around a random center for each of 10 classes, and their classes."""
    centers = torch.randn(10, CHANNELS, generator=generator, dtype=torch.float32, device="cpu") * 0.2
    y = torch.randint(10, (1000,), generator=generator, dtype=torch.int64, device="cpu")
    return centers[y] + torch.randn(len(y), CHANNELS, generator=generator, dtype=torch.float32, device="cpu"), y


def _digits() -> tuple[Tensor, Tensor]:
    """Return the 1797 handwritten digits, 8 x 8 pictures resized to 32 x 32, in [-1, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as reason:
        raise ImportError(f"data='digits' needs scikit-learn: {install_command('digits')}") from reason
    images, y = load_digits(return_X_y=True)
    pictures = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    resized = torch.nn.functional.interpolate(pictures, size=(32, 32), mode="bilinear", align_corners=False)
    return resized.flatten(1) / 8 - 1, torch.from_numpy(y).long()  # pixels are 0 to 16


def _npz(path: Path) -> tuple[Tensor, Tensor]:
    with open_regular(path) as file:
        try:
            x, y = _arrays(file)
            _check_values(x, y)
        except OSError:
            raise
        except Exception as reason:  # numpy may raise anything for a malformed file
            said = str(reason) if isinstance(reason, ValueError) else describe(reason)
            raise ValueError(f"data={str(path)!r}: {said}") from reason
    return torch.from_numpy(np.asarray(x, dtype=np.float32)), torch.from_numpy(np.asarray(y, dtype=np.int64))


def _arrays(file: BufferedReader) -> tuple[np.ndarray, np.ndarray]:
    start = file.read(len(NPY))
    file.seek(0)
    if start == NPY:
        raise ValueError("it is a single array; save x and y with numpy.savez")
    if not is_zipfile(file):
        raise ValueError("it is no .npz file; save x and y with numpy.savez")
    file.seek(0)
    arrays = np.load(file, allow_pickle=False)
    missing = {"x", "y"} - set(arrays.files)
    if missing:
        found = printable(", ".join(arrays.files)) or "nothing"
        raise ValueError(f"it holds {found}; arrays x and y are needed")
    headers = [_header(arrays.zip, f"{name}.npy") for name in ("x", "y")]
    _check_headers(*headers)
    return arrays["x"], arrays["y"]


def _header(file: ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of an array, for which numpy allocates no more than the file holds of it."""
    if name not in file.namelist():
        raise ValueError("its members are not arrays; save x and y with numpy.savez")
    member = file.getinfo(name)
    if member.file_size > _DEFLATE * (member.compress_size + 1):
        raise ValueError(f"{name} claims {member.file_size} bytes, packed in {member.compress_size}; save it again")
    with file.open(member) as content:
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
        nbytes = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and nbytes != member.file_size - content.tell():
            raise ValueError(f"{name} claims {nbytes} bytes for shape={shape}, dtype={dtype}; save it again")
    return shape, dtype


def _check_headers(x: tuple[tuple[int, ...], np.dtype], y: tuple[tuple[int, ...], np.dtype]) -> None:
    """Raise a ValueError unless shapes and dtypes are those of examples and their classes."""
    (x_shape, x_dtype), (y_shape, y_dtype) = x, y
    if len(x_shape) < 2 or x_dtype.kind not in "fiub":
        raise ValueError(
            f"x.shape={x_shape}, dtype={x_dtype} must be numbers (examples, ...); save x.astype('float32')"
        )
    if len(y_shape) != 1 or y_dtype.kind not in "iu":
        raise ValueError(
            f"y.shape={y_shape}, dtype={y_dtype} must be integer classes (examples,); save y.astype('int64')"
        )
    if x_shape[0] != y_shape[0]:
        raise ValueError(f"x holds {x_shape[0]} examples and y {y_shape[0]}; both must have the same number")
    if x_shape[0] < 5:
        raise ValueError(f"{x_shape[0]} examples are too few to split into training and test; 5 is the least")


def _check_values(x: np.ndarray, y: np.ndarray) -> None:
    with np.errstate(over="ignore"):  # overflow to infinity is an error below
        finite = bool(np.isfinite(np.asarray(x, dtype=np.float32)).all())
    if not finite:
        raise ValueError("x holds values that are NaN, infinite or beyond float32")
    if y.min() < 0 or y.max() == 0 or y.max() >= len(y):
        raise ValueError(f"y holds classes from {y.min()} to {y.max()}; number them from 0, at least two of them")
