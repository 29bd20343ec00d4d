"""``lowmem export --for``: the checks of exported files, the Modelfile, and the commands that run them."""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import file_error, value_errors_as_file_errors
from lowmem.io.filesystem import write_atomically
from lowmem.io.formats.gguf.gguf_outlook import gguf_outlook
from lowmem.io.formats.gguf.ollama_modelfile import modelfile_text
from lowmem.io.training_record import RECORD_FILE, StorageTechnique
from lowmem.tools.arguments import option_string
from lowmem.tools.chat_arguments import ChatSettings, read_recorded_chat_settings

if TYPE_CHECKING:
    from lowmem.integrations.transformers.chat_template import ChatTemplate
    from lowmem.integrations.transformers.exported_prompts import Prompt

LLAMA_CPP, OLLAMA = PROGRAMS = ("llama.cpp", "ollama")

_CONTRADICTIONS = {
    "format": "the program chooses it",
    "requantize": "it changes the codes that the adapter was trained on",
    "dense_base": "it writes another base than the adapter was trained on",
}


def check_program_options(arguments: argparse.Namespace, is_adapter: bool) -> None:
    """Raise a ValueError for options that contradict each other."""
    if arguments.program is None:
        if arguments.merge:
            raise ValueError("--merge is an option of --for: add --for llama.cpp, or run lowmem merge")
        return
    said = f"--for={arguments.program}"
    for option, why in _CONTRADICTIONS.items():
        if getattr(arguments, option):
            raise ValueError(f"{option_string(option)} contradicts {said}, {why}: leave it out")
    if not is_adapter and (arguments.merge or arguments.source.is_file()):
        what = "--merge applies to an adapter" if arguments.merge else f"{said} takes a folder"
        raise ValueError(f"{what}, and IN={str(arguments.source)!r} is none: leave it out")
    if is_adapter and arguments.merge != (arguments.dtype is not None):
        raise ValueError(
            f"{said} takes --merge and --dtype together, for one dense file: add the other one, or leave both out"
        )


def check_base_is_exact(base: Path, technique: StorageTechnique, arguments: argparse.Namespace) -> None:
    """Raise a FileError unless GGUF holds the base of an adapter as it was trained on, or all is merged."""
    inexact = gguf_outlook(base, technique).inexact
    if inexact is not None and not arguments.merge:
        why = f"{inexact}: train with lowmem fit --for llama.cpp, or write one dense file with --merge --dtype f16"
        raise file_error(base, why, f"export for {arguments.program}")


@dataclass(frozen=True)
class TrainedPrompts:
    """How the prompts of a training are made.

    Args:
        tokenizer: of transformers.
        settings: of the chat template.
        end_texts: the tokens that end an answer.
        template_file: a chat template that the GGUF file does not have; None: it has the tokenizer's.
    """

    tokenizer: Any
    settings: ChatSettings
    end_texts: Sequence[str]
    template_file: Path | None = None

    def template_or_none(self) -> ChatTemplate | None:
        """Return the chat template; None: prompts are plain texts."""
        from lowmem.integrations.transformers.chat_template import ChatTemplate

        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        return ChatTemplate(self.tokenizer, self.settings.template_kwargs) if has_template else None

    def compared(self) -> list[Prompt]:
        """Return the prompts that an exported file has to make as the training did."""
        from lowmem.integrations.transformers.exported_prompts import compared_prompts

        return compared_prompts(self.template_or_none(), self.settings.system)

    def let_folder_begin_as_trained(self, folder: Path) -> None:
        """Let the tokenizer of a folder begin conversations with what the chat template writes, and no more."""
        from lowmem.integrations.transformers.exported_prompts import leave_out_untrained_beginning

        template = self.template_or_none()
        if template is not None:
            leave_out_untrained_beginning(folder, self.tokenizer, template, self.compared()[0])


