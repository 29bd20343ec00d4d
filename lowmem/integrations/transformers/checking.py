"""Refuses folders that contradict themselves: an index and its shards, or weights and what config.json says of them.

transformers reads all files that an index names, wherever they lie, and takes for a tensor whichever has it; what it
does not find it fills with random numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from lowmem.errors import FileError, refusal, show
from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.io.convert_checkpoint import Source
from lowmem.io.foreign.recognize import quantization_of
from lowmem.io.model_folder import WEIGHTS
from lowmem.io.shards import INDEX, read_index

__all__ = ["check_index", "refuse_pickles", "refuse_unread", "refuse_untold"]


def check_index(files: Sequence[str]) -> None:
    """Raise if the index beside a model's files names other tensors than they have, or files elsewhere.

    Raises:
        FileError: it does; or it is damaged.
        OSError: it cannot be read.
    """
    for folder in sorted({Path(file).parent for file in files}):
        index = folder / f"{WEIGHTS}{INDEX}"
        if not index.exists():
            continue
        listed = set(read_index(index).values())
        if listed == {Path(file).name for file in files if Path(file).parent == folder}:  # not those of a variant
            Source(index).__exit__()


def refuse_pickles(files: Sequence[str]) -> None:
    """Raise if a model's files are others than safetensors: transformers would read them by pickle.

    Raises:
        FileError: one is; it is named.
    """
    for file in files:
        if not file.endswith(".safetensors"):
            why = "lowmem reads safetensors only, and executed nothing; load the model without quantization_config=, "
            raise refusal(file, f"{why}and save it by save_pretrained, which writes them", "load")


def refuse_untold(names: Collection[str], config: LowmemConfig) -> None:
    """Raise if a folder's weights are stored, and its config does not say how.

    Args:
        names: of the folder's tensors.
        config: as config.json has it.

    Raises:
        ValueError: a weight of which no record of ``layers`` has the name.
    """
    told = {str(name) for record in config.layers for name in record.get("names", ())}
    for name in _stored(names):
        if not told & {name, name.removesuffix("weight").removesuffix(".")}:
            raise ValueError(
                f"the folder's config.json does not say how its tensor {show(name)} is stored: get it again, or save "
                "the model again by save_pretrained"
            )


def refuse_unread(folder: Path, names: Collection[str]) -> None:
    """Raise where a folder's weights are lowmem's, and are about to be read as dense ones: all would be random.

    Args:
        folder: in which they lie.
        names: of its tensors.

    Raises:
        ValueError: they are; what the folder's config.json says was left out, or it says nothing.
    """
    try:
        method = quantization_of(folder / "config.json").get("quant_method")
    except (FileError, OSError):  # transformers has read another config
        method = None
    what = f"the weights of {show(str(folder))} are stored by lowmem"
    if method == METHOD:
        raise ValueError(
            f"{what}, and config= is of a dense model: leave out config= and quantization_config=, which the folder "
            "itself has"
        )
    if any(_stored(names)):
        says = "does not say how" if method is None else f"says quant_method={show(method)}"
        raise ValueError(
            f"{what}, and its config.json {says}: get it again, or save the model again by save_pretrained"
        )


def _stored(names: Collection[str]) -> Iterable[str]:
    """Return the names of the weights of which a folder has the parts that lowmem stores."""
    found = set(names)
    fourbit = (name.removesuffix("_packed") for name in sorted(found) if name.endswith("_packed"))
    return [
        *(name for name in fourbit if f"{name}_scales" in found),
        *(name.removesuffix("_rounded") for name in sorted(found) if name.endswith("weight_rounded")),
    ]
