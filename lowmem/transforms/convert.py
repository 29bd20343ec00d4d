"""Converts any model: select modules, assign techniques, store copies, then commit all of them or none."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeVar, cast

from torch import Tensor, nn

from lowmem.errors import short_repr
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA
from lowmem.resident import release_memory_after_call
from lowmem.transforms.adapter_placement import adapter_warning_texts
from lowmem.transforms.bits_per_weight import (
    check_bit_limit,
    check_bits_per_weight,
    dense_weights_warning_or_none,
    techniques_as_code,
)
from lowmem.transforms.converted_copies import StoreFactory, cached_store_factory, converted_copy
from lowmem.transforms.model_checks import check_layers_are_changeable
from lowmem.transforms.module_registry import ModuleFilter, Technique, all_paths_by_module, check_is_module
from lowmem.transforms.module_replacement import commit_replacements_and_freeze_if_adapted
from lowmem.transforms.module_selection import record_user_exclusions, select_paths_and_names_by_module
from lowmem.transforms.technique_assignment import techniques_and_budget_by_layer
from lowmem.transforms.tied_weights import restore_shared_biases_to_dense

M = TypeVar("M", bound=nn.Module)


@release_memory_after_call
def convert(
    model: M,
    *techniques: Technique,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    parameters: Callable[[str, Tensor], bool] | None = None,
    at_most: float | None = None,
) -> M:
    """Apply techniques, left to right, to every module that the first one supports.

    ``Half`` and ``FourBit`` store the weights of linear and convolutional layers, embeddings, attention,
    recurrent layers and experts (``lowmem.transforms.module_registry.ENTRIES``). A module stays the same object, an
    instance of its own class, with its hooks; its ``weight`` is a read-only tensor, whose values are dequantized
    where something else than a product reads them. Norms stay dense, and biases but for those of nn.Linear,
    nn.Conv1d and nn.Conv2d in ``Half``. Modules that share a weight (tied embeddings) share the stored one, or
    are skipped together. Embeddings and output layers are kept in 8 bits by ``FourBit`` unless ``embeddings="4bit"``.

    ``LoRA`` takes linear layers, transformers' Conv1D, experts (a pair of matrices for each) and the projections of
    nn.MultiheadAttention. These stay the same objects, too, get a child ``adapters``, and their parameters become an
    ``AdaptedWeight``; linear layers become a ``LoRALinear``. It leaves out embeddings, convolutions, recurrent
    layers, the output layer of a language model (what ``get_output_embeddings()`` returns), layers that share its
    weight, linear layers whose weight is tied to an embedding (their adapters would be as large as the vocabulary),
    and linear layers that choose experts, unless ``where`` is given: then it takes all that ``where`` selects.
    ``skip`` leaves layers out and keeps this choice. After it only adapters train. ``summary`` lists how each module
    was treated, and why. A call of the model by another thread meanwhile may fail.

    Args:
        model: any module; the root itself can be the layer.
        techniques: ``Half``, ``EightBit``, ``FourBit`` or ``Budget``, and ``LoRA``.
        where: called with (path, module); a module is taken only where it returns True, for all its paths.
        skip: glob patterns of paths to leave as they are.
        parameters: called with (path, parameter) for floating-point parameters of two and more dimensions that no
            entry of the registry knows; those for which it returns True are stored, too.
        at_most: bits per weight of the whole model, biases and norms included; more is an error, which says what the
            least is that a technique gives with the same ``where``, ``skip`` and ``parameters``.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: the model is not a module, or a technique is of another type.
        RuntimeError: inference mode is active, or was when a parameter was made: autograd could not use the weights.
            Or the model is prepared for training.
        ValueError: no technique, techniques that do not compose, nothing to convert, a ``where`` that only leaves
            out, as ``path != "lm_head"``, and takes layers that ``LoRA`` leaves out without it; a pattern of
            ``skip``, of ``LoRA`` or a ``parameters`` that matches nothing, a layer that has the technique already or
            is inside a PEFT layer, a weight that cannot be stored or adapted (its path is named), more than
            ``at_most`` bits, a ``Budget`` that is out of reach (what is possible is named), or a model that is
            wrapped for several processes. The model is left as it was.

    Warns:
        UserWarning: more than a tenth of the model's bytes stayed dense, and neither ``where`` nor ``skip`` left
            them out; the three largest reasons are named with their remedies. Biases, norms and floating-point
            buffers count; where all that is dense is 64 KiB or less, it warns if matrices alone are a tenth.
        UserWarning: more than a fifth of the adapter's numbers are of ranks above the smaller dimension of a weight,
            the most that its change can have; the layer with most of them is named.
    """
    check_is_module(model)
    _check_techniques(techniques)
    where = cache(where) if callable(where) else where  # it may be slow, or ask a person

    def build_meta_replacements(*storage_techniques: Technique) -> dict[nn.Module, nn.Module]:
        return build_replacements(
            model, storage_techniques, where, skip, parameters, cached_store_factory(on_meta=True)
        )

    if at_most is not None:
        check_bit_limit(at_most)
        storing = tuple(t for t in techniques if not isinstance(t, LoRA))
        if all(isinstance(getattr(t, "format", ""), str) for t in storing) and not isinstance(techniques[0], Budget):
            # else sizes depend on values
            sized = build_meta_replacements(*storing) if storing else {}
            # Before the weights are quantized
            check_bits_per_weight(model, sized, at_most, build_meta_replacements)
    replacements = build_replacements(model, techniques, where, skip, parameters, cached_store_factory())
    if at_most is not None:
        check_bits_per_weight(model, replacements, at_most, build_meta_replacements)
    placed = {
        layer: {name: part.technique for name, part in new.adapters.adapters_by_parameter("default").items()}
        for layer, new in replacements.items()
        if isinstance(new, AdaptedModule)
    }
    if placed:
        paths = all_paths_by_module(model)
        check_layers_are_changeable("convert", {layer: paths[layer][0] for layer in placed})
    warning_texts = [dense_weights_warning_or_none(model, replacements, type(techniques[0]), where, skip)]
    warning_texts += adapter_warning_texts(model, placed) if placed else []
    commit_replacements_and_freeze_if_adapted(model, replacements)
    record_user_exclusions(model, where, skip, type(techniques[0]))
    for text in filter(None, warning_texts):
        # The caller of the wrapped function
        warnings.warn(text, UserWarning, stacklevel=3)
    return model


def build_replacements(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: ModuleFilter,
    skip: str | Iterable[str],
    parameter_filter: Callable[[str, Tensor], bool] | None,
    store_factory: StoreFactory,
    choice_losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> dict[nn.Module, nn.Module]:
    """Select, assign and store: return what each module becomes that ``convert`` takes; raises as ``convert``.

    ``choice_losses`` returns what each choice of a ``Budget`` loses of a weight, by its name, or None of one that is
    not known; without ``choice_losses`` they are measured.
    """
    selection = select_paths_and_names_by_module(model, techniques, where, skip, parameter_filter)
    chosen, got = techniques_and_budget_by_layer(model, techniques, selection, where, choice_losses)
    unused: dict[type[Technique], str | None] = {}
    replacements = {
        module: converted_copy(module, chosen[module], path, unused, store_factory, names)
        for module, (path, names) in selection.items()
        if chosen[module]
    }
    for module, choice in got.items():
        cast(StoredModule, replacements[module]).chosen_because = choice.why
    for why in unused.values():
        if why is not None:
            raise ValueError(why)
    restore_shared_biases_to_dense(model, replacements)
    return replacements


def _check_techniques(techniques: tuple[Technique, ...]) -> None:
    if not techniques:
        raise ValueError("no technique was given: pass Half(), EightBit(), FourBit(), Budget() or LoRA()")
    for technique in techniques:
        if type(technique) not in (Half, EightBit, FourBit, Budget, LoRA):
            raise TypeError(
                f"technique={short_repr(technique)} must be an instance of Half, EightBit, FourBit, Budget or LoRA"
            )
    for kind, count in Counter(type(t) for t in techniques).items():
        if count > 1:
            raise ValueError(f"{kind.__name__} was given {count} times: a layer takes a technique once")
    kinds = [type(technique) for technique in techniques]
    if Budget in kinds and kinds not in ([Budget], [Budget, LoRA]):
        raise ValueError(
            f"Budget stores the weights: name it alone, or before LoRA, not {techniques_as_code(techniques)}"
        )
