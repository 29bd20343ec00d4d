"""Finds the blocks of a model of transformers that C computes in one call, by what they do with random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from lowmem.inference.block import Block, Form, Projection
from lowmem.inference.parts import Norm, why_not
from lowmem.integrations.transformers.attending import ATTENTION, CHANGES, attend
from lowmem.integrations.transformers.cache import InPlace, KeyValueCache
from lowmem.kernels.memory import TYPES
from lowmem.training.fused import GatedMLP, RMSNorm
from lowmem.transforms.calibration.runs import evaluation_mode

_TRIAL = "lowmem_trial"  # an attention function that records its arguments
_SERVED = "sdpa", "eager", ATTENTION  # attention functions that compute what blocks compute
_TOKENS = 5
_ROUNDINGS = 2  # by which a number may differ, in units of the terms that it is a sum of


class _Call(NamedTuple):
    """What a module was given and returned."""

    x: Any
    kwargs: Mapping[str, Any]
    out: Any


_Calls: TypeAlias = Mapping[nn.Module, _Call]
_Norms: TypeAlias = list[tuple[Norm, _Call]]
_Parts: TypeAlias = Mapping[nn.Module, RMSNorm | GatedMLP]
_recorded: dict[nn.Module, tuple[tuple[Tensor, Tensor, Tensor], Mapping[str, Any], Tensor]] = {}


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    out = attend(module, query, key, value, attention_mask, **given)
    _recorded[module] = (query, key, value), given, out[0]
    return out


AttentionInterface.register(_TRIAL, _record)
AttentionMaskInterface.register(_TRIAL, sdpa_mask)


@torch.no_grad()
def find_blocks(model: nn.Module, parts: _Parts) -> dict[nn.Module, Block | str]:
    """Return how blocks of a model of transformers are computed in one call, or why not; the model is run once.

    ``parts`` are the norms and MLPs that were recognized.
    """
    owner = next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)
    config: Any = None if owner is None else owner.config.get_text_config()
    if owner is None:
        return {}
    if not owner.can_generate() or config.sub_configs:
        return {owner: "blocks are tried in language models alone, with their output layer"}
    if owner.device.type != "cpu":
        return {owner: f"it is on {owner.device}, where blocks are called as before"}
    before = config._attn_implementation
    if before not in _SERVED:
        return {owner: f"its attention is {before!r}: set_attn_implementation({ATTENTION!r}), and prepare it again"}

    def serves() -> bool:
        return config._attn_implementation in _SERVED

    rooms = lru_cache(maxsize=8)(lambda thread, numbers, dtype: torch.empty(numbers, dtype=dtype, device="cpu"))
    found: dict[nn.Module, Block | str] = {}
    try:
        config._attn_implementation = _TRIAL
        calls = _calls(owner, config)
        for attention in filter(_recorded.__contains__, owner.modules()):  # other threads may try other models
            block = next((one for one in owner.modules() if attention in one._modules.values()), None)
            if block is not None and attention in calls:
                form = _form(block, attention, calls, parts)
                found[block] = form if isinstance(form, str) else Block(block, form, serves, rooms)
    except Exception as error:  # noqa: BLE001 - any model may refuse random tokens, or compute what is not expected
        return {owner: f"a run with random tokens failed: {error!r}"}
    finally:
        config._attn_implementation = before
        for module in owner.modules():
            _recorded.pop(module, None)
    return found


def _calls(model: PreTrainedModel, config: Any) -> dict[nn.Module, _Call]:
    """Run a model with random tokens, and return the calls of its modules; those called twice are left out."""
    calls: dict[nn.Module, _Call | None] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = _Call(args[0] if args else kwargs.get("hidden_states"), kwargs, out)
        calls[module] = None if module in calls else call

    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, _TOKENS), generator=generator, dtype=torch.int64, device="cpu")
    given: dict[str, Any] = {"input_ids": tokens.to(model.device), "cache": KeyValueCache(model), "use_cache": True}
    last = getattr(config, "max_position_embeddings", None)
    if isinstance(last, int) and last > _TOKENS and "position_ids" in inspect.signature(model.forward).parameters:
        # The last positions: some models scale queries from a position on.
        positions = torch.arange(last - _TOKENS, last, dtype=torch.int64, device=model.device)
        given["position_ids"] = positions.unsqueeze(0)
    with evaluation_mode(model) as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        model(**given)
    return {module: call for module, call in calls.items() if call is not None}


def _form(block: nn.Module, attention: nn.Module, calls: _Calls, parts: _Parts) -> Form | str:
    """Return what a block consists of; or, if it does something else, what that is."""
    norms = [(Norm(one, how), calls[one]) for one, how in parts.items() if isinstance(how, RMSNorm) and one in calls]
    mlps = [(one, how) for one in block.modules() if isinstance(how := parts.get(one), GatedMLP) and one in calls]
    own = calls.get(block)
    if own is None or not isinstance(own.out, Tensor) or len(mlps) != 1 or own.kwargs.get("cache") is None:
        return "it has no gated MLP that is recognized, or other arguments or results than a block has"
    if isinstance(read := _attention(attention, calls, norms), str):
        return read

    def beyond(x: Tensor, side: str, other: str) -> tuple[Norm | None, Tensor]:
        """Return the norm whose input or output (``side``) is x, if there is one, and the other of them; or x."""
        return next(((norm, getattr(call, other)) for norm, call in norms if getattr(call, side) is x), (None, x))

    ((mlp, gated),) = mlps
    heads = beyond(calls[read["roles"][0].layer].x, "out", "x"), beyond(calls[read["out"]].out, "x", "out")
    ends = *heads, beyond(calls[mlp].x, "out", "x"), beyond(calls[mlp].out, "x", "out")
    form = Form(attention, mlp, gated, tuple(norm for norm, _ in ends), **read)
    if (reason := why_not(block, form.layers)) is not None:
        return reason
    owners = *form.layers, *(norm.module for norm in form.norms)
    known = {id(value) for one in owners for value in (*one.parameters(), *one.buffers())}
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        if id(value) not in known:  # as of a gate: a trial does not see a factor of one
            return f"{name} belongs to no layer and no norm"
    if not all(norm.fits(own.x.dtype) for norm in form.norms):
        return f"the weight of a norm is not of the dtype of its input, {own.x.dtype}"
    x, attended, given, computed = (one for _, one in ends)
    if x is not own.x:
        return "its attention reads something else than its input or a norm of it"
    total = x + attended
    first, second = _near(given, total, x.abs() + attended.abs()), total.abs() + computed.abs()
    if not (first and _near(own.out, total + computed, second)):
        return "it returns something else than its input and the outputs of attention and MLP, added up"
    if not (attended.any() and computed.any()):
        return "its attention or its MLP returns zeros, so that a trial shows nothing"
    return form


def _attention(module: Any, calls: _Calls, norms: _Norms) -> dict[str, Any] | str:
    """Return how a module computes attention, as fields of ``Form``, or why that is not known."""
    states, given, mixed = _recorded[module]
    layers = [one for one in module.modules() if hasattr(one, "out_features") and one in calls]
    outs = [one for one in layers if _near(calls[one].x, mixed.flatten(2), mixed.flatten(2).abs())]
    inputs = [one for one in layers if one not in outs]
    first = [one for one in inputs if calls[one].x is calls[inputs[0]].x]
    if len(outs) != 1 or len(first) + 1 != len(layers) or len(first) not in (1, 3):
        return "its attention has other layers than those of queries, keys, values and output"
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or any(given.get(name) is not None for name in CHANGES):
        return "its attention function has arguments that the kernel in C does not know"
    angles = calls[module].kwargs.get("position_embeddings")
    none = torch.empty(1, mixed.shape[1], 0, dtype=mixed.dtype, device=mixed.device)
    turns = [(none, none), *([angles] if isinstance(angles, tuple) and len(angles) == 2 else [])]
    own = [(norm, call) for norm, call in norms if norm.module in module.modules() and len(first) > 1]
    found: list[Projection] = []
    for role, state in zip(("queries", "keys", "values"), states, strict=True):
        column = sum(one.heads * one.width for one in found) if len(first) == 1 else 0
        outputs = [(one, calls[one].out) for one in first]
        matching = _projection(state, outputs, column, own, turns if role != "values" else turns[:1])
        if matching is None:
            return f"its {role} are no rotated output of a linear layer"
        found.append(matching)
    q, k, v = found
    if q.rotated != k.rotated or q.heads % k.heads or k.heads != v.heads:
        return "its queries and keys are rotated, or shared, in different ways"
    scaling = q.width**-0.5 if given.get("scaling") is None else given["scaling"]
    taken = {name: value for name, value in given.items() if name not in calls[module].kwargs}

    def attended(query: Tensor, key: Tensor, value: Tensor, mask: Any, cache: Any) -> Tensor:
        """Return what the module gives to its output layer; a cache takes keys and values."""
        if cache is not None:
            key, value = cache.update(key, value, index)
        return attend(module, query, key, value, mask, **taken | {"dropout": 0.0, "scaling": scaling})[0]

    def kept(cache: Any) -> InPlace | None:
        """Return the module's layer of a cache if it is one of lowmem's."""
        layers = cache.layers[index : index + 1] if isinstance(cache, KeyValueCache) else ()
        return next((one for one in layers if isinstance(one, InPlace)), None)

    how = {"scaling": scaling, "softcap": given.get("softcap"), "attend": attended}
    return {"roles": (q, k, v), "out": outs[0], "kept": kept, **how}


def _projection(
    state: Tensor, outputs: list[tuple[Any, Tensor]], column: int, norms: _Norms, turns: list[tuple[Tensor, Tensor]]
) -> Projection | None:
    """Return which layer, norm and rotation compute queries, keys or values (1, heads, tokens, width)."""
    _, heads, tokens, width = state.shape
    count = heads * width
    for layer, out in outputs:
        if out.shape[-1] < column + count or (len(outputs) > 1 and out.shape[-1] != count):
            continue
        raw = out[..., column : column + count].reshape(1, tokens, heads, width).transpose(1, 2)
        candidates = (None, raw), *((norm, _output_for(raw, call)) for norm, call in norms)
        for norm, rows in candidates:
            for cos, sin in turns:
                if rows is not None and _near(state, *_rotated(rows, cos, sin)):
                    return Projection(layer, column, heads, width, cos.shape[-1], norm)
    return None


def _output_for(raw: Tensor, call: _Call) -> Tensor | None:
    """Return what a norm made of heads (1, heads, tokens, width), whose tokens it may have been given first."""
    fits = isinstance(call.x, Tensor) and call.x.numel() == raw.numel() and call.x.dtype == raw.dtype
    for first in (1, 2) if fits else ():
        given = raw.transpose(1, first)
        if torch.equal(call.x.reshape(given.shape), given):
            return cast(Tensor, call.out.reshape(given.shape).transpose(1, first))
    return None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return heads (sequences, heads, tokens, width) with their first numbers rotated by angles, and the size of the
    terms of each number."""
    width = cos.shape[-1]
    front, rest = x[..., :width], x[..., width:]
    half = torch.cat([-front[..., width // 2 :], front[..., : width // 2]], -1)
    terms = front * cos.unsqueeze(1), half * sin.unsqueeze(1)
    return torch.cat([terms[0] + terms[1], rest], -1), torch.cat([terms[0].abs() + terms[1].abs(), rest.abs()], -1)


def _near(a: Any, b: Tensor, size: Tensor) -> bool:
    """Whether tensors differ by a few roundings of the size of each number."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype not in TYPES or b.dtype not in TYPES:
        return False
    unit = _ROUNDINGS * max(torch.finfo(one.dtype).eps for one in (a, b))
    return bool(((a.double() - b.double()).abs() <= unit * size.double() + 1e-30).all())
