"""Writes GGUF files, for llama.cpp and what is built on it: codes as they are, one weight at a time."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import FileError, printable, quoted, refusal, show
from lowmem.io.atomic import check_writable, open_regular, read_into
from lowmem.io.formats.exported import Exported
from lowmem.io.formats.gguf.blocks import BLOCKS, DENSE, EIGHT_BIT, KINDS, SUPERBLOCKS
from lowmem.io.formats.gguf.container import Field, Placed, encode_field, write_file
from lowmem.io.formats.gguf.encoding import (
    dense_rows,
    eight_bit_rows,
    in_blocks,
    inexact,
    nearest,
    nearest_format,
    rows_of,
)
from lowmem.io.formats.gguf.fields import Existing, architecture_of, model_fields, read_existing, rope_factors
from lowmem.io.formats.gguf.names import Names, names_of
from lowmem.io.formats.gguf.superblocks import superblock_rows
from lowmem.io.formats.gguf.tokenizer import tokenizer_fields
from lowmem.io.formats.stored_model import StoredModel, StoredWeight, open_stored
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["NO_TOKENIZER", "write_gguf"]

NO_TOKENIZER = (
    "no tokenizer is written, since the source has none: llama.cpp takes token ids alone; --like copies one"
)

_REMEDY = "--requantize writes what is nearest and prints the error, --dtype f32 writes all of it dense"


@dataclass(frozen=True)
class _Plan:
    """What becomes of a weight."""

    weight: StoredWeight
    placed: Placed
    order: Tensor | None
    """The source's row for each row of the file; None: as they are."""
    again: bool
    """Whether it is quantized again."""


def write_gguf(
    source: Path,
    out: Path,
    *,
    requantize: bool = False,
    like: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Exported]:
    """Write a model as a GGUF file.

    Weights whose levels, blocks and scales a type of GGUF has are written code for code: "q4_0", "iq4_nl" and "uint4"
    in blocks of a multiple of 32 with float16 scales, "uint4" and "iq4_nl" with the scales of Q4_K and IQ4_XS, and
    "fp4" whose scales are 6 times a power of two. Dense
    matrices stay in their dtype; vectors become float32. The rows of q and k are put into llama.cpp's order. The same
    source gives the same bytes.

    Args:
        source: a folder or file that lowmem wrote, or a dense folder.
        out: where nothing is yet.
        requantize: whether to write what is not exact as the nearest that is: with rounded scales, as IQ4_NL, or
            as Q8_0 what is stored in 8 bits.
        like: an existing file of the same model, whose fields are copied; None: they come from the folder.
        dtype: of matrices: write all of them dense in it.
        progress: called with the name of each finished weight and its bytes in the source.

    Returns:
        A row for each weight, sorted by name.

    Raises:
        ValueError: what GGUF cannot hold, by name; a dtype that it has not. Nothing is written.
        FileError: the source or ``like`` is damaged, or of an architecture that lowmem does not write.
        FileExistsError: something is at ``out``.
        OSError: a file cannot be read or written.

    Warns:
        UserWarning: the file has no tokenizer.
    """
    if dtype is not None and dtype not in DENSE:
        raise ValueError(f"dtype={dtype} is none of {', '.join(map(str, DENSE))}")
    check_writable(out)
    with ExitStack() as stack:
        model = stack.enter_context(open_stored(source))
        existing, file = None, None
        if like is not None:
            file = stack.enter_context(open_regular(Path(like)))
            existing = read_existing(Path(like), file)
        names, numbers = _names(model, existing)
        plans = _plans(model, names, requantize, dtype)
        found = {plan.placed.name: plan.placed.shape for plan in plans}
        said_by = "config.json" if existing is None else quoted(existing.path)
        _check(model, names, numbers, found, said_by)
        computed = _computed(model, names, existing, file)
        fields = _fields(model, existing, numbers, plans)
        placed = [one for one, _ in computed] + [plan.placed for plan in plans]
        rows: list[Exported] = []
        measured = requantize or dtype is not None
        write_file(out, fields, placed, _contents(computed, plans, dtype, measured, rows, progress))
    return sorted(rows, key=lambda row: row.name)


