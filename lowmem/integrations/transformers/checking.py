"""Refuses folders that contradict themselves: an index and its shards, or weights and what config.json says of them.

transformers reads all files that an index names, wherever they lie, and takes for a tensor whichever has it; what it
does not find it fills with random numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from lowmem.errors import refusal, show
from lowmem.integrations.transformers.config import METHOD, LowmemConfig
from lowmem.io.formats.recognize import is_coded
from lowmem.io.model_folder import WEIGHTS, quantization_of
from lowmem.io.shards import INDEX, read_index
from lowmem.io.source import Source

__all__ = ["check_index", "refuse_coded", "refuse_pickles", "refuse_unread", "refuse_untold"]


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


def refuse_untold(names: Collection[str], config: LowmemConfig, prefix: str) -> None:
    """Raise if a folder's weights are stored, and its config does not say how.

    Args:
        names: of the folder's tensors.
        config: as config.json has it.
        prefix: of the base model, which the names in config.json or those of the tensors may lack.

    Raises:
        ValueError: a weight of which no record of ``layers`` has the name.
    """
    told = {str(name).removeprefix(f"{prefix}.") for record in config.layers for name in record.get("names", ())}
    for name in _stored(names):
        own = name.removeprefix(f"{prefix}.")
        if not told & {own, own.removesuffix("weight").removesuffix(".")}:
            raise ValueError(
                f"the folder's config.json does not say how its tensor {show(name)} is stored: get it again, or save "
                "the model again by save_pretrained"
            )


def refuse_coded(folder: Path, names: Collection[str]) -> None:
    """Raise where weights of a folder would be quantized that another program has quantized.

    Args:
        folder: in which they lie.
        names: of its tensors.

    Raises:
        ValueError: they would; how to keep them is said.
    """
    method = _method_of(folder)
    if method is not None or any(is_coded(name) for name in names):
        program = "another program" if method is None else show(method)
        raise ValueError(
            f"a folder that {program} quantized has weights that would be quantized a second time: "
            "lowmem.integrations.transformers.from_exact(folder) keeps their codes; `lowmem quantize IN OUT "
            "--requantize` quantizes again what cannot be kept, and prints the error"
        )


def _method_of(folder: Path) -> str | None:
    """Return the ``quant_method`` of a folder's config.json; None where transformers has read another config."""
    file = folder / "config.json"
    return quantization_of(file).get("quant_method") if file.exists() else None


def refuse_unread(folder: Path, names: Collection[str]) -> None:
    """Raise where a folder's weights are lowmem's, and are about to be read as dense ones: all would be random.

    Args:
        folder: in which they lie.
        names: of its tensors.

    Raises:
        ValueError: they are; what the folder's config.json says was left out, or it says nothing.
    """
    method = _method_of(folder)
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
