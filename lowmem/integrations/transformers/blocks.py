"""Finds the blocks of a model of transformers that C computes in one call, by what they do with random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from lowmem.inference.block import Attention, Block, Form, Projection
from lowmem.inference.parts import Norm, why_not
from lowmem.integrations.transformers.attending import ATTENTION, CHANGES, attend
from lowmem.integrations.transformers.cache import InPlace, KeyValueCache
from lowmem.kernels.memory import TYPES
from lowmem.training.fused import GatedMLP, RMSNorm

_TRIAL = "lowmem_trial"  # an attention function that records its arguments
_TOKENS = 5
_ROUNDINGS = 2  # by which a number may differ, in units of the terms that it is a sum of

Found = dict[nn.Module, "Block | str"]


class _Call:
    """What a module was given and returned."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        self.x: Any = args[0] if args else kwargs.get("hidden_states")
        self.kwargs, self.out = kwargs, out[0] if isinstance(out, tuple) else out
        self.is_tensor = isinstance(out, Tensor)


_recorded: dict[nn.Module, tuple[tuple[Tensor, Tensor, Tensor], Mapping[str, Any], Tensor]] = {}


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    out = attend(module, query, key, value, mask, **given)
    _recorded[module] = (query, key, value), given, out[0]
    return out


AttentionInterface.register(_TRIAL, _record)
AttentionMaskInterface.register(_TRIAL, sdpa_mask)


def find_blocks(model: nn.Module, parts: Mapping[nn.Module, RMSNorm | GatedMLP]) -> tuple[Found, Callable[[], None]]:
    """Return how blocks are computed in one call, or why not, and what restores the model's attention.

    Args:
        model: holds a model of transformers. It is run once, and its attention becomes ``ATTENTION``.
        parts: the norms and MLPs that were recognized.
    """
    owner = next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)
    if owner is None or not owner.can_generate():
        return {}, lambda: None
    if owner.device.type != "cpu":
        return {owner: f"it is on {owner.device}, where blocks are called as before"}, lambda: None
    config, before = owner.config.get_text_config(), _implementations(owner.config)

    def serves() -> bool:
        return bool(config._attn_implementation == ATTENTION)

    def release() -> None:
        if serves():
            owner.set_attn_implementation(before)

    rooms: dict[Any, Tensor] = {}
    found: Found = {}
    try:
        owner.set_attn_implementation(_TRIAL)
        calls = _calls(owner, config)
        for attention in list(_recorded):
            block = next((one for one in owner.modules() if attention in one._modules.values()), None)
            if block is not None and attention in calls:
                form = _form(block, attention, calls, parts)
                found[block] = form if isinstance(form, str) else Block(block, form, _layer_of, serves, rooms)
    except Exception as error:  # noqa: BLE001 - any model may refuse random tokens, or compute what is not expected
        owner.set_attn_implementation(before)
        return {owner: f"a run with random tokens failed: {error!r}"}, lambda: None
    finally:
        _recorded.clear()
    owner.set_attn_implementation(ATTENTION)
    return found, release


