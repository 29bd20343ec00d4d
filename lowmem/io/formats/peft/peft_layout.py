"""Where PEFT keeps the matrices of an adapter: the names and shapes of its tensors, by the places that lowmem adapts.

An adapted module is wrapped, and ``base_layer`` stands in the names of what is inside it. The parameters of one
module (``target_parameters``, as experts have them) are wrapped one around the other in the order of the module, so
that the names of the last have no ``base_layer``. A of a stack of E matrices is (E * rank, in) with the experts
outermost, and B is (out, rank * E) with the experts innermost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import is_transformers_conv1d, parameter_layout
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.module_registry import (
    adaptable_parameter_names,
    all_paths_by_module,
    conversion_skip_reason,
    is_weight_only_multiplied,
    layer_display_name,
    layer_or_parameter_path,
)

PREFIX = "base_model.model."
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_OF_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


@dataclass(frozen=True)
class PeftAdapterSlot:
    """The adapter of one parameter of a module.

    Attributes:
        place: the name that lowmem has for the parameter.
        pattern_name: the name that PEFT matches patterns of ranks and alphas with.
        keys: of the adapter's tensors in the file, by ``lora_a`` and ``lora_b``.
    """

    module: nn.Module
    parameter: str
    place: str
    pattern_name: str
    keys: Mapping[str, str]

    def peft_file_shapes_by_matrix(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors in the file."""
        module = self.module
        shapes = parameter_layout(module, self.parameter).lora_matrix_shapes(rank)
        if isinstance(module, _ConvNd):
            lora_b = (module.out_channels, rank, *(1,) * len(module.kernel_size))
            return {"lora_a": (rank, module.in_channels, *module.kernel_size), "lora_b": lora_b}
        *stack, outputs, _ = shapes["lora_b"]
        if not stack:
            return shapes
        return {"lora_a": (stack[0] * rank, shapes["lora_a"][-1]), "lora_b": (outputs, rank * stack[0])}

    def to_file_shape(self, matrix_name: str, value: Tensor) -> Tensor:
        """Return A or B of lowmem's adapter in the shape of the file."""
        value = value.detach()
        if value.dim() == 3:
            return value.flatten(0, 1) if matrix_name == "lora_a" else value.permute(1, 2, 0).flatten(1)
        return value.reshape(
            self.peft_file_shapes_by_matrix(value.shape[0] if matrix_name == "lora_a" else value.shape[1])[
                matrix_name
            ]
        )

    def from_file_shape(self, matrix_name: str, value: Tensor, rank: int) -> Tensor:
        """Return a tensor of the file in the shape of A or B of lowmem's adapter."""
        shape = parameter_layout(self.module, self.parameter).lora_matrix_shapes(rank)[matrix_name]
        if len(shape) == 3 and matrix_name == "lora_b":
            stack, outputs, _ = shape
            return value.reshape(outputs, rank, stack).permute(2, 0, 1)
        return value.reshape(shape)


