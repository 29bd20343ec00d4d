"""What Ollama makes of a Modelfile and conversations, by a program in Go beside this file."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FOLDER = TemporaryDirectory()


@cache
def _program() -> Path:
    """Return the compiled program."""
    target = Path(_FOLDER.name, "ollama_prompts")
    source = Path(__file__).with_name("ollama_prompts.go")
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", target, source], check=True, env=environment)
    return target


def ollama_commands_and_prompts(
    modelfile: str, conversations: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return a Modelfile's commands, and what its template makes of conversations; skip where there is no Go."""
    if which("go") is None:
        pytest.skip("Go is not installed: apt-get install golang-go")
    given = json.dumps({"modelfile": modelfile, "conversations": list(conversations)})
    made = json.loads(subprocess.run([_program()], input=given, capture_output=True, check=True, text=True).stdout)
    return [(each["name"], each["value"]) for each in made["commands"]], made["prompts"] or []
