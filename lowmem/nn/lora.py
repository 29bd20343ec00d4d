"""Low-rank adaptation: two small matrices train beside a frozen layer.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1. QLoRA
(arXiv 2305.14314) is LoRA over a 4-bit base, and needs no class of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lowmem import kernels
from lowmem.kernels import ops, reference
from lowmem.nn.fourbit import Linear4Bit
from lowmem.nn.frozen_linear import autocast_enabled, is_observed, is_plain_call, refuse_nested
from lowmem.nn.half import HalfLinear
from lowmem.nn.loftq import truncated_svd
from lowmem.nn.stored import StoredTensor
from lowmem.nn.stored_module import StoredModule
from lowmem.quant.quantize import relative_error, requantize
from lowmem.quant.rounding import round_to

__all__ = ["Adapter", "Folded", "LoRA", "LoRALinear"]


_LARGEST_ALPHA = torch.finfo(torch.float32).max  # low-rank products are scaled in float32


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: the model is frozen, and two matrices A and B per layer train (arXiv 2106.09685).

        y = W x + b + s B A x,  s = alpha / rank, or alpha / sqrt(rank) if rank-stabilized

    A pattern is a glob of a layer's paths; the first one that matches wins, and one that matches no adapted layer is
    an error: ``LoRA(8, ranks={"*.q_proj": 32, "*_proj": 16})``.

    Args:
        rank: of ``B A``, at least 1.
        alpha: the numerator of the scaling s; None: the rank, of each layer its own.
        dropout: probability of dropout on the input of A, in [0, 1).
        rank_stabilized: whether to scale by ``alpha / sqrt(rank)``, which keeps the size of gradients at high ranks
            (rsLoRA, arXiv 2312.03732).
        ranks: other ranks by pattern, a mapping or pairs; stored as a tuple of pairs.
        alphas: other alphas by pattern, likewise.
        init: "zero": B starts at zero, so that a fresh adapter changes nothing, bit for bit. "loftq": ``s B A``
            starts as the best approximation of this rank of the base's quantization error, so that base and adapter
            are nearer to the dense weight W than the base alone (LoftQ, arXiv 2310.08659, algorithm 1):

                s B A = SVD_rank(W - dequantize(quantize(W)))

            It needs W, so ``FourBit`` has to be applied by the same ``convert``. One step of LoftQ's alternation is
            taken: the base keeps the bytes that ``FourBit`` alone stores, is the same for every adapter, and stays
            tied. Merging a fresh adapter of this kind changes bytes.

    Raises:
        ValueError: a rank that is not a positive integer, an alpha that is not a positive number that
            float32 can hold, a dropout outside [0, 1), a rank_stabilized that is not a bool, ranks or alphas
            that are not pairs of a pattern and a value, or an unknown init.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    ranks: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alphas: Mapping[str, float | None] | tuple[tuple[str, float | None], ...] = ()
    init: str = "zero"

    def __post_init__(self) -> None:
        for name in ("ranks", "alphas"):  # a dict or a list would not be hashable
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        for rank in (self.rank, *(rank for _, rank in _pairs("ranks", self.ranks))):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank={rank!r} must be a positive integer")
        for alpha in (self.alpha, *(alpha for _, alpha in _pairs("alphas", self.alphas))):
            if alpha is not None and not (_is_number(alpha) and 0 < alpha <= _LARGEST_ALPHA):
                raise ValueError(
                    f"alpha={alpha!r} must be a positive number, at most float32's largest ({_LARGEST_ALPHA:.6g}), "
                    "or None for the rank"
                )
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")
        if not isinstance(self.rank_stabilized, bool):
            raise ValueError(f"rank_stabilized={self.rank_stabilized!r} must be True or False")
        if self.init not in ("zero", "loftq"):
            raise ValueError(f"init={self.init!r} must be 'zero' or 'loftq'")

    @property
    def scaling(self) -> float:
        """The factor s of ``B A x``, at the technique's own rank and alpha."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def at(self, paths: Sequence[str]) -> LoRA:
        """Return the technique of a layer at ``paths``: its rank and alpha, without patterns."""

        def found(patterns: Any, default: Any) -> Any:
            return next((value for p, value in patterns if any(fnmatchcase(path, p) for path in paths)), default)

        rank, alpha = found(self.ranks, self.rank), found(self.alphas, self.alpha)
        return replace(self, rank=rank, alpha=alpha, ranks=(), alphas=())


def _pairs(name: str, given: Any) -> tuple[tuple[str, Any], ...]:
    """Return patterns and values as a tuple of pairs."""
    try:
        pairs = tuple((pattern, value) for pattern, value in (given.items() if isinstance(given, Mapping) else given))
    except (TypeError, ValueError):
        pairs = ((None, None),)
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern, _ in pairs):
        raise ValueError(f"{name}={given!r} must map glob patterns of paths to values, as {{'*.q_proj': 32}}")
    return pairs


