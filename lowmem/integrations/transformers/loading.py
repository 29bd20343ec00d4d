"""Lets ``from_pretrained`` take ``LowmemConfig("exact")``: for folders of other programs, and for GGUF files.

transformers asks which quantizer a folder needs by the config.json alone, refuses one for a GGUF file, and reads
tensors from the folder's files. It forgets what config.json says where None is given for it. These functions are
wrapped; for all other loads they do what they did, but that no config may have layers without end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, modeling_utils

from lowmem.errors import FileError, show
from lowmem.integrations.transformers.checking import (
    check_index,
    refuse_pickles,
    refuse_unread,
    refuse_untold,
)
from lowmem.integrations.transformers.config import EXACT, METHOD, LowmemConfig, refuse_technique
from lowmem.integrations.transformers.fitting import refuse_retyped, refuse_unfitting, shapes_and_bytes, specs_of
from lowmem.integrations.transformers.quantizer import LowmemQuantizer
from lowmem.io.formats.recognize import is_coded
from lowmem.io.model_folder import refuse_layers

__all__ = ["checked", "install"]


def install() -> None:
    """Wrap the functions of transformers."""
    choose, load = modeling_utils.get_hf_quantizer, PreTrainedModel._load_pretrained_model
    read, build = AutoConfig.from_pretrained.__func__, PreTrainedConfig.from_dict.__func__

    @wraps(choose)
    def get_hf_quantizer(
        config: Any, quantization_config: Any, device_map: Any, *args: Any, gguf_file: Any = None, **kwargs: Any
    ) -> Any:
        refuse_technique(quantization_config)
        method = _method_of(config)
        if method == METHOD or isinstance(quantization_config, LowmemConfig):
            refuse_layers(config.to_dict())
        if not isinstance(quantization_config, LowmemConfig):
            return choose(config, quantization_config, device_map, *args, gguf_file=gguf_file, **kwargs)
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
        elif state_dict is None and checkpoint_files:
            _check(model, checkpoint_files, quantizer, load_config.weight_mapping or [])
        if isinstance(quantizer, LowmemQuantizer) and quantizer.measures:
            once = replace(load_config, weight_mapping=deepcopy(load_config.weight_mapping))  # which notes its use
            load(model, state_dict, checkpoint_files, once, *args, **kwargs)
            quantizer.divide(model)
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @wraps(read)
    def config_from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config", METHOD) is None:
            own = {name: value for name, value in kwargs.items() if name != "quantization_config"}
            found = read(cls, *args, **own)
            if _method_of(found[0] if isinstance(found, tuple) else found) == METHOD:
                return found
        return read(cls, *args, **kwargs)

    @wraps(build)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        refuse_layers(config_dict)  # of which many a config makes a list
        return build(cls, config_dict, **kwargs)

    AutoConfig.from_pretrained = classmethod(config_from_pretrained)
    PreTrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[arg-type]
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


def _check(model: Any, files: list[str], quantizer: Any, conversions: list[Any]) -> None:
    """Refuse files that are not those of the model, or not what their folder says.

    Raises:
        FileError, OSError, ValueError: as the functions of ``checking`` and ``fitting``.
    """
    is_ours = isinstance(quantizer, LowmemQuantizer)
    if is_ours or _CHECKED.get():
        refuse_pickles(files)
    try:
        specs = specs_of(files)
    except FileError:
        if not is_ours and not _CHECKED.get():
            return  # transformers may read more than lowmem does
        raise
    is_stored = getattr(quantizer, "pre_quantized", False)
    if is_ours or _CHECKED.get():
        check_index(files)
    if not is_stored:
        refuse_unread(Path(files[0]).parent, specs)
    if is_ours and not is_stored and _are_coded(specs):
        raise ValueError(_again("another program"))
    if is_ours or _CHECKED.get():
        refuse_unfitting(model, *shapes_and_bytes(specs), conversions)
    if is_ours and is_stored:
        refuse_untold(specs, quantizer.quantization_config)
        refuse_retyped(model, specs, quantizer.parts, conversions)


def _exact(config: Any, asked: LowmemConfig, device_map: Any) -> tuple[Any, Any, Any]:
    """Return the quantizer that keeps the codes of a folder or file."""
    config.quantization_config = asked
    quantizer = LowmemQuantizer(asked, pre_quantized=True)
    quantizer.validate_environment(device_map=device_map)
    return quantizer, config, quantizer.update_device_map(device_map)


def _refuse(method: str | None, gguf_file: Any) -> None:
    """Raise where weights that another program quantized would be quantized again.

    Raises:
        ValueError: they would, or might, of a GGUF file; how to keep them is said.
    """
    if method in (None, METHOD) and gguf_file is None:
        return
    if gguf_file is not None:
        raise ValueError(
            f"the GGUF file {show(gguf_file)} may have weights that would be quantized a second time: "
            "LowmemConfig('exact') keeps their codes, and lowmem.convert stores what is dense of the loaded model"
        )
    raise ValueError(_again(show(method)))


def _are_coded(names: Iterable[str]) -> bool:
    """Whether tensors are parts of another program's weights, of which config.json may say nothing."""
    return any(is_coded(name) for name in names)


def _again(program: str) -> str:
    return (
        f"a folder that {program} quantized has weights that would be quantized a second time: "
        "LowmemConfig('exact') keeps their codes; `lowmem quantize IN OUT --requantize` quantizes again what "
        "cannot be kept, and prints the error"
    )
