"""PEFT's ``adapter_config.json``: which layers an adapter changes, and their ranks and alphas. What has no form here
(DoRA, biases of B, ...) and unknown keys are refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lowmem.errors import show
from lowmem.io.formats.peft.patterns import MAX_LENGTH, Budget, Pattern
from lowmem.nn.techniques import LoRA

MERGE = "merge it in PEFT, merge_and_unload(), and convert the model that this returns"

# Keys that do not change what a trained adapter computes.
_WITHOUT_EFFECT = {
    "r", "lora_alpha", "peft_type", "auto_mapping", "parent_library", "revision", "task_type",
    "inference_mode", "peft_version", "runtime_config", "megatron_core", "fan_in_fan_out", "init_lora_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip

# Values of init_lora_weights after which the base is as it was.
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Keys of what has no form here.
_REFUSED = {
    "use_dora": "it is a DoRA adapter (use_dora), which also scales each row of a weight",
    "lora_bias": "its matrices B have biases (lora_bias)",
    "trainable_token_indices": "it trains single tokens (trainable_token_indices)",
    "layer_replication": "it repeats layers of the base (layer_replication)",
    "ensure_weight_tying": "it ties adapters to each other (ensure_weight_tying)",
}

_BIASES = ("none", "all", "lora_only")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _is_targets(value: Any) -> bool:
    return _is_names(value) or (isinstance(value, str) and value != "")


def _is_numbers(value: Any) -> bool:
    return all(type(one) is int for one in (value if isinstance(value, list) else [value]))


# By key: what stands for None, whether another value fits, and what it must be.
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "base_model_name_or_path": ("", lambda one: isinstance(one, str), "must be a string"),
    "lora_dropout": (0, lambda one: type(one) in (int, float) and 0 <= one < 1, "must be at least 0 and below 1"),
    "use_rslora": (False, lambda one: isinstance(one, bool), "must be true or false"),
    "bias": ("none", lambda one: one in _BIASES, f"is none of {', '.join(_BIASES)}"),
    "rank_pattern": ({}, lambda one: isinstance(one, dict), "must be an object"),
    "alpha_pattern": ({}, lambda one: isinstance(one, dict), "must be an object"),
    "target_modules": (None, _is_targets, "must be a list of names"),
    "target_parameters": ([], _is_names, "must be a list of names"),
    "exclude_modules": ([], _is_targets, "must be a list of names"),
    "layers_to_transform": ([], _is_numbers, "must be numbers of layers"),
    "layers_pattern": ([], lambda one: one == "" or _is_targets(one), "must be a list of names"),
    "modules_to_save": ([], _is_names, "must be a list of names"),
}

_LITERAL = re.compile(r"\^?((?:[\w-]|\\.)+)")


class PeftConfig:
    """What a config says: the layers that it means, and their ranks and alphas.

    Attributes:
        default: the technique of layers that no pattern names.
        target_parameters: ends of names.
        biases: whether biases of the base are stored, too.
        base: the name of the base, or None.

    Raises:
        ValueError: it is no config of LoRA, or has something without a form here; or matching takes too long, of
            methods, too.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        kind = content.get("peft_type")
        if kind != "LORA":
            what = "names no peft_type" if kind is None else f"is of the type {show(kind)}"
            raise ValueError(f"it {what}, and lowmem loads LORA; {MERGE}")
        for key, why in _REFUSED.items():
            if content.get(key):
                raise ValueError(f"{why}, and lowmem has no form of it; {MERGE}")
        init = content.get("init_lora_weights", True)
        if not any(init is one or (isinstance(one, str) and init == one) for one in _KEEP_BASE):
            raise ValueError(
                f"init_lora_weights={show(init)} has changed the base's weights, too; convert the adapter in PEFT, "
                "save_pretrained(path_initial_model_for_weight_conversion=...), or merge it there"
            )
        given: dict[str, Any] = {}
        for key, (default, fits, what) in _FIELDS.items():
            value = content.get(key)
            given[key] = default if value is None else _checked(key, value, fits(value), what)
        for key, value in content.items():
            if value and key not in _FIELDS and key not in _WITHOUT_EFFECT:
                name = key if key.isidentifier() and len(key) < 60 else show(key)
                raise ValueError(
                    f"{name}={show(value)} is something that lowmem does not know, and may change what the adapter "
                    f"computes; upgrade lowmem, or {MERGE}"
                )
        rank, alpha = _rank("r", content.get("r", 8)), _alpha("lora_alpha", content.get("lora_alpha", 8))
        ranks = {one: _rank(f"rank_pattern of {show(one)}", of) for one, of in given["rank_pattern"].items()}
        alphas = {one: _alpha(f"alpha_pattern of {show(one)}", of) for one, of in given["alpha_pattern"].items()}
        numbers, prefixes = given["layers_to_transform"], given["layers_pattern"]
        budget = Budget()
        self.default = LoRA(rank, alpha, float(given["lora_dropout"]), given["use_rslora"])
        self.target_parameters = frozenset(given["target_parameters"])
        self.biases = given["bias"] != "none"
        self.base = given["base_model_name_or_path"] or None
        self._targets = _targets(given["target_modules"], budget)
        excluded = given["exclude_modules"]
        self._excluded = Pattern(excluded, budget) if isinstance(excluded, str) else frozenset(excluded)
        self._layers = None if numbers == [] else frozenset(numbers if isinstance(numbers, list) else [numbers])
        names = [prefixes] if prefixes and isinstance(prefixes, str) else [*prefixes]
        self._numbered = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
        self._saved_ends = tuple(given["modules_to_save"])
        # As check_target_module_exists of PEFT has it: nothing inside of what is stored whole is adapted.
        self._saved = [Pattern(rf"(^|.*\.){one}($|\..*)", budget) for one in self._saved_ends]
        self._ranks, self._alphas = (_ByPattern(found, budget) for found in (ranks, alphas))

    @property
    def names_modules(self) -> bool:
        """Whether the config says which modules are adapted; otherwise the names of the tensors do."""
        return self._targets is not None

    def takes(self, path: str) -> bool:
        """Whether the module at a path is adapted."""
        named, layers = self._targets, self._layers
        if not _is_named(named, path) or _is_named(self._excluded, path):
            return False
        if any(one.matches(path) for one in self._saved):
            return False
        return layers is None or not isinstance(named, frozenset) or path in named or self._layer(path) in layers

    def takes_parameter(self, name: str) -> bool:
        """Whether a parameter is adapted by its full name."""
        return _is_named(self.target_parameters, name)

    def saves(self, path: str) -> bool:
        """Whether the module at a path is stored whole."""
        return path.endswith(self._saved_ends)

    def technique(self, place: str) -> LoRA:
        """Return the rank and alpha of a module's path, or a parameter's full name."""
        own = self.default
        rank, alpha = self._ranks.of(place, own.rank), self._alphas.of(place, own.alpha)
        return LoRA(rank, alpha, own.dropout, own.rank_stabilized)

    def _layer(self, path: str) -> int | None:
        found = next((found for one in self._numbered if (found := re.match(one, path))), None)
        return None if found is None or len(found[1]) > 9 else int(found[1])