def _names(model: StoredModel, existing: Existing | None) -> tuple[Names, dict[str, Any]]:
    """Return the names of the model's weights, and its numbers by key, from its config or the existing file."""
    numbers: dict[str, Any]
    if model.config is None and existing is None:
        why = "it has no config.json beside it: export the model's folder, or name an existing GGUF file by --like"
        raise refusal(model.path, why, "export")
    if existing is not None:
        if model.config is not None:
            _of_config(model, lambda: existing.check(model.config or {}))
        numbers = existing.header.metadata
        try:
            return names_of(numbers), numbers
        except ValueError as reason:
            raise refusal(existing.path, str(reason), "copy from") from None
    config = model.config or {}
    numbers = {
        "general.architecture": _of_config(model, lambda: architecture_of(config)),
        **_of_config(model, lambda: model_fields(config)),
    }
    return names_of(numbers), numbers


def _of_config(model: StoredModel, read: Callable[[], Any]) -> Any:
    """Return what is made of config.json; its errors name the folder."""
    try:
        return read()
    except FileError:
        raise
    except ValueError as reason:
        raise refusal(model.folder or model.path, str(reason), "export") from None


def _plans(model: StoredModel, names: Names, requantize: bool, dtype: torch.dtype | None) -> list[_Plan]:
    """Return what becomes of each weight, in the order of the file."""
    plans: list[_Plan] = []
    refused: dict[str, list[str]] = {}  # names by form and reason
    for weight in model.weights.values():
        try:
            name = names.file_name(weight.name)
            order = names.row_order(name, weight.shape[0] if weight.shape else 0)
        except ValueError as reason:
            raise refusal(model.path, str(reason), "export") from None
        order = None if order is None else torch.argsort(order)
        try:
            kind, again = _kind(weight, requantize, dtype)
        except ValueError as reason:
            refused.setdefault(f"in {weight.kept}, {reason}", []).append(weight.name)
            continue
        plans.append(_Plan(weight, Placed(name, weight.shape, kind), order, again))
    if refused:
        raise refusal(model.path, f"{_listed(refused)}: {_REMEDY}", "export")
    return sorted(plans, key=lambda plan: _place(plan.placed.name))


def _listed(refused: Mapping[str, list[str]]) -> str:
    parts = [f"{printable(names[0], 60)} and {len(names) - 1} more {why}" for why, names in refused.items()]
    more = f"; and {len(parts) - 2} other kinds" if len(parts) > 2 else ""
    return "; ".join(parts[:2]).replace(" and 0 more", "") + more


def _kind(weight: StoredWeight, requantize: bool, dtype: torch.dtype | None) -> tuple[int, bool]:
    """Return the type of a weight, and whether it is quantized again.

    Raises:
        ValueError: no type holds it.
    """
    form, dims = weight.form, len(weight.shape)
    if not 1 <= dims <= 2:
        raise ValueError(f"a weight of {dims} dimensions has no place in this architecture")
    if isinstance(form, torch.dtype):
        if form not in DENSE and (dtype is None or not form.is_floating_point):
            raise ValueError(f"{form} is none of float32, float16 and bfloat16")
        return (0, False) if dims == 1 else (DENSE[dtype or form], False)
    if dtype is not None:
        return DENSE[dtype], False
    reason = inexact(form, weight.shape[-1])
    if weight.order is not None or weight.transposed:
        reason = f"its {'rows' if weight.order is None else 'columns'} are stored in another order"
    elif reason is None:
        stored = weight.read()
        assert isinstance(stored, QuantizedTensor)
        if in_blocks(stored) is not None:
            return KINDS[form.format], False
        if superblock_rows(stored) is not None:
            return SUPERBLOCKS[form.format], False
        reason = "its scales are no powers of two times 6" if form.format == "fp4" else "its scales exceed float16"
    if not requantize:
        raise ValueError(reason)
    if weight.shape[-1] % 32:
        return DENSE[torch.float16], True
    if form.bits > 4:
        return EIGHT_BIT, True
    stored = weight.plain()
    format = nearest_format(stored) if isinstance(stored, QuantizedTensor) else "iq4_nl"
    return KINDS[format], True


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


