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
from lowmem.errors import error_type_and_first_line, printable_line
from lowmem.io.filesystem import open_regular_file
from lowmem.version import install_command

TEST_SHARE = 0.2
# Largest compression ratio of deflate
_DEFLATE = 1032
# First bytes of an .npy file
NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class TrainTestSplit:
    """Inputs (examples, ...) in float32 and int64 classes (examples,), split into training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def to(self, device: torch.device) -> TrainTestSplit:
        """Return the split with its tensors on a device."""
        tensors = self.train_x, self.train_y, self.test_x, self.test_y
        train_x, train_y, test_x, test_y = (tensor.to(device) for tensor in tensors)
        return TrainTestSplit(train_x, train_y, test_x, test_y, self.classes)


def load_train_test_split(source: str, seed: int) -> TrainTestSplit:
    """Load data, and split it randomly into 80% for training and 20% for the test.

    Args:
        source: "synthetic", "digits", or the path of an .npz file with arrays ``x`` (examples, ...) and
            ``y`` (examples,) of integer classes.
        seed: of the split, and of the synthetic task.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if source == "synthetic":
        x, y = _synthetic_inputs_and_classes(generator)
    elif source == "digits":
        x, y = _digit_inputs_and_classes()
    elif source.endswith(".npz"):
        x, y = _read_npz_inputs_and_classes(Path(source))
    else:
        raise ValueError(f"data={source!r} is unknown: choose synthetic, digits, or a file whose name ends in .npz")
    order = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
    test, train = order.tensor_split([round(TEST_SHARE * len(x))])
    return TrainTestSplit(x[train], y[train], x[test], y[test], int(y.max()) + 1)


def _synthetic_inputs_and_classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (1000, 1024) that are normal around a random center for each of 10 classes, and their classes."""
    centers = torch.randn(10, CHANNELS, generator=generator, dtype=torch.float32, device="cpu") * 0.2
    y = torch.randint(10, (1000,), generator=generator, dtype=torch.int64, device="cpu")
    return centers[y] + torch.randn(len(y), CHANNELS, generator=generator, dtype=torch.float32, device="cpu"), y


def _digit_inputs_and_classes() -> tuple[Tensor, Tensor]:
    """Return the 1797 handwritten digits, 8 x 8 pictures resized to 32 x 32, in [-1, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as reason:
        raise ImportError(f"data='digits' needs scikit-learn: {install_command('digits')}") from reason
    images, y = load_digits(return_X_y=True)
    pictures = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    resized = torch.nn.functional.interpolate(pictures, size=(32, 32), mode="bilinear", align_corners=False)
    # Pixels are 0 to 16
    return resized.flatten(1) / 8 - 1, torch.from_numpy(y).long()


def _read_npz_inputs_and_classes(path: Path) -> tuple[Tensor, Tensor]:
    with open_regular_file(path) as file:
        try:
            x, y = _read_checked_x_and_y(file)
            _check_finite_x_and_valid_classes(x, y)
        except OSError:
            raise
        except Exception as reason:
            # Numpy may raise anything for a malformed file
            message = str(reason) if isinstance(reason, ValueError) else error_type_and_first_line(reason)
            raise ValueError(f"data={str(path)!r}: {message}") from reason
    return torch.from_numpy(np.asarray(x, dtype=np.float32)), torch.from_numpy(np.asarray(y, dtype=np.int64))


def _read_checked_x_and_y(file: BufferedReader) -> tuple[np.ndarray, np.ndarray]:
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
        array_names = printable_line(", ".join(arrays.files)) or "nothing"
        raise ValueError(f"it holds {array_names}; arrays x and y are needed")
    headers = [_checked_npy_shape_and_dtype(arrays.zip, f"{name}.npy") for name in ("x", "y")]
    _check_shapes_and_dtypes(*headers)
    return arrays["x"], arrays["y"]


def _checked_npy_shape_and_dtype(npz_file: ZipFile, member_name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of an array, for which numpy allocates no more than the file holds of it."""
    if member_name not in npz_file.namelist():
        raise ValueError("its members are not arrays; save x and y with numpy.savez")
    member = npz_file.getinfo(member_name)
    if member.file_size > _DEFLATE * (member.compress_size + 1):
        raise ValueError(
            f"{member_name} claims {member.file_size} bytes, packed in {member.compress_size}; save it again"
        )
    with npz_file.open(member) as content:
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
        nbytes = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and nbytes != member.file_size - content.tell():
            raise ValueError(f"{member_name} claims {nbytes} bytes for shape={shape}, dtype={dtype}; save it again")
    return shape, dtype


def _check_shapes_and_dtypes(
    x_shape_and_dtype: tuple[tuple[int, ...], np.dtype], y_shape_and_dtype: tuple[tuple[int, ...], np.dtype]
) -> None:
    """Raise a ValueError unless shapes and dtypes are those of examples and their classes."""
    (x_shape, x_dtype), (y_shape, y_dtype) = x_shape_and_dtype, y_shape_and_dtype
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


def _check_finite_x_and_valid_classes(x: np.ndarray, y: np.ndarray) -> None:
    # Overflow to infinity is an error below
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(np.asarray(x, dtype=np.float32)).all())
    if not finite:
        raise ValueError("x holds values that are NaN, infinite or beyond float32")
    if y.min() < 0 or y.max() == 0 or y.max() >= len(y):
        raise ValueError(f"y holds classes from {y.min()} to {y.max()}; number them from 0, at least two of them")
