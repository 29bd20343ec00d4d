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

from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS
from lowmem.nn.call_context import has_customized_call
from lowmem.nn.module_class import hookless_shallow_copy
from lowmem.training.fused import (
    Act,
    FusionSpec,
    GatedMLPSpec,
    LayerNormSpec,
    RMSNormSpec,
    mlp_children_except_linears,
)
from lowmem.training.fused_functions import gated_product, recomputable_activation, recomputable_rms_norm

_SIZES = 1.0, 1e-4, 30.0, 1e3
"""Factors of rows of random numbers, in turns: modules may clamp large ones, or treat small ones specially."""

_DTYPES = torch.float32, torch.bfloat16
_SHAPES = {torch.float32: ((4,), (1, 37), (4, 1)), torch.bfloat16: ((4,),)}
"""Rows of the calls in each dtype: modules may treat batches, many tokens or single ones specially. Gradients are
compared in the first call."""

# Sizes of a norm's weight in these calls: its output may be clamped
_WEIGHTS = 1.0, 1e3, 1.0

_COUNTS = "numbers of it change from call to call"


def probe_fusion_spec_or_reason(module: nn.Module, training: bool = True) -> FusionSpec | str | None:
    """Return how a module can be fused; if it only looks as if it could, the reason; None for any other module.

    ``training`` is the mode in which it will be called, as it may compute something else in the other.
    """
    if type(module) is nn.LayerNorm:
        return LayerNormSpec() if "forward" not in vars(module) else None
    norm, layers, activation = (
        _norm_weight_and_eps_names_or_none(module),
        _mlp_linear_names_or_none(module),
        _is_activation_candidate(module),
    )
    if norm is None and layers is None and not activation:
        return None
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        # torch.manual_seed would seed other devices, too
        torch.default_generator.manual_seed(0)
        if activation:
            result: FusionSpec | str | None = _probe_activation_spec_or_none(module)
        else:
            result = (
                _probe_rms_norm_spec_or_reason(module, norm, training)
                if norm is not None
                else _probe_gated_mlp_spec_or_reason(module, layers or [], training)
            )
    if isinstance(result, RMSNormSpec | GatedMLPSpec | Act) and "forward" in vars(module):
        return "it has a forward of its own, which another library has put into it"
    return result


def numeric_attributes(module: nn.Module) -> dict[str, int | float]:
    """Return the attributes of a module that are numbers: one that counts its calls computes something else later."""
    return {name: value for name, value in vars(module).items() if type(value) in (int, float)}


