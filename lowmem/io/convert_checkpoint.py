"""Converts a checkpoint on disk, one tensor at a time, to the file that ``save`` writes for the same model converted
in memory with ``embeddings="4bit"``, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import printable
from lowmem.io.metadata import layer_of
from lowmem.io.safetensors import TensorSpec
from lowmem.io.shards import StoredWeight, check_target, write_model
from lowmem.io.source import Source, check_patterns
from lowmem.nn.forms import CodedForm
from lowmem.nn.techniques import Budget, EightBit, FourBit
from lowmem.quant.quantize import squares_lost
from lowmem.quant.tensor import QuantizedTensor
from lowmem.transforms.budget import Chosen, Unit, choose, losses_of, unit_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights that are converted


@dataclass(frozen=True)
class Row:
    """The result for one tensor of the source."""

    name: str
    shape: tuple[int, ...]
    converted: bool
    before_bytes: int
    after_bytes: int
    error: float | None
    """``rms(stored - weight) / rms(weight)`` of a converted tensor."""
    stored: str = ""
    """How a converted tensor is stored."""
    chosen_because: str = ""
    """What its bits save of the loss of all tensors, if a ``Budget`` chose them."""


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    technique: FourBit | EightBit | Budget,
    *,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    shard_bytes: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Row]:
    """Convert a safetensors checkpoint to 4 bits, with one tensor in memory at a time.

    Tensors named ``weight`` in float32, float16 or bfloat16 with 2 to 4 dimensions are converted: the weights of
    nn.Linear, nn.Embedding, nn.Conv1d and nn.Conv2d. Other tensors are copied.

    Args:
        source: a safetensors file, or the ``.index.json`` of a sharded one.
        target: the file to write; an existing file is replaced when the new one is complete.
        technique: with a single format. A file does not say which tensors are embeddings: they become 4 bits, too, as
            with ``embeddings="4bit"``. For a ``Budget``, without inputs, tensors are read twice.
        include, exclude: glob patterns of names; tensors that match ``include`` and not ``exclude`` are converted.
        shard_bytes: the most bytes of tensors per file; ``target-00001-of-00002.safetensors`` and so on are written,
            then ``target.safetensors.index.json``. None: one file.
        device: where each tensor is quantized.
        progress: called with the name of each tensor that was read and its bytes in the source.

    Returns:
        A row for each tensor of the source, sorted by name.

    Raises:
        ValueError: a pattern that matches nothing, nothing to convert, a weight that cannot be quantized, or a tensor
            larger than ``shard_bytes``. No file has changed, except for shards that were completed.
        FileError: the source is damaged, or no dense safetensors checkpoint.
        OSError: a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    with Source(source) as opened:
        wanted = _wanted(opened.specs, list(include), list(exclude))
        chosen = _chosen(opened, wanted, technique, device, progress)
        errors: dict[str, float] = {}
        weights = {
            name: _converted(opened, name, chosen[name].technique, device, errors)
            if name in wanted
            else StoredWeight(name, spec.shape, spec.dtype, spec.nbytes, partial(opened.read_tensor, name))
            for name, spec in opened.specs.items()
        }
        taken: dict[str, str] = {}
        for name, weight in weights.items():
            for out in weight.specs():
                if taken.setdefault(out, name) != name:
                    both = f"both {printable(taken[out], 80)} and {printable(name, 80)} would be {printable(out, 80)}"
                    raise ValueError(f"{both}; copy one as it is with --exclude")
        rows: dict[str, Row] = {}

        def written(weight: StoredWeight, after: int) -> None:
            name, before = weight.name, weight.nbytes
            how = (weight.kept, chosen[name].why) if name in wanted else ()
            rows[name] = Row(name, opened.specs[name].shape, name in wanted, before, after, errors.get(name), *how)
            progress(name, before)

        write_model(target, weights, shard_bytes, opened.paths, written)
    return [rows[name] for name in sorted(rows)]


def _chosen(
    opened: Source,
    wanted: set[str],
    technique: FourBit | EightBit | Budget,
    device: torch.device | str,
    progress: Callable[[str, int], None],
) -> dict[str, Chosen]:
    """Return how each tensor is stored."""
    if not isinstance(technique, Budget):
        return dict.fromkeys(wanted, Chosen(technique, ""))
    if technique.inputs is not None:
        raise ValueError("Budget(inputs=) runs a model, and a checkpoint is none: leave inputs= out")
    units: dict[str, Unit] = {}
    for name in sorted(wanted):
        tensor = _rows(opened.read_tensor(name)).to(device)
        try:
            unit = unit_of({layer_of(name): tensor}, lambda _, weight: losses_of(weight))
        except (ValueError, TypeError) as reason:
            raise ValueError(f"{printable(name)}: {reason}; or leave it as it is with --exclude") from reason
        assert unit is not None
        units[name] = unit
        progress(name, tensor.nbytes)
        del tensor
    return dict(zip(units, choose(list(units.values()), technique), strict=True))


def _wanted(specs: dict[str, TensorSpec], include: list[str], exclude: list[str]) -> set[str]:
    check_patterns((*include, *exclude), specs)
    wanted = {
        name
        for name, spec in specs.items()
        if name.rpartition(".")[2] == "weight"
        and spec.dtype in DTYPES
        and 2 <= len(spec.shape) <= 4
        and 0 not in spec.shape
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not wanted:
        raise ValueError(
            f"nothing to convert among {len(specs)} tensors: looked for float32, float16 or bfloat16 tensors named "
            "weight, of 2 to 4 dimensions, that --include and --exclude leave"
        )
    return wanted


def _converted(
    opened: Source,
    name: str,
    technique: FourBit | EightBit,
    device: torch.device | str,
    errors: dict[str, float],
) -> StoredWeight:
    """Plan to store a tensor by ``technique``; its error is noted when it is written."""
    skeleton = technique.skeleton(_rows(torch.empty(opened.specs[name].shape, dtype=torch.float32, device="meta")))

    def read() -> QuantizedTensor:
        weight = _rows(opened.read_tensor(name)).to(device)
        try:
            stored = technique.store(weight)
        except (ValueError, TypeError) as reason:
            raise ValueError(f"{printable(name)}: {reason}; or leave it as it is with --exclude") from reason
        errors[name] = squares_lost(weight, stored).error
        return replace(stored, packed=stored.packed.to("cpu"), scales=stored.scales.to("cpu"))

    return StoredWeight(name, tuple(skeleton.shape), CodedForm.of(skeleton), opened.specs[name].nbytes, read)


def _rows(weight: Tensor) -> Tensor:
    return weight.flatten(1)  # (out, in * kernel), as the 4-bit layers store it
