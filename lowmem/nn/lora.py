"""A linear layer with adapters: two thin matrices train beside a frozen layer.

QLoRA (arXiv 2305.14314) is this layer with a 4-bit base. Other modules get adapters from
``lowmem.nn.adapted_module``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.nn.adapted_weight import adapted_weight
from lowmem.nn.adapter import Adapter, LoRA
from lowmem.nn.adapter_autograd import adapted_product
from lowmem.nn.eightbit import Linear8Bit
from lowmem.nn.fourbit import Linear4Bit
from lowmem.nn.frozen_linear import autocast_enabled, is_observed, is_plain_call, recorded_call
from lowmem.nn.gathered_linear import GatheredLinear4Bit, gathered_copy
from lowmem.nn.half import HalfLinear
from lowmem.nn.stored import StoredTensor
from lowmem.nn.stored_module import StoredModule, kept_weight
from lowmem.quant.quantize import relative_error, requantize
from lowmem.quant.rounding import round_to

__all__ = ["Adapter", "Folded", "LoRA", "LoRALinear", "refuse_script"]


def _of_single_adapter(name: str) -> Any:
    def get(layer: LoRALinear) -> Any:
        if len(layer.adapters) != 1:
            raise AttributeError(name)
        return getattr(next(iter(layer.adapters.values())), name)

    return property(get, doc=f"The adapter's ``{name}``, if there is exactly one adapter.")


class Folded(NamedTuple):
    """A module with adapters merged into its weights, and the errors of these weights.

    Attributes:
        layer: the copy of the base, with the adapters merged.
        errors: for each adapted parameter, ``rms(weight - adapted) / rms(adapted)``, first for the base's weight
            (without adapters), then for the weight that the copy stores. ``adapted`` is their exact sum.
    """

    layer: nn.Module
    errors: Mapping[str, tuple[float, float]]

    @property
    def before(self) -> float:
        """The largest error of the base's weights."""
        return max(before for before, _ in self.errors.values())

    @property
    def after(self) -> float:
        """The largest error of the weights that the copy stores."""
        return max(after for _, after in self.errors.values())