def _norm_weight_and_eps_names_or_none(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of weight and epsilon if a module has one vector parameter, one epsilon and nothing else."""
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    vectors, count = [name for name, parameter in parameters.items() if parameter.dim() == 1], len(parameters)
    numbers = [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if len(vectors) != 1 or count != 1 or len(numbers) != 1 or module._modules or module._buffers:
        return None
    return vectors[0], numbers[0]


def _probe_rms_norm_spec_or_reason(
    module: nn.Module, weight_and_eps_names: tuple[str, str], training: bool
) -> RMSNormSpec | str:
    copied = hookless_shallow_copy(module, type(module)).train(training)
    candidates = [
        RMSNormSpec(*weight_and_eps_names, offset, rounds_first)
        for offset in (0.0, 1.0)
        for rounds_first in (False, True)
    ]
    errors: dict[RMSNormSpec, float] = {}
    for dtype in _DTYPES:
        for shape, size in zip(_SHAPES[dtype], _WEIGHTS, strict=False):
            errors = _error_by_matching_norm_spec(
                copied, candidates, (dtype, dtype), shape, size, shape == _SHAPES[dtype][0]
            )
            candidates = list(errors)
    if not candidates:
        return "on random numbers it computes no RMS norm"
    mixing = candidates
    for dtypes in (_DTYPES, _DTYPES[::-1]):
        mixing = list(_error_by_matching_norm_spec(copied, mixing, dtypes, (2, 2)))
    if numeric_attributes(copied) != numeric_attributes(module):
        return _COUNTS
    how = min(mixing or candidates, key=errors.__getitem__)
    return replace(how, mixes=bool(mixing))


def _error_by_matching_norm_spec(
    module_copy: nn.Module,
    candidates: list[RMSNormSpec],
    dtypes: tuple[torch.dtype, torch.dtype],
    batch_shape: tuple[int, ...],
    weight_scale: float = 1.0,
    compare_gradients: bool = True,
) -> dict[RMSNormSpec, float]:
    """Return the sum of the output's differences to each fused form that stays within the bound on rounding.

    The module is called once, with random rows of a shape and a random weight of a size, of the two dtypes.
    ``compare_gradients`` says whether these are compared, too.
    """
    if not candidates:
        return {}
    name, eps = candidates[0].weight, getattr(module_copy, candidates[0].eps)
    columns = cast(Tensor, module_copy._parameters[name]).shape[0]
    values = (weight_scale * _random_normal(columns)).to(dtypes[1])
    weight = nn.Parameter(values)
    module_copy.__dict__["_parameters"] = {name: weight}
    x = _random_rows_of_mixed_scale(batch_shape, columns).to(dtypes[0]).requires_grad_()
    computed = _run_forward_backward_or_none(module_copy, [x, weight], compare_gradients)
    if computed is None:
        return {}
    grad, *expected = computed
    # The wider of the roundings
    dtype = dtypes[0] if dtypes[0] is dtypes[1] else torch.bfloat16
    # Sums over columns or rows are rounded in float32, and up to four intermediate results to the dtype.
    unit = 4 * torch.finfo(dtype).eps + 4 * columns * torch.finfo(torch.float32).eps
    exact = x.detach().double().flatten(0, -2)
    inverse, wide = torch.rsqrt((exact * exact).mean(-1, keepdim=True) + eps), grad.double().flatten(0, -2)
    of_factor = (wide * exact * inverse).abs().sum(0)
    errors: dict[RMSNormSpec, float] = {}
    for how in candidates:
        got = recomputable_rms_norm(x, weight, eps, how.offset, how.rounds_first)
        if (got.dtype, got.shape) != (expected[0].dtype, expected[0].shape):
            continue
        factor = (values.double() + how.offset).abs()
        scaled = wide.abs() * factor * inverse
        of_x = scaled + exact.abs() * inverse**2 * (scaled * exact.abs()).mean(-1, keepdim=True)
        sizes = [magnitude.view(x.shape) for magnitude in (exact.abs() * inverse * factor, of_x)]
        results = got, *(torch.autograd.grad(got, [x, weight], grad) if compare_gradients else ())
        if _are_all_close(zip(results, expected, (*sizes, of_factor)[: len(results)], strict=True), unit):
            errors[how] = float((got.detach().double() - expected[0].detach().double()).abs().sum())
    return errors


def _random_rows_of_mixed_scale(batch_shape: tuple[int, ...], columns: int) -> Tensor:
    """Return random numbers (*shape, columns), whose rows have ``_SIZES`` in turns."""
    rows = math.prod(batch_shape)
    sized = _random_normal(len(_SIZES), columns) * torch.tensor(_SIZES, dtype=torch.float32, device="cpu").unsqueeze(
        1
    )
    return sized.repeat(-(-rows // len(sized)), 1)[:rows].view(
        *batch_shape, columns
    )  # a long text need not be all random


def _random_normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")


def _run_forward_backward_or_none(
    module: nn.Module, sources: list[Tensor], with_gradients: bool
) -> tuple[Tensor, ...] | None:
    """Return a random gradient of a module's output, the output and, if asked, the gradients of sources; None if the
    module fails."""
    try:
        out = type(module).forward(module, sources[0])
        grad = _random_normal(*out.shape).to(out.dtype)
        grads = torch.autograd.grad(out, sources, grad) if with_gradients else ()
    except Exception:  # noqa: BLE001 - a module that fails on this input computes something else
        return None
    return (grad, out, *grads) if type(out) is Tensor else None


def _are_all_close(actual_expected_scale: Iterable[tuple[Tensor, Tensor, Tensor]], tolerance: float) -> bool:
    """Whether pairs of tensors differ by at most ``tolerance`` times a size, elementwise."""
    return all(
        bool(((a.double() - b.double()).abs() <= tolerance * size + 1e-30).all())
        for a, b, size in actual_expected_scale
    )


def _is_activation_candidate(module: nn.Module) -> bool:
    """Whether a module has no parameters, buffers or children and takes one input; of torch's own, GELU and SiLU."""
    if module._parameters or module._buffers or module._modules:
        return False
    if type(module).__module__.startswith("torch.") and type(module) not in (nn.GELU, nn.SiLU):
        return False
    try:
        taken = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return False
    return len(taken) == 2 and all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in taken.values())


