"""The result of ``lowmem fit`` of folders: the adapter's folder with its model card, and commands that use it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from lowmem.distributed.processes import start_words
from lowmem.io.adapters import save_adapter
from lowmem.io.atomic import atomic_folder, write_atomically, write_errors
from lowmem.tools.fit_job import RECORD, Job

_OF_THIS_RUN = ("--resume", "--json", "--debug")


def command_of(arguments: argparse.Namespace, short: bool = False) -> str:
    """Return the command of a run as a shell takes it, without options that do not change its result.

    ``short``: of one process, and with the last components of paths, since this machine's mean nothing elsewhere.
    """
    words = [word for word in arguments.command_line if word not in _OF_THIS_RUN]
    return shlex.join(["lowmem", *map(_without_folders, words)] if short else [*start_words(), *words])


def _without_folders(word: str) -> str:
    """Return the last component of a path of this machine; names on the Hub and patterns stay."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = value.rstrip(os.sep)
    is_here = os.sep in value and (os.path.lexists(path) or os.path.isdir(os.path.dirname(path)))
    return option + equals + (os.path.basename(path) if is_here else value)


def next_commands(job: Job) -> list[str]:
    """Return commands that use the adapter of a run."""
    assert job.save is not None
    base, out = str(job.folder), str(job.save)
    how = ["--chat"] if job.texts.chats else ["--prompt", "TEXT"]
    merged = f"{out.rstrip(os.sep)}-merged"
    if job.has_public_base:  # where the adapter's config does not find it
        how = ["--base", base, *how]
    commands = [["generate", out, *how], ["merge", base, out, merged, "--to", "bfloat16"]]
    return [shlex.join(["lowmem", *command]) for command in [*commands, ["export", merged, f"{merged}.gguf"]]]


def save(job: Job, states: Path, model: nn.Module, document: dict[str, Any], command: str) -> None:
    """Write the adapter's folder atomically: within the folder of states, which takes what a kill leaves."""
    assert job.save is not None
    with write_errors(states):
        states.mkdir(exist_ok=True)
    try:
        with atomic_folder(job.save, states) as partial:
            save_adapter(model, partial / "adapter", format="peft", base_name=job.base_name)
            for file in sorted((partial / "adapter").iterdir()):
                shutil.move(file, partial / file.name)
            (partial / "adapter").rmdir()
            job.tokenizer.save_pretrained(partial)
            write_atomically(partial / RECORD, (json.dumps(document, indent=2) + "\n").encode())
            write_atomically(partial / "README.md", _card(job, document, command).encode())
    finally:
        with suppress(OSError):  # it has states
            states.rmdir()


def _card(job: Job, document: dict[str, Any], command: str) -> str:
    """Return the model card: the same for the same run, resumed or not."""
    assert job.save is not None
    base, run = job.public_base, document["run"]
    figures = {
        "Steps": document["steps"],
        "Last loss": f"{document['last_loss']:.4f}",
        **{
            f"Perplexity of the held-out text, {name}": "not finite" if value is None else f"{value:.4f}"
            for name, value in document["perplexity"].items()
        },
        "Rank": run["rank"],
        "Learning rate": f"{run['lr']:g}",
        "Examples": run["examples"],
        "Base while training": run["format"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
base_model: {base}
library_name: peft
tags:
- lora
- lowmem
---

# {job.save.name}

A LoRA adapter of `{base}`, trained on `{job.data.name}` by lowmem {document["lowmem"]}:

```
{command}
```

| Figure | Value |
| :-- | --: |
{rows}

{_opening(job)} All settings are in `training.json`.
"""


def _opening(job: Job) -> str:
    """Return how the adapter's folder is opened."""
    assert job.save is not None
    if job.folder.is_file():
        return f"""`lowmem generate` opens this folder where the base, a GGUF file, is. In Python, with
`lowmem.integrations.transformers`, `lowmem.load_adapter(from_exact("{job.folder.name}"), "{job.save.name}")` does."""
    return """`AutoPeftModelForCausalLM.from_pretrained` of PEFT, `AutoModelForCausalLM.from_pretrained` of
transformers and `lowmem generate` open this folder where the base is. If lowmem has stored the base, import
`lowmem.integrations.transformers` first."""
