"""The quantizer that transformers calls while it loads a model: a dense one to store, or a stored one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowmem.errors import short_repr
from lowmem.integrations.transformers.checkpoint_checks import (
    check_all_safetensors,
    check_config_covers_stored_weights,
    check_folder_fills_model,
    check_not_foreign_quantized,
    check_not_stored_by_lowmem,
    check_shard_index,
    check_stored_part_dtypes,
    safetensors_specs_by_name,
    shapes_by_name_and_total_bytes,
)
from lowmem.integrations.transformers.prequantized_loading import (
    are_recorded_weights_dense,
    check_stored_parts_loaded,
    folder_weight_conversions,
    make_resized_layers_dense,
    metadata_and_meta_tensors,
    stored_part_dtypes_by_name,
    ties_of_parts,
)
from lowmem.integrations.transformers.quantization_config import METHOD, LowmemConfig
from lowmem.integrations.transformers.quantize_on_load import OnLoadBudgetLossMeasurer, OnLoadWeightStorer
from lowmem.integrations.transformers.save_pretrained import (
    StoredPreTrainedModelMixin,
    lowmem_config_or_none,
    stored_model_subclass,
)
from lowmem.io.meta_loading import replace_layers_and_add_adapters
from lowmem.io.model_folder import check_layer_and_expert_counts
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapted_weight import AdaptedWeight
from lowmem.nn.adapter_buffers import sync_buffers_with_adapters
from lowmem.nn.module_class import change_class_and_attributes
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half
from lowmem.resident import drop_mapped_file_pages, trim_heap_unless_small
from lowmem.transforms.layer_roles import module_name_pairs_kept_in_float32
from lowmem.transforms.model_checks import is_peft_module
from lowmem.transforms.module_replacement import freeze_non_adapter_parameters
from lowmem.transforms.peft_models import check_no_stored_peft_targets
from lowmem.transforms.restore_dense import parse_floating_dtype, restore

# transformers initializes parameters without this mark, which a folder lacks. Stored weights are never initialized.
StoredTensor._is_hf_initialized = True  # type: ignore[attr-defined]
AdaptedWeight._is_hf_initialized = True  # type: ignore[attr-defined]


class _StoreWhileLoading(ConversionOps):  # type: ignore[misc]
    """Stores a weight that was read, in place of setting it."""

    def __init__(self, storer: OnLoadWeightStorer, files: list[str]) -> None:
        self._storing, self._files = storer, files

    def convert(self, input_dict: dict[str, Any], missing_keys: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Store weights in their modules; return the tensors that stay dense."""
        left = {}
        while input_dict:
            name, value = input_dict.popitem()
            tensor = value[0] if isinstance(value, list) else value
            if not self._storing.should_process(name) or not self._storing.process_parameter_and_check_if_taken(
                name, tensor, missing_keys
            ):
                left[name] = value
            del value, tensor
        drop_mapped_file_pages(self._files)
        return left


