"""Language models to generate text with: opened from folders, GGUF files and adapters, each with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import TextStreamer

from lowmem.errors import file_error, short_repr
from lowmem.integrations.transformers.hub_models import download_model
from lowmem.integrations.transformers.model_facts import quantizing_program_or_none
from lowmem.integrations.transformers.pretrained_folder import (
    load_folder,
    load_folder_or_gguf,
    weights_read_reported,
)
from lowmem.integrations.transformers.quantization_config import LowmemConfig
from lowmem.integrations.transformers.text_tokenizer import TextTokenizer, read_tokenizer
from lowmem.io.adapter_files import (
    choose_adapter_name_or_none,
    load_adapter,
    read_adapter_summary,
    resolve_adapter_path_and_name,
)
from lowmem.io.filesystem import has_magic_bytes
from lowmem.io.formats.gguf.gguf_file import MAGIC
from lowmem.io.formats.peft.peft_reader import CONFIG, adapter_folders_without_model
from lowmem.io.hub_names import MODEL_KINDS, is_hub_name
from lowmem.io.training_record import StorageTechnique, kept_base_or_none, read_training_technique_or_none
from lowmem.transforms.named_adapters import activate, adapter_names, deactivate


class TokenTimingStreamer(TextStreamer):  # type: ignore[misc]
    """Writes the text of the new tokens to stdout as they are made, and times the prompt and what follows apart.

    Attributes:
        prompt_seconds: from the making of this object to the end of the first step, which computes the prompt and
            the first new token; None before that.
        later_count: of the tokens of later steps, with those that end a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.later_count = 0
        self.prompt_seconds: float | None = None
        self._start = perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt, at first, or the next tokens."""
        if not self.next_tokens_are_prompt:
            if self.prompt_seconds is None:
                self.prompt_seconds = perf_counter() - self._start
            else:
                self.later_count += value.numel()
        super().put(value)

    def later_seconds(self) -> float:
        """Return the time since the first step; 0.0 before its end."""
        return 0.0 if self.prompt_seconds is None else perf_counter() - self._start - self.prompt_seconds


def adapter_base_path(adapter_folder: Path, fetch_base: Callable[[str, str | None], Path] = download_model) -> Path:
    """Return the base that an adapter's folder names, as a path; ``fetch_base`` returns that of a name on the Hub.

    Raises:
        FileError: it names none, or one that is neither on this machine nor to be had from the Hub.
        OSError: its config cannot be read.
    """
    _, _, name, revision = read_adapter_summary(adapter_folder)
    if name is not None:
        base_path = next((base for base in (Path(name), adapter_folder / name) if base.exists()), None)
        if base_path is not None:
            return base_path
        if is_hub_name(name):
            try:
                return fetch_base(name, revision)
            except ValueError as error:
                why = f"{error}; or name the base with --base"
                raise file_error(adapter_folder, why, "find the base of") from error
    what = "is no folder or file here" if name else "names no base"
    why = f"base_model_name_or_path={short_repr(name)} of its {CONFIG} {what}: name the base with --base"
    raise file_error(adapter_folder, why, "find the base of")


def adapter_base_and_technique(
    adapter_folder: Path,
    base: Path | None = None,
    dense_base: bool = False,
    fetch_base: Callable[[str, str | None], Path] = download_model,
) -> tuple[Path, StorageTechnique]:
    """Return the base of an adapter, and how to store it: as ``lowmem fit`` stored it while the adapter trained.

    Args:
        adapter_folder: a folder of PEFT, or a file of ``save_adapter``, which says neither.
        base: None takes the base that ``fit --keep-base`` wrote beside the adapter, or the one that the config names.
        dense_base: whether a dense base stays dense.
        fetch_base: returns the folder of a name and a revision on the Hub.

    Raises:
        FileError, OSError: as ``adapter_base_path``, or the record of the training is damaged.
    """
    if adapter_folder.is_file():
        assert base is not None
        return base, None
    kept_base = kept_base_or_none(adapter_folder)
    if base is None and not dense_base and kept_base is not None:
        return kept_base, None
    path = adapter_base_path(adapter_folder, fetch_base) if base is None else base
    technique = None if dense_base else read_training_technique_or_none(adapter_folder)
    if technique is not None and (adapter_folders_without_model(path) or quantizing_program_or_none(path, "load")):
        technique = None
    return path, technique


def open_model_and_tokenizer(
    path: Path,
    base: Path | None = None,
    adapter_name: str | None = None,
    *,
    dense_base: bool = False,
    fetch_base: Callable[[str, str | None], Path] = download_model,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, Any]:
    """Return a causal language model in evaluation mode, and its tokenizer. No code of a folder is run.

    Args:
        path: a folder of ``save_pretrained``, dense or stored by lowmem or another program; a GGUF file; or an
            adapter_name: a folder of PEFT, or a file of ``save_adapter``.
        base: the base of an adapter, of the same kinds as ``path``; None takes the base that the config names.
        adapter_name: the name of the adapter to use, if the model or the folder of PEFT has several.
        dense_base: whether an adapter's dense base stays dense; otherwise it is stored as ``lowmem fit`` stored it.
        fetch_base: returns the folder of a base that an adapter names on the Hub, by its name and revision.
        progress: called with the number of weights that were read, and of all.

    Raises:
        FileError: as ``load_folder``, ``load_gguf`` and ``load_adapter``; or the adapter's base is not here.
        ValueError: the model does not generate text, ``base`` or ``dense_base`` of what is no adapter, or an
            ``adapter_name`` that it has not, or several without a choice.
    """
    model: Any
    is_alone = bool(adapter_folders_without_model(path))
    if is_alone or (path.is_file() and not has_magic_bytes(path, MAGIC)):
        if base is None and not is_alone:
            raise ValueError(
                f"{str(path)!r} is no model: name {MODEL_KINDS}, or an adapter's file and its base, --base MODEL"
            )
        place, name = resolve_adapter_path_and_name(path, adapter_name)
        base_path, technique = adapter_base_and_technique(place, base, dense_base, fetch_base)
        if technique is None:
            model, tokenizer = open_model_and_tokenizer(base_path, fetch_base=fetch_base, progress=progress)
        else:
            with weights_read_reported(progress):
                model = load_folder(base_path, LowmemConfig(technique))
            tokenizer = read_tokenizer(base_path)
        model = load_adapter(model, place, name).eval()
        if is_alone and any((path / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
            tokenizer = read_tokenizer(path)
    elif base is not None or dense_base:
        option = f"--base={str(base)!r}" if base is not None else "--dense-base"
        raise ValueError(f"{option} applies to adapters alone, and {str(path)!r} is a model: leave it out")
    else:
        with weights_read_reported(progress):
            model = load_folder_or_gguf(path)
        tokenizer = read_tokenizer(path)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ValueError(f"model={str(path)!r} is a {type(model).__name__}, which generates no text")
    chosen = choose_adapter_name_or_none(path, adapter_names(model), adapter_name)
    if chosen is not None:
        deactivate(model)
        activate(model, chosen)
    return model, tokenizer


def end_token_ids(
    generation_config: Any, tokenizer: Any, chat: bool, template_kwargs: Mapping[str, Any] | None = None
) -> Sequence[int]:
    """Return the tokens that end a text: the model's, the tokenizer's, and those that end an answer in a chat.

    ``template_kwargs``: variables of the chat template.

    Raises:
        ValueError: ``chat`` of a tokenizer whose template is missing, or refuses messages.
    """
    eos_token_id = generation_config.eos_token_id
    ends = {*(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]), tokenizer.eos_token_id}
    if chat:
        answer = "An answer"
        messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
        text_tokenizer = TextTokenizer(tokenizer, template_kwargs)
        said = [text for text, counts in text_tokenizer.chat(messages) if counts][-1]
        after = tokenizer(said.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        ends |= {token for token in after if token in text_tokenizer.special}
    return sorted(ends - {None})
