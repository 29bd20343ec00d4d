"""The quantizer that transformers calls while it loads a model: one that is to be stored, or was saved as stored."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from lowmem.errors import show
from lowmem.integrations.transformers.config import EXACT, METHOD, LowmemConfig
from lowmem.integrations.transformers.exact import Exact
from lowmem.integrations.transformers.ordering import put_dense_first
from lowmem.integrations.transformers.peft_models import refuse_passed_over
from lowmem.integrations.transformers.saving import config_of
from lowmem.integrations.transformers.storing import Measuring, Storing
from lowmem.io.container import open_checkpoint
from lowmem.io.skeleton import convert_skeleton
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapted_weight import AdaptedWeight
from lowmem.nn.budget import Budget
from lowmem.nn.eightbit import EightBit
from lowmem.nn.fourbit import FourBit
from lowmem.nn.gathered_weight import check_order
from lowmem.nn.half import Half
from lowmem.nn.stored import StoredTensor
from lowmem.nn.stored_module import StoredModule
from lowmem.resident import drop_pages, trim_heap
from lowmem.transforms.commit import freeze_all_but_adapters
from lowmem.transforms.refusals import is_of_peft
from lowmem.transforms.restore import floating_dtype, restore
from lowmem.transforms.roles import kept_in_float32

__all__ = ["LowmemQuantizer", "adopt"]

# Asked by the functions with which transformers initializes what a folder lacks; stored weights are never that, and
# those with adapters are computed.
StoredTensor._is_hf_initialized = True  # type: ignore[attr-defined]
AdaptedWeight._is_hf_initialized = True  # type: ignore[attr-defined]


class _Store(ConversionOps):  # type: ignore[misc]
    """Stores a weight that was read, in place of setting it."""

    def __init__(self, storing: Storing, files: list[str]) -> None:
        self._storing, self._files = storing, files

    def convert(self, input_dict: dict[str, Any], missing_keys: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return what is not to be stored; weights that are have become a part of their modules."""
        left = {}
        while input_dict:
            name, value = input_dict.popitem()
            tensor = value[0] if isinstance(value, list) else value
            if not self._storing.wants(name) or not self._storing.take(name, tensor, missing_keys):
                left[name] = value
            del value, tensor
        drop_pages(self._files)
        return left


class _Align(ConversionOps):  # type: ignore[misc]
    """Copies scales whose bytes lie in a mapped file where their dtype cannot: they are read as floats."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the only tensor, by its full name."""
        ((_, value),) = input_dict.items()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return {full_layer_name: tensor.clone() if tensor.data_ptr() % _WIDEST else tensor}


_WIDEST = 4  # bytes of the widest scale