class _ByPattern:
    """Values by a regular expression, of which the first one counts that matches a place, or its end."""

    def __init__(self, values: Mapping[str, Any], budget: Budget) -> None:
        self._literal: dict[tuple[bool, str], tuple[float, Any]] = {}  # by whether it is a whole place, and the text
        self._patterns: list[tuple[int, Pattern, Any]] = []
        for number, (text, value) in enumerate(values.items()):
            literal = _LITERAL.fullmatch(text)
            plain = None if literal is None else re.sub(r"\\(.)", r"\1", literal[1])
            if plain is None or re.search(r"\\[0-9A-Za-z]", text):
                self._patterns.append((number, Pattern(rf"(.*\.)?({text})$", budget), value))
            else:  # most are: files name hundreds of layers, and no automaton is needed
                self._literal.setdefault((text.startswith("^"), plain), (number, value))

    def of(self, place: str, default: Any) -> Any:
        """Return the value of a place."""
        keys = [(True, place), *((False, end) for end in ends_of(place))]
        found = (self._literal[key] for key in keys if key in self._literal)
        first, literal = min(found, default=(math.inf, default), key=lambda one: one[0])
        for number, pattern, value in self._patterns:
            if number < first and pattern.matches(place):
                return value
        return literal


def _targets(given: list[str] | str | None, budget: Budget) -> frozenset[str] | Pattern | None:
    """Return what finds the modules; None if the names of the tensors decide, as for patterns that are not served."""
    if given is None or given == "all-linear":  # which PEFT replaces by names before it saves
        return None
    if isinstance(given, list):
        return frozenset(given)
    try:
        return Pattern(given, budget)
    except ValueError:
        if len(given) <= MAX_LENGTH:
            with suppress(re.error, OverflowError, RecursionError):
                re.compile(given)
                return None
        raise


def ends_of(path: str) -> list[str]:
    """Return a path and what is left of it behind each dot."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _is_named(given: Any, path: str) -> bool:
    if isinstance(given, Pattern):
        return given.matches(path)
    return given is not None and any(end in given for end in ends_of(path))


def _rank(what: str, value: Any) -> Any:
    return _checked(what, value, type(value) is int and value >= 1, "must be a positive integer")


def _alpha(what: str, value: Any) -> Any:
    fits = type(value) in (int, float) and 0 < value < math.inf
    return _checked(what, value, fits, "must be a positive number")


def _checked(key: str, value: Any, fits: bool, what: str) -> Any:
    if not fits:
        raise ValueError(f"{key}={show(value)} {what}; get the adapter again")
    return value