def _implementations(config: Any) -> dict[str, Any]:
    """Return the attention of a config and its parts, as ``set_attn_implementation`` takes it."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name)) is not None}
    return {"": config._attn_implementation, **{name: _implementations(part) for name, part in parts.items()}}


def _layer_of(cache: Any, index: int) -> Any:
    layers = cache.layers if isinstance(cache, KeyValueCache) else ()
    found: Any = layers[index] if index < len(layers) else None
    is_ours = isinstance(found, InPlace)
    return found if is_ours and found.is_initialized else None


def _calls(model: PreTrainedModel, config: Any) -> dict[nn.Module, _Call]:
    """Run a model with random tokens, and return the calls of its modules; those called twice are left out."""
    calls: dict[nn.Module, _Call] = {}
    twice: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if module in calls:
            twice.add(module)
        calls[module] = _Call(args, kwargs, out)

    tokens = torch.randint(config.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"input_ids": tokens.to(model.device), "cache": KeyValueCache(model), "use_cache": True}
    last = getattr(config, "max_position_embeddings", None)
    if isinstance(last, int) and last > _TOKENS and "position_ids" in inspect.signature(model.forward).parameters:
        # The last positions: some models scale queries from a position on.
        given["position_ids"] = torch.arange(last - _TOKENS, last, device=model.device).unsqueeze(0)
    _recorded.clear()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        for module in model.modules():
            handle = module.register_forward_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        model(**given)
    return {module: call for module, call in calls.items() if module not in twice}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _form(
    block: nn.Module,
    attention: nn.Module,
    calls: Mapping[nn.Module, _Call],
    parts: Mapping[nn.Module, RMSNorm | GatedMLP],
) -> Form | str:
    """Return what a block consists of; or, if it does something else, what that is."""
    norms = {one: how for one, how in parts.items() if isinstance(how, RMSNorm) and one in calls}
    mlps = [one for one in block.modules() if isinstance(parts.get(one), GatedMLP) and one in calls]
    own = calls.get(block)
    if own is None or not own.is_tensor or len(mlps) != 1 or own.kwargs.get("cache") is None:
        return "it has no gated MLP that is recognized, or other arguments or results than a block has"
    mlp = mlps[0]
    gated = parts[mlp]
    assert isinstance(gated, GatedMLP)

    def before(x: Tensor) -> Norm | None:
        """Return the norm whose output is x, if there is one."""
        return next((Norm(one, how) for one, how in norms.items() if calls[one].out is x), None)

    def after(x: Tensor) -> Norm | None:
        """Return the norm that is given x, if there is one."""
        return next((Norm(one, how) for one, how in norms.items() if calls[one].x is x), None)

    read = _attention(attention, calls, norms)
    if isinstance(read, str):
        return read
    layers = *read.layers, read.out, *(getattr(mlp, name) for name in (gated.gate, gated.up, gated.down) if name)
    names = {one: name for name, one in block.named_modules()}
    reason = next((f"{names[one]} {why}" for one in layers if (why := why_not(one))), None)
    if reason is not None:
        return reason
    first = before(calls[read.layers[0]].x)
    if calls[read.layers[0]].x is not own.x and (first is None or calls[first.module].x is not own.x):
        return "its attention reads something else than its input or a norm of it"
    added = calls[read.out].out
    behind = after(added)
    first_added = added if behind is None else calls[behind.module].out
    total = own.x + first_added
    second, behind_mlp = before(calls[mlp].x), after(calls[mlp].out)
    given = calls[mlp].x if second is None else calls[second.module].x
    result = calls[mlp].out if behind_mlp is None else calls[behind_mlp.module].out
    sizes = own.x.abs() + first_added.abs(), total.abs() + result.abs()
    if not (_near(given, total, sizes[0]) and _near(own.out, total + result, sizes[1])):
        return "it returns something else than its input and the outputs of attention and MLP, added up"
    if not (added.any() and calls[mlp].out.any()):
        return "its attention or its MLP returns zeros, so that a trial shows nothing"
    return Form(read, mlp, gated, first, behind, second, behind_mlp)


def _attention(module: Any, calls: Mapping[nn.Module, _Call], norms: Mapping[nn.Module, RMSNorm]) -> Attention | str:
    """Return how a module computes attention, or why that is not known."""
    states, given, mixed = _recorded[module]
    layers = [one for one in module.modules() if hasattr(one, "out_features") and one in calls]
    rows = mixed.reshape(*mixed.shape[:2], -1)
    outs = [one for one in layers if _near(calls[one].x, rows, rows.abs())]
    inputs = [one for one in layers if one not in outs]
    first = [one for one in inputs if calls[one].x is calls[inputs[0]].x]
    if len(outs) != 1 or len(first) + 1 != len(layers) or len(first) not in (1, 3):
        return "its attention has other layers than those of queries, keys, values and output"
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or any(given.get(name) is not None for name in CHANGES):
        return "its attention function has arguments that the kernel in C does not know"
    angles = calls[module].kwargs.get("position_embeddings")
    angles = angles if isinstance(angles, tuple) and len(angles) == 2 else None
    heads_of = [(one.shape[1], one.shape[3]) for one in states]
    found: list[tuple[Projection, int]] = []
    for role, state in enumerate(states):
        before = sum(number * size for number, size in heads_of[:role]) if len(first) == 1 else 0
        matching = _projection(state, first, before, norms, angles if role < 2 else None, calls)
        if matching is None:
            return f"its {('queries', 'keys', 'values')[role]} are no rotated output of a linear layer"
        found.append(matching)
    (q, rotated), (k, also), (v, _) = found
    if rotated != also or q.heads % k.heads or k.heads != v.heads:
        return "its queries and keys are rotated, or shared, in different ways"
    scaling = given.get("scaling")
    scaling = heads_of[0][1] ** -0.5 if scaling is None else scaling
    widths = heads_of[0][1], heads_of[2][1]
    known = {*calls[module].kwargs, "dropout", "scaling", "softcap"}
    taken = {name: value for name, value in given.items() if name not in known}
    return Attention(module, q, k, v, outs[0], *widths, rotated, scaling, given.get("softcap"), taken, index, attend)


def _projection(
    state: Tensor,
    layers: list[Any],
    first: int,
    norms: Mapping[nn.Module, RMSNorm],
    angles: tuple[Tensor, Tensor] | None,
    calls: Mapping[nn.Module, _Call],
) -> tuple[Projection, int] | None:
    """Return which layer computes queries, keys or values (1, heads, tokens, width), and how much is rotated."""
    _, heads, tokens, width = state.shape
    for layer in layers:
        own = calls[layer].out
        if own.shape[-1] < first + heads * width or (len(layers) > 1 and own.shape[-1] != heads * width):
            continue
        raw = own[..., first : first + heads * width].view(1, tokens, heads, width)
        normed: list[tuple[Norm | None, Tensor]] = [(None, raw)]
        for one, how in norms.items():
            given, out = calls[one].x, calls[one].out
            if len(layers) > 1 and given.numel() == raw.numel():
                given, out = (_rows_of(x, raw) for x in (given, out))
                if given is not None and out is not None and torch.equal(given, raw):
                    normed.append((Norm(one, how), out))
        for norm, heads_ in normed:
            rows = heads_.transpose(1, 2)
            if _near(rows, state, state.abs()):
                return Projection(layer, first, heads, norm), 0
            if angles is not None and _near(state, *_rotated(rows, *angles)):
                return Projection(layer, first, heads, norm), angles[0].shape[-1]
    return None


def _rows_of(x: Tensor, like: Tensor) -> Tensor | None:
    """Return x as (1, tokens, heads, width), where it is (1, heads, tokens, width) or has one row for all heads."""
    if x.shape == like.shape or x.shape == like.flatten(2).shape:
        return x.view(like.shape)
    return x.transpose(1, 2) if x.dim() == 4 and x.transpose(1, 2).shape == like.shape else None


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
