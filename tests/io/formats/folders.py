"""Writes folders as ``save_pretrained`` of a converted model does, of small models, without transformers."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import lowmem
from lowmem.io.metadata_records import CONFIG_VERSION, form_to_record_dict, parameter_record_key
from lowmem.nn.forms import CodedForm
from lowmem.quant.tensor import QuantizedTensor

Weights = dict[str, "Tensor | QuantizedTensor"]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 96,
}


def shapes(config: Mapping[str, Any] = CONFIG) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a model's weights."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for part, shape in (
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, queries)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            yield f"model.layers.{layer}.{part}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def weights_of(
    make: Callable[[Tensor], "Tensor | QuantizedTensor"], config: Mapping[str, Any] = CONFIG, seed: int = 0
) -> Weights:
    """Return random weights, of which ``make`` makes what is stored for matrices."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, shape in shapes(config):
        values = torch.randn(shape, generator=generator)
        found[name] = make(values) if len(shape) > 1 else values
    return found


def fourbit(format: str, **options: Any) -> Callable[[Tensor], QuantizedTensor]:
    return lambda values: lowmem.quantize(values, format, **options)


def write_folder(folder: Path, weights: Weights, config: Mapping[str, Any] = CONFIG, shards: int = 1) -> Path:
    """Write a folder."""
    folder.mkdir(parents=True)
    parts: dict[str, Tensor] = {}
    layers = []
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedTensor):
            parts[name] = weight
            continue
        parts |= {f"{name}_packed": weight.packed, f"{name}_scales": weight.scales.view(torch.uint8)}
        module = name.removesuffix(".weight")
        parts[f"{module}._extra_state"] = torch.tensor(list(b"how it is stored"), dtype=torch.uint8, device="cpu")
        layers.append({**form_to_record_dict(CodedForm.from_quantized_tensor(weight)), "names": [module]})
    method = "lowmem: import lowmem.integrations.transformers"
    record = (
        {"quantization_config": {"quant_method": method, "version": CONFIG_VERSION, "layers": layers}}
        if layers
        else {}
    )
    (folder / "config.json").write_text(json.dumps({**config, **record}))
    if shards == 1:
        save_file(parts, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(list(parts.items())[number::shards])
        save_file(own, folder / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_file(path: Path, weights: Weights) -> Path:
    """Write a file of lowmem's."""
    from lowmem.io.lowmem_file import write_tensors_returning_digest

    parts: dict[str, Tensor] = {}
    layers = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            parts |= {f"{name}_packed": weight.packed, f"{name}_scales": weight.scales.view(torch.uint8)}
            layers[parameter_record_key(name)] = form_to_record_dict(CodedForm.from_quantized_tensor(weight))
        else:
            parts[name] = weight
    write_tensors_returning_digest(path, parts, {"kind": "model", "layers": layers})
    return path