class Adapter(nn.Module):
    """The low-rank product of one layer, ``s B A x``: A (rank, in) starts random, B (out, rank) zero.

    A new adapter therefore does not change the output, bit for bit; one with ``init="loftq"`` does.

    Args:
        base: the layer to adapt; its shape, dtype and device are read, and its weight for ``init="loftq"``.
        technique: rank, alpha, dropout, scaling and init; patterns are for ``LoRA.at`` to resolve.
        dense: the weight that a 4-bit base was quantized from, (out, in), for ``init="loftq"``.

    Raises:
        ValueError: ``init="loftq"`` without a 4-bit base or its dense weight.
    """

    weight_count = 0  # an adapter adds no weights to those that its base stores

    def __init__(
        self, base: nn.Linear | HalfLinear | Linear4Bit, technique: LoRA, dense: Tensor | None = None
    ) -> None:
        super().__init__()
        self.technique = technique
        self.rank = technique.rank
        self.scaling = technique.scaling
        self.dropout = nn.Dropout(technique.dropout) if technique.dropout else nn.Identity()
        stored = base.weight
        dtype = stored.dtype if stored.dtype in (torch.float32, torch.float64) else torch.float32
        self.lora_a = nn.Parameter(torch.empty(self.rank, base.in_features, dtype=dtype, device=stored.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, self.rank, dtype=dtype, device=stored.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear initializes its weight
        if technique.init == "loftq":
            if dense is None or not isinstance(base, Linear4Bit):
                raise ValueError(
                    "init='loftq' approximates what 4 bits lose of the dense weight, and needs both: apply it in the "
                    "call that quantizes, convert(model, FourBit(), LoRA(init='loftq')), or use init='zero'"
                )
            self._approximate(dense.detach().to(dtype) - base.quantized.dequantize(dtype))

    @torch.no_grad()
    def _approximate(self, error: Tensor) -> None:
        """Set A and B so that ``s B A`` is near to an error (out, in); their sizes are the same."""
        u, sizes, vt = truncated_svd(error, self.rank)
        count = int((sizes > 0).sum())  # the rest of A stays random, and of B zero: it can train from there
        root = (sizes[:count] / self.scaling).sqrt()
        self.lora_b[:, :count] = u[:, :count] * root
        self.lora_a[:count] = root[:, None] * vt[:count]

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Return ``out + s B A x`` in out's dtype, for out (..., out_features), x (..., in_features)."""
        own, dropout = self._parameters, self._modules["dropout"]  # faster than attributes
        assert dropout is not None
        a, b = own.get("lora_a"), own.get("lora_b")
        if a is None or b is None:  # a parametrization has moved them out
            a, b = self.lora_a, self.lora_b
        x = x if x.dtype is a.dtype else x.to(a.dtype)
        if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)):
            x = dropout(x)
        if x.dim() != 2:
            refuse_nested(x)
        wide = out if out.dim() == 2 else out.reshape(-1, b.shape[0])  # (batch, out)
        rows = x if x.dim() == 2 else x.reshape(-1, a.shape[1])  # (batch, in)
        if autocast_enabled("cpu" if x.is_cpu else x.device.type):  # it would cast the sum with ``out`` to 16 bits
            narrow = nn.functional.linear(rows, a) * self.scaling  # (batch, rank)
            wide = wide + nn.functional.linear(narrow, b).to(out.dtype)
        else:
            add_low_rank = kernels.add_low_rank if is_plain_call(x, out, a, b) else reference.add_low_rank
            wide = add_low_rank(wide, rows, a, b, self.scaling)
        return wide if out.dim() == 2 else wide.view(out.shape)

    def delta(self) -> Tensor:
        """Return ``s B A``, the change of the weight: (out, in), in float32 or wider."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)  # the adapter may have been cast to 16 bits
        return (self.lora_b.detach().to(dtype) * self.scaling) @ self.lora_a.detach().to(dtype)

    def extra_repr(self) -> str:
        """Describe the adapter."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _of_single_adapter(name: str) -> Any:
    def get(layer: LoRALinear) -> Any:
        if len(layer.adapters) != 1:
            raise AttributeError(name)
        return getattr(next(iter(layer.adapters.values())), name)

    return property(get, doc=f"The adapter's ``{name}``, while there is one adapter only.")


class Folded(NamedTuple):
    """A base with adapters merged into its weight, and ``rms(weight - adapted) / rms(adapted)`` of two weights.

    Attributes:
        layer: the copy of the base.
        before: the error of the base's weight, without the adapters.
        after: the error of the weight that the copy stores.
    """

    layer: nn.Module
    before: float
    after: float


