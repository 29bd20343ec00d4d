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

from lowmem.errors import is_one_of, printable, quoted, refusal, refusing, show
from lowmem.io.atomic import check_writable, open_regular, read_into
from lowmem.io.formats.exported import Exported
from lowmem.io.formats.gguf.blocks import BLOCKS, DENSE, KINDS
from lowmem.io.formats.gguf.container import Field, Placed, encode_field, write_file
from lowmem.io.formats.gguf.encoding import (
    AGAIN,
    dense_rows,
    exact_rows,
    inexact,
    nearest,
    nearest_format,
    rows_of,
)
from lowmem.io.formats.gguf.fields import Existing, architecture_of, model_fields, read_existing, rope_factors
from lowmem.io.formats.gguf.names import Names, names_of
from lowmem.io.formats.gguf.tokenizer import tokenizer_fields
from lowmem.io.formats.stored_model import StoredModel, open_stored
from lowmem.io.shards import StoredWeight
from lowmem.quant.tensor import QuantizedTensor

NO_TOKENIZER = (
    "no tokenizer is written, since the source has none: llama.cpp takes token ids alone; --like copies one"
)

_REMEDY = "--requantize writes what is nearest and prints the error, --dtype f32 writes all of it dense"


_LAYER = re.compile(r"blk\.(\d+)\.")

_Values = QuantizedTensor | Tensor


@dataclass(frozen=True)
class _Plan:
    """What becomes of a weight."""

    weight: StoredWeight
    placed: Placed
    order: Tensor | None
    """The source's row for each row of the file; None: as they are."""
    convert: Callable[[_Values], tuple[_Values | None, Tensor]]
    """Returns what the file holds, or None where that is the same, and its bytes in the order of the source."""


