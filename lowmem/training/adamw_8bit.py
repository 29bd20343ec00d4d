"""AdamW with both moments in 8 bits, 2.03 bytes per trained parameter instead of 8 (Dettmers et al., arXiv
2110.02861): levels of e4m3, and the root of the second moment, whose exponents span half the range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.errors import short_repr
from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.quant.backend import chunk_length
from lowmem.training.master_weights import REST, parameter_loaded_state_pairs, replace_state_with_uncast_copies

BLOCK = 256
"""Elements of a moment that share a scale."""

_LARGEST = 448.0
"""The largest level of e4m3."""

_LEAST = 2.0**-9
"""The smallest positive level of e4m3: the least level stored for the root of a second moment, by which updates
divide."""

_SMALL = 4096
"""Parameters with fewer elements keep float32 moments: codes would save little."""

_CHUNK = 2**18
"""Elements that are updated at a time, so that temporaries stay small."""

_CHUNK_BYTES = 32
"""Temporaries of an element, at most: on a GPU chunks are as large as its scratch, since each starts 38 kernels."""

_SHORT = 16
"""Sharded parameters with shorter rows keep float32 moments: each row has scales of its own."""

_MOMENTS = "exp_avg", "exp_avg_root"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with block-wise 8-bit moments.

    A stored first moment is off by at most 1/16 of itself, or 2^-10 / 448 of the largest magnitude in its block of
    256, if that is more. The root of a second moment has the same bound, twice as much where it is rounded up to the
    smallest positive level. Parameters with fewer than 4096 elements keep float32 moments.

    Parameters may be sharded along their first dimension by ``fully_shard``: each process updates its own shards, and
    the moments are shards, too. Blocks then end at the end of each row, so rows of 16 elements take 2.5 bytes per
    element. torch's distributed checkpoints save the state, and can load it with another number of processes.

    Args:
        params: parameters or groups, as for ``torch.optim.AdamW``.
        lr: the learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay: each step multiplies parameters by ``1 - lr * weight_decay``.

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
            raise ValueError(f"betas={short_repr(betas)} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; return the loss of ``closure``, if it is given.

        Raises:
            RuntimeError: a gradient is sparse or complex, or a parameter is sharded along another dimension than the
                first.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_parameter(parameter, group)
        return loss

    def _update_parameter(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        gradient = cast(Tensor, parameter.grad)
        if gradient.layout is not torch.strided or gradient.is_complex():
            raise RuntimeError(
                f"AdamW8bit takes dense real gradients, found {gradient.layout} {gradient.dtype}: use torch.optim "
                "for this parameter"
            )
        state = self.state[parameter]
        if not state:
            state.update(_initial_state(parameter))
        state["step"] += 1
        first, second = group["betas"]
        size = group["lr"] / (1 - first ** state["step"])
        root = (1 - second ** state["step"]) ** 0.5
        local_parameter, gradient = _local_shard_or_tensor(parameter), _local_shard_or_tensor(gradient)
        flat = local_parameter if local_parameter.is_contiguous() else local_parameter.contiguous()
        values, gradient = flat.view(-1), gradient.reshape(-1)
        decay = 1 - group["lr"] * group["weight_decay"]
        row = _shard_row_length_or_zero(parameter)
        chunk = chunk_length(values, _CHUNK, _CHUNK_BYTES) // BLOCK * BLOCK
        chunk = max(1, chunk // row) * row if row else chunk
        for start in range(0, len(values), chunk):
            part = slice(start, min(start + chunk, len(values)))
            g = gradient[part].float()
            m, s = (_moment_chunk_in_float32(state, name, part, row) for name in _MOMENTS)
            m.lerp_(g, 1 - first)
            torch.sqrt(s.mul_(s).mul_(second).addcmul_(g, g, value=1 - second), out=s)
            change = m / (s / root).add_(group["eps"])
            values[part].mul_(decay).sub_(change.mul_(size).to(values.dtype))
            # An infinite scale would make NaN of its whole block
            s.clamp_(max=torch.finfo(torch.float32).max)
            for name, moment in zip(_MOMENTS, (m, s), strict=True):
                _write_moment_chunk(state, name, part, row, moment)
        if flat is not local_parameter:
            local_parameter.copy_(flat)

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state; codes and scales keep their dtypes, which torch would cast to those of the parameters.

        Raises:
            ValueError: the state is of other parameters or of another optimizer; nothing was changed.
        """
        loaded = parameter_loaded_state_pairs(self, state_dict)
        for number, (parameter, state) in enumerate(loaded):
            _check_loaded_state_shapes(state, parameter, number)
        super().load_state_dict(state_dict)
        for parameter, state in loaded:
            replace_state_with_uncast_copies(self, parameter, state)


