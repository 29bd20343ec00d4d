"""Recognizes RMS norms, gated MLPs and activations by what they compute: on random numbers, in float32 and bfloat16,
outputs and gradients must equal those of the fused form within a bound on rounding errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.kernels.rowwise import ACTIVATIONS
from lowmem.nn.calls import is_observed
from lowmem.nn.module_copy import copied_module
from lowmem.training.fused import Act, GatedMLP, How, LayerNorm, RMSNorm, activations
from lowmem.training.fused_functions import activated, gated_product, rms_norm

_ROWS = 4
_SIZES = 1.0, 1e-4, 30.0, 1e3
"""Factor of each row of random numbers: modules may clamp large ones, or treat small ones specially (epsilon)."""

_DTYPES = torch.float32, torch.bfloat16


def recognize(module: nn.Module, training: bool = True) -> How | str | None:
    """Return how a module can be fused; if it only looks as if it could, the reason; None for any other module.

    ``training`` is the mode in which it will be called, as it may compute something else in the other.
    """
    if type(module) is nn.LayerNorm:
        return LayerNorm() if "forward" not in vars(module) else None
    norm, layers, activation = _norm_parts(module), _mlp_layers(module), _is_function(module)
    if norm is None and layers is None and not activation:
        return None
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed other devices, too
        if activation:
            found: How | str | None = _as_activation(module)
        else:
            found = _as_norm(module, norm, training) if norm is not None else _as_mlp(module, layers or [], training)
    if isinstance(found, RMSNorm | GatedMLP | Act) and "forward" in vars(module):
        return "it has a forward of its own, which another library has put into it"
    return found


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")


def _sizes() -> Tensor:
    """Return by what the rows of an input are multiplied: (rows, 1)."""
    return torch.tensor(_SIZES, dtype=torch.float32, device="cpu").unsqueeze(1)


def _norm_parts(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of weight and epsilon if a module has one vector parameter, one epsilon and nothing else."""
    own = {name: one for name, one in module._parameters.items() if one is not None}
    vectors, count = [name for name, one in own.items() if one.dim() == 1], len(own)
    numbers = [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if len(vectors) != 1 or count != 1 or len(numbers) != 1 or module._modules or module._buffers:
        return None
    return vectors[0], numbers[0]


def _as_norm(module: nn.Module, parts: tuple[str, str], training: bool) -> RMSNorm | str:
    weight, eps = parts
    best: tuple[bool, float, RMSNorm] | None = None
    for offset in (0.0, 1.0):
        for rounds_first in (False, True):
            how = RMSNorm(weight, eps, offset, rounds_first)
            off = [_norm_error(module, how, dtype, dtype, training) for dtype in _DTYPES]
            if None in off:
                continue
            mixes = None not in [_norm_error(module, how, *dtypes, training) for dtypes in (_DTYPES, _DTYPES[::-1])]
            found = not mixes, cast(float, off[1]), replace(how, mixes=mixes)
            if best is None or found[:2] < best[:2]:
                best = found
    return "on random numbers it computes no RMS norm" if best is None else best[2]


def _norm_error(
    module: nn.Module, how: RMSNorm, dtype: torch.dtype, of_weight: torch.dtype, training: bool
) -> float | None:
    """Return the sum of the output's differences to the fused form; None if one exceeds the bound on rounding."""
    columns = getattr(module, how.weight).shape[0]
    copied = copied_module(module, type(module)).train(training)
    values = _normal(columns).to(of_weight)
    weight = nn.Parameter(values)
    copied.__dict__["_parameters"] = {how.weight: weight}
    x = (_normal(_ROWS, columns) * _sizes()).to(dtype).requires_grad_()
    got = rms_norm(x, weight, getattr(module, how.eps), how.offset, how.rounds_first)
    grad = _normal(_ROWS, columns).to(got.dtype)
    expected = _computed(copied, [x, weight], grad, got)
    if expected is None:
        return None
    found = torch.autograd.grad(got, [x, weight], grad)
    dtype = dtype if dtype is of_weight else torch.bfloat16  # the wider of the roundings
    # Sums over columns or rows are rounded in float32, and up to four intermediate results to the dtype.
    unit = 4 * torch.finfo(dtype).eps + 4 * columns * torch.finfo(torch.float32).eps
    exact, factor = x.detach().double(), (values.double() + how.offset).abs()
    inverse = torch.rsqrt((exact * exact).mean(-1, keepdim=True) + getattr(module, how.eps))
    scaled = grad.double().abs() * factor * inverse
    of_x = scaled + exact.abs() * inverse**2 * (scaled * exact.abs()).mean(-1, keepdim=True)
    of_factor = (grad.double() * exact * inverse).abs().sum(0)
    sizes = exact.abs() * inverse * factor, of_x, of_factor
    if not _are_near(zip((got, *found), expected, sizes, strict=True), unit):
        return None
    return float((got.detach().double() - expected[0].detach().double()).abs().sum())


def _computed(module: nn.Module, sources: list[Tensor], grad: Tensor, like: Tensor) -> tuple[Tensor, ...] | None:
    """Return a module's output and the gradients of sources; None if it fails, or its output is not like ``like``."""
    try:
        out = type(module).forward(module, sources[0])
        found = torch.autograd.grad(out, sources, grad)
    except Exception:  # noqa: BLE001 - a module that fails on this input computes something else
        return None
    return (out, *found) if type(out) is Tensor and (out.dtype, out.shape) == (like.dtype, like.shape) else None


def _are_near(pairs: Iterable[tuple[Tensor, Tensor, Tensor]], unit: float) -> bool:
    """Whether pairs of tensors differ by at most ``unit`` times a size, elementwise."""
    return all(bool(((a.double() - b.double()).abs() <= unit * size + 1e-30).all()) for a, b, size in pairs)


def _is_function(module: nn.Module) -> bool:
    """Whether a module has no parameters, buffers or children and takes one input; of torch's own, GELU and SiLU."""
    if module._parameters or module._buffers or module._modules:
        return False
    if type(module).__module__.startswith("torch.") and type(module) not in (nn.GELU, nn.SiLU):
        return False
    try:
        taken = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return False
    return len(taken) == 2 and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in taken.values())