class PeftTargetLayers:
    """The layers of a model that PEFT adapts, by what its config calls them.

    Args:
        model: with or without lowmem's adapters.
        module_paths_to_adapt: paths of ``target_modules``.
        parameter_names: full names of ``target_parameters``.

    Attributes:
        slots: of all adapted parameters.

    Raises:
        ValueError: PEFT, or lowmem, cannot adapt one of them.
    """

    def __init__(
        self, model: nn.Module, module_paths_to_adapt: Iterable[str], parameter_names: Iterable[str]
    ) -> None:
        self.slots: list[PeftAdapterSlot] = []
        module_paths_to_adapt = dict.fromkeys(module_paths_to_adapt)
        self._paths = all_paths_by_module(model)
        self._by_path = {path: module for module, paths in self._paths.items() for path in paths}
        self._projections = {
            id(attention.out_proj) for attention in self._paths if isinstance(attention, nn.MultiheadAttention)
        }
        self._depth = dict.fromkeys(module_paths_to_adapt, 1)
        owned: dict[str, set[str]] = {}
        for name in parameter_names:
            owner, _, parameter_name = name.rpartition(".")
            owned.setdefault(owner, set()).add(parameter_name)
        # In the order of the module
        targeted: dict[str, list[str]] = {}
        for path, own_names in owned.items():
            targeted[path] = [
                name for name in dense_parameter_names(self._checked_module_at_path(path)) if name in own_names
            ]
            self._depth[path] = self._depth.get(path, 0) + len(targeted[path])
        for path in module_paths_to_adapt:
            self._check_and_add_module(path)
        for path, names in targeted.items():
            self._check_and_add_parameters(path, names)

    def tensor_name_prefix(self, module_path: str, wrapper_count: int = 0) -> str:
        """Return what the names of a module's tensors begin with, so many of its own wrappers inside."""
        parts: list[str] = []
        done = ""
        for part in module_path.split("."):
            if parts:
                parts += ["base_layer"] * self._depth.get(done, 0)
            done = f"{done}.{part}".lstrip(".")
            parts.append(part)
        return ".".join([PREFIX + parts[0], *parts[1:], *["base_layer"] * wrapper_count])

    def innermost_tensor_name_prefix(self, module_path: str) -> str:
        """Return what the names of a module's own tensors begin with, inside all of its wrappers."""
        return self.tensor_name_prefix(module_path, self._depth.get(module_path, 0))

    def _checked_module_at_path(self, path: str) -> nn.Module:
        module = self._by_path.get(path)
        if module is None:
            raise ValueError(
                f"it adapts {layer_display_name(path)}, which the model has not: it is of another architecture"
            )
        if not path:
            raise ValueError("PEFT does not adapt a model that is a layer itself: put it into another module")
        if len(self._paths[module]) > 1:
            other = next(alias for alias in self._paths[module] if alias != path)
            raise ValueError(
                f"{layer_display_name(path)} is {layer_display_name(other)}, too, of which PEFT would adapt one "
                "alone: leave it out"
            )
        return module

    def _add_slot(
        self, path: str, parameter: str, pattern_name: str, prefix: str, matrix_suffixes: Mapping[str, str]
    ) -> None:
        keys = {part: f"{prefix}.{name}" for part, name in matrix_suffixes.items()}
        self.slots.append(
            PeftAdapterSlot(
                self._by_path[path], parameter, layer_or_parameter_path(path, parameter), pattern_name, keys
            )
        )

    def _check_lowmem_can_adapt(self, path: str, parameter: str) -> None:
        module = self._by_path[path]
        why = conversion_skip_reason(LoRA, module, user_selected=True)
        if why is None and parameter not in adaptable_parameter_names(module):
            why = "it is no weight that lowmem adapts"
        if why is not None:
            kind = type(module).__name__
            raise ValueError(
                f"it adapts {layer_display_name(layer_or_parameter_path(path, parameter))}, in a {kind} here: {why}"
            )

    def _check_and_add_module(self, path: str) -> None:
        module = self._checked_module_at_path(path)
        why = _peft_skip_reason_or_none(module, id(module) in self._projections)
        if why is None and self._depth[path] > 1:
            why = "PEFT would adapt both it and a parameter of it"
        if why is not None:
            raise ValueError(f"{layer_display_name(path)} is a {type(module).__name__}: {why}")
        parts = _OF_EMBEDDING if isinstance(module, nn.Embedding) else _PARTS
        self._check_lowmem_can_adapt(path, "weight")
        self._add_slot(path, "weight", path, self.tensor_name_prefix(path), parts)

    def _check_and_add_parameters(self, path: str, names: Sequence[str]) -> None:
        module = self._checked_module_at_path(path)
        for number, name in enumerate(names):
            self._check_lowmem_can_adapt(path, name)
            layout = parameter_layout(module, name)
            why = None
            if len(layout.shape) not in (2, 3):
                why = f"has {len(layout.shape)} dimensions, and PEFT adapts parameters of 2 and 3"
            elif len(layout.shape) == 2 and layout.kind != "linear":
                why = "is no matrix (out, in), as which PEFT adapts parameters"
            elif len(layout.shape) == 3 and layout.shape[0] == 1 and layout.kind == "transposed":
                why = "is a stack of one transposed matrix, which PEFT adapts wrongly"
            if why is not None:
                raise ValueError(f"{layer_display_name(layer_or_parameter_path(path, name))} {why}: leave it out")
            inside = len(names) - 1 - number
            self._add_slot(path, name, f"{path}.{name}", self.tensor_name_prefix(path, inside), _PARTS)


def dense_parameter_names(module: nn.Module) -> list[str]:
    """Return the names of a module's parameters, of stored ones those that they have when they are dense."""
    stored = list(module.forms) if isinstance(module, StoredModule) else []
    parts = module.part_parameter_names if isinstance(module, StoredModule) else ()
    dense_names = [
        name for name, parameter in module._parameters.items() if parameter is not None and name not in parts
    ]
    return stored + [name for name in dense_names if name not in stored]


def _peft_skip_reason_or_none(module: nn.Module, is_attention_out_proj: bool) -> str | None:
    """Return why PEFT does not adapt a module as lowmem does, or None."""
    kind = module._plain_class if isinstance(module, AdaptedModule) else type(module)
    if is_attention_out_proj or isinstance(module, nn.MultiheadAttention):
        # until 0.21 at least: merge() of its MultiheadAttention; a wrapper of out_proj alone is not called
        return "PEFT has no working adapter of out_proj, which it adds twice or not at all: leave it out"
    if isinstance(module, _ConvNd):
        if isinstance(module, _ConvTransposeNd):
            return "PEFT does not adapt transposed convolutions: leave it out"
        if module.groups > 1 or any(dilation != 1 for dilation in module.dilation) or module.padding_mode != "zeros":
            return "PEFT adapts convolutions without groups, dilation and other padding than zeros: leave it out"
        return None
    if isinstance(module, nn.Embedding) or is_transformers_conv1d(module):
        return None
    dense = kind.dense_class if issubclass(kind, StoredModule) else kind
    if isinstance(module, nn.Linear):
        known = dense.forward is nn.Linear.forward or is_weight_only_multiplied(module)
        return None if known else "PEFT would not add to the weight that it computes with: leave it out"
    return "PEFT does not adapt such a module: leave it out"
