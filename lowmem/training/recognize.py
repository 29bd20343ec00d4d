"""Recognizes RMS norms, gated MLPs and activations by what they compute: on random numbers, in float32 and bfloat16,
outputs and gradients must equal those of the fused form within a bound on rounding errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.kernels.rowwise import ACTIVATIONS
from lowmem.nn.calls import is_observed
from lowmem.nn.module_class import copied_module
from lowmem.training.fused import Act, GatedMLP, How, LayerNorm, RMSNorm, activations
from lowmem.training.fused_functions import activated, gated_product, rms_norm

_SIZES = 1.0, 1e-4, 30.0, 1e3
"""Factors of rows of random numbers, in turns: modules may clamp large ones, or treat small ones specially."""

_DTYPES = torch.float32, torch.bfloat16
_SHAPES = {torch.float32: ((4,), (1, 37), (4, 1)), torch.bfloat16: ((4,),)}
"""Rows of the calls in each dtype: modules may treat batches, many tokens or single ones specially. Gradients are
compared in the first call."""

_WEIGHTS = 1.0, 1e3, 1.0  # sizes of a norm's weight in these calls: its output may be clamped

_COUNTS = "numbers of it change from call to call"


def recognize(module: nn.Module, training: bool = True) -> How | str | None:
    """Return how a module can be fused; if it only looks as if it could, the reason; None for any other module.

    ``training`` is the mode in which it will be called, as it may compute something else in the other.
    """
    if type(module) is nn.LayerNorm:
        return LayerNorm() if "forward" not in vars(module) else None
    norm, layers, activation = _norm_parts(module), _mlp_layers(module), _is_function(module)
    if norm is None and layers is None and not activation:
        return None
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed other devices, too
        if activation:
            found: How | str | None = _as_activation(module)
        else:
            found = _as_norm(module, norm, training) if norm is not None else _as_mlp(module, layers or [], training)
    if isinstance(found, RMSNorm | GatedMLP | Act) and "forward" in vars(module):
        return "it has a forward of its own, which another library has put into it"
    return found


def numbers_of(module: nn.Module) -> dict[str, int | float]:
    """Return the attributes of a module that are numbers: one that counts its calls computes something else later."""
    return {name: value for name, value in vars(module).items() if type(value) in (int, float)}


def _norm_parts(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of weight and epsilon if a module has one vector parameter, one epsilon and nothing else."""
    own = {name: one for name, one in module._parameters.items() if one is not None}
    vectors, count = [name for name, one in own.items() if one.dim() == 1], len(own)
    numbers = [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if len(vectors) != 1 or count != 1 or len(numbers) != 1 or module._modules or module._buffers:
        return None
    return vectors[0], numbers[0]


def _as_norm(module: nn.Module, parts: tuple[str, str], training: bool) -> RMSNorm | str:
    copied = copied_module(module, type(module)).train(training)
    candidates = [RMSNorm(*parts, offset, rounds_first) for offset in (0.0, 1.0) for rounds_first in (False, True)]
    errors: dict[RMSNorm, float] = {}
    for dtype in _DTYPES:
        for shape, size in zip(_SHAPES[dtype], _WEIGHTS, strict=False):
            errors = _norm_errors(copied, candidates, (dtype, dtype), shape, size, shape == _SHAPES[dtype][0])
            candidates = list(errors)
    if not candidates:
        return "on random numbers it computes no RMS norm"
    mixing = candidates
    for dtypes in (_DTYPES, _DTYPES[::-1]):
        mixing = list(_norm_errors(copied, mixing, dtypes, (2, 2)))
    if numbers_of(copied) != numbers_of(module):
        return _COUNTS
    how = min(mixing or candidates, key=errors.__getitem__)
    return replace(how, mixes=bool(mixing))


def _norm_errors(
    module: nn.Module,
    candidates: list[RMSNorm],
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    size: float = 1.0,
    gradients: bool = True,
) -> dict[RMSNorm, float]:
    """Return the sum of the output's differences to each fused form that stays within the bound on rounding.

    The module is called once, with random rows of a shape and a random weight of a size, of the two dtypes.
    ``gradients`` says whether these are compared, too.
    """
    if not candidates:
        return {}
    name, eps = candidates[0].weight, getattr(module, candidates[0].eps)
    columns = cast(Tensor, module._parameters[name]).shape[0]
    values = (size * _normal(columns)).to(dtypes[1])
    weight = nn.Parameter(values)
    module.__dict__["_parameters"] = {name: weight}
    x = _rows(shape, columns).to(dtypes[0]).requires_grad_()
    computed = _computed(module, [x, weight], gradients)
    if computed is None:
        return {}
    grad, *expected = computed
    dtype = dtypes[0] if dtypes[0] is dtypes[1] else torch.bfloat16  # the wider of the roundings
    # Sums over columns or rows are rounded in float32, and up to four intermediate results to the dtype.
    unit = 4 * torch.finfo(dtype).eps + 4 * columns * torch.finfo(torch.float32).eps
    exact = x.detach().double().flatten(0, -2)
    inverse, wide = torch.rsqrt((exact * exact).mean(-1, keepdim=True) + eps), grad.double().flatten(0, -2)
    of_factor = (wide * exact * inverse).abs().sum(0)
    found: dict[RMSNorm, float] = {}
    for how in candidates:
        got = rms_norm(x, weight, eps, how.offset, how.rounds_first)
        if (got.dtype, got.shape) != (expected[0].dtype, expected[0].shape):
            continue
        factor = (values.double() + how.offset).abs()
        scaled = wide.abs() * factor * inverse
        of_x = scaled + exact.abs() * inverse**2 * (scaled * exact.abs()).mean(-1, keepdim=True)
        sizes = [one.view(x.shape) for one in (exact.abs() * inverse * factor, of_x)]
        results = got, *(torch.autograd.grad(got, [x, weight], grad) if gradients else ())
        if _are_near(zip(results, expected, (*sizes, of_factor)[: len(results)], strict=True), unit):
            found[how] = float((got.detach().double() - expected[0].detach().double()).abs().sum())
    return found


def _rows(shape: tuple[int, ...], columns: int) -> Tensor:
    """Return random numbers (*shape, columns), whose rows have ``_SIZES`` in turns."""
    rows = math.prod(shape)
    sized = _normal(len(_SIZES), columns) * torch.tensor(_SIZES, dtype=torch.float32, device="cpu").unsqueeze(1)
    return sized.repeat(-(-rows // len(sized)), 1)[:rows].view(*shape, columns)  # a long text need not be all random


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")


def _computed(module: nn.Module, sources: list[Tensor], gradients: bool) -> tuple[Tensor, ...] | None:
    """Return a random gradient of a module's output, the output and, if asked, the gradients of sources; None if the
    module fails."""
    try:
        out = type(module).forward(module, sources[0])
        grad = _normal(*out.shape).to(out.dtype)
        found = torch.autograd.grad(out, sources, grad) if gradients else ()
    except Exception:  # noqa: BLE001 - a module that fails on this input computes something else
        return None
    return (grad, out, *found) if type(out) is Tensor else None


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
    names, copied = list(ACTIVATIONS), copied_module(module, type(module)).train()
    for dtype, shape in ((one, shape) for one in _DTYPES for shape in _SHAPES[one]):
        x = 3 * _rows(shape, 64)
        x.view(-1, 64)[2:].abs_()  # exp of a large negative number's magnitude may overflow, where act(x) is zero
        x = x.to(dtype).requires_grad_()
        computed = _computed(copied, [x], True)
        if computed is None or (computed[1].dtype, computed[1].shape) != (x.dtype, x.shape):
            return None
        grad, expected, wanted = computed
        size = (1 + x.detach().double().abs()) ** (1 if dtype is torch.float32 else 2)
        matching = []
        for name in names:
            got = activated(x, name)
            (found,) = torch.autograd.grad(got, x, grad)
            pairs = (got, expected, size), (found, wanted, size * grad.double().abs())
            if _are_near(pairs, 8 * torch.finfo(dtype).eps):  # eight roundings, of numbers near 1 + |x| at most
                matching.append(name)
        names = matching
    return Act(names[0]) if names and numbers_of(copied) == numbers_of(module) else None


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
        for number, ran in enumerate(_probed(module, layers, dtype, training)):
            if ran is None or isinstance(ran, str):
                return ran
            first, down, hidden = ran
            candidates = _candidates(first, down) if matching is None else matching
            given = first, hidden, dtype, number == 0
            matching = [how for how in candidates if how.down == down and _gates(how, *given)]
            if not matching:
                return f"what it gives to {down} is no act(gate) * up of a known activation: {', '.join(ACTIVATIONS)}"
    if matching and any(is_observed(child) for child in activations(module, matching[0])):
        return "its activation has hooks"
    return matching[0] if matching else None


class _Probe(nn.Module):
    """Replaces a layer: records its input and returns random numbers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = _shape(layer)

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Forget earlier inputs; return rows of a shape from now on."""
        self.inputs: list[Tensor] = []
        self.out = (2 * _rows(shape, self.out_features)).to(dtype).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self.out


def _probed(
    module: nn.Module, layers: list[str], dtype: torch.dtype, training: bool
) -> Iterator[tuple[dict[str, _Probe], str, Tensor] | str | None]:
    """Call a module with probes in place of its layers, once for each shape, and yield those that read its input, the
    last layer and its input. A reason: the module does not return the last layer's output, or it counts its calls;
    None: its layers are connected in another way."""
    copied = copied_module(module, type(module))
    copied.training = training  # not train(), which would change the children, too
    probes = {name: _Probe(module._modules[name]) for name in layers}
    copied._modules.update(probes)
    for name, child in copied._modules.items():
        if name not in probes and child is not None:
            copied._modules[name] = copied_module(child, type(child)).train(training) if not child._modules else child
    others = [name for name, child in copied._modules.items() if name not in probes and child is not None]
    before = [numbers_of(module), *(numbers_of(cast(nn.Module, module._modules[name])) for name in others)]
    for shape in _SHAPES[dtype]:
        yield _probed_call(copied, probes, shape, dtype)
    if before != [numbers_of(copied), *(numbers_of(cast(nn.Module, copied._modules[name])) for name in others)]:
        yield _COUNTS


def _probed_call(
    copied: nn.Module, probes: dict[str, _Probe], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[str, _Probe], str, Tensor] | str | None:
    """Call a module with rows of a shape; return what ``_probed`` yields."""
    reason = None
    for size in dict.fromkeys(probe.in_features for probe in probes.values()):
        x = _normal(*shape, size).to(dtype)
        for probe in probes.values():
            probe.begin(shape, dtype)
        try:
            out = type(copied).forward(copied, x)
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


def _gates(how: GatedMLP, first: dict[str, _Probe], hidden: Tensor, dtype: torch.dtype, gradients: bool) -> bool:
    """Whether the last layer's input and, if asked, its gradients are of ``act(gate) * up``, within rounding."""
    gate, up = first[how.gate].out, None if how.up is None else first[how.up].out
    sources = [one for one in (gate, up) if one is not None]
    got = gated_product(gate, up, how.activation, how.gate_first)
    if type(hidden) is not Tensor or (hidden.dtype, hidden.shape) != (dtype, got.shape) or not hidden.requires_grad:
        return False
    # Up to five roundings, of numbers not larger than (1 + |gate|) * (1 + |up|).
    unit = 5 * torch.finfo(dtype).eps
    exact = [one.detach().double().abs() for one in sources]
    a, b = exact if up is not None else exact[0].chunk(2, -1)
    bound = (1 + a) * (1 + b)
    near = _are_near([(got, hidden, bound)], unit)
    if not (near and gradients):
        return near
    grad = _normal(*got.shape).to(dtype)
    wanted = torch.autograd.grad(hidden, sources, grad, retain_graph=True, allow_unused=True)
    if any(one is None for one in wanted):
        return False
    found = torch.autograd.grad(got, sources, grad)
    if up is None:
        found, wanted = found[0].chunk(2, -1), wanted[0].chunk(2, -1)
    return _are_near(zip(found, wanted, [bound * grad.double().abs()] * 2, strict=True), unit)
