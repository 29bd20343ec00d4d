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
from lowmem.nn.adapter import is_conv1d, layout_of
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.registry import (
    computes_linear,
    layer_name,
    module_paths,
    parameters_to_adapt,
    place_name,
    skip_reason,
)

PREFIX = "base_model.model."
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_OF_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


@dataclass(frozen=True)
class Slot:
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

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors in the file."""
        module = self.module
        shapes = layout_of(module, self.parameter).shapes(rank)
        if isinstance(module, _ConvNd):
            lora_b = (module.out_channels, rank, *(1,) * len(module.kernel_size))
            return {"lora_a": (rank, module.in_channels, *module.kernel_size), "lora_b": lora_b}
        *stack, outputs, _ = shapes["lora_b"]
        if not stack:
            return shapes
        return {"lora_a": (stack[0] * rank, shapes["lora_a"][-1]), "lora_b": (outputs, rank * stack[0])}

    def to_file(self, part: str, value: Tensor) -> Tensor:
        """Return A or B of lowmem's adapter in the shape of the file."""
        value = value.detach()
        if value.dim() == 3:
            return value.flatten(0, 1) if part == "lora_a" else value.permute(1, 2, 0).flatten(1)
        return value.reshape(self.shapes(value.shape[0] if part == "lora_a" else value.shape[1])[part])

    def from_file(self, part: str, value: Tensor, rank: int) -> Tensor:
        """Return a tensor of the file in the shape of A or B of lowmem's adapter."""
        shape = layout_of(self.module, self.parameter).shapes(rank)[part]
        if len(shape) == 3 and part == "lora_b":
            stack, outputs, _ = shape
            return value.reshape(outputs, rank, stack).permute(2, 0, 1)
        return value.reshape(shape)