def _as_activation(module: nn.Module) -> Act | None:
    """Return which activation a module computes; None, without a reason for the report, for other functions."""
    names = list(ACTIVATIONS)
    for dtype in _DTYPES:
        x = 3 * _normal(_ROWS, 64) * _sizes()
        x[2:].abs_()  # exp of a large negative number's magnitude may overflow in the module, where act(x) is zero
        x = x.to(dtype).requires_grad_()
        grad = _normal(_ROWS, 64).to(dtype)
        computed = _computed(copied_module(module, type(module)).train(), [x], grad, x)
        if computed is None:
            return None
        expected, wanted = computed
        size = (1 + x.detach().double().abs()) ** (1 if dtype is torch.float32 else 2)
        matching = []
        for name in names:
            got = activated(x, name)
            (found,) = torch.autograd.grad(got, x, grad)
            pairs = (got, expected, size), (found, wanted, size * grad.double().abs())
            if _are_near(pairs, 8 * torch.finfo(dtype).eps):  # eight roundings, of numbers near 1 + |x| at most
                matching.append(name)
        names = matching
    return Act(names[0]) if names else None


def _mlp_layers(module: nn.Module) -> list[str] | None:
    """Return a module's linear layers if their shapes (in, out) are (n, m), (n, m), (m, n) or (n, 2m), (m, n), in any
    order, and it has no other parameters and no buffers; else None."""
    layers = {name: child for name, child in module._modules.items() if child is not None and _shape(child)}
    others = [child for name, child in module._modules.items() if child is not None and name not in layers]
    if module._parameters or module._buffers or any((*one.parameters(), *one.buffers()) for one in others):
        return None
    shapes = sorted(_shape(child) for child in layers.values())
    if len(layers) == 3 and any(shapes[i] == shapes[j] == shapes[k][::-1] for i, j, k in ((0, 1, 2), (1, 2, 0))):
        return list(layers)
    if len(layers) == 2:
        (first, second) = (_shape(child) for child in layers.values())
        if any(a == (b[1], 2 * b[0]) for a, b in ((first, second), (second, first))):
            return list(layers)
    return None