def _local_shard_or_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, in the same memory; other tensors as they are."""
    return cast(Any, tensor).to_local() if isinstance(tensor, imported_dtensor_types()) else tensor


def _shard_row_length_or_zero(parameter: Tensor) -> int:
    """Return the elements per row of a sharded parameter, where blocks end with rows; 0 if it is not sharded."""
    if not isinstance(parameter, imported_dtensor_types()):
        return 0
    return parameter.numel() // max(1, len(parameter)) or 1


def _initial_state(parameter: Tensor, device: torch.device | str | None = None) -> dict[str, Any]:
    """Return a parameter's state before the first step."""
    count, row = parameter.numel(), _shard_row_length_or_zero(parameter)
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
    made = {name: _zeros_sharded_like(shape, dtype, parameter, device) for name, (shape, dtype) in shapes.items()}
    return {"step": 0, **made}


def _zeros_sharded_like(
    shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor, device: torch.device | str | None
) -> Tensor:
    """Return zeros, sharded as the parameter is unless ``device`` is given."""
    if not _shard_row_length_or_zero(parameter) or device is not None:
        return torch.zeros(shape, dtype=dtype, device=device or parameter.device)
    from torch.distributed.tensor import Replicate, Shard, zeros

    placements = cast(Any, parameter).placements
    if not all(
        type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0) for placement in placements
    ):
        raise RuntimeError(
            f"AdamW8bit takes parameters that are sharded along their first dimension, as by fully_shard, found "
            f"placements={placements}: use torch.optim for this parameter"
        )
    made: Tensor = zeros(shape, dtype=dtype, device_mesh=cast(Any, parameter).device_mesh, placements=placements)
    return made


def _check_loaded_state_shapes(state: Mapping[str, Any], parameter: Tensor, parameter_index: int) -> None:
    """Raise a ValueError if a loaded state does not have the names and shapes that this parameter's state has."""
    if not state:
        return
    shapes = {name: getattr(value, "shape", None) for name, value in state.items() if name != REST}
    wanted = {name: getattr(value, "shape", None) for name, value in _initial_state(parameter, "meta").items()}
    if shapes != wanted:
        raise ValueError(
            f"state of parameter {parameter_index}, of shape {tuple(parameter.shape)}: found {_shapes_text(shapes)}, "
            "expected "
            f"{_shapes_text(wanted)}; load a state that AdamW8bit has saved for the same parameters, or start a new "
            "one"
        )


def _shapes_text(shapes: Mapping[str, Any]) -> str:
    return ", ".join(name if shape is None else f"{name} {tuple(shape)}" for name, shape in shapes.items())


def _moment_chunk_in_float32(state: Mapping[str, Any], name: str, elements: slice, row_length: int) -> Tensor:
    """Return a chunk of a moment in float32; a view of the state where that is float32."""
    if name in state:
        return _local_shard_or_tensor(state[name]).view(-1)[elements]
    blocks = _code_rows_slice(elements, row_length)
    codes = _local_shard_or_tensor(state[f"{name}_codes"])[blocks].view(torch.float8_e4m3fn).float()
    scales = _local_shard_or_tensor(state[f"{name}_scales"])[blocks]
    if row_length:
        return codes.mul_(scales.repeat_interleave(min(row_length, BLOCK), 1)[:, :row_length]).view(-1)
    return codes.mul_(scales).view(-1)[: elements.stop - elements.start]


def _write_moment_chunk(
    state: Mapping[str, Any], name: str, elements: slice, row_length: int, moment: Tensor
) -> None:
    if name in state:
        _local_shard_or_tensor(state[name]).view(-1)[elements] = moment
        return
    blocks, positive = _code_rows_slice(elements, row_length), name == "exp_avg_root"
    if row_length:
        padded = functional.pad(moment.view(-1, row_length), (0, -row_length % min(row_length, BLOCK)))
        codes, scales = e4m3_codes_and_scales_of_moment(padded.view(-1), positive, min(row_length, BLOCK))
        codes, scales = codes.view(padded.shape)[:, :row_length], scales.view(len(padded), -1)
    else:
        codes, scales = e4m3_codes_and_scales_of_moment(moment, positive)
    (
        _local_shard_or_tensor(state[f"{name}_codes"])[blocks],
        _local_shard_or_tensor(state[f"{name}_scales"])[blocks],
    ) = codes, scales


def _code_rows_slice(elements: slice, row_length: int) -> slice:
    """Return the rows of the codes that hold these elements."""
    length = row_length or BLOCK
    return slice(elements.start // length, -(-elements.stop // length))


def e4m3_codes_and_scales_of_moment(
    moment: Tensor, avoid_zero: bool = False, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Return the codes of a moment, float32 (n,): bits of e4m3 floats, uint8 (blocks, block), and float32 scales.

    With ``avoid_zero``, the smallest code is that of the smallest positive level, not zero.
    """
    padded = functional.pad(moment, (0, -len(moment) % block_size)).view(-1, block_size)
    scales = padded.abs().amax(1, keepdim=True).div_(_LARGEST)
    scaled = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = scaled.clamp_(_LEAST if avoid_zero else -_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales
