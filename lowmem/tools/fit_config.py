"""``lowmem fit --config``: options from a YAML file, or those of an earlier run from its ``training.json``."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lowmem.errors import error_type_and_first_line, file_error, short_repr
from lowmem.io.filesystem import read_text_and_sha256
from lowmem.tools.arguments import long_options, nearest_option_or_none, option_string
from lowmem.tools.fit_settings import options_of_run, run_of_record, set_options_not_given
from lowmem.version import install_command

_TASK = "take options from"

_RUN_TYPES = {
    "examples": int,
    "batch_size": int,
    "rows_of_a_step": int,
    "window": int | None,
    "chat_template": str | None,
}
"""The types of what is read of a run and is no option."""


class _RaisingParser(argparse.ArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def take_options_of_config(
    arguments: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> dict[str, Any] | None:
    """Set options that are not given to those of the YAML file ``--config``.

    Returns:
        If the file is a ``training.json``, the run that ``take_options_of_run`` takes; no option is set here.

    Raises:
        FileError: the file holds no options, an option is unknown or has a wrong value.
        OSError: the file cannot be read.
        ImportError: PyYAML is not installed.
    """
    content = _read_mapping(arguments.config)
    try:
        if not isinstance(content.get("run"), dict):
            set_options_not_given(arguments, _parse_options(content, add_arguments))
            return None
        run = run_of_record(content)
        _parse_options(options_of_run(run, is_dense=True), add_arguments)
        for name, kind in _RUN_TYPES.items():
            if not isinstance(run.get(name), kind):
                raise TypeError(f"{name}={short_repr(run.get(name))} is of another kind")
    except ValueError as reason:
        raise file_error(arguments.config, str(reason), _TASK) from None
    except (AttributeError, KeyError, TypeError) as reason:
        damage = error_type_and_first_line(reason)
        raise file_error(arguments.config, f"its run is damaged: {damage}", _TASK) from None
    return run


def check_digests_of_config(arguments: argparse.Namespace, identity: Mapping[str, Any]) -> None:
    """Raise a FileError if the run of ``--config`` had another base or other data than ``identity``."""
    options = {"base": "MODEL", "data": "--data", "from": "--from"}
    if arguments.eval_data is None and arguments.eval_share is None:
        options["held_out"] = "--eval-data"
    for name, option in options.items():
        if arguments.configured_run.get(name) != identity[name]:
            raise file_error(
                arguments.config,
                f"its run had other files as {option}: give those, or write its options into a YAML file",
                _TASK,
            )


def _read_mapping(path: Path) -> dict[str, Any]:
    text, _ = read_text_and_sha256(path)
    try:
        import yaml
    except ImportError as reason:
        raise ImportError(f"--config needs PyYAML: {install_command('finetune')}") from reason
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        raise file_error(path, f"it is no YAML: {' '.join(str(reason).split())}", _TASK) from reason
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise file_error(path, "it must hold options by their long names, as `rank: 16`", _TASK)
    return content


def _parse_options(
    content: Mapping[str, Any], add_arguments: Callable[[argparse.ArgumentParser], None]
) -> dict[str, Any]:
    """Return the values of options by the names of their attributes.

    Raises:
        ValueError: an option is unknown, has a wrong value or is there twice, or two exclude each other.
    """
    parser = _RaisingParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    known = long_options(parser) - {"--config", "--json"}
    defaults = vars(parser.parse_args(["MODEL"]))
    words: list[str] = []
    names: dict[str, str] = {}
    for name, value in content.items():
        option_words = words_of_option(name, value)
        option = option_words[0].partition("=")[0]
        if option not in known:
            nearest = nearest_option_or_none(option, known)
            raise ValueError(f"{name} is no option" + ("" if nearest is None else f": did you mean {nearest[2:]}?"))
        parsed, rest = parser.parse_known_args(["MODEL", *option_words])
        if rest:
            raise ValueError(f"{name} takes one value, and not {short_repr(value)}")
        attribute = next(name for name, value in vars(parsed).items() if value != defaults[name])
        if attribute in names:
            raise ValueError(f"{names[attribute]} and {name} are one option: leave one out")
        names[attribute] = name
        words += [] if value is False else option_words
    values = vars(parser.parse_args(["MODEL", *words]))
    return {name: value for name, value in values.items() if value != defaults[name]}


def words_of_option(name: str, value: Any) -> list[str]:
    """Return an option with its value as words of a command line; of a truth value, the option alone."""
    option = option_string(name)
    if isinstance(value, bool):
        return [option]
    if name == "columns" and isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, list):
        texts = ["=".join(item) if isinstance(item, tuple) else str(item) for item in value]
        return [f"{option}={text}" for text in texts] if name == "data" else [option, *texts]
    if value is None:
        raise ValueError(f"{name} has no value")
    return [f"{option}={json.dumps(value) if isinstance(value, Mapping) else value}"]


def options_as_text(options: Mapping[str, Any]) -> str:
    """Return options as a command line takes them."""
    return shlex.join(word for name, value in options.items() for word in words_of_option(name, value))