def read_trained_prompts(
    adapter_folder: Path, base: Path, like: Path | None, generation_config: Any
) -> TrainedPrompts:
    """Return how prompts were made.

    Args:
        adapter_folder: has the tokenizer of the training, or the base has.
        base: a folder or a GGUF file.
        like: the GGUF file whose tokenizer and template are copied; None: those of the training, or of the base.
        generation_config: of the model.
    """
    from lowmem.integrations.transformers.text_generation import end_token_ids
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    settings = read_recorded_chat_settings(adapter_folder, RECORD_FILE)
    tokenizer = read_tokenizer(adapter_folder if (adapter_folder / "tokenizer_config.json").is_file() else base)
    copied, file = like or (base if base.is_file() else None), adapter_folder / "chat_template.jinja"
    is_another = copied is not None and read_tokenizer(copied).chat_template != tokenizer.chat_template
    template_file = file if is_another and file.is_file() else None
    chats = bool(getattr(tokenizer, "chat_template", None))
    ends = end_token_ids(generation_config, tokenizer, chats, settings.template_kwargs)
    return TrainedPrompts(tokenizer, settings, tokenizer.convert_ids_to_tokens(ends), template_file)


def write_program_files(arguments: argparse.Namespace, outs: Sequence[Path], prompts: TrainedPrompts) -> list[str]:
    """Check that an exported file makes the prompts of the training, write the Modelfile, and return commands.

    Args:
        arguments: of the command.
        outs: the GGUF file, maybe that of the adapter, and for Ollama the Modelfile.
        prompts: of the training.

    Raises:
        FileError: the file makes other tokens of a prompt, or Ollama has no such template.
    """
    from lowmem.integrations.transformers.exported_prompts import ExportedTokenizer, check_ollama_prompts
    from lowmem.integrations.transformers.ollama_template import derive_ollama_template

    out, *others = outs
    template, settings, compared = prompts.template_or_none(), prompts.settings, prompts.compared()
    exported = ExportedTokenizer(out, None if prompts.template_file is None else prompts.tokenizer.chat_template)
    exported.check_prompts(compared, prompts.tokenizer, settings.template_kwargs)
    if arguments.program == LLAMA_CPP:
        return [shlex.join(_llama_cli_words(out, others[0] if others else None, prompts))]
    *adapters, modelfile = others
    with value_errors_as_file_errors(arguments.source, "export for ollama"):
        if template is None:
            raise ValueError("it has no chat template, and Ollama is for chats: export it --for llama.cpp")
        derived = derive_ollama_template(template)
        check_ollama_prompts(derived, compared, template)
        go_text = derived.go_text(exported.beginning)
        text = modelfile_text(out, adapters[0] if adapters else None, go_text, settings.system, prompts.end_texts)
    if derived.tools is None and any(prompt.tools for prompt in compared):
        warnings.warn("TEMPLATE has no tools: Go cannot write them as the chat template does", stacklevel=2)
    write_atomically(modelfile, text.encode(), overwrite=False)
    name = out.stem.lower()
    return [shlex.join(["ollama", "create", name, "-f", str(modelfile)]), shlex.join(["ollama", "run", name])]


def _llama_cli_words(out: Path, adapter_out: Path | None, prompts: TrainedPrompts) -> list[str]:
    """Return the command of llama.cpp that answers as the training did."""
    words = ["llama-cli", "-m", str(out)]
    words += [] if adapter_out is None else ["--lora", str(adapter_out)]
    if prompts.template_or_none() is None:
        return [*words, "-no-cnv", "-p", "TEXT"]
    words.append("--jinja")
    if prompts.template_file is not None:
        words += ["--chat-template-file", str(prompts.template_file)]
    if prompts.settings.template_kwargs:
        words += ["--chat-template-kwargs", json.dumps(dict(prompts.settings.template_kwargs))]
    return words if prompts.settings.system is None else [*words, "-sys", prompts.settings.system]
