"""The Modelfile of Ollama, which names a model's files, its template, its system message and where answers end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem.errors import short_repr

_QUOTES = '"""'
_REMEDY = "export it --for llama.cpp"


def modelfile_text(
    base: Path, adapter: Path | None, template: str, system: str | None, stop_texts: Sequence[str]
) -> str:
    """Return a Modelfile.

    Args:
        base, adapter: GGUF files in the Modelfile's folder.
        template: of Go.
        system: the system message of conversations that have none.
        stop_texts: the texts that end an answer.

    Raises:
        ValueError: Ollama would read a value as another one, or as several.
    """
    if system is not None and ("{{" in system or "}}" in system):
        raise ValueError(f"system={short_repr(system)} has actions of Go's templates: {_REMEDY}")
    lines = [f"FROM {_checked(f'./{base.name}', 'the name')}"]
    lines += [] if adapter is None else [f"ADAPTER {_checked(f'./{adapter.name}', 'the name')}"]
    lines += [f"PARAMETER stop {_quoted(text, 'the end')}" for text in stop_texts]
    lines += [] if system is None else [f"SYSTEM {_quoted(system, 'system')}"]
    return "\n".join([*lines, f"TEMPLATE {_quoted(template, 'the template')}", ""])


def _quoted(value: str, name: str) -> str:
    """Return a value in quotes, within which Ollama knows no escapes: three quotes always end it."""
    if _QUOTES in value:
        raise ValueError(f"{name}={short_repr(value)} has three quotes, which end a value of a Modelfile: {_REMEDY}")
    _checked("".join(value.split("\n")), name)
    return f"{_QUOTES}{value}{_QUOTES}"


def _checked(value: str, name: str) -> str:
    """Return a value if Ollama reads all of its characters: it leaves out those that are not printable."""
    character = next((character for character in value if not character.isprintable() and character != "\t"), None)
    if character is not None:
        raise ValueError(f"{name}={short_repr(value)} has {character!r}, which Ollama leaves out: {_REMEDY}")
    return value
