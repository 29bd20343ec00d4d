"""Tiny models in folders as other programs quantize them, beside dense ones of the same values."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowmem
from tests.integrations.transformers.folders import change_config, write
from tests.io.formats import test_gptq_awq
from tests.io.formats.written import words

GROUP = 32

Made = tuple[dict[str, Tensor], Tensor]


def gptq(seed: int, rows: int, columns: int) -> Made:
    return test_gptq_awq.layer(seed, columns, rows, GROUP)


def gptq_by_activations(seed: int, rows: int, columns: int) -> Made:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) // GROUP
    return test_gptq_awq.layer(seed, columns, rows, GROUP, order=order)


def awq(seed: int, rows: int, columns: int) -> Made:
    zeros = torch.randint(0, 16, (columns // GROUP, rows), generator=torch.Generator().manual_seed(seed))
    parts, weight = test_gptq_awq.awq_layer(seed, columns, rows, GROUP, zeros)
    return {name.removeprefix("q."): value for name, value in parts.items()}, weight


def compressed(seed: int, rows: int, columns: int) -> Made:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    scales = torch.rand(rows, columns // GROUP, generator=generator) + 0.01
    parts = {"weight_packed": words(codes), "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
    return parts, (codes - 8).float() * scales.repeat_interleave(GROUP, -1)


METHODS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "gptq desc_act": (
        gptq_by_activations,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
}


def is_layer(name: str) -> bool:
    """Whether a folder's tensor is a weight that quantizers take: of linear layers inside the blocks."""
    return (
        name.endswith(".weight")
        and ("layers." in name or ".h." in name)
        and "norm" not in name
        and "gate." not in name
    )


def write_foreign(folder: Path, method: str, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """Write ``folder / "foreign"``, and ``folder / "dense"`` with the same values; return the first."""
    make, settings = METHODS[method]
    dense = write(folder / "dense", kind, dtype)
    quantized = folder / "foreign"
    state = load_file(dense / "model.safetensors")
    parts: dict[str, Tensor] = {}
    for number, (name, value) in enumerate(sorted(state.items())):
        if not is_layer(name) or value.dim() != 2:
            parts[name] = value
            continue
        conv1d = kind == "gpt2"  # whose weights are (in, out)
        rows, columns = reversed(value.shape) if conv1d else value.shape
        made, weight = make(number, rows, columns)
        parts |= {f"{name.removesuffix('weight')}{part}": one for part, one in made.items()}
        state[name] = (weight.T if conv1d else weight).contiguous()
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    quantized.mkdir()
    save_file(parts, quantized / "model.safetensors", {"format": "pt"})
    shutil.copy(dense / "config.json", quantized)
    change_config(quantized, quantization_config=settings)
    return quantized


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return all parameters in float32, dequantized; tied ones under each of their names."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = getattr(module, "part_parameter_names", ())
        names = [*getattr(module, "forms", ()), *(name for name in module._parameters if name not in parts)]
        for name in names:
            value = getattr(module, name)
            if value is not None:
                dense = value.dequantize(torch.float32) if isinstance(value, lowmem.StoredTensor) else value.float()
                found[f"{path}.{name}".lstrip(".")] = dense
    return found
