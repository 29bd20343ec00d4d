"""``lowmem export``: writes a model that lowmem stored for another program, its codes as they are."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from lowmem.errors import file_error
from lowmem.io.adapter_files import load_adapter, resolve_adapter_path_and_name, save_adapter
from lowmem.io.filesystem import (
    atomic_file,
    check_not_exists,
    check_outside_inputs,
    exclusive_write_lock,
    open_regular_file,
    scratch_folder,
)
from lowmem.io.formats.export_model import checked_or_inferred_export_format, export, export_targets_by_format_name
from lowmem.io.formats.export_results import Exported, combined_relative_rms_error
from lowmem.io.formats.gguf.gguf_file import read_gguf_header
from lowmem.io.formats.gguf.gguf_tensor_names import tensor_name_map_from_metadata
from lowmem.io.formats.lazy_model import open_lazy_model
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.formats.peft.peft_reader import adapter_folders_without_model
from lowmem.io.hub_names import displayed_model_name
from lowmem.io.model_folder import read_json_object
from lowmem.io.shards import INDEX
from lowmem.io.training_record import check_unchanged_since_training
from lowmem.tools.arguments import DTYPES, add_verbose_argument, option_string, parse_nonempty_path
from lowmem.tools.export_programs import (
    OLLAMA,
    PROGRAMS,
    check_base_is_exact,
    check_program_options,
    read_trained_prompts,
    write_program_files,
)
from lowmem.tools.hub_arguments import fetch_base, fetch_model, parse_model_path
from lowmem.tools.output import (
    bytes_before_and_after_text,
    mib_text,
    print_json,
    print_saved_path_to_stderr,
    print_table,
    progress_display,
    shape_text,
    warnings_printed_as_notes,
)
from lowmem.transforms.merge_adapters import merge
from lowmem.transforms.restore_dense import restore

DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source",
        type=parse_nonempty_path,
        metavar="IN",
        help="a folder of lowmem quantize or save_pretrained, a .safetensors file of lowmem, or the folder of an "
        "adapter: its base is written as lowmem fit stored it, and the adapter beside it, as OUT-adapter",
    )
    parser.add_argument("out", type=parse_nonempty_path, metavar="OUT", help="OUT.gguf, or a folder; must not exist")
    parser.add_argument(
        "--format", choices=list(export_targets_by_format_name()), help="default: by the ending of OUT"
    )
    parser.add_argument(
        "--for",
        dest="program",
        choices=PROGRAMS,
        help="write OUT.gguf with the codes of the training and OUT-adapter.gguf, for ollama with OUT.Modelfile, "
        "check that they make the same tokens of conversations, and print the commands that run them",
    )
    parser.add_argument(
        "--merge", action="store_true", help="for --for: one dense file in --dtype, with the adapter merged into it"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize weights again that the format cannot hold exactly, and print the error",
    )
    parser.add_argument("--dtype", choices=list(DTYPE_NAMES), help="for gguf: write all weights dense, in this dtype")
    parser.add_argument(
        "--like",
        type=parse_nonempty_path,
        metavar="GGUF",
        help="for gguf: copy metadata and tokenizer from this file of the same model",
    )
    parser.add_argument(
        "--base", type=parse_model_path, metavar="MODEL", help="the base of an adapter (default: what it names)"
    )
    parser.add_argument("--adapter", metavar="NAME", help="the adapter to write, of a folder of several")
    parser.add_argument("--dense-base", action="store_true", help="write the dense base of an adapter as it is")
    add_verbose_argument(parser, "weights")
    parser.add_argument("--json", action="store_true", help="print JSON with integer bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    is_adapter = bool(adapter_folders_without_model(arguments.source))
    check_program_options(arguments, is_adapter)
    if arguments.program is not None:
        arguments.out = arguments.out.with_name(f"{arguments.out.name.removesuffix('.gguf')}.gguf")
    name = checked_or_inferred_export_format(arguments.out, arguments.format)
    check_outside_inputs(arguments.out, {"IN": arguments.source})
    outs = [arguments.out]
    if is_adapter and not arguments.merge:
        outs.append(_adapter_out_path(arguments.out, name))
    if arguments.program == OLLAMA:
        outs.append(arguments.out.with_suffix(".Modelfile"))
    for path in outs:
        check_not_exists(path)
    if is_adapter:
        rows, commands = _export_base_and_adapter(arguments, name, outs)
    else:
        for option in ("base", "adapter", "dense_base"):
            if getattr(arguments, option):
                raise ValueError(
                    f"{option_string(option)} applies to an adapter, and IN={str(arguments.source)!r} is none: leave "
                    "it out"
                )
        with exclusive_write_lock(arguments.out), warnings_printed_as_notes(), ExitStack() as undo:
            rows = _export_model(arguments, arguments.source, name)
            undo.callback(_remove, arguments.out)
            commands = [] if arguments.program is None else _program_commands_of_folder(arguments, outs)
            undo.pop_all()
    if arguments.json:
        print_json({"weights": [asdict(row) for row in rows], "files": [*map(str, outs)], "commands": commands})
        return 0
    if arguments.verbose:
        print_table(
            ["Weight", "Shape", "From", "To", "After MiB", "Error"],
            [_exported_weight_cells(row) for row in rows],
            text_columns=(0, 2, 3),
        )
    _print_export_totals(name, rows)
    if arguments.merge:
        print(f"one dense file in {DTYPE_NAMES[arguments.dtype]}: the adapter is merged into its base")
    for out in outs:
        print_saved_path_to_stderr(out)
    for command in commands:
        print(command)
    return 0


def _export_model(arguments: argparse.Namespace, source: Path, format_name: str) -> list[Exported]:
    with progress_display("export", total=_source_weight_bytes(source)) as update:
        return export(
            source,
            arguments.out,
            format=format_name,
            requantize=arguments.requantize,
            like=arguments.like,
            dtype=None if arguments.dtype is None else DTYPES[DTYPE_NAMES[arguments.dtype]],
            progress=lambda name, nbytes: update(advance=nbytes),
        )


def _adapter_out_path(out: Path, format_name: str) -> Path:
    """Return where the adapter of an exported base goes: to ``tuned-adapter.gguf`` beside ``tuned.gguf``."""
    ending = export_targets_by_format_name()[format_name].ending or ""
    return out.with_name(f"{out.name.removesuffix(ending)}-adapter{ending}")


def _export_base_and_adapter(
    arguments: argparse.Namespace, format_name: str, outs: Sequence[Path]
) -> tuple[list[Exported], list[str]]:
    """Write an adapter's base as training stored it, and the adapter, or both merged.

    Everything is written, or nothing. Returns the base's rows, and the commands of ``--for``.
    """
    from lowmem.integrations.transformers.adapted_folder import write_base_with_tokenizer
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log
    from lowmem.integrations.transformers.pretrained_folder import (
        load_folder_or_gguf,
        quantize_folder,
        weights_read_reported,
    )
    from lowmem.integrations.transformers.text_generation import adapter_base_and_technique

    folder, adapter_name = resolve_adapter_path_and_name(arguments.source, arguments.adapter)
    named_base = None if arguments.base is None else fetch_model(arguments.base, argument="--base")
    base, technique = adapter_base_and_technique(folder, named_base, arguments.dense_base, fetch_base)
    check_outside_inputs(arguments.out, {"the base": base})
    kind, prompts = "gguf" if format_name == "gguf" else "peft", None
    if arguments.program is not None:
        check_unchanged_since_training(folder, base)
        check_base_is_exact(base, technique, arguments)
    if base.is_file() and not arguments.merge and (kind != "gguf" or arguments.dtype or arguments.like):
        quantize = shlex.join(["lowmem", "quantize", str(base), "FOLDER"])
        why = f"it is a GGUF file, which is copied as it is: run `{quantize}`, and name that with --base FOLDER"
        raise file_error(base, why, "export")
    with (
        exclusive_write_lock(arguments.out),
        warnings_printed_as_notes(),
        delayed_transformers_log(),
        scratch_folder(arguments.out.parent, arguments.out) as scratch,
        ExitStack() as undo,
    ):
        if technique is not None:
            with (
                progress_display("store the base", MofNCompleteColumn, TimeRemainingColumn) as update,
                weights_read_reported(lambda done, total: update(completed=done, total=total)),
            ):
                # Under its name, which is compared with the one that the adapter names
                stored_base = scratch / Path(displayed_model_name(base.resolve())).name
                quantize_folder(base, stored_base, technique)
            base = stored_base
        model: Any = load_adapter(load_folder_or_gguf(base), folder, adapter_name)
        if arguments.merge and base.is_file():
            arguments.like = arguments.like or base
        if arguments.program is not None:
            prompts = read_trained_prompts(folder, base, arguments.like, model.generation_config)
        if arguments.merge:
            base = _write_merged_folder(arguments, model, base, scratch / "merged")
        else:
            options = {} if kind == "gguf" else {"base_name": str(arguments.out)}
            save_adapter(model, outs[1], format=kind, **options)
            undo.callback(_remove, outs[1])
        del model
        if base.is_file():
            if prompts is None:
                _warn_of_another_chat_template(base, folder)
            rows = _copy_gguf(base, arguments.out)
        else:
            write_base_with_tokenizer(base, folder, scratch / "source")
            if prompts is not None:
                prompts.let_folder_begin_as_trained(scratch / "source")
            rows = _export_model(arguments, scratch / "source", format_name)
        undo.callback(_remove, arguments.out)
        commands = [] if prompts is None else write_program_files(arguments, outs, prompts)
        undo.pop_all()
    return rows, commands


def _remove(path: Path) -> None:
    (shutil.rmtree if path.is_dir() else os.unlink)(path)


def _write_merged_folder(arguments: argparse.Namespace, model: Any, base: Path, target: Path) -> Path:
    """Write the folder of a model with its adapter merged, dense; return it."""
    from lowmem.integrations.transformers.pretrained_folder import write_model_folder

    dtype = DTYPES[DTYPE_NAMES[arguments.dtype]]
    write_model_folder(restore(merge(model, dtype), dtype=dtype), base if base.is_dir() else None, target, None)
    return target


def _program_commands_of_folder(arguments: argparse.Namespace, outs: Sequence[Path]) -> list[str]:
    """Check the file of a folder without an adapter, and return commands that run it."""
    from transformers import GenerationConfig

    source = arguments.source
    path = source / "generation_config.json"
    generation_config = GenerationConfig.from_dict(read_json_object(path)) if path.is_file() else GenerationConfig()
    return write_program_files(
        arguments, outs, read_trained_prompts(source, source, arguments.like, generation_config)
    )


def _copy_gguf(source: Path, out: Path) -> list[Exported]:
    """Write a GGUF file as it is; return its rows."""
    with open_foreign_checkpoint(source) as checkpoint, open_regular_file(source) as file:
        names = tensor_name_map_from_metadata(read_gguf_header(source, file).metadata)
        rows = [
            Exported(name, item.shape, item.kind, item.kind, item.nbytes, item.nbytes, None, names.gguf_name(name))
            for name, item in checkpoint.tensors.items()
        ]
        file.seek(0)
        with atomic_file(out, overwrite=False) as copied:
            shutil.copyfileobj(file, copied)
    return sorted(rows, key=lambda row: row.name)


def _warn_of_another_chat_template(base: Path, adapter_folder: Path) -> None:
    """Warn if an adapter was trained with another chat template than that of a GGUF file."""
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    file = adapter_folder / "chat_template.jinja"
    if file.is_file() and file.read_text(encoding="utf8") != read_tokenizer(base).chat_template:
        text = (
            f"the adapter was trained with another chat template: llama-server --chat-template-file {file} takes it"
        )
        warnings.warn(text, UserWarning, stacklevel=2)


def _source_weight_bytes(source: Path) -> int:
    """Return the bytes of the weights of a folder or index, or those of a file: opening it would verify it twice."""
    if source.is_file() and not source.name.endswith(INDEX):
        return source.stat().st_size
    with open_lazy_model(source) as model:
        return sum(weight.nbytes for weight in model.weights.values())


def _print_export_totals(format_name: str, rows: list[Exported]) -> None:
    changed = [row for row in rows if row.error is not None]
    print(f"{format_name}: {len(rows) - len(changed)} of {len(rows)} weights as they were")
    print(bytes_before_and_after_text(rows))
    for change in dict.fromkeys((row.kept, row.kind) for row in changed):
        same = [row for row in changed if (row.kept, row.kind) == change]
        error = combined_relative_rms_error(same)
        print(f"{len(same)} from {change[0]} to {change[1]}: an error of {error:.4g} was added (rms)")
    if changed:
        print(f"over all weights: {combined_relative_rms_error(rows):.4g}")


def _exported_weight_cells(row: Exported) -> list[str]:
    error = "same" if row.error is None else f"{row.error:.4g}"
    return [row.name, shape_text(row.shape), row.kept, row.kind, mib_text(row.after_bytes), error]
