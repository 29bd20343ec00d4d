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

_MOMENTS = "exp_avg", "exp_avg_root"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with block-wise 8-bit moments.

    A stored first moment is off by at most 1/16 of itself, or by 2^-10 / 448 of the largest among its 256 neighbours,
    if that is more; the root of a second moment by the same, and by as much again where it is less than that.
    Parameters below 4096 numbers keep float32 moments.

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
        flat = parameter if parameter.is_contiguous() else parameter.contiguous()
        values, gradient = flat.view(-1), gradient.reshape(-1)
        decay = 1 - group["lr"] * group["weight_decay"]
        for start in range(0, len(values), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(values)))
            g = gradient[part].float()
            m, s = (_read(state, name, part) for name in _MOMENTS)
            m.lerp_(g, 1 - first)
            torch.sqrt(s.mul_(s).mul_(second).addcmul_(g, g, value=1 - second), out=s)
            change = m / (s / root).add_(group["eps"])
            values[part].mul_(decay).sub_(change.mul_(size).to(values.dtype))
            for name, moment in zip(_MOMENTS, (m, s), strict=True):
                _write(state, name, part, moment)
        if flat is not parameter:
            parameter.copy_(flat)

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


def _zeros(parameter: Tensor) -> dict[str, Any]:
    """Return the state before the first step."""
    count, device = parameter.numel(), parameter.device
    state: dict[str, Any] = {"step": 0}
    for name in _MOMENTS:
        if count < _SMALL:
            state[name] = torch.zeros(count, device=device)
        else:
            blocks = -(-count // BLOCK)
            state[f"{name}_codes"] = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device)
            state[f"{name}_scales"] = torch.zeros(blocks, 1, device=device)
    return state


def _check_state(state: Mapping[str, Any] | None, parameter: Tensor, number: int) -> None:
    """Raise a ValueError for a state that is none of this parameter's."""
    if not state:
        return
    shapes = {name: getattr(one, "shape", None) for name, one in state.items()}
    wanted = {
        name: getattr(one, "shape", None) for name, one in _zeros(torch.empty_like(parameter, device="meta")).items()
    }
    if shapes != wanted:
        raise ValueError(
            f"state of parameter {number}, of shape {tuple(parameter.shape)}: found {_listed(shapes)}, expected "
            f"{_listed(wanted)}; load a state that AdamW8bit has saved for the same parameters, or start a new one"
        )


def _listed(shapes: Mapping[str, Any]) -> str:
    return ", ".join(name if shape is None else f"{name} {tuple(shape)}" for name, shape in shapes.items())


def _read(state: Mapping[str, Any], name: str, part: slice) -> Tensor:
    """Return a chunk of a moment in float32, which may be the stored one."""
    if name in state:
        return cast(Tensor, state[name][part])
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    codes = state[f"{name}_codes"][blocks].view(torch.float8_e4m3fn)
    values: Tensor = codes.float().mul_(state[f"{name}_scales"][blocks])
    return values.view(-1)[: part.stop - part.start]


def _write(state: Mapping[str, Any], name: str, part: slice, moment: Tensor) -> None:
    if name in state:
        state[name][part] = moment
        return
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    codes, scales = quantize_moment(moment, positive=name == "exp_avg_root")
    state[f"{name}_codes"][blocks], state[f"{name}_scales"][blocks] = codes, scales


def quantize_moment(moment: Tensor, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 (blocks, 256), the bits of an e4m3 float, and the scales, float32 (blocks, 1).

    Args:
        moment: float32 (n,).
        positive: whether the smallest level stands for zero, too.
    """
    padded = functional.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1, keepdim=True).div_(_LARGEST)
    scaled = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = scaled.clamp_(_LEAST if positive else -_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales
