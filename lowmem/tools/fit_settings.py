"""Settings of ``lowmem fit`` on folders that are not given: those of the run that goes on, or by the data."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowmem.errors import quoted_path
from lowmem.finetuning.data_files import is_hub_data_set_name
from lowmem.finetuning.packed_rows import pack_into_rows
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.text_examples import Texts
from lowmem.io.formats.gguf.gguf_outlook import LLAMA_CPP
from lowmem.io.training_record import AS_IT_IS
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE
from lowmem.tools.arguments import option_string
from lowmem.tools.chat_arguments import NO_TEMPLATE

EXAMPLES_PER_STEP = 8
"""Examples of a step, about, where neither --batch-size nor --accumulate is given."""

WARMUP_RATIO = 0.05
"""Share of the steps over which the learning rate rises."""

DPO_LEARNING_RATE = 5e-6
"""Learning rate of ``--method dpo`` where none is given, for any rank."""

FEW_STEPS = 50
"""Steps of one pass, below which a run that asks for no number is told so: 23 taught SmolLM2-135M no fact of 30, and
60 taught it 17 (docs/guides/fine-tuning.md)."""

HELD_OUT_FROM, HELD_OUT_SHARE, MOST_HELD_OUT = 100, 0.05, 200
"""Examples from which on some are held out, the share of those, and how many at most."""

ALTERNATIVES = (
    ("bits", "format", "for"),
    ("eval_data", "eval_share"),
    ("shard", "replicate"),
    ("steps", "epochs"),
    ("warmup", "warmup_ratio"),
)
"""Options of which one at most is given."""


STATE_FACT = "options"
"""The fact of a state with the options that its run, which is OUT's, too, does not hold."""

_FILES_OF_STATE = ("eval_data", "samples", "from")


def is_given(arguments: argparse.Namespace, name: str) -> bool:
    """Whether an option, whose default is None or False, has a value."""
    value = getattr(arguments, name)
    return value is not None and value is not False


def run_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run of a ``training.json``; versions of before wrote the blocks of the base beside it."""
    blocks = {"block_size": record["block_size"]} if "block_size" in record else {}
    return {**blocks, **record["run"]}


def options_of_run(run: Mapping[str, Any], is_dense: bool) -> dict[str, Any]:
    """Return the options of an earlier run that its ``FineTuningJob.run_identity_dict`` holds.

    Args:
        run: may be of an earlier version, and then lacks settings that had no options; it trained prompts as plain
            text.
        is_dense: whether the base's folder is.
    """
    settings = [field.name for field in fields(FineTuning)]
    names = (*settings, "alpha", "dropout", "rank", "memory", "length", "system", "template_kwargs")
    names += ("keep", "samples", "method", "beta")
    options = {name: run.get(name) for name in names}
    options |= {"target": run.get("targets") or None, "rslora": run.get("rank_stabilized")}
    if "clip" in run:
        options["clip"] = run["clip"] or 0.0
    if run.get("warmup_ratio") is not None:
        options["warmup"] = None
    if run.get("from") is not None:
        options |= dict.fromkeys(("alpha", "dropout", "rank", "target", "rslora"))
    options["columns"] = list((run.get("columns") or {}).items()) or None
    if run.get("prompts") is None and run.get("chat_template") is None:
        options["chat_template"] = NO_TEMPLATE
    name, block_size = run.get("format"), run.get("block_size", DEFAULT_BLOCK_SIZE)
    # The default has blocks of its own, and no name
    if is_dense and run.get("embeddings") == LLAMA_CPP.embeddings:
        options["for"] = "llama.cpp"
    elif is_dense and (name, block_size) != (DEFAULT, DEFAULT_BLOCK_SIZE):
        bits, *unit = str(name).split()
        options |= {"bits": float(bits)} if unit == ["bits"] else {"format": "dense" if name == AS_IT_IS else name}
    return {name: value for name, value in options.items() if value is not None}


def take_options_of_run(
    arguments: argparse.Namespace, run: Mapping[str, Any], is_dense: bool, process_count: int
) -> None:
    """Set the options that are not given to those of the run that goes on.

    The rows of a step stay as many: ``--batch-size`` and the number of processes divide them otherwise.
    """
    # The digest of the texts is compared, which these two have decided
    options = options_of_run(run, is_dense) | {"cut": True, "skip_bad_rows": True}
    rows, rest = divmod(run.get("rows_of_a_step", 0), process_count)
    if rows and not rest:
        batch_size = arguments.batch_size or math.gcd(rows, run["batch_size"])
        if arguments.accumulate is not None and arguments.batch_size is None:
            batch_size = max(1, rows // arguments.accumulate)
        options |= {"batch_size": batch_size, "accumulate": max(1, rows // batch_size)}
    if arguments.length is None:
        arguments.text_window = run.get("window")
    set_options_not_given(arguments, options)


def options_for_state(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a state has beside its run, as JSON: paths are absolute."""
    options = {"base_name": arguments.base_name, "keep_base": arguments.keep_base}
    for name in _FILES_OF_STATE:
        value = getattr(arguments, name)
        # A number of samples is in the run
        if isinstance(value, Path):
            options[name] = str(value) if is_hub_data_set_name(str(value)) else os.path.abspath(value)
    return {name: value for name, value in options.items() if value}


def take_options_of_state(arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Set the options that are not given to those that ``options_for_state`` returned.

    Raises:
        ValueError: a file of them is not there any more.
    """
    paths = {name: Path(options[name]) for name in _FILES_OF_STATE if name in options}
    set_options_not_given(arguments, {**options, **paths})
    for name, path in paths.items():
        if getattr(arguments, name) is path and not (path.exists() or is_hub_data_set_name(str(path))):
            raise ValueError(
                f"{quoted_path(path)} is not there any more, which the run had: name it with {option_string(name)}"
            )


def set_options_not_given(arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Set options where neither they nor what excludes them are given."""
    given = {name for name in vars(arguments) if is_given(arguments, name)}
    for name, value in options.items():
        others = {other for group in ALTERNATIVES if name in group for other in group}
        if not given & {name, *others}:
            setattr(arguments, name, value)


def split_held_out(
    texts: Texts, share: float | None, seed: int, run: Mapping[str, Any] | None
) -> tuple[Texts, Texts | None]:
    """Return the texts to train on, and those that are held out.

    Args:
        texts: of ``--data``.
        share: as given; None takes what ``run`` held out or, without one, a default.
        seed: of the choice.
        run: that goes on.
    """
    count = len(texts.examples)
    if share is None:
        held_out_count = 0 if count < HELD_OUT_FROM else min(round(HELD_OUT_SHARE * count), MOST_HELD_OUT)
        if run is not None:
            held_out_count = count - run["examples"] if run["held_out"] == texts.digest else 0
        share = held_out_count / count
    return texts.split(share, seed) if share else (texts, None)


def batches_of_default_step(texts: Texts, process_count: int) -> tuple[int, int]:
    """Return ``batch_size`` and ``accumulate`` of steps with about ``EXAMPLES_PER_STEP`` of the texts, packed."""
    # A pair is a row, and two sequences
    sequences, row_count = len(texts.examples[0].sequences), len(texts.examples)
    if sequences == 1:
        row_count = len(pack_into_rows([len(example.ids) for example in texts.examples], texts.length))
    rows = EXAMPLES_PER_STEP * row_count / len(texts.examples) / process_count
    # A power of two, which --batch-size and memory divide
    power = 2 ** max(0, round(math.log2(rows)))
    batch_size = min(FineTuning.batch_size // sequences, power)
    return batch_size, power // batch_size