@register_quantizer(METHOD)
class LowmemQuantizer(HfQuantizer):  # type: ignore[misc]
    """Stores weights while they are read, or takes them as ``save_pretrained`` has written them.

    Attributes:
        exact: what is kept of another program's files, while they are loaded.
        parts: of a saved model, while it is loaded: the dtypes of what its stored weights consist of, by name.
    """

    quantization_config: LowmemConfig

    def __init__(self, quantization_config: LowmemConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._storing: Storing | None = None
        self.exact: Exact | None = None
        self._files: list[str] = []
        self.parts: dict[str, torch.dtype] = {}
        self._ties: dict[str, str] | None = None
        self._model: Any = lambda: None  # weak: a model that is deleted is freed at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.attach(state["_model"])

    def attach(self, model: Any) -> None:
        """Become the quantizer of a model, which ``is_qat_trainable`` asks about."""
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` can write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether ``Trainer`` may train the model without PEFT, which it asks before it trains any model.

        Raises:
            ValueError: the model has no adapter, and training would change what is dense alone, such as norms; or an
                adapter of PEFT leaves out parameters that it names.
        """
        model = self._model()
        if model is None:
            return True
        refuse_passed_over(model, getattr(model, "peft_config", {}))
        adapted = any(isinstance(module, AdaptedModule) or is_of_peft(module) for module in model.modules())
        if adapted or self.quantization_config.train_dense:
            return True
        trained = [name for name, one in model.named_parameters() if one.requires_grad]
        if trained and any(isinstance(module, StoredModule) for module in model.modules()):
            raise ValueError(
                f"the model is stored and has no adapter: training would change {len(trained)} dense parameters "
                f"alone, as {trained[0]}. lowmem.add_adapter(model, 'tuned', lowmem.LoRA()) or PEFT's get_peft_model "
                "adds one; where that is what you want, LowmemConfig(..., train_dense=True), or "
                "model.hf_quantizer.quantization_config.train_dense = True"
            )
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be loaded.

        Raises:
            ValueError: the config is of a model that was saved, and the folder's is dense; or weights would be
                offloaded to disk before they are stored.
        """
        if not self.pre_quantized and self.quantization_config.technique is None:
            raise ValueError(
                "quantization_config has no technique, and the folder is dense: LowmemConfig(FourBit('nf4'))"
            )
        if (
            (not self.pre_quantized or self.is_exact)
            and isinstance(device_map, Mapping)
            and "disk" in device_map.values()
        ):
            raise ValueError(
                f"device_map={show(device_map)} offloads weights to disk while they are stored: load and save the "
                "model without it first, and offload what was saved"
            )

    @property
    def measures(self) -> bool:
        """Whether the weights are to be read twice: once to measure what a budget loses of them."""
        return isinstance(self._storing, Measuring)

    def divide(self, model: Any) -> None:
        """Divide a budget among the layers, once all weights were measured: the next time they are stored.

        Raises:
            TypeError, ValueError: a weight that cannot be stored, or a budget that is out of reach.
        """
        assert isinstance(self._storing, Measuring)
        self._storing.finish()
        config = self.quantization_config
        assert isinstance(config.technique, Budget)
        self._storing = Storing(model, config.technique, config.skip, self._storing.losses)

    @property
    def is_exact(self) -> bool:
        """Whether codes of another program's files are kept."""
        return self.quantization_config.technique == EXACT

    def read_header(self, gguf_file: str) -> None:
        """Do nothing: a GGUF file is read with its tensors."""

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of the model: that of the user's, or float32 of a GGUF file, which names none."""
        return torch.float32 if dtype is None else dtype

    def get_state_dict(self, checkpoint_file: str | None = None, model: Any = None) -> dict[str, Any] | None:
        """Return what there is to load in place of the tensors of files; None: these."""
        return None if self.exact is None else self.exact.state

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype to cast a saved tensor to: none for parts of stored weights."""
        if any(name in self.parts for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Prepare a model on the meta device; what transformers keeps in float32 is so here, as in a dense model."""
        for module, name in kept_in_float32(model, dtype):
            parameter = module._parameters[name]
            if parameter is not None:
                parameter.data = parameter.data.float()
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be stored while it is read."""
        return self._storing is not None and self._storing.wants(param_name)

    def get_quantize_ops(self) -> _Store:
        """Return what stores a weight."""
        assert self._storing is not None
        return _Store(self._storing, self._files)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return how names of the folder become those of the model: a saved model has its own."""
        if self.exact is not None:
            return self.exact.conversions(weight_conversions)
        if not self.pre_quantized:
            return weight_conversions
        return [WeightConverter(["_scales"], ["_scales"], [_Align()])]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        tied = _tie(model)
        self._files = list(checkpoint_files or [])
        config = self.quantization_config
        if not self.pre_quantized:
            assert isinstance(config.technique, (Half, EightBit, FourBit, Budget))
            if isinstance(config.technique, Budget):  # what it gives each layer is known once all weights were read
                storing: Storing = Measuring(model, config.technique, config.skip)
            else:
                storing = Storing(model, config.technique, config.skip)
            self._storing = storing
            _keep_dtypes(model, storing)
            ties = {target: source for target, source in tied.items() if storing.stays_tied(target, source)}
            self._ties, model.all_tied_weights_keys = model.all_tied_weights_keys, ties
            return model
        if self.is_exact:
            self.exact = Exact(self._files, model, self.quantization_config.requantizing)
            convert_skeleton(model, {"layers": self.exact.layers}, {})
            self.exact.add_formats(model)
        else:
            convert_skeleton(model, *_records(model, config, self._files))
        ties = {}
        for target, source in tied.items():
            ties |= _ties_of_parts(model, target, source)
        self._ties, model.all_tied_weights_keys = model.all_tied_weights_keys, ties
        self.parts = _parts(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._storing is not None:
            del model._get_dtype_plan  # the instance's
            self._storing.finish()
            drop_pages(self._files)
            if self._storing.warning is not None:
                warnings.warn(self._storing.warning, UserWarning, stacklevel=2)
        else:
            _check_complete(model)
        if self.exact is not None:
            self.exact.close()
            self.exact = None
        self._storing, self.parts = None, {}
        if self._ties is not None:
            model.all_tied_weights_keys, self._ties = self._ties, None
        for module in model.modules():
            if isinstance(module, StoredModule):
                for name in module.part_names:
                    module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        put_dense_first(model)
        if any(isinstance(module, AdaptedModule) for module in model.modules()):
            freeze_all_but_adapters(model)
        model.config.quantization_config = self.quantization_config = config_of(model) or self.quantization_config
        model.is_quantized = False  # it trains, casts and moves as any model does
        self.attach(model)
        trim_heap(model)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make a model dense in one dtype: that of the model, or another, which may be its name.

        What transformers keeps in float32 beside that dtype is float32, as where a dense model is loaded.

        Raises:
            TypeError: ``dtype`` names no floating-point dtype of torch.
        """
        return super().dequantize(model, model.dtype if dtype is None else floating_dtype(dtype))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        wide = {module for module, _ in kept_in_float32(model, dtype)}
        if any(isinstance(module, StoredModule) for module in wide):
            restore(model, where=lambda path, module: module in wide, dtype=torch.float32)
        return restore(model, where=lambda path, module: module not in wide, dtype=dtype)


def adopt(model: nn.Module) -> None:
    """Give the models of transformers that ``convert`` stored a quantizer, as ``from_pretrained`` does.

    ``dequantize`` and ``Trainer`` ask for it. Models that transformers is loading, and those that have a quantizer,
    keep it. A dense parameter is put first, as there.
    """
    put_dense_first(model)
    found: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {part for module in found for part in module.modules() if part is not module}
    for module in found:
        if module in inner or getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None):
            continue
        config = config_of(module)
        if config is not None and config.layers:
            module.hf_quantizer = LowmemQuantizer(config)
            module.hf_quantizer.attach(module)


def _keep_dtypes(model: Any, storing: Storing) -> None:
    """Let weights be read in the dtype in which a model makes them, which may be float32 whatever is asked for.

    transformers casts what is stored while it is read to the model's dtype, and all else to that of the parameter.
    """
    plan = model._get_dtype_plan

    def with_own(dtype: torch.dtype) -> dict[str, torch.dtype]:
        made = {name: one.dtype for name, one in model.named_parameters() if storing.wants(name)}
        return {**{name: own for name, own in made.items() if own != dtype}, **plan(dtype)}

    model._get_dtype_plan = with_own


def _tie(model: Any) -> dict[str, str]:
    """Tie the parameters of a model that transformers has made without: target -> source."""
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in tied.items():
        path, _, name = target.rpartition(".")
        setattr(model.get_submodule(path), name, model.get_parameter(source))
    return tied


def _ties_of_parts(model: Any, target: str, source: str) -> dict[str, str]:
    """Return the ties of what two tied parameters consist of; none where only one of them is stored."""
    parts = []
    for name in (target, source):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        form = module.forms.get(own) if isinstance(module, StoredModule) else None
        parts.append([name] if form is None else [f"{name}_{part}" for part in form.parts])
    stored = [names != [name] for names, name in zip(parts, (target, source), strict=True)]
    return dict(zip(*parts, strict=True)) if stored[0] == stored[1] else {}


def _parts(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the names of all parameters that hold a part of a stored one, and their dtypes."""
    return {
        f"{path}.{name}".lstrip("."): getattr(module, name).dtype
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StoredModule)
        for name in module.part_names
    }


def _records(model: Any, config: LowmemConfig, files: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder's metadata as lowmem's files have it, and its tensors without values, by the model's paths.

    Raises:
        ValueError: records that are not lowmem's, or of none of the model's modules.
    """
    found = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."

    def own(name: str) -> str | None:
        """Return the name in this model: a folder may hold it with a head, and the model be the part below it."""
        for path in (name, name.removeprefix(prefix), prefix + name):
            parent, _, parameter = path.rpartition(".")
            if path in found or (parent in found and parameter in found[parent]._parameters):
                return path
        return None

    layers: dict[str, Any] = {}
    for record in config.layers:
        if not isinstance(record.get("names"), list):
            raise ValueError(f"quantization_config: layers has {show(record)}, without the names of its weights")
        how = {key: value for key, value in record.items() if key != "names"}
        layers |= {place: how for name in record["names"] if (place := own(str(name))) is not None}
    adapters = {place: record for name, record in config.adapters.items() if (place := own(name)) is not None}
    if (config.layers and not layers) or (config.adapters and not adapters):
        raise ValueError(
            f"quantization_config names no module that {type(model).__name__} has: load the class that was saved"
        )
    tensors: dict[str, Tensor] = {}
    for file in files if adapters else ():
        with open_checkpoint(file) as checkpoint:
            for name, spec in checkpoint.specs.items():
                tensors[name] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    tensors |= {
        place: one for name, one in tensors.items() if (place := _own_tensor(name, prefix, found)) is not None
    }
    return {"layers": layers, "adapters": adapters}, tensors


def _own_tensor(name: str, prefix: str, found: Container[str]) -> str | None:
    """Return the name of an adapter's tensor in a model that has another prefix."""
    place, adapters, rest = name.partition(".adapters.")
    for path in (place.removeprefix(prefix), prefix + place):
        if adapters and path in found:
            return path + adapters + rest
    return None


def _check_complete(model: nn.Module) -> None:
    """Raise if a part of a stored weight was not in the folder.

    Raises:
        ValueError: one was not; it is named.
    """
    on_disk = "disk" in getattr(model, "hf_device_map", {}).values()
    for path, module in model.named_modules():
        if isinstance(module, StoredModule):
            for name in module.part_names:
                part: Any = getattr(module, name)
                if part.is_meta and on_disk:
                    continue
                if part.is_meta or not getattr(part, "_is_hf_initialized", False):
                    raise ValueError(
                        f"the folder lacks {f'{path}.{name}'.lstrip('.')}, which its quantization_config names: get "
                        "it again from one source"
                    )
                if name.endswith("_order"):
                    check_order(part, f"{path}.{name}".lstrip("."))
