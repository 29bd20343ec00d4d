"""Modules with parameters in 4 or 8 bits, whose state_dict names the formats."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from lowmem.errors import short_repr
from lowmem.kernels.frozen_weight_operator import QuantizedOperands
from lowmem.nn.forms import CodedForm
from lowmem.nn.module_copy import BASES
from lowmem.nn.stored_module import StoredModule, stored_part_by_name
from lowmem.quant.tensor import QuantizedTensor

# Called often: globals are faster
is_compiling, is_jit_tracing = torch.compiler.is_compiling, torch._C._is_tracing


def cached_quantized_weight_or_none(module: StoredModule) -> QuantizedTensor | None:
    """Return a module's cached 4- or 8-bit weight; None if there is none, or it is stale.

    Layers read it at each call, but not under torch.compile or torch.jit.trace, which would record its tensors.
    """
    known = module._kept.get("weight")
    if known is None:
        return None
    (packed, *_, scales), address, _, _, weight = known
    parameters = module._parameters
    same = packed is parameters.get("weight_packed") and scales is parameters.get("weight_scales")
    return weight if same and address == scales.data_ptr() else None  # type: ignore[return-value]


class QuantizedModule(StoredModule):
    """Base of all modules with parameters in 4 or 8 bits.

    The state_dict names the formats, and loading codes of another format is an error.
    """

    stored_bits: ClassVar[int] = 4

    @property
    def formats_text(self) -> str:
        """The forms of the 4- and 8-bit parameters as text: that of ``weight`` alone, or all with their names."""
        texts = {
            name: str(storage.form) for name, storage in self._forms.items() if isinstance(storage.form, CodedForm)
        }
        return (
            texts["weight"]
            if [*texts] == ["weight"]
            else "; ".join(f"{name}: {text}" for name, text in texts.items())
        )

    @property
    def _version(self) -> Any:  # type: ignore[override]
        """The version that torch writes into a state_dict's metadata: the formats, unless the class has its own."""
        class_version = self.dense_class._version
        return self.formats_text if class_version == nn.Module._version else class_version

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor of the layer's own parameters, not copied."""
        if not is_compiling() and not is_jit_tracing():
            cached = cached_quantized_weight_or_none(self)
            if cached is not None:
                return cached
            self._weight_coded_form  # noqa: B018 - raises an AttributeError where there is no such weight
            return self.stored_weight("weight")  # type: ignore[return-value]
        return self._recordable_operands()  # type: ignore[return-value]

    def _recordable_operands(self) -> QuantizedOperands:
        """Return ``quantized`` in the form that torch.compile and torch.jit.trace can record."""
        parameters = self._parameters
        packed, scales = (
            stored_part_by_name(self, parameters, "weight_packed"),
            stored_part_by_name(self, parameters, "weight_scales"),
        )
        return QuantizedOperands(packed, scales, self._forms["weight"].text)

    @property
    def packed(self) -> nn.Parameter:
        """The codes of the weight."""
        return self.weight_packed  # type: ignore[return-value]

    @property
    def scales(self) -> Tensor:
        """The scales of the weight, a view of ``weight_scales`` in their dtype."""
        return self.quantized.scales

    @property
    def _weight_coded_form(self) -> CodedForm:
        form = self._forms["weight"].form if "weight" in self._forms else None
        if not isinstance(form, CodedForm):
            raise AttributeError(f"{type(self).__name__} has no weight in 4 or 8 bits")
        return form

    def get_extra_state(self) -> Any:
        """Return the formats as text in a uint8 tensor, which safetensors can hold, and the class's own state."""
        text = torch.tensor(list(self.formats_text.encode()), dtype=torch.uint8, device="cpu")
        return {"formats": text, "own": super().get_extra_state()} if _has_dense_class_extra_state(self) else text

    def set_extra_state(self, state: Any) -> None:
        """Check the formats, and set the class's own state."""
        state_formats = _extra_state_formats_or_default(
            state.get("formats") if isinstance(state, dict) else state, self.formats_text
        )
        if state_formats != self.formats_text:
            raise ValueError(f"the layer stores {self.formats_text}; the state holds {short_repr(state_formats)}")
        if _has_dense_class_extra_state(self):
            super().set_extra_state(state["own"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Reject codes of another format; warn if the state names no format."""
        key, formats = prefix + _EXTRA_STATE_KEY_SUFFIX, self.formats_text
        missing, errors = rest[-3], rest[-1]
        state_formats = local_metadata.get("version")
        if key in state_dict:
            state = state_dict[key]
            text = state.get("formats") if isinstance(state, dict) and _has_dense_class_extra_state(self) else state
            state_formats = _extra_state_formats_or_default(text, formats if state_formats is None else state_formats)
        if isinstance(state_formats, str) and state_formats != formats:
            errors.append(f"{prefix.rstrip('.') or 'the layer'} stores {formats}; the state holds {state_formats}")
            return
        coded = {prefix + name for name in self.part_parameter_names}
        if not isinstance(state_formats, str) and coded & state_dict.keys():
            warnings.warn(
                f"nothing in the state says how its {self.stored_bits}-bit codes are stored: they are taken for "
                f"{formats}, and are noise if they are not; load what state_dict() gives, or a file with lowmem.load",
                UserWarning,
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if key in missing and not _has_dense_class_extra_state(self):
            missing.remove(key)


def _has_dense_class_extra_state(module: StoredModule) -> bool:
    return module.dense_class.get_extra_state is not nn.Module.get_extra_state


def _extra_state_formats_or_default(extra_state: Any, default: object) -> object:
    """Return the formats in an extra state; ``default`` if it is a meta or fake tensor, without values."""
    if isinstance(extra_state, Tensor) and (extra_state.is_meta or isinstance(extra_state, FakeTensor)):
        return default
    if isinstance(extra_state, Tensor) and extra_state.dtype == torch.uint8 and extra_state.dim() == 1:
        return bytes(extra_state.tolist()).decode(errors="replace")
    return f"something else than a format ({type(extra_state).__name__})"


def state_dict_keys_of_formats(model: nn.Module) -> set[str]:
    """Return the state_dict keys that hold only formats; files keep formats in their metadata instead."""
    layers = model.named_modules(remove_duplicate=False)
    return {
        f"{path}.{_EXTRA_STATE_KEY_SUFFIX}".lstrip(".")
        for path, module in layers
        if isinstance(module, QuantizedModule) and not _has_dense_class_extra_state(module)
    }


def _set_weight_compute_dtype(module: QuantizedModule, dtype: torch.dtype | None) -> None:
    storage = module._forms["weight"]
    module._forms["weight"] = storage._replace(form=replace(module._weight_coded_form, compute_dtype=dtype))
    module._kept.pop("weight", None)


weight_compute_dtype = property(lambda module: module._weight_coded_form.compute_dtype, _set_weight_compute_dtype)
"""The ``compute_dtype`` of the weight's form."""

BASES[4] = BASES[8] = QuantizedModule
