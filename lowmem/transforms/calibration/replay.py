"""Runs a model up to one of its blocks, where the blocks before it return what they returned the last time.

What lies between blocks (embeddings, masks, rotations) is computed by the model itself at each run, so that nothing
is assumed about how it calls its blocks. Only the last output of each list of blocks is kept; the others return NaN
instead, which shows where a model reads one after all: then all outputs are kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowmem.errors import unwritable
from lowmem.transforms.calibration.batches import run_batch

__all__ = ["Overrides", "Replay", "Stale", "Stop", "evaluation_mode"]


class Stop(BaseException):
    """Ends a run of the model once what it was for is known; no Exception, which a model might catch."""


class Stale(BaseException):
    """A model has read an output of a block that was no longer kept."""


class Overrides:
    """Forwards of modules that stand in for their own for a while."""

    def __init__(self) -> None:
        self._own: dict[nn.Module, Any] = {}

    def set(self, module: nn.Module, forward: Callable[..., Any]) -> Any:
        """Let a module call ``forward``; return what it had as an attribute, or None."""
        before = vars(module).get("forward")
        self._own.setdefault(module, before)
        vars(module)["forward"] = forward
        return before

    def give_back(self, module: nn.Module, before: Any) -> None:
        """Let a module call what ``set`` returned."""
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

    def undo(self) -> None:
        """Give all modules their own forwards back, a user's included."""
        for module, before in self._own.items():
            vars(module).pop("forward", None)
            if before is not None:
                vars(module)["forward"] = before


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[Overrides]:
    """Put the model in evaluation mode without gradients, yield what overrides forwards; undo all afterwards."""
    modes = {module: module.training for module in model.modules()}
    overrides = Overrides()
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # which bypasses the linear layers of encoder layers
        with torch.no_grad():
            yield overrides
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        overrides.undo()
        for module, training in modes.items():
            module.training = training


class Replay:
    """A model of which some blocks are done: they return their outputs without computing them.

    Use it in a ``with`` statement, which ends the life of what is kept on disk.

    Args:
        model: in ``evaluation_mode``.
        overrides: as that yields.
        lists: the blocks, by the list that holds them, each in the order of their calls.
        offload: a folder for what is kept; None: memory.
        keep_all: whether the outputs of all blocks are kept, and not only the last of each list.
    """

    def __init__(
        self,
        model: nn.Module,
        overrides: Overrides,
        lists: Iterable[list[nn.Module]],
        offload: Path | None,
        keep_all: bool,
    ) -> None:
        self._model, self._overrides, self._keep_all = model, overrides, keep_all
        self._list = {block: number for number, blocks in enumerate(lists) for block in blocks}
        self._last: dict[int, nn.Module] = {}  # the last block of each list that is done
        self._done: dict[nn.Module, Any] = {}  # and the forward that it had as an attribute
        self._kept: dict[nn.Module, dict[int, Any]] = {}
        self._dropped = False
        self._run = 0  # the number of the batch
        self._stale: dict[int, Any] = {}  # of this run, by list: an output that is NaN throughout
        self._offload, self._stack = offload, ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> Replay:
        if self._offload is not None:
            if self._offload.is_file():
                raise NotADirectoryError(f"offload={str(self._offload)!r} is a file: name a folder")
            self._offload.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="hidden-states-", dir=self._offload)
            self._folder = Path(self._stack.enter_context(made))
        return self

    def __exit__(self, *_: object) -> None:
        for block, before in self._done.items():
            self._overrides.give_back(block, before)
        self._kept.clear()
        self._stack.close()

    def run(self, number: int, batch: Any) -> None:
        """Run a batch, until a hook raises ``Stop``."""
        self._run = number
        self._stale.clear()
        with suppress(Stop):
            run_batch(self._model, batch)

    @contextmanager
    def ending_at(self, block: nn.Module, keep: Callable[[Any], None] = lambda output: None) -> Iterator[None]:
        """End runs in the block when this block has computed its output, and give that to ``keep``."""
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            keep(own(*args, **kwargs))
            raise Stop

        before = self._overrides.set(block, forward)
        try:
            yield
        finally:
            self._overrides.give_back(block, before)

    def finish(self, block: nn.Module, batches: Iterable[Any]) -> None:
        """Compute a block's outputs and keep them: from now on it returns them.

        Raises:
            Stale: it has read what was not kept.
        """
        kept = self._kept[block] = {}
        before = self._last.get(self._list[block])

        def keep(output: Any) -> None:
            if self._dropped and _holds_nan(output):
                raise Stale
            kept[self._run] = _Output(output, self._folder)
            if before is not None and not self._keep_all:
                self._kept[before].pop(self._run, None)
                self._dropped = True

        with self.ending_at(block, keep):
            for number, batch in enumerate(batches):
                self.run(number, batch)
        self._last[self._list[block]] = block
        self._done[block] = self._overrides.set(block, lambda *args, **kwargs: self._output(block))

    @property
    def has_dropped(self) -> bool:
        """Whether a model that computes NaN may have read an output that is no longer kept."""
        return self._dropped

    def _output(self, block: nn.Module) -> Any:
        if self._run in self._kept[block]:
            return self._kept[block][self._run].copy()
        number = self._list[block]
        if number not in self._stale:
            latest = self._kept[self._last[number]].get(self._run)
            if latest is None:
                raise ValueError(
                    f"batch {self._run + 1} of batches is another one than before, or the model took another way "
                    "through its blocks: pass batches that are the same at each iteration, or blocks=() to calibrate "
                    "layer by layer"
                )
            self._stale[number] = pytree.tree_map(_nan, latest.copy())
        return self._stale[number]


class _Output:
    """What a block returned for a batch: tensors in any structure, in memory or in a file."""

    def __init__(self, output: Any, folder: Path | None) -> None:
        leaves, self._structure = pytree.tree_flatten(output)
        self._leaves: list[Any] = leaves
        self._path: Path | None = None
        tensors = {str(number): leaf for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._devices = {name: tensor.device for name, tensor in tensors.items()}
        if folder is not None and tensors:
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            self._path = folder / f"{id(self):x}.safetensors"
            try:
                save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, self._path)
            except (OSError, SafetensorError) as reason:
                raise unwritable(folder.parent, reason) from reason
            self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def copy(self) -> Any:
        """Return it anew: a model may write to what its blocks return."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        if self._path is not None:
            from safetensors.torch import load_file

            for name, tensor in load_file(self._path).items():
                leaves[int(name)] = tensor.to(self._devices[name])
        return pytree.tree_unflatten(leaves, self._structure)

    def __del__(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _nan(leaf: Any) -> Any:
    return leaf.fill_(torch.nan) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _holds_nan(output: Any) -> bool:
    leaves = pytree.tree_leaves(output)
    return any(bool(x.isnan().any()) for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
