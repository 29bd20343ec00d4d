"""The chat template, its variables and the system message: of ``lowmem fit``, and as its record has them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from lowmem.errors import file_error, printable_line, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import read_text_and_sha256
from lowmem.io.model_folder import read_json_object

NO_TEMPLATE = "none"
RECORD_KEY = "chat"
"""The key of training.json with these settings."""


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are made.

    Args:
        system: the system message of those that have none.
        template_kwargs: variables of the template.
        template: the text of a template; None: the tokenizer's own.
        date: as ``2026-07-26``: what a template that writes today's date writes on other days, too.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    date: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what a record has beside the template, which is the tokenizer's beside an adapter."""
        return {"system": self.system, "template_kwargs": dict(self.template_kwargs) or None, "date": self.date}


def add_chat_arguments(group: argparse._ActionsContainer, template_help: str) -> None:
    """Add ``--system``, ``--chat-template`` and ``--template-kwargs``."""
    group.add_argument(
        "--system", type=_parse_text, metavar="TEXT", help="the system message of conversations that have none"
    )
    group.add_argument("--chat-template", type=_parse_text, metavar="FILE", help=template_help)
    group.add_argument(
        "--template-kwargs",
        type=_parse_json_object,
        metavar="JSON",
        help="variables of the chat template, as '{\"enable_thinking\": false}'",
    )


def _parse_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'' must be a text that is not empty")
    return text


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{printable_line(repr(text), 80)} must be a JSON object, as '{{\"a\": 1}}'")
    return value


def apply_chat_arguments(
    arguments: argparse.Namespace, tokenizer: Any, recorded: ChatSettings = ChatSettings()
) -> ChatSettings:
    """Give a tokenizer of transformers the template that is named, and return the settings.

    What is not named is as ``recorded``. A template that writes the date of the day writes that of the record.

    Raises:
        FileError: the template's file is empty or no UTF-8 text.
        OSError: it cannot be read.
    """
    template = recorded.template
    if arguments.chat_template not in (None, NO_TEMPLATE):
        template, _ = read_text_and_sha256(Path(arguments.chat_template))
        if not template.strip():
            raise file_error(arguments.chat_template, "it is empty; name a file with a chat template")
    if template is not None:
        tokenizer.chat_template = template
    system = recorded.system if arguments.system is None else arguments.system
    variables = recorded.template_kwargs if arguments.template_kwargs is None else arguments.template_kwargs
    dated = _template_at_date(tokenizer.chat_template, recorded.date, variables)
    if dated is not None:
        tokenizer.chat_template = dated
    return ChatSettings(system, variables, template, None if dated is None else recorded.date)


def _template_at_date(template: object, day: str | None, variables: Mapping[str, Any]) -> str | None:
    """Return a template that writes a date in place of the day's; None: it writes none, or a variable sets it."""
    if not isinstance(template, str) or day is None:
        return None
    names = re.findall(r"set\s+(\w+)\s*=\s*strftime_now\b", template)
    changed = re.sub(
        r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""",
        lambda call: json.dumps(date.fromisoformat(day).strftime(call[2])),
        template,
    )
    return None if changed == template or any(name in variables for name in names) else changed


def read_recorded_chat_settings(folder: Path, record_file: str) -> ChatSettings:
    """Return the settings that an adapter was trained with; the defaults where there is no record of any.

    Raises:
        FileError: the record is damaged.
    """
    path = folder / record_file
    recorded = read_json_object(path, kind="record").get(RECORD_KEY) if path.is_file() else None
    with value_errors_as_file_errors(path):
        return parsed_chat_settings({} if recorded is None else recorded)


def parsed_chat_settings(recorded: Any, template: str | None = None) -> ChatSettings:
    """Return settings from what ``as_json`` made of them.

    Raises:
        ValueError: they are of another kind.
    """
    values: dict[str, Any] = recorded if isinstance(recorded, dict) else {"system": 0}
    system, variables, day = (values.get(key) for key in ("system", "template_kwargs", "date"))
    if not (isinstance(system, str | None) and isinstance(variables, dict | None) and isinstance(day, str | None)):
        raise ValueError(f"{RECORD_KEY}={short_repr(recorded)} must hold system, template_kwargs and date")
    if day is not None:
        date.fromisoformat(day)
    return ChatSettings(system, variables or {}, template, day)


def template_with_settings(template: str, settings: ChatSettings) -> str:
    """Return a template that uses settings where neither the conversation nor the caller says anything else."""
    # Python's literals of the values of JSON are Jinja's, too
    parts = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in settings.template_kwargs.items()
        if name.isidentifier()
    ]
    if settings.system is not None:
        message = repr({"role": "system", "content": settings.system})
        condition = "not messages or messages[0]['role'] != 'system'"
        parts.append(f"{{%- if {condition} %}}{{%- set messages = [{message}] + messages %}}{{%- endif %}}")
    # So that the newline with which a template may begin stays
    return "".join([*parts, "{{- '' }}", template]) if parts else template
