"""Finds the blocks of a model of transformers that C computes in one call, by what they do with random tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from lowmem.inference.norms_and_mlps import (
    NativeRMSNorm,
    gated_mlp_layers,
    is_native_layer,
    unsupported_layer_reason_or_none,
)
from lowmem.inference.transformer_block import AttentionProjection, BlockSpec, NativeBlock
from lowmem.integrations.transformers.attention_interface import (
    ATTENTION,
    RESULT_CHANGING_ARGUMENTS,
    SERVED_ATTENTION,
    lowmem_attention_forward,
)
from lowmem.integrations.transformers.key_value_cache import InPlaceCacheLayer, KeyValueCache
from lowmem.kernels.tensor_checks import TYPES
from lowmem.training.fused import GatedMLPSpec, RMSNormSpec
from lowmem.training.fusion_recognition import numeric_attributes
from lowmem.transforms.calibration.model_runs import evaluation_without_gradients, replaced_forward

# An attention function that records its arguments
_TRIAL = "lowmem_trial"
_MASKS = sdpa_mask, eager_mask
# The function of a model's file that serves "eager", unless one is registered
_EAGER = "eager_attention_forward"
_TOKENS, _MORE_TOKENS = 5, 37  # of the first run, and of each sequence of the second one
# Factors of the random numbers of neighbouring tokens, from the second run on
_SIZES = 1.0, 1e3
# By which a number may differ, in units of the terms that it is a sum of
_ROUNDINGS = 2


class _ModuleCall(NamedTuple):
    """What a module was given and returned."""

    x: Any
    kwargs: Mapping[str, Any]
    out: Any


class _AttentionCall(NamedTuple):
    """What an attention function was given and returned, and the globals of the function that called it."""

    states: tuple[Tensor, Tensor, Tensor]
    kwargs: Mapping[str, Any]
    out: Tensor
    scope: dict[str, Any]


_ModuleCalls: TypeAlias = Mapping[nn.Module, _ModuleCall]
_NormCalls: TypeAlias = list[tuple[NativeRMSNorm, _ModuleCall]]
_RecognizedModules: TypeAlias = Mapping[nn.Module, RMSNormSpec | GatedMLPSpec]
_attention_calls: dict[nn.Module, _AttentionCall] = {}


def _compute_and_record_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    out = lowmem_attention_forward(module, query, key, value, attention_mask, **kwargs)
    caller = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
    _attention_calls[module] = _AttentionCall((query, key, value), kwargs, out[0], caller.f_globals)
    return out


AttentionInterface.register(_TRIAL, _compute_and_record_attention)
AttentionMaskInterface.register(_TRIAL, sdpa_mask)


@torch.no_grad()
def find_blocks(model: nn.Module, recognized_modules: _RecognizedModules) -> dict[nn.Module, NativeBlock | str]:
    """Return how blocks of a model of transformers are computed in one call, or why not.

    ``recognized_modules`` are the norms and MLPs that were recognized.
    """
    owner = next((submodule for submodule in model.modules() if isinstance(submodule, PreTrainedModel)), None)
    config: Any = None if owner is None else owner.config.get_text_config()
    if owner is None:
        return {}
    if not owner.can_generate() or config.sub_configs:
        return {owner: "blocks are tried in language models alone, with their output layer"}
    if owner.device.type != "cpu":
        return {owner: f"it is on {owner.device}, where blocks are called as before"}
    before = config._attn_implementation
    if before not in SERVED_ATTENTION:
        return {owner: f"its attention is {before!r}: set_attn_implementation({ATTENTION!r}), and prepare it again"}
    rooms = lru_cache(maxsize=8)(lambda thread, numbers, dtype: torch.empty(numbers, dtype=dtype, device="cpu"))
    implementations = _attn_implementation_by_config(owner.config)
    try:
        owner.set_attn_implementation(_attn_implementation_by_config(owner.config, {id(config): _TRIAL}))
        forms = _BlockRecognitionTrial(owner, config, recognized_modules).recognize_block_specs_or_reasons()
    except Exception as error:  # noqa: BLE001 - any model may refuse random tokens, or compute what is not expected
        return {owner: f"a run with random tokens failed: {error!r}"}
    finally:
        owner.set_attn_implementation(implementations)
        for module in owner.modules():
            _attention_calls.pop(module, None)
    return {
        submodule: form if isinstance(form, str) else NativeBlock(submodule, form, rooms)
        for submodule, form in forms.items()
    }


def _attn_implementation_by_config(
    config: Any, overrides: Mapping[int, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the attention of a config and of each sub-config, as ``set_attn_implementation`` takes them.

    ``overrides`` are those of other names, by the ids of their configs.
    """
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    result = {"": overrides.get(id(config), config._attn_implementation)}
    return result | {
        name: _attn_implementation_by_config(sub_config, overrides)
        for name, sub_config in inner.items()
        if sub_config is not None
    }


