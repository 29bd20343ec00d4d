"""``lowmem fit --show N``: rendered examples with the tokens that are learned, and quantiles of lengths."""

from __future__ import annotations

import argparse
import math
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lowmem.finetuning.text_examples import IGNORED, Example
from lowmem.tools.fit_data import FitTexts, read_fit_texts
from lowmem.tools.fit_job import resumed_run_or_none
from lowmem.tools.fit_settings import take_options_of_run
from lowmem.tools.output import escaped_and_truncated, print_json

QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
_LEARNED_STYLE = "bold green"


def print_examples(arguments: argparse.Namespace, model_path: Path) -> int:
    """Print ``arguments.show`` examples of the data; no weights are read."""
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log, read_language_model_sizes
    from lowmem.integrations.transformers.text_tokenizer import read_tokenizer

    run = resumed_run_or_none(arguments) or arguments.configured_run
    if run is not None:
        # How the base is stored changes no example, and its weights are not fetched
        take_options_of_run(arguments, run, is_dense=True, process_count=1)
    with delayed_transformers_log(replay=False):
        vocabulary, _, positions, _ = read_language_model_sizes(model_path)
        data = read_fit_texts(arguments, read_tokenizer(model_path, vocabulary), positions, run)
    for note in data.notes:
        print(f"lowmem fit: {note}", file=sys.stderr)
    shown = [
        (sequence, place + name)
        for example, place in [*zip(data.texts.examples, data.texts.places, strict=True)][: arguments.show]
        for name, sequence in example.sequences.items()
    ]
    lengths = _length_quantiles(data)
    if arguments.json:
        examples = [
            {"place": place, "tokens": example.ids.tolist(), "pieces": _decoded_pieces(example, data.tokenizer)}
            for example, place in shown
        ]
        print_json({"examples": examples, "length": data.length, "lengths": lengths})
        return 0
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(data.description())
    for example, place in shown:
        pieces = [(_visible(text), learned) for text, learned in _decoded_pieces(example, data.tokenizer)]
        console.print(f"\n{escaped_and_truncated(place)}: {len(example.ids):,} tokens, {_end_text(pieces)}")
        if console.is_terminal and console.color_system:
            console.print(Text.assemble(*((text, _LEARNED_STYLE if learned else "") for text, learned in pieces)))
        else:
            for line in _underlined_lines(pieces):
                console.print(line)
    quantiles = ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    console.print(f"\ntokens of the {len(data.lengths):,} examples: {quantiles}; --length {data.length}")
    return 0


def _length_quantiles(data: FitTexts) -> dict[str, int]:
    """Return quantiles of the lengths of the rows, before they are cut."""
    lengths = sorted(data.lengths)
    return {name: lengths[math.ceil(share * len(lengths)) - 1] for name, share in QUANTILES.items()}


def _decoded_pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the text of an example in pieces, and whether each is learned: a token is where it is a target."""
    learned = [False, *(example.targets[:-1] != IGNORED).tolist()]
    pairs = zip(example.ids.tolist(), learned, strict=True)
    return [
        (str(tokenizer.decode([token for token, _ in group], skip_special_tokens=False)), is_learned)
        for is_learned, group in groupby(pairs, lambda pair: pair[1])
    ]


def _visible(text: str) -> str:
    """Return a text whose control characters, but ends of lines, are written as Python writes them."""
    return re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", lambda character: repr(character[0])[1:-1], text)


def _end_text(pieces: list[tuple[str, bool]]) -> str:
    """Return the last characters that are learned."""
    end = next((text for text, learned in reversed(pieces) if learned), "").rstrip()
    return f"learned to the end of {end[-24:]!r}"


def _underlined_lines(pieces: list[tuple[str, bool]]) -> list[str]:
    """Return the lines of a text, each with a line of marks under what is learned of it."""
    lines, text, marks = [], "", ""
    for piece, learned in [*pieces, ("\n", False)]:
        for character in piece:
            if character == "\n":
                # A learned end of a line has a mark, too
                marks += "^" if learned else ""
                lines += [text, marks] if marks.strip() else [text]
                text, marks = "", ""
            else:
                text, marks = text + character, marks + ("^" if learned else " ") * cell_len(character)
    return lines
