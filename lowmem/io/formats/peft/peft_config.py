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

from lowmem.errors import short_repr
from lowmem.nn.techniques import LoRA

MERGE = "merge it in PEFT, merge_and_unload(), and convert the model that this returns"

# Keys that do not change what a trained adapter computes.
_WITHOUT_EFFECT = {
    "r", "lora_alpha", "peft_type", "auto_mapping", "parent_library", "task_type",
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


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_list_of_names_or_pattern(value: Any) -> bool:
    return _is_list_of_names(value) or (isinstance(value, str) and value != "")


def _is_integer_or_list_of_integers(value: Any) -> bool:
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))


# By key: what stands for None, whether another value fits, and what it must be.
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "base_model_name_or_path": ("", lambda item: isinstance(item, str), "must be a string"),
    "revision": ("", lambda item: isinstance(item, str), "must be a string"),
    "lora_dropout": (0, lambda item: type(item) in (int, float) and 0 <= item < 1, "must be at least 0 and below 1"),
    "use_rslora": (False, lambda item: isinstance(item, bool), "must be true or false"),
    "bias": ("none", lambda item: item in _BIASES, f"is none of {', '.join(_BIASES)}"),
    "rank_pattern": ({}, lambda item: isinstance(item, dict), "must be an object"),
    "alpha_pattern": ({}, lambda item: isinstance(item, dict), "must be an object"),
    "target_modules": (None, _is_list_of_names_or_pattern, "must be a list of names"),
    "target_parameters": ([], _is_list_of_names, "must be a list of names"),
    "exclude_modules": ([], _is_list_of_names_or_pattern, "must be a list of names"),
    "layers_to_transform": ([], _is_integer_or_list_of_integers, "must be numbers of layers"),
    "layers_pattern": ([], lambda item: item == "" or _is_list_of_names_or_pattern(item), "must be a list of names"),
    "modules_to_save": ([], _is_list_of_names, "must be a list of names"),
}

_TOKEN = re.compile(r"\.\*|\\\W|[\w-]+|.", re.DOTALL)
_SPECIAL = frozenset("\\^$*+?{}[]()|")
# In the patterns of a config, which are tried one after the other with each layer
_MOST_WILDCARDS = 2000
_MOST_CHARACTERS = 100_000  # of patterns with .* or |


