"""Writes GGUF files, for llama.cpp and what is built on it: codes as they are, one weight at a time."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import file_error, is_one_of, printable_line, quoted_path, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import check_writable, open_regular_file, read_exactly_into
from lowmem.io.formats.export_results import Exported
from lowmem.io.formats.gguf.gguf_block_types import BLOCKS, DENSE, KINDS
from lowmem.io.formats.gguf.gguf_encoding import (
    AGAIN,
    block_row_bytes,
    exact_type_and_row_bytes_or_none,
    flat_dense_bytes,
    form_mismatch_reason_or_none,
    nearest_gguf_format,
    nearest_gguf_weight,
)
from lowmem.io.formats.gguf.gguf_file import GGUFTensorInfo, GGUFValue, encode_metadata_field, write_new_gguf_file
from lowmem.io.formats.gguf.gguf_metadata import (
    OpenGGUFMetadataSource,
    gguf_architecture_of_model_type_or_raise,
    gguf_model_fields,
    llama3_rope_factors_or_none,
    read_copyable_gguf_metadata,
)
from lowmem.io.formats.gguf.gguf_tensor_names import GGUFTransformersNameMap, tensor_name_map_from_metadata
from lowmem.io.formats.gguf.gguf_tokenizer_fields import tokenizer_and_chat_template_fields
from lowmem.io.formats.lazy_model import LazyModelContent, open_lazy_model
from lowmem.io.shards import LazyWeight
from lowmem.quant.tensor import QuantizedTensor

NO_TOKENIZER = (
    "no tokenizer is written, since the source has none: llama.cpp takes token ids alone; --like copies one"
)

_REMEDY = "--requantize writes what is nearest and prints the error, --dtype f32 writes all of it dense"


_LAYER = re.compile(r"blk\.(\d+)\.")

_Values = QuantizedTensor | Tensor


@dataclass(frozen=True)
class _GGUFWeightPlan:
    """What becomes of a weight."""

    weight: LazyWeight
    placed: GGUFTensorInfo
    order: Tensor | None
    """The source's row for each row of the file; None: as they are."""
    convert: Callable[[_Values], tuple[_Values | None, Tensor]]
    """Returns what the file holds, or None where that is the same, and its bytes in the order of the source."""


def export_gguf(
    source: Path,
    out: Path,
    *,
    requantize: bool = False,
    like: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Exported]:
    """Write a model as a GGUF file, as ``export`` does.

    Weights whose levels, blocks and scales a type of GGUF has are written code for code: "q4_0", "iq4_nl", "uint4"
    and "q8_0" in blocks of a multiple of 32 with float16 scales, "uint4" and "iq4_nl" with the scales of Q4_K and
    IQ4_XS, and "fp4" whose scales are 6 times a power of two. Others become the nearest that is exact: with rounded
    scales, as IQ4_NL, or as Q8_0 what is stored in 8 bits. Dense matrices stay in their dtype; vectors become
    float32. The rows of q and k are put into llama.cpp's order. The same source gives the same bytes.

    Warns:
        UserWarning: the file has no tokenizer.
    """
    if dtype is not None and not is_one_of(dtype, DENSE):
        raise ValueError(f"dtype={short_repr(dtype)} is none of {', '.join(map(str, DENSE))}")
    check_writable(out)
    with ExitStack() as stack:
        model = stack.enter_context(open_lazy_model(source))
        existing = None
        if like is not None:
            existing = read_copyable_gguf_metadata(Path(like), stack.enter_context(open_regular_file(Path(like))))
        names, numbers = checked_name_map_and_metadata(model, existing)
        plans = _sorted_weight_plans_or_refuse(model, names, requantize, dtype)
        weight_shapes = {plan.placed.name: plan.placed.shape for plan in plans}
        described_by = "config.json" if existing is None else quoted_path(existing.path)
        check_weights_match_metadata(model, names, numbers, weight_shapes, described_by)
        computed = (
            _rope_factor_tensors_and_bytes(model)
            if existing is None
            else _read_copied_tensors_and_bytes(existing, names)
        )
        fields = _encoded_metadata_or_warn(model, existing, numbers, plans)
        placed = [computed_tensor for computed_tensor, _ in computed] + [plan.placed for plan in plans]
        rows: list[Exported] = []
        measured = requantize or dtype is not None
        write_new_gguf_file(
            out, fields, placed, _iterate_bytes_and_add_results(computed, plans, measured, rows, progress)
        )
    return sorted(rows, key=lambda row: row.name)