class AdaptedWeight(Tensor):
    """The weight of an adapted layer, ``W + sum s B A``, for those who read it and do not call the layer.

    ``F.linear`` computes with it as the layer does. Its shape, dtype and device are known; its values are computed,
    with gradients for A and B, by every other function that takes it, each time.

    Args:
        base: the layer that is adapted.
        adapters: the active ones.
    """

    _layer: nn.Module
    _adapters: list[Adapter]

    @staticmethod
    def __new__(cls, base: Any, adapters: list[Adapter]) -> AdaptedWeight:
        """Make a tensor without values of its own."""
        weight = base.weight
        return torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )

    def __init__(self, base: nn.Module, adapters: list[Adapter]) -> None:
        self._layer, self._adapters = base, adapters
        self._is_param = True

    def values(self) -> Tensor:
        """Return the adapted weight as a dense tensor, differentiable in A and B."""
        weight: Any = self._layer.weight
        total: Tensor = weight.dequantize() if isinstance(weight, StoredTensor) else weight
        for adapter in self._adapters:
            total = total + ((adapter.lora_b * adapter.scaling) @ adapter.lora_a).to(total.dtype)
        return total

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is nn.functional.linear and len(args) > 1 and isinstance(args[1], AdaptedWeight):
            return args[1]._linear(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = lambda one: one.values() if isinstance(one, AdaptedWeight) else one  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return operator(*args, **kwargs)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight: Any = self._layer.weight
        out = nn.functional.linear(x, weight, bias)
        for adapter in self._adapters:
            out = adapter.forward(out, x)
        return out

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, adapters={len(self._adapters)})"


_READS = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "is_leaf",
        "ndim",
        "is_cpu",
        "is_cuda",
        "is_meta",
    )
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.element_size,
    Tensor.__len__,
}