def _probe_activation_spec_or_none(module: nn.Module) -> Act | None:
    """Return which activation a module computes; None, without a reason for the report, for other functions."""
    names, copied = list(ACTIVATIONS), hookless_shallow_copy(module, type(module)).train()
    for dtype, shape in ((tested_dtype, shape) for tested_dtype in _DTYPES for shape in _SHAPES[tested_dtype]):
        x = 3 * _random_rows_of_mixed_scale(shape, 64)
        # Exp of a large negative number's magnitude may overflow, where act(x) is zero
        x.view(-1, 64)[2:].abs_()
        x = x.to(dtype).requires_grad_()
        computed = _run_forward_backward_or_none(copied, [x], True)
        if computed is None or (computed[1].dtype, computed[1].shape) != (x.dtype, x.shape):
            return None
        grad, expected, wanted = computed
        matching = []
        for name in names:
            degree = max(ACTIVATIONS[name].degree, 1 if dtype is torch.float32 else 2)
            size = (1 + x.detach().double().abs()) ** degree
            got = recomputable_activation(x, name)
            (gradient,) = torch.autograd.grad(got, x, grad)
            pairs = (got, expected, size), (gradient, wanted, size * grad.double().abs())
            # Eight roundings, of numbers near (1 + |x|)^degree at most
            if _are_all_close(pairs, 8 * torch.finfo(dtype).eps):
                matching.append(name)
        names = matching
    return Act(names[0]) if names and numeric_attributes(copied) == numeric_attributes(module) else None


def _mlp_linear_names_or_none(module: nn.Module) -> list[str] | None:
    """Return a module's linear layers if their shapes (in, out) are (n, m), (n, m), (m, n) or (n, 2m), (m, n), in any
    order, and it has no other parameters and no buffers; else None."""
    layers = {
        name: child
        for name, child in module._modules.items()
        if child is not None and _in_out_features_or_empty(child)
    }
    others = [child for name, child in module._modules.items() if child is not None and name not in layers]
    if module._parameters or module._buffers or any((*other.parameters(), *other.buffers()) for other in others):
        return None
    shapes = sorted(_in_out_features_or_empty(child) for child in layers.values())
    if len(layers) == 3 and any(shapes[i] == shapes[j] == shapes[k][::-1] for i, j, k in ((0, 1, 2), (1, 2, 0))):
        return list(layers)
    if len(layers) == 2:
        (first, second) = (_in_out_features_or_empty(child) for child in layers.values())
        if any(a == (b[1], 2 * b[0]) for a, b in ((first, second), (second, first))):
            return list(layers)
    return None


