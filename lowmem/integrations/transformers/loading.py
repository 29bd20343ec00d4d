"""Lets ``from_pretrained`` take ``LowmemConfig("exact")``: for folders of other programs, and for GGUF files.

transformers asks which quantizer a folder needs by the config.json alone, refuses one for a GGUF file, and reads
tensors from the folder's files. Both functions are wrapped; for all other loads they do what they did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from lowmem.errors import show
from lowmem.integrations.transformers.config import EXACT, METHOD, LowmemConfig
from lowmem.integrations.transformers.fitting import refuse_unfitting, shapes_of
from lowmem.integrations.transformers.quantizer import LowmemQuantizer

__all__ = ["checked", "install"]


def install() -> None:
    """Wrap the functions of transformers."""
    choose, load = modeling_utils.get_hf_quantizer, PreTrainedModel._load_pretrained_model

    @wraps(choose)
    def get_hf_quantizer(
        config: Any, quantization_config: Any, device_map: Any, *args: Any, gguf_file: Any = None, **kwargs: Any
    ) -> Any:
        if not isinstance(quantization_config, LowmemConfig):
            return choose(config, quantization_config, device_map, *args, gguf_file=gguf_file, **kwargs)
        method = _method_of(config)
        if quantization_config.technique == EXACT and (method != METHOD or gguf_file is not None):
            return _exact(config, quantization_config, device_map)
        _refuse(method, gguf_file)
        return choose(config, quantization_config, device_map, *args, gguf_file=gguf_file, **kwargs)

    @wraps(load)
    def load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        exact = quantizer.exact if isinstance(quantizer, LowmemQuantizer) else None
        if exact is not None:
            refuse_unfitting(model, dict.fromkeys(exact.state), exact.nbytes, load_config.weight_mapping or [])
            state_dict = exact.state
        elif _CHECKED.get() or isinstance(quantizer, LowmemQuantizer):
            files = checkpoint_files or [""]
            if state_dict is None and all(file.endswith(".safetensors") for file in files):
                refuse_unfitting(model, *shapes_of(files), load_config.weight_mapping or [])
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    modeling_utils.get_hf_quantizer = get_hf_quantizer
    PreTrainedModel._load_pretrained_model = staticmethod(load_pretrained_model)


@contextmanager
def checked() -> Iterator[None]:
    """Refuse folders in the block whose tensors do not fit their config, though no quantizer of lowmem loads them."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


_CHECKED: ContextVar[bool] = ContextVar("checked", default=False)


def _method_of(config: Any) -> str | None:
    """Return by what a folder was quantized, as its config says."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method", "bitsandbytes") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _exact(config: Any, asked: LowmemConfig, device_map: Any) -> tuple[Any, Any, Any]:
    """Return the quantizer that keeps the codes of a folder or file."""
    config.quantization_config = asked
    quantizer = LowmemQuantizer(asked, pre_quantized=True)
    quantizer.validate_environment(device_map=device_map)
    return quantizer, config, quantizer.update_device_map(device_map)


def _refuse(method: str | None, gguf_file: Any) -> None:
    """Raise where weights that another program quantized would be quantized again.

    Raises:
        ValueError: they would; how to keep them is said.
    """
    if method in (None, METHOD) and gguf_file is None:
        return
    what = f"the GGUF file {show(gguf_file)}" if gguf_file is not None else f"a folder that {show(method)} quantized"
    raise ValueError(
        f"{what} has weights that would be quantized a second time: LowmemConfig('exact') keeps their codes; `lowmem "
        "quantize IN OUT.safetensors --requantize` quantizes again what cannot be kept, and prints the error"
    )
