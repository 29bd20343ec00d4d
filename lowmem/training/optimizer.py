"""AdamW whose two moments are kept in 8 bits: 2.03 bytes for each number that trains, in place of 8.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861: blocks have a scale of their own, and
levels are dense near zero. Here the levels are those of an 8-bit float (e4m3: four bits of exponent), into which
torch casts in one pass, and of the second moment its root is kept, whose range is half as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.nn.sharded import sharded_types
from lowmem.training.master_weights import REST

__all__ = ["AdamW8bit"]

BLOCK = 256
_LARGEST = 448.0
"""The largest level of e4m3."""

_LEAST = 2.0**-9
"""Its smallest level above zero, below which no root of a second moment is stored: an update divides by it."""

_SMALL = 4096
"""Numbers below which a parameter's moments are kept in float32: their codes would save little."""

_CHUNK = 2**18
"""Numbers that are updated at a time, so that temporaries stay small."""

_SHORT = 16
"""Numbers of a sharded parameter's row, which has scales of its own, below which moments are kept in float32."""

_MOMENTS = "exp_avg", "exp_avg_root"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with block-wise 8-bit moments.

    A stored first moment is off by at most 1/16 of itself, or by 2^-10 / 448 of the largest among its 256 neighbours,
    if that is more; the root of a second moment by the same, and by as much again where it is less than that.
    Parameters below 4096 numbers keep float32 moments.

    Each process updates its own shards of parameters that ``fully_shard`` has split along their first dimension.
    Their moments are shards, too: a block ends with its row, so that 2.5 bytes are kept for each number in rows of
    16. torch's distributed checkpoints save them, and load them in another number of processes.

    Args:
        params: parameters or groups, as ``torch.optim.AdamW`` takes them.
        lr: the learning rate.
        betas: of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: how much of a parameter a learning rate of 1 takes from it.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; return the loss of ``closure``, if it is given.

        Raises:
            RuntimeError: a gradient that is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        gradient = cast(Tensor, parameter.grad)
        if gradient.layout is not torch.strided or gradient.is_complex():
            raise RuntimeError(
                f"AdamW8bit takes dense real gradients, found {gradient.layout} {gradient.dtype}: use torch.optim "
                "for this parameter"
            )
        state = self.state[parameter]
        if not state:
            state.update(_zeros(parameter))
        state["step"] += 1
        first, second = group["betas"]
        size = group["lr"] / (1 - first ** state["step"])
        root = (1 - second ** state["step"]) ** 0.5
        own, gradient = _local(parameter), _local(gradient)
        flat = own if own.is_contiguous() else own.contiguous()
        values, gradient = flat.view(-1), gradient.reshape(-1)
        decay = 1 - group["lr"] * group["weight_decay"]
        row = _row(parameter)
        chunk = max(1, _CHUNK // row) * row if row else _CHUNK
        for start in range(0, len(values), chunk):
            part = slice(start, min(start + chunk, len(values)))
            g = gradient[part].float()
            m, s = (_read(state, name, part, row) for name in _MOMENTS)
            m.lerp_(g, 1 - first)
            torch.sqrt(s.mul_(s).mul_(second).addcmul_(g, g, value=1 - second), out=s)
            change = m / (s / root).add_(group["eps"])
            values[part].mul_(decay).sub_(change.mul_(size).to(values.dtype))
            s.clamp_(max=torch.finfo(torch.float32).max)  # an infinite scale would make NaN of its whole block
            for name, moment in zip(_MOMENTS, (m, s), strict=True):
                _write(state, name, part, row, moment)
        if flat is not own:
            own.copy_(flat)

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state; its codes and scales keep their dtypes, which torch would cast to those of parameters.

        Raises:
            ValueError: it is of other parameters, or of another optimizer; this one is left as it was.
        """
        given = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(given, own, strict=False):  # torch refuses other numbers of them
            _check_state(state_dict["state"].get(number), parameter, number)
        super().load_state_dict(state_dict)
        for number, parameter in zip(given, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory."""
    return cast(Any, tensor).to_local() if isinstance(tensor, sharded_types()) else tensor


def _row(parameter: Tensor) -> int:
    """Return the length of a sharded parameter's rows, which blocks do not leave; 0 for a parameter in one piece."""
    if not isinstance(parameter, sharded_types()):
        return 0
    return parameter.numel() // max(1, len(parameter)) or 1


def _zeros(parameter: Tensor, device: torch.device | str | None = None) -> dict[str, Any]:
    """Return the state before the first step."""
    count, row = parameter.numel(), _row(parameter)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in _MOMENTS:
        if count < _SMALL or (row and row < _SHORT):
            shapes[name] = (tuple(parameter.shape) if row else (count,)), torch.float32
        elif row:
            shapes[f"{name}_codes"] = (parameter.shape[0], row), torch.uint8
            shapes[f"{name}_scales"] = (parameter.shape[0], -(-row // BLOCK)), torch.float32
        else:
            shapes[f"{name}_codes"] = (-(-count // BLOCK), BLOCK), torch.uint8
            shapes[f"{name}_scales"] = (-(-count // BLOCK), 1), torch.float32
    made = {name: _zero(shape, dtype, parameter, device) for name, (shape, dtype) in shapes.items()}
    return {"step": 0, **made}


def _zero(shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor, device: torch.device | str | None) -> Tensor:
    """Return zeros, split among processes as a parameter is.

    Raises:
        RuntimeError: it is split along another dimension than the first.
    """
    if not _row(parameter) or device is not None:
        return torch.zeros(shape, dtype=dtype, device=device or parameter.device)
    from torch.distributed.tensor import Replicate, Shard, zeros

    placements = cast(Any, parameter).placements
    if not all(type(one) is Replicate or (type(one) is Shard and one.dim == 0) for one in placements):
        raise RuntimeError(
            f"AdamW8bit takes parameters that are sharded along their first dimension, as by fully_shard, found "
            f"placements={placements}: use torch.optim for this parameter"
        )
    made: Tensor = zeros(shape, dtype=dtype, device_mesh=cast(Any, parameter).device_mesh, placements=placements)
    return made


def _check_state(state: Mapping[str, Any] | None, parameter: Tensor, number: int) -> None:
    """Raise a ValueError for a state that is none of this parameter's."""
    if not state:
        return
    shapes = {name: getattr(one, "shape", None) for name, one in state.items() if name != REST}
    wanted = {name: getattr(one, "shape", None) for name, one in _zeros(parameter, "meta").items()}
    if shapes != wanted:
        raise ValueError(
            f"state of parameter {number}, of shape {tuple(parameter.shape)}: found {_listed(shapes)}, expected "
            f"{_listed(wanted)}; load a state that AdamW8bit has saved for the same parameters, or start a new one"
        )


def _listed(shapes: Mapping[str, Any]) -> str:
    return ", ".join(name if shape is None else f"{name} {tuple(shape)}" for name, shape in shapes.items())


def _read(state: Mapping[str, Any], name: str, part: slice, row: int) -> Tensor:
    """Return a chunk of a moment in float32, which may be the stored one."""
    if name in state:
        return _local(state[name]).view(-1)[part]
    blocks = _blocks(part, row)
    codes = _local(state[f"{name}_codes"])[blocks].view(torch.float8_e4m3fn).float()
    scales = _local(state[f"{name}_scales"])[blocks]
    if row:
        return codes.mul_(scales.repeat_interleave(min(row, BLOCK), 1)[:, :row]).view(-1)
    return codes.mul_(scales).view(-1)[: part.stop - part.start]


def _write(state: Mapping[str, Any], name: str, part: slice, row: int, moment: Tensor) -> None:
    if name in state:
        _local(state[name]).view(-1)[part] = moment
        return
    blocks, positive = _blocks(part, row), name == "exp_avg_root"
    if row:
        padded = functional.pad(moment.view(-1, row), (0, -row % min(row, BLOCK)))
        codes, scales = quantize_moment(padded.view(-1), positive, min(row, BLOCK))
        codes, scales = codes.view(padded.shape)[:, :row], scales.view(len(padded), -1)
    else:
        codes, scales = quantize_moment(moment, positive)
    _local(state[f"{name}_codes"])[blocks], _local(state[f"{name}_scales"])[blocks] = codes, scales


def _blocks(part: slice, row: int) -> slice:
    """Return which rows of the codes hold a part of the numbers."""
    length = row or BLOCK
    return slice(part.start // length, -(-part.stop // length))


def quantize_moment(moment: Tensor, positive: bool = False, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 (blocks, block), the bits of an e4m3 float, and the scales, float32 (blocks, 1).

    Args:
        moment: float32 (n,).
        positive: whether the smallest level stands for zero, too.
        block: numbers that share a scale.
    """
    padded = functional.pad(moment, (0, -len(moment) % block)).view(-1, block)
    scales = padded.abs().amax(1, keepdim=True).div_(_LARGEST)
    scaled = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = scaled.clamp_(_LEAST if positive else -_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales
