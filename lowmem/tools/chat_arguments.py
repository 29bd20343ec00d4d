"""The chat template, its variables and the system message: of ``lowmem fit``, and as its record has them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem.errors import file_error, printable_line, short_repr
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
        template_digest: SHA-256 of the file of a template; None: the tokenizer's own.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_digest: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what a record has."""
        return {"system": self.system, "template_kwargs": dict(self.template_kwargs) or None}


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

    What is not named is as ``recorded``.

    Raises:
        FileError: the template's file is empty or no UTF-8 text.
        OSError: it cannot be read.
    """
    digest = recorded.template_digest
    if arguments.chat_template not in (None, NO_TEMPLATE):
        text, digest = read_text_and_sha256(Path(arguments.chat_template))
        if not text.strip():
            raise file_error(arguments.chat_template, "it is empty; name a file with a chat template")
        tokenizer.chat_template = text
    system = recorded.system if arguments.system is None else arguments.system
    variables = recorded.template_kwargs if arguments.template_kwargs is None else arguments.template_kwargs
    return ChatSettings(system, variables, digest)


def read_recorded_chat_settings(folder: Path, record_file: str) -> ChatSettings:
    """Return the settings that an adapter was trained with; the defaults where there is no record of any.

    Raises:
        FileError: the record is damaged.
    """
    path = folder / record_file
    if not path.is_file():
        return ChatSettings()
    recorded = read_json_object(path, kind="record").get(RECORD_KEY) or {}
    system, variables = (
        (recorded.get(key) for key in ("system", "template_kwargs")) if isinstance(recorded, dict) else (0, 0)
    )
    if not (isinstance(system, str | None) and isinstance(variables, dict | None)):
        raise file_error(path, f"{RECORD_KEY}={short_repr(recorded)} must hold system and template_kwargs")
    return ChatSettings(system, variables or {})
