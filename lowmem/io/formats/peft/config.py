"""PEFT's ``adapter_config.json``: which layers an adapter changes, and their ranks and alphas. What has no form here
(DoRA, biases of B, ...) and unknown keys are refused by name.

Names and lists are compared exactly. Regular expressions are not run, since one can keep Python's ``re`` busy for
years: where the config has one for the layers, the names of the adapter's tensors decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from lowmem.errors import show
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

_TOKEN = re.compile(r"\.\*|\\\W|[\w-]+|.", re.DOTALL)
_SPECIAL = frozenset("\\^$*+?{}[]()|")
_MOST_WILDCARDS = 2000  # in the patterns of a config, which are tried one after the other with each layer
_MOST_CHARACTERS = 100_000  # of patterns with .* or |


class PeftConfig:
    """What a config says: the layers that it means, and their ranks and alphas.

    Attributes:
        default: the technique of layers that no pattern names.
        target_parameters: ends of names.
        biases: whether biases of the base are stored, too.
        names_modules: whether the config alone says which modules are adapted; otherwise the names of the tensors do.
        base: the name of the base, or None.

    Raises:
        ValueError: it is no config of LoRA, or has something without a form here.
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
        self.default = LoRA(rank, alpha, float(given["lora_dropout"]), given["use_rslora"])
        self.target_parameters = frozenset(given["target_parameters"])
        self.biases = given["bias"] != "none"
        self.base = given["base_model_name_or_path"] or None
        self._targets, self._excluded = _modules(given["target_modules"]), _modules(given["exclude_modules"])
        self._layers = None if numbers == [] else frozenset(numbers if isinstance(numbers, list) else [numbers])
        names = [prefixes] if prefixes and isinstance(prefixes, str) else [*prefixes]
        self._numbered = {name: order for order, name in reversed([*enumerate(names)])}
        unread = any(map(_SPECIAL.intersection, names))
        self._layers = None if unread else self._layers
        self.names_modules = not unread and self._targets is not None and self._excluded is not None
        self._saved = frozenset(given["modules_to_save"])
        self._ranks, self._alphas = _Patterns("rank_pattern", ranks), _Patterns("alpha_pattern", alphas)

    def takes(self, path: str) -> bool:
        """Whether the module at a path may be adapted."""
        targets, layers = self._targets, self._layers
        if not _is_named(targets, path, True) or _is_named(self._excluded, path, False):
            return False
        # As check_target_module_exists of PEFT has it: nothing inside of what is stored whole is adapted.
        parts = path.split(".") if self._saved else ()
        if any(".".join(parts[start:end]) in self._saved for start, end in combinations(range(len(parts) + 1), 2)):
            return False
        return layers is None or not isinstance(targets, frozenset) or path in targets or self._layer(path) in layers

    def takes_parameter(self, name: str) -> bool:
        """Whether a parameter is adapted by its full name."""
        return _is_named(self.target_parameters, name, False)

    def saves(self, path: str) -> bool:
        """Whether the module at a path is stored whole."""
        return any(path[start:] in self._saved for start in range(len(path)))

    def technique(self, place: str) -> LoRA:
        """Return the rank and alpha of a module's path, or a parameter's full name."""
        own = self.default
        rank, alpha = self._ranks.of(place, own.rank), self._alphas.of(place, own.alpha)
        return LoRA(rank, alpha, own.dropout, own.rank_stabilized)

    def _layer(self, path: str) -> int | None:
        """Return the number of the layer that a path is in: behind a name of ``layers_pattern``, or the first one."""
        *parts, _ = path.split(".")
        found: list[tuple[int, int]] = []  # in what order PEFT tries them, and the place of the number
        for at, part in enumerate(parts):
            if part.isdecimal():
                ends = ends_of(".".join(parts[:at]))
                orders = [self._numbered[end] for end in ends if end in self._numbered]
                found += [(order, at) for order in (orders if self._numbered else [0] * (at > 1))]
        number = parts[min(found)[1]] if found else ""
        return int(number) if 0 < len(number) < 10 else None