class LoRALinear(nn.Module):
    """``y = base(x) + sum s B A x`` over the active adapters, in the order in which they were added.

    Args:
        base: an nn.Linear, HalfLinear or Linear4Bit.
        technique: rank, alpha, dropout and scaling s of a first adapter, which is active.
        name: of that adapter.
        dense: the weight that a 4-bit base was quantized from, for ``init="loftq"``.

    Attributes:
        adapters: every ``Adapter`` by its name.
        active: the names of the adapters that are applied; the others cost nothing.
        merged: the name of the adapter that is merged into ``merged_base``, or None.
        merged_base: a copy of the base with one adapter merged into its weight, called in place of the base. It is
            left out of the state_dict, and rebuilt when one is loaded.
    """

    merged_base: nn.Module | None
    lora_a = _of_single_adapter("lora_a")
    lora_b = _of_single_adapter("lora_b")
    rank = _of_single_adapter("rank")
    scaling = _of_single_adapter("scaling")

    def __init__(
        self,
        base: nn.Linear | HalfLinear | Linear4Bit,
        technique: LoRA,
        name: str = "default",
        dense: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged: str | None = None
        self.register_module("merged_base", None)
        self._register_state_dict_hook(_drop_merged_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_remerge)  # type: ignore[no-untyped-call]
        self.add(name, Adapter(base, technique, dense))

    @classmethod
    def from_layer(
        cls, layer: nn.Linear | HalfLinear | Linear4Bit, technique: LoRA, dense: Tensor | None = None
    ) -> LoRALinear:
        """Build it over a layer, which becomes its base; ``dense`` is the weight that the layer was made from.

        Raises:
            ValueError: ``init="loftq"`` without a 4-bit base or its dense weight.
        """
        return cls(layer, technique, dense=dense)

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter and activate it."""
        self.adapters[name] = adapter.train(self.training)
        self.active += (name,)

    @property
    def weight(self) -> Any:
        """The weight with the active adapters: an ``AdaptedWeight``, or that of the base where none is active."""
        active = [name for name in self.active if name != self.merged]
        base: Any = self.merged_base or self.base
        return AdaptedWeight(base, [cast(Adapter, self.adapters[name]) for name in active]) if active else base.weight

    @property
    def bias(self) -> Any:
        """The bias of the base."""
        return self.base.bias

    @property
    def in_use(self) -> tuple[str, ...]:
        """The adapters that contribute to the output, active or merged, in the order in which they were added."""
        return tuple(name for name in self.adapters if name in self.active or name == self.merged)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the base's dtype, for input (..., in_features)."""
        active = self.active  # this and the merged base are read once: another thread may change them
        parts: dict[str, Any] = self._modules
        base = parts["merged_base"]
        merged = None if base is None else base.folds
        if base is None:
            base = parts["base"]
        adapters: dict[str, Any] = parts["adapters"]._modules
        if len(active) == 1 and active[0] != merged:
            fused = _fused_forward(base, adapters.get(active[0]), input)
            if fused is not None:
                return fused
        out: Tensor = base(input)
        for name in active:
            adapter = adapters.get(name)  # another thread may have deleted it
            if name != merged and adapter is not None:
                out = adapter.forward(out, input)  # not __call__, for speed
        return out

    def merge(self, name: str, folded: nn.Module) -> None:
        """Use ``folded``, a copy of the base with adapter ``name`` merged into its weight, in place of the base."""
        folded.folds = name  # type: ignore[assignment]  # stored on the copy, so that forward reads both in one access
        self.merged, self.merged_base = name, folded

    def folded(self, names: Iterable[str], to: torch.dtype | None = None) -> Folded:
        """Return a copy of the base with adapters merged into its weight. This layer and its base do not change.

        An adapter whose B is all zero is left out, so that it changes no byte.

        Args:
            names: of the adapters.
            to: the dtype of an nn.Linear to make; None: store the weight as the base does.

        Raises:
            ValueError: the adapted weight is not finite, or exceeds the range of the dtype or scales.
        """
        base = self.base
        own = _weight_of(base)
        adapted = own.dequantize() if isinstance(base, Linear4Bit) else own.detach()
        added = [part for name in names if (part := cast(Adapter, self.adapters[name])).lora_b.any()]
        for adapter in added:
            adapted = adapted + adapter.delta()
        layer: nn.Module
        if to is None and isinstance(base, Linear4Bit):
            quantized = requantize(base.quantized, adapted) if added else base.quantized
            layer = Linear4Bit(quantized, base.bias, base.compute_dtype, base.weight.dtype)
        elif to is None and isinstance(base, HalfLinear):
            rounded = round_to(adapted, own.dtype, "weight")
            layer = HalfLinear(rounded, base._parameters.get("bias_rounded"), base.weight.dtype)
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            trains = base.weight.requires_grad
            dtype = base.weight.dtype if to is None else to
            layer.weight = nn.Parameter(round_to(adapted, dtype, "weight"), requires_grad=trains)
            bias: Any = base.bias
            if isinstance(bias, StoredTensor):
                bias = nn.Parameter(bias.dequantize(to), requires_grad=False)
            elif to is not None and bias is not None:
                bias = nn.Parameter(round_to(bias, to, "bias"), requires_grad=bias.requires_grad)
            layer.register_parameter("bias", bias)
        before, after = (relative_error(adapted, _weight_of(part)) for part in (base, layer))
        return Folded(layer.train(base.training), before, after)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.merged_base = None  # rebuilt by the post hook
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Describe which adapters are active and merged."""
        return f"active={', '.join(self.active) or None}, merged={self.merged}"


def _fused_forward(base: nn.Module | None, adapter: nn.Module | None, x: Tensor) -> Tensor | None:
    """Return the output of base and adapter from one fused product; None where they must be called as modules."""
    weight: kernels.Weight
    if type(base) is Linear4Bit and base.compute_dtype in (None, torch.float32):
        weight = base.quantized
    elif type(base) is HalfLinear:
        found = base._parameters.get("weight_rounded")
        if found is None:  # a parametrization has moved it out
            return None
        weight = found
    else:
        return None
    if type(adapter) is not Adapter:
        return None
    own, bases = adapter.__dict__, base._parameters  # faster than attributes
    key = "bias" if "bias" in bases else "bias_rounded"
    update, dropout = own["_parameters"], own["_modules"]["dropout"]
    a, b = update.get("lora_a"), update.get("lora_b")
    plain = is_plain_call(x, bases.get(key), a, b)
    if (
        a is None
        or b is None
        or key not in bases  # a parametrization has moved it out
        or "forward" in own
        or not (plain or torch.compiler.is_compiling())
        or not (x.dtype is a.dtype is b.dtype is torch.float32 and x.dim() == 2 and not x.is_nested)
        or not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        or autocast_enabled("cpu" if x.is_cpu else x.device.type)
        or is_observed(base)
    ):
        return None
    if plain:
        return kernels.linear(x, weight, torch.float32, bases[key], (a, b, adapter.scaling))
    return ops.product(x, weight, torch.float32, False, bases[key], a, b, adapter.scaling)


def _drop_merged_base(layer: LoRALinear, state: dict[str, Any], prefix: str, _: object) -> None:
    if layer.merged_base is not None:
        for name in layer.merged_base.state_dict():
            del state[f"{prefix}merged_base.{name}"]
        getattr(state, "_metadata", {}).pop(f"{prefix}merged_base", None)


def _remerge(layer: LoRALinear, _: object) -> None:
    if layer.merged is not None:
        name, layer.merged = layer.merged, None  # stays None if the loaded values cannot be merged
        layer.merge(name, layer.folded([name]).layer)


def _weight_of(layer: nn.Module) -> Any:
    return layer.stored_weight() if isinstance(layer, StoredModule) else layer.weight


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