class LoRALinear(nn.Module):
    """``y = base(x) + sum s B A x`` over the active adapters, in the order of ``active``.

    Args:
        base: an nn.Linear, HalfLinear, Linear4Bit or Linear8Bit.
        technique: rank, alpha, dropout and init of a first adapter, which is active.
        name: of that adapter.
        dense: the weight that a 4- or 8-bit base was quantized from, for ``init="loftq"``.

    Attributes:
        adapters: every ``Adapter`` by its name.
        active: names of the adapters that are applied; the others cost no time.
        merged: name of the adapter that is merged into ``merged_base``, or None.
        merged_base: a copy of the base with one adapter merged into its weight, called in place of the base. It is
            not in the state_dict, and is rebuilt when one is loaded.

    Raises:
        ValueError: ``init="loftq"`` without a 4- or 8-bit base or its dense weight.
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
        """Build it over a layer, which becomes its base; arguments and errors are those of the class."""
        return cls(layer, technique, dense=dense)

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter and activate it."""
        self.adapters[name] = adapter.train(self.training)
        self.active += (name,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(self.adapters)

    def parts(self, name: str) -> dict[str, Adapter]:
        """Return ``{"weight": adapter}`` for the adapter of a name; {} for an unknown name."""
        return {"weight": cast(Adapter, self.adapters[name])} if name in self.adapters else {}

    def add_parts(self, name: str, parts: Mapping[str, Adapter]) -> None:
        """Add the adapter ``parts["weight"]`` and activate it."""
        self.add(name, parts["weight"])

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        self.active = tuple(other for other in self.active if other != name)
        del self.adapters[name]

    def unmerge(self) -> None:
        """Call the base again."""
        self.merged = self.merged_base = None

    @property
    def weight(self) -> Any:
        """The weight with the active adapters: an ``AdaptedWeight``; the base's own weight if none is active."""
        active = [name for name in self.active if name != self.merged]
        base: Any = self.merged_base or self.base
        if not active:
            return base.weight
        adapters = [cast(Adapter, self.adapters[name]) for name in active]
        return adapted_weight(base.weight, [one.update() for one in adapters], adapters[0].layout)

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
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        active = self.active  # read this and the merged base only once: another thread may change them
        parts: dict[str, Any] = self._modules
        base = parts["merged_base"]
        merged = None if base is None else base.folds
        if base is None:
            base = parts["base"]
        adapters: dict[str, Any] = parts["adapters"]._modules
        if len(active) == 1 and active[0] != merged:
            fused = _fused_forward(base, adapters.get(active[0]), input)
            if fused is None and (self.training or torch.is_grad_enabled()):
                fused = adapted_product(base, adapters.get(active[0]), input)
            if fused is not None:
                return fused
        out: Tensor = base(input)
        for name in active:
            adapter = adapters.get(name)  # None if another thread has deleted it
            if name != merged and adapter is not None:
                out = adapter.forward(out, input)  # not __call__, for speed
        return out

    def merge(self, name: str, folded: nn.Module) -> None:
        """Use ``folded``, a copy of the base with adapter ``name`` merged into its weight, in place of the base."""
        folded.folds = name  # type: ignore[assignment]  # stored on the copy, so that forward reads both in one access
        self.merged, self.merged_base = name, folded

    def folded(self, names: Iterable[str], to: torch.dtype | None = None) -> Folded:
        """Return a copy of the base with adapters merged into its weight. This layer and its base do not change.

        Adapters whose A or B is all zero are left out; if all are, the weight keeps its bytes.

        Args:
            names: of the adapters to merge.
            to: dtype of a dense nn.Linear; None: the weight is stored in the same form as in the base.

        Raises:
            ValueError: the adapted weight is not finite, or exceeds the range of the dtype or scales.
        """
        base = self.base
        own = _weight_of(base)
        adapted = own.dequantize() if isinstance(base, Linear4Bit) else own.detach()
        added = [part for name in names if not (part := cast(Adapter, self.adapters[name])).changes_nothing()]
        order = base.weight_order if isinstance(base, GatheredLinear4Bit) else None
        for adapter in added:
            adapted = adapted + (adapter.delta() if order is None else adapter.delta().index_select(1, order))
        before = relative_error(adapted, own)
        layer: nn.Module
        if to is None and isinstance(base, Linear4Bit):
            quantized = requantize(base.quantized, adapted) if added else base.quantized
            kind = Linear8Bit if isinstance(base, Linear8Bit) else Linear4Bit
            layer = made = kind(quantized, base.bias, base.compute_dtype, base.weight.dtype)
            layer = made if order is None else gathered_copy(made, order)
        elif to is None and isinstance(base, HalfLinear):
            rounded = round_to(adapted, own.dtype, "weight")
            layer = HalfLinear(rounded, base._parameters.get("bias_rounded"), base.weight.dtype)
        else:
            adapted = adapted if order is None else adapted.index_select(1, order.argsort())
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
        after = relative_error(adapted, _weight_of(layer))
        return Folded(layer.train(base.training), {"weight": (before, after)})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)
            return
        if self.merged is not None:  # its copy would keep the old values
            raise ValueError(
                f"{name} cannot be set while adapter {self.merged!r} is merged: call unmerge_adapter(model) first"
            )
        value = getattr(value, "unadapted", value)
        if not (value is None or isinstance(value, (nn.Parameter, StoredTensor))):
            raise TypeError(
                f"cannot assign {type(value).__name__} as parameter {name!r} of a layer with adapters: give a "
                f"torch.nn.Parameter, or None; functional_call takes another value under the name base.{name}"
            )
        setattr(self.base, name, value)  # as tie_weights() of transformers does

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.merged_base = None  # rebuilt by the post hook
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Describe which adapters are active and merged."""
        return f"active={', '.join(self.active) or None}, merged={self.merged}"


def _fused_forward(base: nn.Module | None, adapter: nn.Module | None, x: Tensor) -> Tensor | None:
    """Return the output of base and adapter from one fused kernel; None if they must be called separately."""
    if type(base) is Linear4Bit or type(base) is Linear8Bit:
        if base.compute_dtype is not None and base.compute_dtype is not torch.float32:
            return None
    elif type(base) is not HalfLinear:
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
    if type(base) is HalfLinear:
        weight: Any = bases.get("weight_rounded")
        if weight is None:  # a parametrization has moved it out
            return None
    else:
        linear = cast(Linear4Bit, base)
        weight = (kept_weight(linear) if plain else None) or linear.quantized  # kept_weight is faster
    if plain:
        return kernels.linear(x, weight, torch.float32, bases[key], (a, b, adapter.scaling))
    return ops.product(x, weight, torch.float32, False, bases[key], a, b, adapter.scaling)


def refuse_script(module: nn.Module) -> NoReturn:
    """Refuse torch.jit.script, which calls ``__prepare_scriptable__`` before it compiles a module's code.

    Raises:
        RuntimeError: always; the remedy is named.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(module).__name__} with adapters: take torch.jit.trace, "
        "torch.compile or torch.export, or merge the adapters to a dtype before: "
        "model = lowmem.merge(model, torch.float32)"
    )


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