class _Patterns:
    """Values by a pattern: names, ``.*``, and ``|`` between them. The first one counts that matches a place, or what
    is left of it behind a dot.

    Args:
        key: of the config, for errors.
        values: by pattern.
        whole: whether patterns match whole places only, as those that begin with ``^`` do.

    Raises:
        ValueError: another regular expression.
    """

    def __init__(self, key: str, values: Mapping[str, Any], whole: bool = False) -> None:
        self._names: dict[tuple[bool, str], tuple[float, Any]] = {}  # by whether it is a whole place, and the text
        self._wildcards: list[tuple[int, bool, list[str], Any]] = []  # the texts around .*
        characters = sum(len(pattern) for pattern in values if "|" in pattern or "*" in pattern)
        for number, (pattern, value) in enumerate(values.items()) if characters <= _MOST_CHARACTERS else ():
            for start, texts in _alternatives(key, pattern):
                if len(texts) == 1:  # most are: files name hundreds of layers
                    self._names.setdefault((whole or start, texts[0]), (number, value))
                else:
                    self._wildcards.append((number, whole or start, texts, value))
        if characters > _MOST_CHARACTERS or sum(len(texts) for _, _, texts, _ in self._wildcards) > _MOST_WILDCARDS:
            raise ValueError(f"{key} has too many patterns with .* or |: name the layers by their paths")

    def of(self, place: str, default: Any) -> Any:
        """Return the value of a place."""
        keys = [(True, place), *((False, end) for end in ends_of(place))]
        named = (self._names[key] for key in keys if key in self._names)
        first, value = min(named, default=(math.inf, default), key=lambda one: one[0])
        for number, whole, texts, other in self._wildcards:
            if number < first and _matches(f".{place}", whole, texts):
                return other
        return value


def _alternatives(key: str, pattern: str) -> list[tuple[bool, list[str]]]:
    """Split a pattern at ``|``: return whether each part begins with ``^``, and the texts around its ``.*``."""
    found: list[tuple[bool, list[list[str]]]] = [(False, [[]])]
    for token in _TOKEN.findall(pattern):
        if token == "|":
            found.append((False, [[]]))
        elif token == "^" and found[-1] == (False, [[]]):
            found[-1] = True, [[]]
        elif token in _SPECIAL:
            raise ValueError(
                f"{key} has the regular expression {show(pattern)}, and lowmem reads names, .* and a|b: name the "
                "layers by their paths"
            )
        elif token == ".*":
            found[-1][1].append([])
        else:
            found[-1][1][-1].append(token.removeprefix("\\"))
    return [(whole, ["".join(text) for text in texts]) for whole, texts in found]


def _matches(place: str, whole: bool, texts: list[str]) -> bool:
    """Whether texts stand in a place, which begins with a dot, one after the other, the last one at its end."""
    first, *between, last = texts
    at = place.find(f".{first}")
    if at < 0 or (whole and at > 0):
        return False
    at += len(first) + 1
    for text in between:
        found = place.find(text, at)
        if found < 0:
            return False
        at = found + len(text)
    return place.endswith(last) and len(place) - len(last) >= at


def _modules(given: list[str] | str | None) -> frozenset[str] | _Patterns | None:
    """Return what finds modules; None if the names of the tensors decide, as for a regular expression."""
    if given is None or given == "all-linear":  # which PEFT replaces by names before it saves
        return None
    if isinstance(given, list):
        return frozenset(given)
    try:
        return _Patterns("", {given: True}, whole=True)
    except ValueError:
        return None


def ends_of(path: str) -> list[str]:
    """Return a path and what is left of it behind each dot."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _is_named(names: frozenset[str] | _Patterns | None, path: str, default: bool) -> bool:
    if names is None:
        return default
    if isinstance(names, _Patterns):
        return bool(names.of(path, False))
    return any(end in names for end in ends_of(path))


def _rank(what: str, value: Any) -> Any:
    return _checked(what, value, type(value) is int and value >= 1, "must be a positive integer")


def _alpha(what: str, value: Any) -> Any:
    fits = type(value) in (int, float) and 0 < value < math.inf
    return _checked(what, value, fits, "must be a positive number")


def _checked(key: str, value: Any, fits: bool, what: str) -> Any:
    if not fits:
        raise ValueError(f"{key}={show(value)} {what}; get the adapter again")
    return value