def _computed(
    model: StoredModel, names: Names, existing: Existing | None, file: BufferedReader | None
) -> list[tuple[Placed, Tensor]]:
    """Return the tensors, with their bytes, that the model in transformers computes itself, and llama.cpp reads."""
    if model.config is not None and existing is None:
        factors = _of_config(model, lambda: rope_factors(model.config or {}))
        if factors is None:
            return []
        return [(Placed("rope_freqs.weight", tuple(factors.shape), 0), dense_rows(factors))]
    assert existing is not None
    assert file is not None
    found = []
    for tensor in existing.header.tensors.values():
        try:
            if names.model_name(tensor.name) is not None:
                continue
        except ValueError as reason:
            raise refusal(existing.path, str(reason), "copy from") from None
        if tensor.nbytes is None:
            raise refusal(existing.path, f"tensor {show(tensor.name)} has an unknown type; name another file")
        content = torch.empty(tensor.nbytes, dtype=torch.uint8)
        read_into(existing.path, file, tensor.begin, content.numpy().data)
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
    if existing is None:
        assert model.folder is not None
        assert model.config is not None
        own = {key: value for key, value in numbers.items() if key not in fields}
        tokens = tokenizer_fields(model.folder, model.config, rows)
        fields |= {"general.type": "model", **own, **(tokens or {})}
    else:
        existing.check_tokens(rows)
    copied = {} if existing is None else existing.fields
    if not {"tokenizer.ggml.model"} & {*fields, *copied}:
        warnings.warn(NO_TOKENIZER, UserWarning, stacklevel=2)
        fields |= {"tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": rows}
    return {key: encode_field(key, value) for key, value in fields.items()} | copied


def _contents(
    computed: list[tuple[Placed, Tensor]],
    plans: list[_Plan],
    dtype: torch.dtype | None,
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
            after, content = _converted(before, plan)
        except ValueError as reason:
            raise ValueError(f"{printable(weight.name)}: {reason}") from reason
        content = content.view(placed.shape[0], -1)
        content = content if plan.order is None else content[plan.order]
        rows.append(
            Exported.compare(weight, placed.name, BLOCKS[placed.type].name, before, after, placed.nbytes, measured)
        )
        del before, after
        yield placed.name, content.flatten()
        del content
        progress(weight.name, weight.nbytes)


def _converted(before: QuantizedTensor | Tensor, plan: _Plan) -> tuple[QuantizedTensor | Tensor | None, Tensor]:
    """Return what the file holds, or None where that is the same, and its bytes in the order of the source.

    Raises:
        ValueError: values beyond the type's.
    """
    kind = plan.placed.type
    dtype = next((one for one, number in DENSE.items() if number == kind), None)
    if dtype is None:
        if not plan.again:
            assert isinstance(before, QuantizedTensor)
            blocks = None if kind in SUPERBLOCKS.values() else in_blocks(before)
            rows = superblock_rows(before) if blocks is None else rows_of(blocks)
            assert rows is not None
            return None, rows
        if kind == EIGHT_BIT:
            assert isinstance(before, QuantizedTensor)
            return eight_bit_rows(before)
        blocks = nearest(before, BLOCKS[kind].format or "")
        return blocks, rows_of(blocks)
    after = before.dequantize(dtype) if isinstance(before, QuantizedTensor) else before.to(dtype)
    if dtype is torch.float16 and not bool(after.isfinite().all()):
        values = before.dequantize() if isinstance(before, QuantizedTensor) else before
        if bool(values.isfinite().all()):
            raise ValueError("it has values beyond float16; write it with --dtype bf16 or f32")
    return after, dense_rows(after)


_LAYER = re.compile(r"blk\.(\d+)\.")
