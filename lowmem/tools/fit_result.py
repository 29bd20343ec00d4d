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

from lowmem.distributed.torchrun_processes import restart_command_words
from lowmem.io.adapter_files import save_adapter
from lowmem.io.filesystem import atomic_folder, write_atomically, write_errors_with_path
from lowmem.io.hub_names import hub_name_and_commit_or_none
from lowmem.io.training_record import FILES_KEY, KEPT_BASE, RECORD_FILE, sha256_by_file
from lowmem.tools.export_programs import LLAMA_CPP, OLLAMA
from lowmem.tools.fit_job import FineTuningJob, states_folder
from lowmem.tools.fit_samples import samples_markdown
from lowmem.transforms.named_adapters import delete_adapter

CHECKPOINTS = "checkpoints"
"""The folder in OUT with those that ``--keep`` writes; an adapter in OUT itself would be one of several to choose."""

_TRANSIENT_OPTIONS = ("--resume", "--json", "--debug")


def reproducing_shell_command(arguments: argparse.Namespace, short_paths: bool = False) -> str:
    """Return the command of a run as a shell takes it, without options that do not change its result.

    ``short_paths``: of one process, and with the last components of paths, since this machine's mean nothing
    elsewhere.
    """
    words = [word for word in arguments.command_line if word not in _TRANSIENT_OPTIONS]
    return shlex.join(
        ["lowmem", *map(_shorten_local_path, words)] if short_paths else [*restart_command_words(), *words]
    )


def _shorten_local_path(word: str) -> str:
    """Return the last component of a path of this machine; names on the Hub and patterns stay."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = value.rstrip(os.sep)
    is_here = os.sep in value and (os.path.lexists(path) or os.path.isdir(os.path.dirname(path)))
    return option + equals + (os.path.basename(path) if is_here else value)


def suggested_next_commands(job: FineTuningJob) -> list[str]:
    """Return commands that use the adapter of a run."""
    assert job.save_path is not None
    out, cached = str(job.save_path), hub_name_and_commit_or_none(job.model_path)
    # By the commit, since a branch moves
    base, revision = (str(job.model_path), []) if cached is None else (cached[0], ["--revision", cached[1]])
    how = ["--chat"] if job.texts.chats else ["--prompt", "TEXT"]
    # Where the adapter's config does not find it
    named = ["--base", base] if job.has_public_base_name and job.base_name != base else []
    serve, alternative = [["serve", out]] if job.keep_base else [], ""
    if job.gguf.refusal is None:
        like = [] if job.gguf.like is None else ["--like", "GGUF"]
        how_exported = ["--requantize"]
        if job.gguf.inexact is None:
            how_exported = ["--for", LLAMA_CPP]
            # Which is for chats
            alternative = f"  # or --for {OLLAMA}" if job.texts.chats else ""
        last = ["export", out, f"{out.rstrip(os.sep)}.gguf", *named, *like, *how_exported]
    else:
        last = ["merge", base, out, f"{out.rstrip(os.sep)}-merged", *revision, "--to", "bfloat16"]
    commands = [shlex.join(["lowmem", *command]) for command in (["generate", out, *named, *how], *serve, last)]
    return [*commands[:-1], commands[-1] + alternative]


def write_adapter_folder(
    job: FineTuningJob, states_folder: Path, model: nn.Module, record: dict[str, Any], command: str
) -> None:
    """Write the adapter's folder, maybe with the base, atomically: the folder of states takes what a kill leaves."""
    from lowmem.integrations.transformers.pretrained_folder import write_model_folder

    assert job.save_path is not None
    with write_errors_with_path(states_folder):
        states_folder.mkdir(exist_ok=True)
    try:
        with atomic_folder(job.save_path, states_folder) as partial:
            _write_adapter_files(job, partial, model)
            if (states_folder / CHECKPOINTS).exists():
                shutil.copytree(states_folder / CHECKPOINTS, partial / CHECKPOINTS)
            if job.keep_base:
                # Only the files are used from here on
                write_model_folder(delete_adapter(model, "default"), job.model_path, partial / KEPT_BASE, None)
            _write_record(partial, record)
            write_atomically(partial / "README.md", _model_card_markdown(job, record, command).encode())
    finally:
        with suppress(OSError):  # it has states
            states_folder.rmdir()


def write_checkpoint(job: FineTuningJob, model: nn.Module, record: dict[str, Any]) -> None:
    """Write the adapter of a moment beside the states of a run, from where ``write_adapter_folder`` takes it."""
    assert job.save_path is not None
    folder = states_folder(job.save_path)
    path = folder / CHECKPOINTS / f"step-{record['steps']}"
    with write_errors_with_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(path, folder) as partial:
        _write_adapter_files(job, partial, model)
        _write_record(partial, record)


def remove_later_checkpoints(save_path: Path, step: int) -> None:
    """Remove the checkpoints after a step from which a run goes on, which writes them again."""
    for path in (states_folder(save_path) / CHECKPOINTS).glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            with write_errors_with_path(path):
                shutil.rmtree(path)


def _write_adapter_files(job: FineTuningJob, folder: Path, model: nn.Module) -> None:
    save_adapter(model, folder / "adapter", format="peft", base_name=job.base_name)
    for file in sorted((folder / "adapter").iterdir()):
        shutil.move(file, folder / file.name)
    (folder / "adapter").rmdir()
    job.tokenizer.save_pretrained(folder)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of an adapter whose other files are written."""
    record = record | {FILES_KEY: sha256_by_file(folder)}
    write_atomically(folder / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _model_card_markdown(job: FineTuningJob, record: dict[str, Any], command: str) -> str:
    """Return the model card: the same for the same run, resumed or not."""
    assert job.save_path is not None
    base, run = job.public_base_name, record["run"]
    figures = {
        "Steps": record["steps"],
        "Last loss": f"{record['last_loss']:.4f}",
        **{
            f"Perplexity of the held-out text, {name}": "not finite" if value is None else f"{value:.4f}"
            for name, value in record["perplexity"].items()
        },
        **{f"Held-out {name}": f"{value:.4f}" for name, value in record.get("held_out", {}).items()},
        "Rank": run["rank"],
        "Learning rate": f"{run['lr']:g}",
        "Examples": run["examples"],
        "Base while training": run["format"],
    }
    samples = samples_markdown(record.get("samples", ()))
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
base_model: {base}
library_name: peft
tags:
- lora
- lowmem
---

# {job.save_path.name}

A LoRA adapter of `{base}`, trained on `{", ".join(job.data.names)}` by lowmem {record["lowmem"]}:

```
{command}
```

| Figure | Value |
| :-- | --: |
{rows}

{_usage_instructions(job)} All settings are in `training.json`.
{samples and f"{chr(10)}{samples}{chr(10)}"}"""


def _usage_instructions(job: FineTuningJob) -> str:
    """Return how the adapter's folder is opened."""
    assert job.save_path is not None
    if job.model_path.is_file():
        adapter = job.save_path.name
        return f"""`lowmem generate` opens this folder where the base, a GGUF file, is. In Python, with
`lowmem.integrations.transformers`, `lowmem.load_adapter(from_exact("{job.model_path.name}"), "{adapter}")` does."""
    return """`AutoPeftModelForCausalLM.from_pretrained` of PEFT, `AutoModelForCausalLM.from_pretrained` of
transformers and `lowmem generate` open this folder where the base is. If lowmem has stored the base, import
`lowmem.integrations.transformers` first."""