def write_gguf(
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
        raise ValueError(f"dtype={show(dtype)} is none of {', '.join(map(str, DENSE))}")
    check_writable(out)
    with ExitStack() as stack:
        model = stack.enter_context(open_stored(source))
        existing = None
        if like is not None:
            existing = read_existing(Path(like), stack.enter_context(open_regular(Path(like))))
        names, numbers = _names(model, existing)
        plans = _plans(model, names, requantize, dtype)
        found = {plan.placed.name: plan.placed.shape for plan in plans}
        said_by = "config.json" if existing is None else quoted(existing.path)
        _check(model, names, numbers, found, said_by)
        computed = _computed(model, names, existing)
        fields = _fields(model, existing, numbers, plans)
        placed = [one for one, _ in computed] + [plan.placed for plan in plans]
        rows: list[Exported] = []
        measured = requantize or dtype is not None
        write_file(out, fields, placed, _contents(computed, plans, measured, rows, progress))
    return sorted(rows, key=lambda row: row.name)


def _names(model: StoredModel, existing: Existing | None) -> tuple[Names, dict[str, Any]]:
    """Return the names of the model's weights, and its numbers by key, from its config or the existing file."""
    config = model.config
    if existing is None:
        if config is None:
            why = (
                "it has no config.json beside it: export the model's folder, or name an existing GGUF file by --like"
            )
            raise refusal(model.path, why, "export")
        with refusing(model.folder or model.path, "export"):
            numbers: dict[str, Any] = {"general.architecture": architecture_of(config), **model_fields(config)}
            return names_of(numbers), numbers
    if config is not None:
        with refusing(model.folder or model.path, "export"):
            existing.check(config)
    with refusing(existing.path, "copy from"):
        return names_of(existing.header.metadata), existing.header.metadata


def _plans(model: StoredModel, names: Names, requantize: bool, dtype: torch.dtype | None) -> list[_Plan]:
    """Return what becomes of each weight, in the order of the file."""
    plans: list[_Plan] = []
    refused: dict[str, list[str]] = {}  # names by form and reason
    for weight in model.weights.values():
        with refusing(model.path, "export"):
            name = names.file_name(weight.name)
            order = names.row_order(name, weight.shape[0] if weight.shape else 0)
        try:
            kind, convert = _kind(weight, requantize, dtype)
        except ValueError as reason:
            refused.setdefault(f"in {weight.kept}, {reason}", []).append(weight.name)
            continue
        rows = None if order is None else torch.argsort(order)
        plans.append(_Plan(weight, Placed(name, weight.shape, kind), rows, convert))
    if refused:
        raise refusal(model.path, f"{_listed(refused)}: {_REMEDY}", "export")
    return sorted(plans, key=lambda plan: _place(plan.placed.name))


def _listed(refused: Mapping[str, list[str]]) -> str:
    parts = [f"{printable(names[0], 60)} and {len(names) - 1} more {why}" for why, names in refused.items()]
    more = f"; and {len(parts) - 2} other kinds" if len(parts) > 2 else ""
    return "; ".join(parts[:2]).replace(" and 0 more", "") + more


def _kind(
    weight: StoredWeight, requantize: bool, dtype: torch.dtype | None
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
        return DENSE[dtype], partial(_dense, dtype)
    assert not isinstance(form, torch.dtype)
    reason = inexact(form, weight.shape[-1])
    if weight.order is not None or weight.transposed:
        reason = f"its {'rows' if weight.order is None else 'columns'} are stored in another order"
    elif reason is None:
        stored = weight.read()
        assert isinstance(stored, QuantizedTensor)
        if (found := exact_rows(stored)) is not None:
            return found[0], _exact
        reason = "its scales are no powers of two times 6" if form.format == "fp4" else "its scales exceed float16"
    if not requantize:
        raise ValueError(reason)
    if weight.shape[-1] % 32:
        return DENSE[torch.float16], partial(_dense, torch.float16)
    values = weight.plain()
    format = nearest_format(values) if isinstance(values, QuantizedTensor) else AGAIN[form.bits]
    return KINDS[format], partial(_nearest, format)


def _exact(before: QuantizedTensor) -> tuple[None, Tensor]:
    found = exact_rows(before)
    assert found is not None
    return None, found[1]


def _nearest(format: str, before: _Values) -> tuple[QuantizedTensor, Tensor]:
    blocks = nearest(before, format)
    return blocks, rows_of(blocks)


def _dense(dtype: torch.dtype, before: _Values) -> tuple[Tensor, Tensor]:
    after = before.dequantize(dtype) if isinstance(before, QuantizedTensor) else before.to(dtype)
    if dtype is torch.float16 and not bool(after.isfinite().all()):
        values = before.dequantize() if isinstance(before, QuantizedTensor) else before
        if bool(values.isfinite().all()):
            raise ValueError("it has values beyond float16; write it with --dtype bf16 or f32")
    return after, dense_rows(after)


def _place(name: str) -> tuple[int, int, str]:
    """Return by what tensors are sorted: the embedding, the layers, the rest."""
    found = _LAYER.match(name)
    return (1, int(found[1]), name) if found else (0 if name.startswith("token_embd") else 2, 0, name)


def _check(
    model: StoredModel, names: Names, numbers: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], said_by: str
) -> None:
    """Raise a FileError unless the weights, and their rows and columns, are those that the numbers describe."""

    def refuse(why: str) -> None:
        raise refusal(model.path, why, "export")

    arch = names.architecture
    layers = numbers.get(f"{arch}.block_count")
    if type(layers) is not int or not 1 <= layers < 10**6:
        raise refusal(model.path, f"{arch}.block_count={show(layers)} must be a number of layers", "export")
    wanted = ["token_embd.weight", "output_norm.weight"]
    wanted += [
        f"blk.{layer}.{part}.weight" for layer in range(min(layers, len(found))) for part in names.family.parts
    ]
    if (model.config or {}).get("tie_word_embeddings") is False and "lm_head.weight" not in model.tied:
        wanted.append("output.weight")
    for name in wanted:
        if name not in found:
            refuse(f"it has no weight for {name}, which a {arch} of {layers} layers has")
    hidden, inner, heads, keys, head, vocabulary = (
        numbers.get(f"{arch}.{key}")
        for key in (
            *("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
            *("attention.key_length", "vocab_size"),
        )
    )
    queries = heads * head if type(heads) is type(head) is int else None  # None: the numbers do not say it
    keys = keys * head if type(keys) is type(head) is int else None
    shapes: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("token_embd", "output"), (vocabulary, hidden)),
        **dict.fromkeys(("output_norm", "attn_norm", "ffn_norm"), (hidden,)),
        **dict.fromkeys(("attn_k", "attn_v"), (keys, hidden)),
        "attn_q": (queries, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for name, shape in found.items():
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= layers:
            refuse(f"it has {name}, and {arch}.block_count is {layers}; repair config.json")
        *_, part, kind = name.split(".")
        said = shapes.get(part, ())
        said = said if kind == "weight" else said[:1]
        if said and (len(shape) != len(said) or any(b not in (a, None) for a, b in zip(shape, said, strict=True))):
            refuse(f"{name} has the shape {show(shape)}, and {said_by} says {show(said)}: they are of two models")


def _computed(model: StoredModel, names: Names, existing: Existing | None) -> list[tuple[Placed, Tensor]]:
    """Return the tensors, with their bytes, that the model in transformers computes itself, and llama.cpp reads."""
    if existing is None:
        with refusing(model.folder or model.path, "export"):
            factors = rope_factors(model.config or {})
        return (
            [] if factors is None else [(Placed("rope_freqs.weight", tuple(factors.shape), 0), dense_rows(factors))]
        )
    found = []
    for tensor in existing.header.tensors.values():
        with refusing(existing.path, "copy from"):
            if names.model_name(tensor.name) is not None:
                continue
        if not tensor.nbytes:
            raise refusal(existing.path, f"tensor {show(tensor.name)} has an unknown type; name another file")
        content = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu")
        read_into(existing.path, existing.file, tensor.begin, content.numpy().data)
        found.append((Placed(tensor.name, tensor.shape, tensor.type), content))
    return found


def _fields(
    model: StoredModel, existing: Existing | None, numbers: Mapping[str, Any], plans: list[_Plan]
) -> dict[str, bytes]:
    """Return the metadata of the file."""
    rows = next(plan.placed.shape[0] for plan in plans if plan.placed.name == "token_embd.weight")
    kinds = [plan.placed.type for plan in plans if len(plan.placed.shape) > 1]
    arch = str(numbers["general.architecture"])
    fields: dict[str, Field] = {
        "general.architecture": arch,
        "general.file_type": BLOCKS[max(kinds, key=kinds.count)].file_type or 0,
        "general.quantization_version": 2,
    }
    copied: dict[str, bytes] = {}
    if existing is None:
        assert model.folder is not None
        own = {key: value for key, value in numbers.items() if key not in fields}
        fields |= {"general.type": "model", **own, **tokenizer_fields(model.folder, model.config or {}, rows)}
    else:
        existing.check_tokens(rows)
        copied = existing.fields
    if "tokenizer.ggml.model" not in {**fields, **copied}:
        warnings.warn(NO_TOKENIZER, UserWarning, stacklevel=2)
        fields |= {"tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": rows}
    return {key: encode_field(key, value) for key, value in fields.items()} | copied


def _contents(
    computed: list[tuple[Placed, Tensor]],
    plans: list[_Plan],
    measured: bool,
    rows: list[Exported],
    progress: Callable[[str, int], None],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and bytes of each tensor, and add the rows."""
    for placed, content in computed:
        yield placed.name, content
    for plan in plans:
        weight, placed = plan.weight, plan.placed
        before = weight.plain()
        try:
            after, content = plan.convert(before)
        except ValueError as reason:
            raise ValueError(f"{printable(weight.name)}: {reason}") from reason
        content = content.view(placed.shape[0], -1)
        content = content if plan.order is None else content[plan.order]
        kind = BLOCKS[placed.type].name
        rows.append(Exported.compare(weight, placed.name, kind, before, after, placed.nbytes, measured))
        del before, after
        yield placed.name, content.flatten()
        del content
        progress(weight.name, weight.nbytes)