def checked_name_map_and_metadata(
    model: LazyModelContent, existing: OpenGGUFMetadataSource | None
) -> tuple[GGUFTransformersNameMap, dict[str, Any]]:
    """Return the names of the model's weights, and its numbers by key, from its config or the existing file."""
    config = model.config
    if existing is None:
        if config is None:
            why = (
                "it has no config.json beside it: export the model's folder, or name an existing GGUF file by --like"
            )
            raise file_error(model.path, why, "export")
        with value_errors_as_file_errors(model.folder or model.path, "export"):
            numbers: dict[str, Any] = {
                "general.architecture": gguf_architecture_of_model_type_or_raise(config),
                **gguf_model_fields(config),
            }
            return tensor_name_map_from_metadata(numbers), numbers
    if config is not None:
        with value_errors_as_file_errors(model.folder or model.path, "export"):
            existing.check_matches_config(config)
    with value_errors_as_file_errors(existing.path, "copy from"):
        return tensor_name_map_from_metadata(existing.header.metadata), existing.header.metadata


def _sorted_weight_plans_or_refuse(
    model: LazyModelContent, names: GGUFTransformersNameMap, requantize: bool, dtype: torch.dtype | None
) -> list[_GGUFWeightPlan]:
    """Return what becomes of each weight, in the order of the file."""
    plans: list[_GGUFWeightPlan] = []
    # Names by form and reason
    refused: dict[str, list[str]] = {}
    for weight in model.weights.values():
        with value_errors_as_file_errors(model.path, "export"):
            name = names.gguf_name(weight.name)
            order = names.file_rows_in_model_order_or_none(name, weight.shape[0] if weight.shape else 0)
        try:
            kind, convert = _block_type_and_converter(weight, requantize, dtype)
        except ValueError as reason:
            refused.setdefault(f"in {weight.form_name}, {reason}", []).append(weight.name)
            continue
        if shift := names.value_shift(name):
            convert = partial(_shifted_vector_bytes, shift)
        rows = None if order is None else torch.argsort(order)
        plans.append(_GGUFWeightPlan(weight, GGUFTensorInfo(name, weight.shape, kind), rows, convert))
    if refused:
        raise file_error(model.path, f"{_refused_weights_message(refused)}: {_REMEDY}", "export")
    return sorted(plans, key=lambda plan: _embedding_layers_rest_sort_key(plan.placed.name))


def _refused_weights_message(names_by_reason: Mapping[str, list[str]]) -> str:
    parts = [
        f"{printable_line(names[0], 60)} and {len(names) - 1} more {why}" for why, names in names_by_reason.items()
    ]
    more = f"; and {len(parts) - 2} other kinds" if len(parts) > 2 else ""
    return "; ".join(parts[:2]).replace(" and 0 more", "") + more


def _block_type_and_converter(
    weight: LazyWeight, requantize: bool, dtype: torch.dtype | None
) -> tuple[int, Callable[[Any], tuple[_Values | None, Tensor]]]:
    """Return the type of a weight, and what converts its values to this type; a ValueError if no type holds it."""
    form, dims = weight.form, len(weight.shape)
    if not 1 <= dims <= 2:
        raise ValueError(f"a weight of {dims} dimensions has no place in this architecture")
    if isinstance(form, torch.dtype):
        if form not in DENSE and (dtype is None or not form.is_floating_point):
            raise ValueError(f"{form} is none of float32, float16 and bfloat16")
        dtype = torch.float32 if dims == 1 else dtype or form
    if dtype is not None:
        return DENSE[dtype], partial(_cast_tensor_and_bytes, dtype)
    assert not isinstance(form, torch.dtype)
    reason = form_mismatch_reason_or_none(form, weight.shape[-1])
    if weight.order is not None or weight.is_transposed:
        reason = f"its {'rows' if weight.order is None else 'columns'} are stored in another order"
    elif reason is None:
        stored = weight.read()
        assert isinstance(stored, QuantizedTensor)
        if (type_and_rows := exact_type_and_row_bytes_or_none(stored)) is not None:
            return type_and_rows[0], _none_and_exact_bytes
        reason = "its scales are no powers of two times 6" if form.format == "fp4" else "its scales exceed float16"
    if not requantize:
        raise ValueError(reason)
    if weight.shape[-1] % 32:
        return DENSE[torch.float16], partial(_cast_tensor_and_bytes, torch.float16)
    values = weight.weight_in_model_layout()
    format = nearest_gguf_format(values) if isinstance(values, QuantizedTensor) else AGAIN[form.bits]
    return KINDS[format], partial(_nearest_weight_and_bytes, format)


