"""Files that other programs' own packages write, with the values that those packages say they hold, in float32.

Each maker writes one file of weights from a seed and returns the values by the names in the model. Codes and scales
are as random as the format allows, so that every code, and scales of both signs and of any size, occur.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Values = dict[str, Tensor]

GGUF_PLACES = {  # a tensor's name in GGUF, the module in transformers, and how it is stored
    "token_embd": ("model.embed_tokens", "Q5_1"),
    "output": ("lm_head", "F16"),
    "output_norm": ("model.norm", "BF16"),
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", "Q4_0"),
    "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", "IQ4_NL"),
    "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", "IQ4_XS"),
    "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", "MXFP4"),
    "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", "Q8_0"),
    "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", "Q6_K"),
    "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", "Q5_0"),
    "blk.1.attn_q": ("model.layers.1.self_attn.q_proj", "Q4_K"),
    "blk.1.attn_v": ("model.layers.1.self_attn.v_proj", "Q5_K"),
    "blk.1.ffn_down": ("model.layers.1.mlp.down_proj", "Q4_1"),
}
HEADS, KV_HEADS = 2, 1


def halves(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return float16 numbers of any sign and size, as bytes: (*shape, 2)."""
    values = random.standard_normal(shape) * 2.0 ** random.integers(-16, 4, shape)
    return values.astype(np.float16)[..., None].view(np.uint8)


def raw_blocks(kind: str, rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """Return blocks of random codes and scales: uint8 (rows, bytes)."""
    import gguf

    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = rows, columns // size
    raw = random.integers(0, 256, (*shape, nbytes), dtype=np.uint8)
    if kind in ("F16", "BF16", "F32"):
        values = torch.from_numpy(random.standard_normal((rows, columns)).astype(np.float32))
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
        return values.to(dtype).view(torch.uint8).numpy()
    if kind == "MXFP4":
        raw[..., 0] = random.integers(0, 253, shape)
    else:
        at = {"Q6_K": 208, "Q2_K": 80, "Q3_K": 108}.get(kind, 0)
        raw[..., at : at + 2] = halves(shape, random)
        if kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):
            raw[..., at + 2 : at + 4] = halves(shape, random)
    return np.ascontiguousarray(raw.reshape(rows, -1))


def gguf_values(kind: str, raw: np.ndarray) -> Tensor:
    """Return what the package gguf says that rows of blocks hold."""
    import gguf

    values = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def in_halves(values: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of q and k, as transformers does it (LlamaTensorProcessor)."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def gguf(path: Path, seed: int, rows: int = 4, columns: int = 256) -> Values:
    """Write a GGUF file with a tensor of each type that lowmem reads."""
    import gguf as package

    random = np.random.default_rng(seed)
    writer = package.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "\u00e9"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    expected = {}
    for place, (module, kind) in GGUF_PLACES.items():
        raw = raw_blocks(kind, rows, columns, random)
        values = gguf_values(kind, raw)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(place.rpartition(".")[2])
        expected[f"{module}.weight"] = values if heads is None else in_halves(values, heads)
        writer.add_tensor(f"{place}.weight", raw, raw_dtype=package.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def bitsandbytes(
    path: Path, seed: int, kind: str = "nf4", double: bool = False, shape: tuple[int, int] = (16, 64)
) -> Values:
    """Write a weight as bitsandbytes quantizes it and as transformers saves it."""
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-6, 3, (shape[0], 1), generator=generator).float())
    weight = torch.randn(shape, generator=generator) * scale
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    parts = {"layer.weight": packed}
    for name, value in state.as_dict(packed=True).items():
        parts[f"layer.weight.{name}"] = value
    save_file(parts, path)
    # Its own definition: the product of level and scale. On the CPU, dequantize_4bit of 0.50.2 is wrong where rows
    # are no multiples of 64 long, and its operator in plain torch is right.
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=-1).flatten()[: weight.numel()]
    blocks = scales.repeat_interleave(state.blocksize)[: weight.numel()]
    values = (state.code[nibbles.long()] * blocks).view(shape)
    if shape[1] % state.blocksize == 0:
        assert torch.equal(functional.dequantize_4bit(packed, state), values)
    return {"layer.weight": values}