def _in_out_features_or_empty(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, also one of another library; () for other modules."""
    features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return features if all(isinstance(size, int) for size in features) else ()  # type: ignore[return-value]


def _probe_gated_mlp_spec_or_reason(
    module: nn.Module, layer_names: list[str], training: bool
) -> GatedMLPSpec | str | None:
    matching: list[GatedMLPSpec] | None = None
    for dtype in _DTYPES:
        for number, ran in enumerate(_iterate_probed_calls(module, layer_names, dtype, training)):
            if ran is None or isinstance(ran, str):
                return ran
            first, down, hidden = ran
            candidates = _gated_mlp_candidates(first, down) if matching is None else matching
            product_args = first, hidden, dtype, number == 0
            matching = [how for how in candidates if how.down == down and _is_gated_product(how, *product_args)]
            if not matching:
                return f"what it gives to {down} is no act(gate) * up of a known activation: {', '.join(ACTIVATIONS)}"
    if matching and any(has_customized_call(child) for child in mlp_children_except_linears(module, matching[0])):
        return "its activation has hooks"
    return matching[0] if matching else None


class _InputRecordingProbe(nn.Module):
    """Replaces a layer: records its input and returns random numbers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = _in_out_features_or_empty(layer)

    def reset_inputs_and_randomize_output(self, batch_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Forget earlier inputs; return rows of a shape from now on."""
        self.inputs: list[Tensor] = []
        self.out = (2 * _random_rows_of_mixed_scale(batch_shape, self.out_features)).to(dtype).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self.out


def _iterate_probed_calls(
    module: nn.Module, layer_names: list[str], dtype: torch.dtype, training: bool
) -> Iterator[tuple[dict[str, _InputRecordingProbe], str, Tensor] | str | None]:
    """Call a module with probes in place of its layers, once for each shape, and yield those that read its input, the
    last layer and its input. A reason: the module does not return the last layer's output, or it counts its calls;
    None: its layers are connected in another way."""
    copied = hookless_shallow_copy(module, type(module))
    # Not train(), which would change the children, too
    copied.training = training
    probes = {name: _InputRecordingProbe(module._modules[name]) for name in layer_names}
    copied._modules.update(probes)
    for name, child in copied._modules.items():
        if name not in probes and child is not None:
            copied._modules[name] = (
                hookless_shallow_copy(child, type(child)).train(training) if not child._modules else child
            )
    others = [name for name, child in copied._modules.items() if name not in probes and child is not None]
    before = [
        numeric_attributes(module),
        *(numeric_attributes(cast(nn.Module, module._modules[name])) for name in others),
    ]
    for shape in _SHAPES[dtype]:
        yield _probe_connections_or_reason(copied, probes, shape, dtype)
    if before != [
        numeric_attributes(copied),
        *(numeric_attributes(cast(nn.Module, copied._modules[name])) for name in others),
    ]:
        yield _COUNTS


def _probe_connections_or_reason(
    module_copy: nn.Module, probes: dict[str, _InputRecordingProbe], batch_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[str, _InputRecordingProbe], str, Tensor] | str | None:
    """Call a module with rows of a shape; return what ``_iterate_probed_calls`` yields."""
    reason = None
    for size in dict.fromkeys(probe.in_features for probe in probes.values()):
        x = _random_normal(*batch_shape, size).to(dtype)
        for probe in probes.values():
            probe.reset_inputs_and_randomize_output(batch_shape, dtype)
        try:
            out = type(module_copy).forward(module_copy, x)
        except Exception:  # noqa: BLE001 - a module that fails on this input is no MLP
            continue
        first = {
            name: candidate
            for name, candidate in probes.items()
            if len(candidate.inputs) == 1 and candidate.inputs[0] is x
        }
        last = [name for name in probes if name not in first]
        if len(last) == 1 and len(probes[last[0]].inputs) == 1:
            if out is probes[last[0]].out:
                return first, last[0], probes[last[0]].inputs[0]
            reason = f"it does not return what {last[0]} returns, as with dropout"
    return reason


def _gated_mlp_candidates(input_probes: dict[str, _InputRecordingProbe], down_name: str) -> list[GatedMLPSpec]:
    names = list(input_probes)
    places: list[tuple[str, str | None, bool]] = [(names[0], None, True), (names[0], None, False)]
    if len(names) == 2:
        places = [(names[0], names[1], True), (names[1], names[0], True)]
    return [
        GatedMLPSpec(gate, up, down_name, activation, gate_first)
        for gate, up, gate_first in places
        for activation in ACTIVATIONS
    ]


def _is_gated_product(
    spec: GatedMLPSpec,
    input_probes: dict[str, _InputRecordingProbe],
    hidden: Tensor,
    dtype: torch.dtype,
    compare_gradients: bool,
) -> bool:
    """Whether the last layer's input and, if asked, its gradients are of ``act(gate) * up``, within rounding."""
    gate, up = input_probes[spec.gate].out, None if spec.up is None else input_probes[spec.up].out
    sources = [tensor for tensor in (gate, up) if tensor is not None]
    got = gated_product(gate, up, spec.activation, spec.gate_first)
    if type(hidden) is not Tensor or (hidden.dtype, hidden.shape) != (dtype, got.shape) or not hidden.requires_grad:
        return False
    # Up to five roundings, of numbers not larger than (1 + |gate|)^degree * (1 + |up|).
    unit = 5 * torch.finfo(dtype).eps
    exact = [tensor.detach().double().abs() for tensor in sources]
    a, b = exact if up is not None else exact[0].chunk(2, -1)
    bound = (1 + a) ** ACTIVATIONS[spec.activation].degree * (1 + b)
    near = _are_all_close([(got, hidden, bound)], unit)
    if not (near and compare_gradients):
        return near
    grad = _random_normal(*got.shape).to(dtype)
    wanted = torch.autograd.grad(hidden, sources, grad, retain_graph=True, allow_unused=True)
    if any(tensor is None for tensor in wanted):
        return False
    grads = torch.autograd.grad(got, sources, grad)
    if up is None:
        grads, wanted = grads[0].chunk(2, -1), wanted[0].chunk(2, -1)
    return _are_all_close(zip(grads, wanted, [bound * grad.double().abs()] * 2, strict=True), unit)