def _none_and_exact_bytes(weight: QuantizedTensor) -> tuple[None, Tensor]:
    type_and_rows = exact_type_and_row_bytes_or_none(weight)
    assert type_and_rows is not None
    return None, type_and_rows[1]


def _nearest_weight_and_bytes(format: str, weight: _Values) -> tuple[QuantizedTensor, Tensor]:
    blocks = nearest_gguf_weight(weight, format)
    return blocks, block_row_bytes(blocks)


def _cast_tensor_and_bytes(dtype: torch.dtype, weight: _Values) -> tuple[Tensor, Tensor]:
    after = weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)
    if dtype is torch.float16 and not bool(after.isfinite().all()):
        values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        if bool(values.isfinite().all()):
            raise ValueError("it has values beyond float16; write it with --dtype bf16 or f32")
    return after, flat_dense_bytes(after)


def _shifted_vector_bytes(shift: float, weight: _Values) -> tuple[None, Tensor]:
    """Return the bytes of a norm's weight as llama.cpp multiplies by it: what the model computes of it itself."""
    assert isinstance(weight, Tensor)
    return None, flat_dense_bytes(weight.float() + shift)


def _embedding_layers_rest_sort_key(gguf_name: str) -> tuple[int, int, str]:
    """Return by what tensors are sorted: the embedding, the layers, the rest."""
    match = _LAYER.match(gguf_name)
    return (1, int(match[1]), gguf_name) if match else (0 if gguf_name.startswith("token_embd") else 2, 0, gguf_name)