def gpt_oss(path: Path, seed: int, experts: int = 2, rows: int = 4, columns: int = 64) -> Values:
    """Write a stack of experts in MXFP4 as gpt-oss has it; its values by transformers, transposed."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 253, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
    bias = torch.randn(experts, rows, generator=generator)
    save_file({"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales, "experts.bias": bias}, path)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"experts.down_proj": values, "experts.bias": bias}


def compressed_tensors(
    path: Path,
    seed: int,
    kind: str = "int4",
    group: int = 32,
    rows: int = 16,
    columns: int = 64,
    symmetric: bool = True,
) -> Values:
    """Write a layer as compressed-tensors packs it; its values by the same package."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator, columns = torch.Generator().manual_seed(seed), 64
    if kind == "int4":
        args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group)
        compressor = PackedQuantizationCompressor
        scales = torch.randn(rows, columns // group, generator=generator).abs() + 1e-3
        scales = scales if symmetric else scales.half()
        zeros = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8)
    else:
        args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
        args.scale_dtype = torch.uint8
        compressor = MXFP4PackedCompressor
        scales = torch.exp2(torch.randint(-20, 20, (rows, columns // 32), generator=generator).float())
        zeros = None
    wide = scales.repeat_interleave(columns // scales.shape[1], -1)
    state = {"weight": torch.randn(rows, columns, generator=generator) * 4 * wide, "weight_scale": scales}
    if kind == "int4" and not symmetric:
        state["weight_zero_point"] = zeros
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = compressor.compress(state, scheme)
    parts = {f"layer.{name}": value.contiguous() for name, value in packed.items()}
    save_file(parts, path)
    if kind == "int4":  # which is the dtype that it computes in
        packed["weight_scale"] = packed["weight_scale"].float()
    values = compressor.decompress(packed, scheme)["weight"]
    return {"layer.weight": values.float()}


PEFT_CONFIG = {
    "r": 2,
    "lora_alpha": 3,
    "use_rslora": True,
    "target_modules": ["fc", "embed", "conv"],
    "target_parameters": ["experts.up", "experts.down"],
    "exclude_modules": ["inner.fc"],
    "modules_to_save": ["head"],
    "rank_pattern": {"experts.d.*": 3},
    "alpha_pattern": {"^fc": 5},
    "bias": "lora_only",
}


def peft_folder(folder: Path, seed: int = 0) -> Tensor:
    """Write an adapter of ``LayerTensors`` as PEFT does, and return the outputs that PEFT computes with it."""
    from peft import LoraConfig, get_peft_model

    from tests.io.formats.peft_model import TOKENS, filled, parts

    torch.manual_seed(seed)
    model = get_peft_model(parts(), LoraConfig(**PEFT_CONFIG), autocast_adapter_dtype=False).eval()
    trained = torch.nn.ParameterList([one for one in model.parameters() if one.requires_grad])
    filled(trained, seed=1)
    model.save_pretrained(folder)
    with torch.no_grad():
        outputs: Tensor = model(TOKENS)
    save_file({"outputs": outputs}, folder / "outputs.safetensors")
    (folder / "README.md").unlink()
    return outputs


MAKERS: dict[str, Callable[[Path, int], Values]] = {
    "types.gguf": gguf,
    "bitsandbytes-nf4.safetensors": bitsandbytes,
    "bitsandbytes-nf4-double.safetensors": lambda path, seed: bitsandbytes(path, seed, "nf4", True),
    "bitsandbytes-fp4.safetensors": lambda path, seed: bitsandbytes(path, seed, "fp4"),
    "bitsandbytes-fp4-double.safetensors": lambda path, seed: bitsandbytes(path, seed, "fp4", True),
    "bitsandbytes-rows-of-40.safetensors": lambda path, seed: bitsandbytes(path, seed, "nf4", True, (16, 40)),
    "gpt-oss.safetensors": gpt_oss,
    "compressed-tensors-int4.safetensors": compressed_tensors,
    "compressed-tensors-asymmetric.safetensors": lambda path, seed: compressed_tensors(path, seed, symmetric=False),
    "compressed-tensors-mxfp4.safetensors": lambda path, seed: compressed_tensors(path, seed, "mxfp4"),
}
"""By the name of the file that is kept in ``tests/io/formats/samples``."""

PACKAGES = ("bitsandbytes", "compressed-tensors", "gguf", "peft", "transformers", "torch")


def samples_json(digests: dict[str, dict[str, str]], versions: dict[str, str]) -> str:
    return json.dumps({"versions": versions, "sha256": digests}, indent=1, sort_keys=True) + "\n"