class PeftConfig:
    """What a config says: the layers that it means, and their ranks and alphas.

    Attributes:
        default: the technique of layers that no pattern names.
        target_parameters: ends of names.
        biases: whether biases of the base are stored, too.
        names_modules: whether the config alone says which modules are adapted; otherwise the names of the tensors do.
        base: the name of the base, or None.
        base_revision: the commit, branch or tag of the base on the Hub, or None.

    Raises:
        ValueError: it is no config of LoRA, or has something without a form here.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        kind = content.get("peft_type")
        if kind != "LORA":
            what = "names no peft_type" if kind is None else f"is of the type {short_repr(kind)}"
            raise ValueError(f"it {what}, and lowmem loads LORA; {MERGE}")
        for key, why in _REFUSED.items():
            if content.get(key):
                raise ValueError(f"{why}, and lowmem has no form of it; {MERGE}")
        init = content.get("init_lora_weights", True)
        if not any(init is item or (isinstance(item, str) and init == item) for item in _KEEP_BASE):
            raise ValueError(
                f"init_lora_weights={short_repr(init)} has changed the base's weights, too; convert the adapter in "
                "PEFT, "
                "save_pretrained(path_initial_model_for_weight_conversion=...), or merge it there"
            )
        field_values: dict[str, Any] = {}
        for key, (default, fits, what) in _FIELDS.items():
            value = content.get(key)
            field_values[key] = default if value is None else _checked_value(key, value, fits(value), what)
        for key, value in content.items():
            if value and key not in _FIELDS and key not in _WITHOUT_EFFECT:
                name = key if key.isidentifier() and len(key) < 60 else short_repr(key)
                raise ValueError(
                    f"{name}={short_repr(value)} is something that lowmem does not know, and may change what the "
                    "adapter "
                    f"computes; upgrade lowmem, or {MERGE}"
                )
        rank, alpha = (
            _checked_rank("r", content.get("r", 8)),
            _checked_alpha("lora_alpha", content.get("lora_alpha", 8)),
        )
        ranks = {
            item: _checked_rank(f"rank_pattern of {short_repr(item)}", of)
            for item, of in field_values["rank_pattern"].items()
        }
        alphas = {
            item: _checked_alpha(f"alpha_pattern of {short_repr(item)}", of)
            for item, of in field_values["alpha_pattern"].items()
        }
        numbers, prefixes = field_values["layers_to_transform"], field_values["layers_pattern"]
        self.default = LoRA(rank, alpha, float(field_values["lora_dropout"]), field_values["use_rslora"])
        self.target_parameters = frozenset(field_values["target_parameters"])
        self.biases = field_values["bias"] != "none"
        self.base = field_values["base_model_name_or_path"] or None
        self.base_revision = field_values["revision"] or None
        self._targets, self._excluded = (
            _module_matcher_or_none(field_values["target_modules"]),
            _module_matcher_or_none(field_values["exclude_modules"]),
        )
        self._layers = None if numbers == [] else frozenset(numbers if isinstance(numbers, list) else [numbers])
        names = [prefixes] if prefixes and isinstance(prefixes, str) else [*prefixes]
        self._numbered = {name: order for order, name in reversed([*enumerate(names)])}
        unread = any(map(_SPECIAL.intersection, names))
        self._layers = None if unread else self._layers
        self.names_modules = not unread and self._targets is not None and self._excluded is not None
        self._saved = frozenset(field_values["modules_to_save"])
        self._ranks, self._alphas = (
            _FirstMatchPatternMap("rank_pattern", ranks),
            _FirstMatchPatternMap("alpha_pattern", alphas),
        )

    def is_target_module(self, module_path: str) -> bool:
        """Whether the module at a path may be adapted."""
        targets, layers = self._targets, self._layers
        if not _is_path_matched(targets, module_path, True) or _is_path_matched(self._excluded, module_path, False):
            return False
        # As check_target_module_exists of PEFT has it: nothing inside of what is stored whole is adapted.
        parts = module_path.split(".") if self._saved else ()
        if any(".".join(parts[start:end]) in self._saved for start, end in combinations(range(len(parts) + 1), 2)):
            return False
        return (
            layers is None
            or not isinstance(targets, frozenset)
            or module_path in targets
            or self._layer_number_or_none(module_path) in layers
        )

    def is_target_parameter(self, parameter_name: str) -> bool:
        """Whether a parameter is adapted by its full name."""
        return _is_path_matched(self.target_parameters, parameter_name, False)

    def is_in_modules_to_save(self, module_path: str) -> bool:
        """Whether the module at a path is stored whole."""
        return any(module_path[start:] in self._saved for start in range(len(module_path)))

    def lora_technique(self, parameter_path: str) -> LoRA:
        """Return the rank and alpha of a module's path, or a parameter's full name."""
        default = self.default
        rank, alpha = (
            self._ranks.first_match_or_default(parameter_path, default.rank),
            self._alphas.first_match_or_default(parameter_path, default.alpha),
        )
        return LoRA(rank, alpha, default.dropout, default.rank_stabilized)

    def _layer_number_or_none(self, path: str) -> int | None:
        """Return the number of the layer that a path is in: behind a name of ``layers_pattern``, or the first one."""
        *parts, _ = path.split(".")
        # In what order PEFT tries them, and the place of the number
        candidates: list[tuple[int, int]] = []
        for at, part in enumerate(parts):
            if part.isdecimal():
                ends = dotted_path_suffixes(".".join(parts[:at]))
                orders = [self._numbered[end] for end in ends if end in self._numbered]
                candidates += [(order, at) for order in (orders if self._numbered else [0] * (at > 1))]
        number = parts[min(candidates)[1]] if candidates else ""
        return int(number) if 0 < len(number) < 10 else None


class _FirstMatchPatternMap:
    """Values by a pattern: names, ``.*``, and ``|`` between them. The first one counts that matches a place, or what
    is left of it behind a dot.

    Args:
        config_key: of the config, for errors.
        values_by_pattern: by pattern.
        match_whole_paths: whether patterns match whole places only, as those that begin with ``^`` do.

    Raises:
        ValueError: another regular expression.
    """

    def __init__(
        self, config_key: str, values_by_pattern: Mapping[str, Any], match_whole_paths: bool = False
    ) -> None:
        # By whether it is a whole place, and the text
        self._names: dict[tuple[bool, str], tuple[float, Any]] = {}
        # The texts around .*
        self._wildcards: list[tuple[int, bool, list[str], Any]] = []
        characters = sum(len(pattern) for pattern in values_by_pattern if "|" in pattern or "*" in pattern)
        for number, (pattern, value) in (
            enumerate(values_by_pattern.items()) if characters <= _MOST_CHARACTERS else ()
        ):
            for start, texts in _parse_pattern_alternatives(config_key, pattern):
                # Most are: files name hundreds of layers
                if len(texts) == 1:
                    self._names.setdefault((match_whole_paths or start, texts[0]), (number, value))
                else:
                    self._wildcards.append((number, match_whole_paths or start, texts, value))
        if characters > _MOST_CHARACTERS or sum(len(texts) for _, _, texts, _ in self._wildcards) > _MOST_WILDCARDS:
            raise ValueError(f"{config_key} has too many patterns with .* or |: name the layers by their paths")

    def first_match_or_default(self, path: str, default: Any) -> Any:
        """Return the value of a place."""
        keys = [(True, path), *((False, end) for end in dotted_path_suffixes(path))]
        named = (self._names[key] for key in keys if key in self._names)
        first, value = min(named, default=(math.inf, default), key=lambda item: item[0])
        for number, whole, texts, other in self._wildcards:
            if number < first and _is_wildcard_match(f".{path}", whole, texts):
                return other
        return value


def _parse_pattern_alternatives(config_key: str, pattern: str) -> list[tuple[bool, list[str]]]:
    """Split a pattern at ``|``: return whether each part begins with ``^``, and the texts around its ``.*``."""
    alternatives: list[tuple[bool, list[list[str]]]] = [(False, [[]])]
    for token in _TOKEN.findall(pattern):
        if token == "|":
            alternatives.append((False, [[]]))
        elif token == "^" and alternatives[-1] == (False, [[]]):
            alternatives[-1] = True, [[]]
        elif token in _SPECIAL:
            raise ValueError(
                f"{config_key} has the regular expression {short_repr(pattern)}, and lowmem reads names, .* and a|b: "
                "name the "
                "layers by their paths"
            )
        elif token == ".*":
            alternatives[-1][1].append([])
        else:
            alternatives[-1][1][-1].append(token.removeprefix("\\"))
    return [(whole, ["".join(text) for text in texts]) for whole, texts in alternatives]


def _is_wildcard_match(dotted_path: str, from_start: bool, literal_parts: list[str]) -> bool:
    """Whether texts stand in a place, which begins with a dot, one after the other, the last one at its end."""
    first, *between, last = literal_parts
    at = dotted_path.find(f".{first}")
    if at < 0 or (from_start and at > 0):
        return False
    at += len(first) + 1
    for text in between:
        text_start = dotted_path.find(text, at)
        if text_start < 0:
            return False
        at = text_start + len(text)
    return dotted_path.endswith(last) and len(dotted_path) - len(last) >= at


def _module_matcher_or_none(targets: list[str] | str | None) -> frozenset[str] | _FirstMatchPatternMap | None:
    """Return what finds modules; None if the names of the tensors decide, as for a regular expression."""
    if targets is None or targets == "all-linear":  # which PEFT replaces by names before it saves
        return None
    if isinstance(targets, list):
        return frozenset(targets)
    try:
        return _FirstMatchPatternMap("", {targets: True}, match_whole_paths=True)
    except ValueError:
        return None


def dotted_path_suffixes(path: str) -> list[str]:
    """Return a path and what is left of it behind each dot."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _is_path_matched(matcher: frozenset[str] | _FirstMatchPatternMap | None, path: str, default: bool) -> bool:
    if matcher is None:
        return default
    if isinstance(matcher, _FirstMatchPatternMap):
        return bool(matcher.first_match_or_default(path, False))
    return any(end in matcher for end in dotted_path_suffixes(path))


def _checked_rank(key: str, value: Any) -> Any:
    return _checked_value(key, value, type(value) is int and value >= 1, "must be a positive integer")


def _checked_alpha(key: str, value: Any) -> Any:
    fits = type(value) in (int, float) and 0 < value < math.inf
    return _checked_value(key, value, fits, "must be a positive number")


def _checked_value(key: str, value: Any, fits: bool, requirement: str) -> Any:
    if not fits:
        raise ValueError(f"{key}={short_repr(value)} {requirement}; get the adapter again")
    return value