class _BlockRecognitionTrial:
    """Runs a model with random tokens, and reads what each block consists of from its calls.

    The recognized parts, stored layers and the output layer return random numbers meanwhile: what a block computes
    between them does not depend on their weights, whose products would take longer.
    """

    def __init__(self, model: PreTrainedModel, config: Any, recognized_modules: _RecognizedModules) -> None:
        self.model, self.config, self.parts = model, config, recognized_modules
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.sizes: tuple[float, ...] = _SIZES[:1]
        self.calls: dict[nn.Module, _ModuleCall] = {}
        self.counts: Counter[nn.Module] = Counter()
        self.found: dict[nn.Module, list[BlockSpec | str]] = {}

    def recognize_block_specs_or_reasons(self) -> dict[nn.Module, BlockSpec | str]:
        """Return the form of each block if all runs show the same one, or a reason.

        The first run is one sequence at the last positions, since some models scale queries from a position on. The
        second one is padded sequences with large numbers, and the third one is their next token.
        """
        last = getattr(self.config, "max_position_embeddings", None)
        last = last if isinstance(last, int) and last > _TOKENS else None
        tokens = _MORE_TOKENS if last is None else min(_MORE_TOKENS, last - 1)
        mask = torch.ones(2, tokens, dtype=torch.int64, device="cpu")
        mask[0, :3] = 0
        longer = torch.cat([mask, mask[:, -1:]], 1)
        numbers = {module: numeric_attributes(module) for module in self.model.modules()}
        with evaluation_without_gradients(self.model) as stack:
            embedding, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            stack.callback(
                embedding.register_forward_hook(lambda _, inputs, out: self._scale_rows_by_sizes(out)).remove
            )
            for module in self.model.modules():
                stack.callback(
                    module.register_forward_hook(self._record_call_and_read_block, with_kwargs=True).remove
                )
                if module in self.parts or is_native_layer(module) or module is output:
                    stack.enter_context(replaced_forward(module, self._random_output_forward(module)))
            at = None
            if last is not None:
                at = torch.arange(last - _TOKENS, last, dtype=torch.int64, device="cpu").unsqueeze(0)
            specs_by_block = self._specs_from_random_run(1, _TOKENS, at, cache=KeyValueCache(self.model))
            for block, form in specs_by_block.items():
                specs_by_block[block] = (
                    form if isinstance(form, str) else _unsupported_block_reason_or_none(block, form) or form
                )
            if any(isinstance(form, BlockSpec) for form in specs_by_block.values()):
                self.sizes, cache = _SIZES, KeyValueCache(self.model)
                for more, tokens in ((mask, mask.shape[1]), (longer, 1)):
                    at = (more.cumsum(1) - 1).clamp_min(0)[:, -tokens:]
                    again = self._specs_from_random_run(2, tokens, at, cache=cache, attention_mask=more)
                    specs_by_block = {
                        block: _common_spec_or_reason(form, again.get(block))
                        for block, form in specs_by_block.items()
                    }
        changed = {module for module, before in numbers.items() if numeric_attributes(module) != before}
        return {
            block: "its numbers change from call to call" if changed.intersection(block.modules()) else form
            for block, form in specs_by_block.items()
        }

    def _specs_from_random_run(
        self, batch_size: int, tokens: int, position_ids: Tensor | None, **model_kwargs: Any
    ) -> dict[nn.Module, BlockSpec | str]:
        """Run the model with random tokens, and return the form of each block that was called."""
        size, generator = (batch_size, tokens), self.generator
        ids = torch.randint(self.config.vocab_size, size, generator=generator, dtype=torch.int64, device="cpu")
        model_kwargs |= {"input_ids": ids, "use_cache": True}
        if position_ids is not None and "position_ids" in inspect.signature(self.model.forward).parameters:
            model_kwargs["position_ids"] = position_ids
        self.found.clear()
        self.counts.clear()
        self.model(**model_kwargs)
        return {block: self._spec_or_repeated_call_reason(block, forms) for block, forms in self.found.items()}

    def _spec_or_repeated_call_reason(self, block: nn.Module, forms: list[BlockSpec | str]) -> BlockSpec | str:
        """Return the form of a block that is called once, and so are its parts."""
        form = forms[0]
        if isinstance(form, str):
            return form
        parts = *form.projection_layers, form.out, form.attention, form.mlp, *(norm.module for norm in form.all_norms)
        again = len(forms) > 1 or any(self.counts[part] > 1 for part in parts)
        return "it is called more than once, or a part of it is" if again else form

    def _record_call_and_read_block(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Record a call; when a block returns, read its form."""
        self.counts[module] += 1
        if (module in self.parts or is_native_layer(module)) and (kwargs or len(args) != 1):
            # C would compute it without the other arguments
            return
        self.calls[module] = _ModuleCall(args[0] if args else kwargs.get("hidden_states"), kwargs, out)
        attention = next((submodule for submodule in module.children() if submodule in _attention_calls), None)
        if attention is not None:
            self.found.setdefault(module, []).append(_block_spec_or_reason(module, attention, self.calls, self.parts))
            for submodule in module.modules():
                self.calls.pop(submodule, None)
                _attention_calls.pop(submodule, None)

    def _random_output_forward(self, module: nn.Module) -> Callable[..., Tensor]:
        """Return a function that returns random numbers in place of a part's or layer's output."""
        how = self.parts.get(module)
        last: Any = gated_mlp_layers(module, how)[-1] if isinstance(how, GatedMLPSpec) else module

        def random_output(x: Tensor, *others: Any, **more: Any) -> Tensor:
            shape = *x.shape[:-1], getattr(last, "out_features", x.shape[-1])
            return self._scale_rows_by_sizes(
                torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
            ).to(x)

        return random_output

    def _scale_rows_by_sizes(self, x: Tensor) -> Tensor:
        """Return rows times ``sizes``, in turns."""
        rows = x.reshape(-1, x.shape[-1])
        sizes = torch.tensor(self.sizes, dtype=x.dtype, device=x.device).repeat(len(rows))[: len(rows)]
        return (rows * sizes.unsqueeze(1)).view(x.shape)


def _unsupported_block_reason_or_none(block: nn.Module, form: BlockSpec) -> str | None:
    """Return why C does not compute a block of a form; or None."""
    if (reason := unsupported_layer_reason_or_none(block, form.all_layers)) is not None:
        return reason
    owners = *form.all_layers, *(norm.module for norm in form.all_norms)
    known = {id(value) for owner in owners for value in (*owner.parameters(), *owner.buffers())}
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        # As of a gate: a trial does not see a factor of one
        if id(value) not in known:
            return f"{name} belongs to no layer and no norm"
    return None


def _common_spec_or_reason(form: BlockSpec | str, other: BlockSpec | str | None) -> BlockSpec | str:
    """Return a form if another run shows the same one; or the reason of either."""
    if isinstance(form, str) or form == other:
        return form
    return f"another run differs: {other}" if isinstance(other, str) else "it consists of other parts in another run"


def _supported_attention_predicate(module: Any, caller_globals: dict[str, Any]) -> Callable[[], bool]:
    """Return a function that tells whether the attention of a module, and its masks, are those that blocks compute.

    Functions may be registered under their names at any time, for all models or in the interface of one.
    """
    interfaces = [name for name, value in caller_globals.items() if isinstance(value, AttentionInterface)]
    eager = caller_globals.get(_EAGER)
    is_known = str(getattr(eager, "__module__", None)).startswith("transformers.")
    known = sdpa_attention_forward, lowmem_attention_forward, *([eager] if is_known else [])

    def is_attention_supported() -> bool:
        name = module.config._attn_implementation
        functions = [caller_globals[item].get(name, caller_globals.get(_EAGER)) for item in interfaces]
        is_supported = name in SERVED_ATTENTION and bool(functions) and all(item in known for item in functions)
        return is_supported and ALL_MASK_ATTENTION_FUNCTIONS.get(name) in _MASKS

    return is_attention_supported


def _block_spec_or_reason(
    block: nn.Module, attention: nn.Module, calls: _ModuleCalls, recognized_modules: _RecognizedModules
) -> BlockSpec | str:
    """Return what a block consists of; or, if it does something else, what that is."""
    norms = [
        (NativeRMSNorm(item, how), calls[item])
        for item, how in recognized_modules.items()
        if isinstance(how, RMSNormSpec) and item in calls
    ]
    mlps = [
        (item, how)
        for item in block.modules()
        if isinstance(how := recognized_modules.get(item), GatedMLPSpec) and item in calls
    ]
    block_call = calls.get(block)
    is_plain = block_call is not None and attention in calls and isinstance(block_call.out, Tensor)
    if block_call is None or not is_plain or len(mlps) != 1 or block_call.kwargs.get("cache") is None:
        return "it has no gated MLP that is recognized, or other arguments or results than a block has"
    if isinstance(read := _attention_spec_fields_or_reason(attention, calls, norms), str):
        return read

    def norm_with_x_and_other_tensor(
        x: Tensor, norm_side_of_x: str, other_norm_side: str
    ) -> tuple[NativeRMSNorm | None, Tensor]:
        """Return the norm whose input or output (``side``) is x, if there is one, and the other of them; or x."""
        return next(
            ((norm, getattr(call, other_norm_side)) for norm, call in norms if getattr(call, norm_side_of_x) is x),
            (None, x),
        )

    ((mlp, gated),) = mlps
    heads = (
        norm_with_x_and_other_tensor(calls[read["projections"][0].layer].x, "out", "x"),
        norm_with_x_and_other_tensor(calls[read["out"]].out, "x", "out"),
    )
    ends = (
        *heads,
        norm_with_x_and_other_tensor(calls[mlp].x, "out", "x"),
        norm_with_x_and_other_tensor(calls[mlp].out, "x", "out"),
    )
    form = BlockSpec(attention, mlp, gated, tuple(norm for norm, _ in ends), **read)
    if not all(norm.has_c_readable_weight(block_call.x.dtype) for norm in form.all_norms):
        return f"the weight of a norm is not of the dtype of its input, {block_call.x.dtype}"
    x, attended, mlp_input, computed = (item for _, item in ends)
    if x is not block_call.x:
        return "its attention reads something else than its input or a norm of it"
    total = x + attended
    first, second = _is_within_rounding(mlp_input, total, x.abs() + attended.abs()), total.abs() + computed.abs()
    if not (first and _is_within_rounding(block_call.out, total + computed, second)):
        return "it returns something else than its input and the outputs of attention and MLP, added up"
    return form


def _attention_spec_fields_or_reason(module: Any, calls: _ModuleCalls, norms: _NormCalls) -> dict[str, Any] | str:
    """Return how a module computes attention, as fields of ``Form``, or why that is not known."""
    (query, *others), attention_kwargs, mixed, scope = _attention_calls[module]
    # Without the earlier ones of a cache
    states = query, *(item[:, :, -query.shape[2] :] for item in others)
    layers = [item for item in module.modules() if hasattr(item, "out_features") and item in calls]
    outs = [item for item in layers if _is_within_rounding(calls[item].x, mixed.flatten(2), mixed.flatten(2).abs())]
    inputs = [item for item in layers if item not in outs]
    first = [item for item in inputs if calls[item].x is calls[inputs[0]].x]
    if len(outs) != 1 or len(first) + 1 != len(layers) or len(first) not in (1, 3):
        return "its attention has other layers than those of queries, keys, values and output"
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or any(
        attention_kwargs.get(name) is not None for name in RESULT_CHANGING_ARGUMENTS
    ):
        return "its attention function has arguments that the kernel in C does not know"
    angles = calls[module].kwargs.get("position_embeddings")
    none = mixed.new_empty(1, mixed.shape[1], 0)
    turns = [(none, none), *([angles] if isinstance(angles, tuple) and len(angles) == 2 else [])]
    inner_norms = [(norm, call) for norm, call in norms if norm.module in module.modules() and len(first) > 1]
    projections: list[AttentionProjection] = []
    for role, state in zip(("queries", "keys", "values"), states, strict=True):
        column = sum(item.heads * item.head_width for item in projections) if len(first) == 1 else 0
        outputs = [(item, calls[item].out) for item in first]
        matching = _matching_projection_or_none(
            state, outputs, column, inner_norms, turns if role != "values" else turns[:1]
        )
        if matching is None:
            return f"its {role} are no rotated output of a linear layer"
        projections.append(matching)
    q, k, v = projections
    if q.rotary_width != k.rotary_width or q.heads % k.heads or k.heads != v.heads:
        return "its queries and keys are rotated, or shared, in different ways"
    scaling = q.head_width**-0.5 if attention_kwargs.get("scaling") is None else attention_kwargs["scaling"]
    taken = {name: value for name, value in attention_kwargs.items() if name not in calls[module].kwargs}
    if any(isinstance(value, Tensor) for value in taken.values()):
        return "its attention function is given tensors of its own"

    def attend_and_update_cache(query: Tensor, key: Tensor, value: Tensor, mask: Any, cache: Any) -> Tensor:
        """Return what the module gives to its output layer; a cache takes keys and values."""
        if cache is not None:
            key, value = cache.update(key, value, index)
        return lowmem_attention_forward(
            module, query, key, value, mask, **taken | {"dropout": 0.0, "scaling": scaling}
        )[0]

    def lowmem_cache_layer_or_none(cache: Any) -> InPlaceCacheLayer | None:
        """Return the module's layer of a cache if it is one of lowmem's."""
        layers = cache.layers[index : index + 1] if type(cache) in (DynamicCache, KeyValueCache) else ()
        return next((item for item in layers if isinstance(item, InPlaceCacheLayer)), None)

    how = {
        "scaling": scaling,
        "softcap": attention_kwargs.get("softcap"),
        "attention_arguments": taken,
        "is_current": _supported_attention_predicate(module, scope),
    }
    return {
        "projections": (q, k, v),
        "out": outs[0],
        "attend": attend_and_update_cache,
        "cached_layer": lowmem_cache_layer_or_none,
        **how,
    }


def _matching_projection_or_none(
    state: Tensor,
    layer_outputs: list[tuple[Any, Tensor]],
    first_column: int,
    norms: _NormCalls,
    cos_sin_pairs: list[tuple[Tensor, Tensor]],
) -> AttentionProjection | None:
    """Return which layer, norm and rotation compute queries, keys or values (batch, heads, tokens, width)."""
    batch, heads, tokens, width = state.shape
    count = heads * width
    for layer, out in layer_outputs:
        if out.shape[-1] < first_column + count or (len(layer_outputs) > 1 and out.shape[-1] != count):
            continue
        raw = out[..., first_column : first_column + count].reshape(batch, tokens, heads, width).transpose(1, 2)
        candidates = (None, raw), *((norm, _recorded_norm_output_or_none(raw, call)) for norm, call in norms)
        for norm, rows in candidates:
            for cos, sin in cos_sin_pairs:
                if rows is not None and _is_within_rounding(state, *_rotated_heads_and_term_sizes(rows, cos, sin)):
                    return AttentionProjection(layer, first_column, heads, width, cos.shape[-1], norm)
    return None


def _recorded_norm_output_or_none(heads: Tensor, call: _ModuleCall) -> Tensor | None:
    """Return what a norm made of heads (batch, heads, tokens, width), whose tokens it may have been given first."""
    fits = isinstance(call.x, Tensor) and call.x.numel() == heads.numel() and call.x.dtype == heads.dtype
    for first in (1, 2) if fits else ():
        candidate = heads.transpose(1, first)
        if torch.equal(call.x.reshape(candidate.shape), candidate):
            return cast(Tensor, call.out.reshape(candidate.shape).transpose(1, first))
    return None


def _rotated_heads_and_term_sizes(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return heads (sequences, heads, tokens, width) with their first numbers rotated by angles, and the size of the
    terms of each number."""
    width = cos.shape[-1]
    front, rest = x[..., :width], x[..., width:]
    half = torch.cat([-front[..., width // 2 :], front[..., : width // 2]], -1)
    terms = front * cos.unsqueeze(1), half * sin.unsqueeze(1)
    return torch.cat([terms[0] + terms[1], rest], -1), torch.cat([terms[0].abs() + terms[1].abs(), rest.abs()], -1)


def _is_within_rounding(actual: Any, expected: Tensor, term_sizes: Tensor) -> bool:
    """Whether tensors differ by a few roundings of the size of each number."""
    if (
        not isinstance(actual, Tensor)
        or actual.shape != expected.shape
        or actual.dtype not in TYPES
        or expected.dtype not in TYPES
    ):
        return False
    if actual.dtype is expected.dtype and torch.equal(actual, expected):
        return True
    unit = _ROUNDINGS * max(torch.finfo(tensor.dtype).eps for tensor in (actual, expected))
    return bool(((actual.double() - expected.double()).abs() <= unit * term_sizes.double() + 1e-30).all())