def check_weights_match_metadata(
    model: LazyModelContent,
    names: GGUFTransformersNameMap,
    metadata: Mapping[str, Any],
    weight_shapes: Mapping[str, tuple[int, ...]],
    described_by: str,
) -> None:
    """Raise a FileError unless the weights, and their rows and columns, are those that the numbers describe."""

    def refuse_export(reason: str) -> None:
        raise file_error(model.path, reason, "export")

    arch = names.architecture
    layers = metadata.get(f"{arch}.block_count")
    if type(layers) is not int or not 1 <= layers < 10**6:
        raise file_error(model.path, f"{arch}.block_count={short_repr(layers)} must be a number of layers", "export")
    wanted = ["token_embd.weight", "output_norm.weight"]
    wanted += [
        f"blk.{layer}.{part}.weight"
        for layer in range(min(layers, len(weight_shapes)))
        for part in names.family.parts
    ]
    if (model.config or {}).get("tie_word_embeddings") is False and "lm_head.weight" not in model.tied:
        wanted.append("output.weight")
    for name in wanted:
        if name not in weight_shapes:
            refuse_export(f"it has no weight for {name}, which a {arch} of {layers} layers has")
    hidden, inner, heads, keys, head, vocabulary = (
        metadata.get(f"{arch}.{key}")
        for key in (
            *("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
            *("attention.key_length", "vocab_size"),
        )
    )
    # None: the numbers do not say it
    queries = heads * head if type(heads) is type(head) is int else None
    keys = keys * head if type(keys) is type(head) is int else None
    shapes: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("token_embd", "output"), (vocabulary, hidden)),
        **dict.fromkeys(("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"), (hidden,)),
        **dict.fromkeys(("attn_k", "attn_v"), (keys, hidden)),
        "attn_q": (queries, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for name, shape in weight_shapes.items():
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= layers:
            refuse_export(f"it has {name}, and {arch}.block_count is {layers}; repair config.json")
        *_, part, kind = name.split(".")
        expected_shape = shapes.get(part, ())
        expected_shape = expected_shape if kind == "weight" else expected_shape[:1]
        if expected_shape and (
            len(shape) != len(expected_shape)
            or any(b not in (a, None) for a, b in zip(shape, expected_shape, strict=True))
        ):
            refuse_export(
                f"{name} has the shape {short_repr(shape)}, and {described_by} says {short_repr(expected_shape)}: "
                "they are of two models"
            )


def _rope_factor_tensors_and_bytes(model: LazyModelContent) -> list[tuple[GGUFTensorInfo, Tensor]]:
    """Return the tensor of rope's factors, with its bytes, of a model that has them: transformers computes them."""
    with value_errors_as_file_errors(model.folder or model.path, "export"):
        factors = llama3_rope_factors_or_none(model.config or {})
    if factors is None:
        return []
    return [(GGUFTensorInfo("rope_freqs.weight", tuple(factors.shape), 0), flat_dense_bytes(factors))]


def _read_copied_tensors_and_bytes(
    existing: OpenGGUFMetadataSource, names: GGUFTransformersNameMap
) -> list[tuple[GGUFTensorInfo, Tensor]]:
    """Return the tensors of an existing file, with their bytes, that models in transformers compute themselves."""
    copied_tensors = []
    for tensor in existing.header.tensors.values():
        with value_errors_as_file_errors(existing.path, "copy from"):
            if names.transformers_name_or_none(tensor.name) is not None:
                continue
        if not tensor.nbytes:
            raise file_error(
                existing.path, f"tensor {short_repr(tensor.name)} has an unknown type; name another file"
            )
        content = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu")
        read_exactly_into(existing.path, existing.file, tensor.begin, content.numpy().data)
        copied_tensors.append((GGUFTensorInfo(tensor.name, tensor.shape, tensor.type), content))
    return copied_tensors


def _encoded_metadata_or_warn(
    model: LazyModelContent,
    existing: OpenGGUFMetadataSource | None,
    metadata: Mapping[str, Any],
    plans: list[_GGUFWeightPlan],
) -> dict[str, bytes]:
    """Return the metadata of the file."""
    rows = next(plan.placed.shape[0] for plan in plans if plan.placed.name == "token_embd.weight")
    kinds = [plan.placed.type for plan in plans if len(plan.placed.shape) > 1]
    arch = str(metadata["general.architecture"])
    fields: dict[str, GGUFValue] = {
        "general.architecture": arch,
        "general.file_type": BLOCKS[max(kinds, key=kinds.count)].file_type or 0,
        "general.quantization_version": 2,
    }
    copied: dict[str, bytes] = {}
    if existing is None:
        assert model.folder is not None
        config_fields = {key: value for key, value in metadata.items() if key not in fields}
        fields |= {
            "general.type": "model",
            **config_fields,
            **tokenizer_and_chat_template_fields(model.folder, model.config or {}, rows),
        }
    else:
        existing.check_tokenizer_fields(rows)
        copied = existing.fields
    if "tokenizer.ggml.model" not in {**fields, **copied}:
        warnings.warn(NO_TOKENIZER, UserWarning, stacklevel=2)
        fields |= {"tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": rows}
    return {key: encode_metadata_field(key, value) for key, value in fields.items()} | copied


def _iterate_bytes_and_add_results(
    computed: list[tuple[GGUFTensorInfo, Tensor]],
    plans: list[_GGUFWeightPlan],
    measured: bool,
    results: list[Exported],
    progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and bytes of each tensor, and add the rows."""
    for placed, content in computed:
        yield placed.name, content
    for plan in plans:
        weight, placed = plan.weight, plan.placed
        before = weight.weight_in_model_layout()
        try:
            after, content = plan.convert(before)
        except ValueError as reason:
            raise ValueError(f"{printable_line(weight.name)}: {reason}") from reason
        content = content.view(placed.shape[0], -1)
        content = content if plan.order is None else content[plan.order]
        kind = BLOCKS[placed.type].name
        results.append(Exported.compare(weight, placed.name, kind, before, after, placed.nbytes, measured))
        del before, after
        yield placed.name, content.flatten()
        del content
        progress(weight.name, weight.nbytes)