@register_quantizer(METHOD)
class LowmemQuantizer(HfQuantizer):  # type: ignore[misc]
    """Stores weights while they are read, or takes them as ``save_pretrained`` has written them.

    Attributes:
        part_dtypes: of a saved model, while it is loaded: the dtypes of what its stored weights consist of, by name.
    """

    quantization_config: LowmemConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        is_technique = not isinstance(quantization_config, QuantizationConfigMixin)
        super().__init__(LowmemConfig(quantization_config) if is_technique else quantization_config, **kwargs)
        self._storing: OnLoadWeightStorer | None = None
        self._files: list[str] = []
        # A folder whose config says otherwise
        self._is_dense = False
        self._dtype: torch.dtype | None = None
        self._own_dtypes: dict[str, torch.dtype] = {}
        self.part_dtypes: dict[str, torch.dtype] = {}
        self._ties: dict[str, str] | None = None
        # Weak: a model that is deleted is freed at once
        self._model: Any = lambda: None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.attach_model(state["_model"])

    def attach_model(self, model: Any) -> None:
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
        if model is not None:
            self._check_trains_more_than_dense_parameters(model)
        return True

    def _check_trains_more_than_dense_parameters(self, model: Any) -> None:
        """Raise the errors of ``is_qat_trainable``."""
        check_no_stored_peft_targets(model, getattr(model, "peft_config", {}))
        adapted = any(isinstance(module, AdaptedModule) or is_peft_module(module) for module in model.modules())
        if adapted or self.quantization_config.train_dense:
            return
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if trained and any(isinstance(module, StoredModule) for module in model.modules()):
            raise ValueError(
                f"the model is stored and has no adapter: training would change {len(trained)} dense parameters "
                f"alone, as {trained[0]}. lowmem.add_adapter(model, 'tuned', lowmem.LoRA()) or PEFT's get_peft_model "
                "adds one; where that is what you want, LowmemConfig(..., train_dense=True), or "
                "model.hf_quantizer.quantization_config.train_dense = True"
            )

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise a ValueError for a dense folder without a technique, and for weights offloaded to disk."""
        if self.pre_quantized:
            return
        if self.quantization_config.technique is None:
            raise ValueError(
                "quantization_config has no technique, and the folder is dense: LowmemConfig(FourBit('nf4'))"
            )
        self.check_no_disk_offload(device_map)

    @staticmethod
    def check_no_disk_offload(device_map: Any) -> None:
        """Raise a ValueError where weights would be offloaded to disk before they are stored."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ValueError(
                f"device_map={short_repr(device_map)} offloads weights to disk while they are stored: load and save "
                "the "
                "model without it first, and offload what was saved"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Return the model's config, unless it asks for more layers or experts than any model has."""
        # A technique
        if not isinstance(config.quantization_config, QuantizationConfigMixin):
            config.quantization_config = self.quantization_config
        check_layer_and_expert_counts(config.to_dict())
        return config

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype to cast a saved tensor to: none for parts of stored weights."""
        if any(name in self.part_dtypes for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Prepare a model on the meta device, with the parameters in float32 that dense models have in float32."""
        float32_ids = set()
        for module, name in module_name_pairs_kept_in_float32(model, dtype):
            parameter = module._parameters[name]
            if parameter is not None:
                parameter.data = parameter.data.float()
                float32_ids.add(id(parameter))
        self._dtype = dtype
        self._own_dtypes = {
            name: tensor.dtype
            for name, tensor in model.named_parameters(remove_duplicate=False)
            if tensor.dtype is not dtype and id(tensor) not in float32_ids
        }
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is stored while it is read; one that a model makes in its own dtype is stored later."""
        has_own_dtype = param_name in self._own_dtypes and not isinstance(self._storing, OnLoadBudgetLossMeasurer)
        return self._storing is not None and not has_own_dtype and self._storing.should_process(param_name)

    def get_quantize_ops(self) -> _StoreWhileLoading:
        """Return what stores a weight."""
        assert self._storing is not None
        return _StoreWhileLoading(self._storing, self._files)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return how names of the folder become those of the model: a saved model has its own.

        The model is empty and the folder's files are known: they are checked, and a budget is divided.
        """
        if self.pre_quantized and not self._is_dense:
            weight_conversions = folder_weight_conversions(model)
        if self._files:
            self._check_checkpoint(model, weight_conversions)
        if isinstance(self._storing, OnLoadBudgetLossMeasurer):
            self._measure_and_assign_budget(model, weight_conversions)
        return weight_conversions

    def _check_checkpoint(self, model: Any, conversions: list[Any]) -> None:
        check_all_safetensors(self._files)
        specs = safetensors_specs_by_name(self._files)
        check_shard_index(self._files)
        if not self.pre_quantized:
            check_not_stored_by_lowmem(Path(self._files[0]).parent, specs)
            check_not_foreign_quantized(Path(self._files[0]).parent, specs)
        check_folder_fills_model(model, *shapes_by_name_and_total_bytes(specs), conversions)
        if self.pre_quantized and not self._is_dense:
            check_config_covers_stored_weights(specs, self.quantization_config, model.base_model_prefix)
            check_stored_part_dtypes(model, specs, self.part_dtypes, conversions)

    def _measure_and_assign_budget(self, model: Any, conversions: list[Any]) -> None:
        """Read all weights to measure them, and divide the budget among the layers."""
        measuring, asked = self._storing, self.quantization_config
        assert isinstance(measuring, OnLoadBudgetLossMeasurer)
        assert isinstance(asked.technique, Budget)
        if not self._files:
            raise ValueError(
                "a Budget reads the weights of a folder twice, and a state dict has none: load the model, and "
                "lowmem.convert(model, Budget(...))"
            )
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, "pt")) for file in self._files]
            state = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
            once = LoadStateDictConfig(
                dtype=self._dtype,
                dtype_plan=self._own_dtypes,
                hf_quantizer=self,
                weight_mapping=deepcopy(conversions),  # which note their use
            )
            convert_and_load_state_dict_in_model(model, state, once)
        measuring.finish_or_raise()
        self._storing = OnLoadWeightStorer(model, asked.technique, asked.skip, measuring.losses)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self._files = list(checkpoint_files or [])
        config = self.quantization_config
        if self.pre_quantized:
            check_all_safetensors(self._files)
            self._is_dense = are_recorded_weights_dense(config, model.base_model_prefix, self._files)
        if self._is_dense:
            warnings.warn(
                f"config.json says that the weights of {short_repr(str(Path(self._files[0]).parent))} are stored, "
                "and they "
                "are dense: they stay dense, and save_pretrained writes a config.json that says so",
                UserWarning,
                stacklevel=2,
            )
            return model
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        self.tie_parameters(model, tied)
        if not self.pre_quantized:
            assert isinstance(config.technique, (Half, EightBit, FourBit, Budget))
            if isinstance(config.technique, Budget):  # which is divided once all weights were read
                storing: OnLoadWeightStorer = OnLoadBudgetLossMeasurer(model, config.technique, config.skip)
            else:
                storing = OnLoadWeightStorer(model, config.technique, config.skip)
            self._storing = storing
            kept_ties = {
                target: source for target, source in tied.items() if storing.are_both_stored_or_dense(target, source)
            }
            self.replace_ties_while_loading(model, kept_ties)
            return model
        replace_layers_and_add_adapters(model, *metadata_and_meta_tensors(model, config, self._files))
        make_resized_layers_dense(model, self._files)
        self.replace_ties_while_loading(model, ties_of_parts(model, tied))
        self.part_dtypes = stored_part_dtypes_by_name(model)
        return model

    @staticmethod
    def tie_parameters(model: Any, source_by_target: Mapping[str, str]) -> None:
        """Tie the parameters of a model on the meta device."""
        for target, source in source_by_target.items():
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, model.get_parameter(source))

    def replace_ties_while_loading(self, model: Any, source_by_target: dict[str, str]) -> None:
        """Set the ties by which transformers loads the model, until all weights were loaded."""
        self._ties, model.all_tied_weights_keys = model.all_tied_weights_keys, source_by_target

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._storing is not None:
            self._storing.finish_or_raise()
            drop_mapped_file_pages(self._files)
            if self._storing.warning is not None:
                warnings.warn(self._storing.warning, UserWarning, stacklevel=2)
        else:
            check_stored_parts_loaded(model)
        self._storing, self.part_dtypes, self._files, self._own_dtypes = None, {}, [], {}
        if self._ties is not None:
            model.all_tied_weights_keys, self._ties = self._ties, None
        for module in model.modules():
            if isinstance(module, StoredModule):
                for name in module.part_parameter_names:
                    module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        if any(isinstance(module, AdaptedModule) for module in model.modules()):
            freeze_non_adapter_parameters(model)
            sync_buffers_with_adapters(model)
        model.is_quantized = False  # it trains, casts and moves as any model does
        adopt(model)
        trim_heap_unless_small(model)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make a model dense in a dtype, or its name; None: the model's.

        Parameters that transformers keeps in float32 are float32, as in a dense model.

        Raises:
            TypeError: ``dtype`` names no floating-point dtype of torch.
        """
        return super().dequantize(model, model.dtype if dtype is None else parse_floating_dtype(dtype))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        wide = {module for module, _ in module_name_pairs_kept_in_float32(model, dtype)}
        if any(isinstance(module, StoredModule) for module in wide):
            restore(model, where=lambda path, module: module in wide, dtype=torch.float32)
        return restore(model, where=lambda path, module: module not in wide, dtype=dtype)


def adopt(model: nn.Module) -> None:
    """Let models of transformers know what lowmem has stored in them, or that all weights are dense again.

    ``save_pretrained`` writes stored weights, ``dequantize`` and ``Trainer`` find a quantizer, and a dense parameter
    comes first among ``parameters()``.
    ``lowmem.convert`` and ``lowmem.restore`` call this for the model that they are given. Where that was a part of a
    model, such as a list of layers, call it for the whole. Models that transformers is loading are left alone.
    """
    pretrained_models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {part for module in pretrained_models for part in module.modules() if part is not module}
    for module in pretrained_models:
        if getattr(module, "is_quantized", False):
            continue
        config = lowmem_config_or_none(module)
        if config is None:
            if isinstance(module, StoredPreTrainedModelMixin):
                change_class_and_attributes(module, module.own_class)
            if isinstance(getattr(module, "hf_quantizer", None), LowmemQuantizer):
                module.hf_quantizer.remove_quantization_config(module)
            continue
        change_class_and_attributes(module, stored_model_subclass(type(module)))
        if module in inner or not config.layers:
            continue
        quantizer = getattr(module, "hf_quantizer", None) or LowmemQuantizer(config)
        if isinstance(quantizer, LowmemQuantizer):
            quantizer.attach_model(module)
            module.hf_quantizer = quantizer
            # The model around a base model shares its config, and says so, too
            if module.base_model is not module:
                _replace_shared_config(module)
            module.config.quantization_config = quantizer.quantization_config = config


def _replace_shared_config(model: Any) -> None:
    """Give a model a config object of its own: other models may have been made of the same object, and are dense."""
    shared = model.config
    if not isinstance(getattr(shared, "quantization_config", None), LowmemConfig):
        config_copy = copy(shared)
        for module in model.modules():
            if vars(module).get("config") is shared:
                module.config = config_copy
