"""Sums of the inputs of linear layers: their second moments, or covariance, and mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.transforms.calibration.model_runs import StopModelRun, registered_forward_pre_hooks

# Columns that are multiplied at a time with themselves and those behind them
_PANEL = 256


class RunningMoments:
    """Mean and second moments of rows that come in parts, in float32.

    Args:
        columns: of a row.
        centered: whether the mean is taken off, as where a layer's bias makes up for it. Rows are then summed less
            the mean of the first ones, since the difference of large sums would have few correct bits.
        diagonal: whether each column is taken alone: in the memory of a row.
        device: of the rows.
    """

    def __init__(self, columns: int, *, centered: bool, diagonal: bool, device: torch.device) -> None:
        self.rows, self.columns = 0, columns
        self._centred, self._diagonal = centered, diagonal
        self._shift = torch.zeros(columns, dtype=torch.float32, device=device)
        self._sum = torch.zeros(columns, dtype=torch.float32, device=device)
        shape = (columns,) if diagonal else (columns, columns)
        self._squares = torch.zeros(shape, dtype=torch.float32, device=device)

    def add_rows(self, x: Tensor) -> None:
        """Add rows (n, columns) of any floating dtype."""
        if not len(x):
            return
        x = x.float()
        if self._centred:
            if not self.rows:
                self._shift = x.mean(0)
            x = x - self._shift
        self.rows += len(x)
        self._sum += x.sum(0)
        if self._diagonal:
            self._squares += x.square().sum(0)
        else:
            # What lies above these is mirrored in the end
            for panel in range(0, x.shape[1], _PANEL):
                self._squares[panel:, panel : panel + _PANEL].addmm_(x[:, panel:].T, x[:, panel : panel + _PANEL])

    @property
    def mean(self) -> Tensor:
        """The mean of the rows: float32 (columns,)."""
        return self._shift + self._sum / max(1, self.rows)

    def is_finite(self) -> bool:
        """Whether the sums hold neither NaN nor infinities."""
        return bool(self._squares.isfinite().all())

    def second_moments_or_covariance(self) -> Tensor:
        """Return the mean of ``x^T x`` over the rows, or their covariance: float32 (in, in), of diagonals (in,)."""
        mean = self._squares / max(1, self.rows)
        if not self._diagonal:
            for start, stop in ((panel, panel + _PANEL) for panel in range(0, len(mean), _PANEL)):
                mean[start:stop, stop:] = mean[stop:, start:stop].T
        if not self._centred:
            return mean
        off = self._sum / max(1, self.rows)
        return (mean - off.square()).clamp_min_(0) if self._diagonal else mean.addr_(off, off, alpha=-1)


def unpadded_token_mask_or_none(batch: Any, batch_index: int) -> Tensor | None:
    """Return which tokens of a batch count, bool (batch, tokens), by its ``attention_mask``; None: all.

    Raises:
        ValueError: no token counts.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    counted = mask != 0
    if not counted.any():
        raise ValueError(
            f"batch {batch_index + 1} of batches is padding alone: its attention_mask of {tuple(mask.shape)} is 0 "
            "throughout; leave it out"
        )
    return counted


class RegroupingNeeded(BaseException):
    """Layers that had one input at first have different ones: their moments are to be taken anew."""


class SharedInputTracker:
    """The first layer, of each kind, that got the current input: the same tensor, not written to since."""

    def __init__(self) -> None:
        self._input: tuple[Tensor, int] | None = None
        self._first: dict[Hashable, nn.Module] = {}

    def input_and_its_first_layer(
        self, layer: nn.Module, args: Any, kwargs: Any, sharing_key: Hashable
    ) -> tuple[Tensor, nn.Module]:
        """Return the input that a layer gets, and the first layer of its kind that got this input."""
        x: Tensor = args[0] if args else kwargs["input"]
        version = -1 if x.is_inference() else x._version
        if self._input is None or self._input[0] is not x or not self._input[1] == version >= 0:
            self._input, self._first = (x, version), {}
        return x, self._first.setdefault(sharing_key, layer)


class InputMomentCollector:
    """The moments of the inputs of some layers, taken while the model runs; layers with one input share theirs.

    Of those in ``centered_layers`` the mean is taken off; those in ``unshared_layers`` share with no other. A run
    ends when the first layer was called ``stop_after`` times. ``moments`` are by the first layer that got the input.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        centered_layers: set[nn.Module],
        unshared_layers: set[nn.Module],
        *,
        diagonal: bool = False,
        stop_after: int | None = None,
    ) -> None:
        self._layers, self._centred, self._alone, self._diagonal = (
            list(layers),
            centered_layers,
            unshared_layers,
            diagonal,
        )
        self._stop_after = stop_after
        self._leader: dict[nn.Module, nn.Module] = {}
        self._calls: Counter[nn.Module] = Counter()
        self.moments: dict[nn.Module, RunningMoments] = {}
        self.start_batch(None)

    @contextmanager
    def collecting_inputs(self) -> Iterator[None]:
        """Take the inputs of all calls in the block."""
        with registered_forward_pre_hooks(self._layers, self._accumulate_layer_input_or_stop):
            yield
        self.start_batch(None)

    def start_batch(self, token_mask: Tensor | None) -> None:
        """Begin a batch, of which the tokens in ``token_mask`` count."""
        self._mask, self._readers = token_mask, SharedInputTracker()
        self._left = self._stop_after or 0

    def layer_groups_by_input_or_raise(self) -> list[list[nn.Module]]:
        """Return the layers that were called, by their input; raise ``RegroupingNeeded`` if some had fewer calls."""
        layers_by_leader: dict[nn.Module, list[nn.Module]] = {}
        for layer, leader in self._leader.items():
            if self._calls[layer] != self._calls[leader]:
                self._alone.add(layer)
                raise RegroupingNeeded
            layers_by_leader.setdefault(leader, []).append(layer)
        return list(layers_by_leader.values())

    def _accumulate_layer_input_or_stop(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        kind = layer if layer in self._alone else layer in self._centred
        x, leader = self._readers.input_and_its_first_layer(layer, args, kwargs, kind)
        if self._leader.setdefault(layer, leader) is not leader:
            self._alone.add(layer)
            raise RegroupingNeeded
        self._calls[layer] += 1
        if leader is layer:
            columns = int(x.shape[-1])
            if layer not in self.moments:
                centred = layer in self._centred
                self.moments[layer] = RunningMoments(
                    columns, centered=centred, diagonal=self._diagonal, device=x.device
                )
            self.moments[layer].add_rows(_unmasked_input_rows(x, columns, self._mask))
        if self._stop_after and layer is self._layers[0]:
            self._left -= 1
            if not self._left:
                raise StopModelRun


def _unmasked_input_rows(x: Tensor, columns: int, token_mask: Tensor | None) -> Tensor:
    """Return the rows of an input (..., columns) that count: those of all tokens where it is no tensor of tokens."""
    if token_mask is not None:
        token_mask = token_mask.to(x.device)
        if x.shape[:-1] == token_mask.shape:
            return x[token_mask]
        if x.shape[:-1] == (token_mask.numel(),):
            return x[token_mask.flatten()]
    return x.reshape(-1, columns)