def _shape(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, also one of another library; () for other modules."""
    found = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return found if all(isinstance(one, int) for one in found) else ()  # type: ignore[return-value]


def _as_mlp(module: nn.Module, layers: list[str], training: bool) -> GatedMLP | str | None:
    matching: list[GatedMLP] | None = None
    for dtype in _DTYPES:
        ran = _probed(module, layers, dtype, training)
        if ran is None or isinstance(ran, str):
            return ran
        first, down, hidden = ran
        candidates = _candidates(first, down) if matching is None else matching
        matching = [how for how in candidates if _gates(how, first, hidden, dtype)]
        if not matching:
            return f"what it gives to {down} is no act(gate) * up of a known activation: {', '.join(ACTIVATIONS)}"
    if matching and any(is_observed(child) for child in activations(module, matching[0])):
        return "its activation has hooks"
    return matching[0] if matching else None


class _Probe(nn.Module):
    """Replaces a layer: records its input and returns random numbers."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = _shape(layer)
        self.inputs: list[Tensor] = []
        self.out = (2 * _normal(_ROWS, self.out_features) * _sizes()).to(dtype).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self.out


def _probed(
    module: nn.Module, layers: list[str], dtype: torch.dtype, training: bool
) -> tuple[dict[str, _Probe], str, Tensor] | str | None:
    """Run a module with probes in place of its layers; return those that read its input, the last layer and its
    input. A reason: the module does not return the last layer's output; None: its layers are connected in another
    way."""
    reason = None
    copied = copied_module(module, type(module))
    copied.training = training  # not train(), which would change the children, too
    probes = {name: _Probe(module._modules[name], dtype) for name in layers}
    copied._modules.update(probes)
    for name, child in copied._modules.items():
        if name not in probes and child is not None:
            copied._modules[name] = copied_module(child, type(child)).train(training) if not child._modules else child
    for size in dict.fromkeys(probe.in_features for probe in probes.values()):
        x = _normal(_ROWS, size).to(dtype)
        for probe in probes.values():
            probe.inputs.clear()
        try:
            out = type(module).forward(copied, x)
        except Exception:  # noqa: BLE001 - a module that fails on this input is no MLP
            continue
        first = {name: one for name, one in probes.items() if len(one.inputs) == 1 and one.inputs[0] is x}
        last = [name for name in probes if name not in first]
        if len(last) == 1 and len(probes[last[0]].inputs) == 1:
            if out is probes[last[0]].out:
                return first, last[0], probes[last[0]].inputs[0]
            reason = f"it does not return what {last[0]} returns, as with dropout"
    return reason


def _candidates(first: dict[str, _Probe], down: str) -> list[GatedMLP]:
    names = list(first)
    places: list[tuple[str, str | None, bool]] = [(names[0], None, True), (names[0], None, False)]
    if len(names) == 2:
        places = [(names[0], names[1], True), (names[1], names[0], True)]
    return [
        GatedMLP(gate, up, down, activation, gate_first)
        for gate, up, gate_first in places
        for activation in ACTIVATIONS
    ]


def _gates(how: GatedMLP, first: dict[str, _Probe], hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether the last layer's input and its gradients are those of ``act(gate) * up``, within rounding."""
    gate, up = first[how.gate].out, None if how.up is None else first[how.up].out
    sources = [one for one in (gate, up) if one is not None]
    got = gated_product(gate, up, how.activation, how.gate_first)
    if type(hidden) is not Tensor or (hidden.dtype, hidden.shape) != (dtype, got.shape) or not hidden.requires_grad:
        return False
    grad = _normal(*got.shape).to(dtype)
    wanted = torch.autograd.grad(hidden, sources, grad, retain_graph=True, allow_unused=True)
    if any(one is None for one in wanted):
        return False
    found = torch.autograd.grad(got, sources, grad)
    # Up to five roundings, of numbers not larger than (1 + |gate|) * (1 + |up|).
    unit = 5 * torch.finfo(dtype).eps
    exact = [one.detach().double().abs() for one in sources]
    a, b = exact if up is not None else exact[0].chunk(2, -1)
    bound = (1 + a) * (1 + b)
    bounds = [bound] + [(bound * grad.double().abs())] * 2
    if up is None:
        found, wanted = found[0].chunk(2, -1), wanted[0].chunk(2, -1)
    return _are_near(zip((got, *found), (hidden, *wanted), bounds, strict=True), unit)