class Layers:
    """The layers of a model that PEFT adapts, by what its config calls them.

    Args:
        model: with or without lowmem's adapters.
        modules: paths of ``target_modules``.
        parameters: full names of ``target_parameters``.

    Attributes:
        slots: of all adapted parameters.

    Raises:
        ValueError: PEFT, or lowmem, cannot adapt one of them.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str], parameters: Iterable[str]) -> None:
        self.slots: list[Slot] = []
        modules = dict.fromkeys(modules)
        self._paths = module_paths(model)
        self._by_path = {path: module for module, paths in self._paths.items() for path in paths}
        self._projections = {id(one.out_proj) for one in self._paths if isinstance(one, nn.MultiheadAttention)}
        self._depth = dict.fromkeys(modules, 1)
        owned: dict[str, set[str]] = {}
        for name in parameters:
            owner, _, own = name.rpartition(".")
            owned.setdefault(owner, set()).add(own)
        targeted: dict[str, list[str]] = {}  # in the order of the module
        for path, own_names in owned.items():
            targeted[path] = [name for name in dense_parameters(self._module_at(path)) if name in own_names]
            self._depth[path] = self._depth.get(path, 0) + len(targeted[path])
        for path in modules:
            self._add_module(path)
        for path, names in targeted.items():
            self._add_parameters(path, names)

    def key(self, path: str, inside: int = 0) -> str:
        """Return what the names of a module's tensors begin with, so many of its own wrappers inside."""
        parts: list[str] = []
        done = ""
        for part in path.split("."):
            if parts:
                parts += ["base_layer"] * self._depth.get(done, 0)
            done = f"{done}.{part}".lstrip(".")
            parts.append(part)
        return ".".join([PREFIX + parts[0], *parts[1:], *["base_layer"] * inside])

    def inner_key(self, path: str) -> str:
        """Return what the names of a module's own tensors begin with, inside all of its wrappers."""
        return self.key(path, self._depth.get(path, 0))

    def _module_at(self, path: str) -> nn.Module:
        module = self._by_path.get(path)
        if module is None:
            raise ValueError(f"it adapts {layer_name(path)}, which the model has not: it is of another architecture")
        if not path:
            raise ValueError("PEFT does not adapt a model that is a layer itself: put it into another module")
        if len(self._paths[module]) > 1:
            other = next(one for one in self._paths[module] if one != path)
            raise ValueError(
                f"{layer_name(path)} is {layer_name(other)}, too, of which PEFT would adapt one alone: leave it out"
            )
        return module

    def _slot(self, path: str, parameter: str, pattern_name: str, prefix: str, parts: Mapping[str, str]) -> None:
        self._check_adaptable(path, parameter)
        keys = {part: f"{prefix}.{name}" for part, name in parts.items()}
        self.slots.append(Slot(self._by_path[path], parameter, place_name(path, parameter), pattern_name, keys))

    def _check_adaptable(self, path: str, parameter: str) -> None:
        module = self._by_path[path]
        why = skip_reason(LoRA, module, chosen=True)
        if why is None and parameter not in parameters_to_adapt(module):
            why = "it is no weight that lowmem adapts"
        if why is not None:
            kind = type(module).__name__
            raise ValueError(f"it adapts {layer_name(place_name(path, parameter))}, in a {kind} here: {why}")

    def _add_module(self, path: str) -> None:
        module = self._module_at(path)
        why = _why_not(module, id(module) in self._projections)
        if why is None and self._depth[path] > 1:
            why = "PEFT would adapt both it and a parameter of it"
        if why is not None:
            raise ValueError(f"{layer_name(path)} is a {type(module).__name__}: {why}")
        parts = _OF_EMBEDDING if isinstance(module, nn.Embedding) else _PARTS
        self._slot(path, "weight", path, self.key(path), parts)

    def _add_parameters(self, path: str, names: Sequence[str]) -> None:
        module = self._module_at(path)
        for number, name in enumerate(names):
            self._check_adaptable(path, name)
            layout = layout_of(module, name)
            why = None
            if len(layout.shape) not in (2, 3):
                why = f"has {len(layout.shape)} dimensions, and PEFT adapts parameters of 2 and 3"
            elif len(layout.shape) == 2 and layout.kind != "linear":
                why = "is no matrix (out, in), as which PEFT adapts parameters"
            elif len(layout.shape) == 3 and layout.shape[0] == 1 and layout.kind == "transposed":
                why = "is a stack of one transposed matrix, which PEFT adapts wrongly"
            if why is not None:
                raise ValueError(f"{layer_name(place_name(path, name))} {why}: leave it out")
            inside = len(names) - 1 - number
            self._slot(path, name, f"{path}.{name}", self.key(path, inside), _PARTS)


def dense_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's parameters, of stored ones those that they have when they are dense."""
    stored = list(module.forms) if isinstance(module, StoredModule) else []
    parts = module.part_names if isinstance(module, StoredModule) else ()
    own = [name for name, one in module._parameters.items() if one is not None and name not in parts]
    return stored + [name for name in own if name not in stored]


def _why_not(module: nn.Module, is_projection: bool) -> str | None:
    """Return why PEFT does not adapt a module as lowmem does, or None."""
    kind = module._plain_class if isinstance(module, AdaptedModule) else type(module)
    if is_projection or isinstance(module, nn.MultiheadAttention):
        # until 0.21 at least: merge() of its MultiheadAttention; a wrapper of out_proj alone is not called
        return "PEFT has no working adapter of out_proj, which it adds twice or not at all: leave it out"
    if isinstance(module, _ConvNd):
        if isinstance(module, _ConvTransposeNd):
            return "PEFT does not adapt transposed convolutions: leave it out"
        if module.groups > 1 or any(one != 1 for one in module.dilation) or module.padding_mode != "zeros":
            return "PEFT adapts convolutions without groups, dilation and other padding than zeros: leave it out"
        return None
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return None
    dense = kind.dense_class if issubclass(kind, StoredModule) else kind
    if isinstance(module, nn.Linear):
        known = dense.forward is nn.Linear.forward or computes_linear(module)
        return None if known else "PEFT would not add to the weight that it computes with: leave it out"
    return "PEFT does not adapt such a module: leave it out"
