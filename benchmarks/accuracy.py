"""Whether what was timed is right: each product is held to the float64 one of what is stored.

A bound on a whole model's output lets anything through, as errors grow from layer to layer. That of one product is
Higham's (see ``tests.rounding``): in float32 it shows an output that is wrong by a thousandth.
"""

import torch
from torch import Tensor, nn

from lowmem import LoRALinear
from lowmem.kernels import int8
from lowmem.nn.adapter_bank import parameter_of
from lowmem.nn.coded_module import CodedModule
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor
from tests.rounding import gamma, unit

ROWS = 4  # of a batch are checked: each is a product of its own, and in float64 they take long


def assert_layers_exact(model: nn.Module, x: Tensor) -> None:
    """Run a model, and hold the output of each of its linear layers to the product of that layer's input."""
    layers = {module for module in model.modules() if isinstance(module, nn.Linear)}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda layer, inputs, out: calls.append((layer, inputs[0][:ROWS], out[:ROWS])))
        for layer in layers
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(layers) > 0
    for layer, given, out in calls:
        weight = layer.quantized if isinstance(layer, CodedModule) else parameter_of(layer, "weight").detach()
        if getattr(layer, "compute_dtype", None) is torch.int8:
            factor, weights = int8.round_inputs(given, weight.block_size), [rounded_levels(weight)]
        else:
            factor, weights = given, may_multiply_with(weight, given.dtype)
        assert not isinstance(layer, LoRALinear) or not layer.lora_b.any()  # nothing was trained: the update is zero
        assert_product(out, factor, weights, layer.bias)


def rounded_levels(weight: QuantizedTensor) -> Tensor:
    """Return what products in 8-bit integers multiply with."""
    return weight.restore(slice(None), int8.rounded_levels(get_format(weight.format).levels)[1])


def may_multiply_with(weight: Tensor | QuantizedTensor, dtype: torch.dtype) -> list[Tensor]:
    """Return what a product in a dtype multiplies with: in bfloat16 a processor's instructions decide.

    It is the stored weight, or that rounded, or levels rounded and then multiplied with their scales.
    """
    dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    if dtype == torch.float32:
        return [dense]
    if not isinstance(weight, QuantizedTensor):
        return [dense, dense.to(dtype)]
    levels = torch.tensor(get_format(weight.format).levels).to(dtype).tolist()
    return [dense, dense.to(dtype), weight.restore(slice(None), tuple(levels))]


def assert_product(
    got: Tensor, x: Tensor, weights: list[Tensor], bias: Tensor | None = None, factors: float = 0.0
) -> None:
    """Hold each output to ``x @ W.T + bias`` for one of the weights, added up in float32, rounded to its dtype.

    Args:
        got: (batch, out), in float32 or bfloat16.
        x: (batch, in).
        weights: each (out, in).
        bias: (out,), or None.
        factors: what rounding the factors of a term may change of it, relative to the term.
    """
    x, added = x.double(), torch.zeros(()) if bias is None else bias.detach().double()
    excess = torch.full(got.shape, torch.inf, dtype=torch.float64)
    for weight in weights:
        product = x @ weight.double().t()
        allowed = (factors + gamma(x.shape[1] + 1)) * (x.abs() @ weight.double().t().abs() + added.abs())
        if got.dtype != torch.float32:  # the product is rounded, the bias, and their sum: a hundredth for their own
            allowed += 1.01 * unit(got.dtype) * (product.abs() + added.abs() + (product + added).abs())
        excess = torch.minimum(excess, (got.double() - product - added).abs() - allowed)
    assert (excess <= 0).all(), f"a product is beyond its bound by {float(excess.max()):.3g}"
