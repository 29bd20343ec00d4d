"""The data of ``lowmem fit`` for language models: its arguments, what is read, and what is said of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from lowmem.errors import file_error, printable_line
from lowmem.finetuning.data_files import DataFile, check_data_path, is_hub_data_set_name, read_data_files
from lowmem.finetuning.preferences import DEFAULT_BETA, PREFERENCES_AS_CHAT, encode_preference
from lowmem.finetuning.row_kinds import COLUMNS, RowOptions
from lowmem.finetuning.text_examples import (
    ALL_MASKED,
    PROMPTS_AS_CHAT,
    TEXT_FILE,
    EncodedRows,
    Example,
    Texts,
    check_length,
    encode_row,
    encode_rows,
)
from lowmem.io.filesystem import read_text_and_sha256
from lowmem.tools.arguments import option_string, parse_positive_int
from lowmem.tools.chat_arguments import (
    NO_TEMPLATE,
    ChatSettings,
    add_chat_arguments,
    apply_chat_arguments,
    parsed_chat_settings,
)
from lowmem.tools.fit_samples import examples_with_prompts
from lowmem.tools.fit_settings import split_held_out
from lowmem.tools.output import escaped_and_truncated

METHODS = ("sft", "dpo")
"""Supervised fine-tuning, and direct preference optimization."""

WINDOW = 512
"""Tokens of the windows of .txt files, unless --length is given."""

MAX_DEFAULT_LENGTH = 2048

CUT_SHARE = 0.1
"""Share of the answers that may lose the token that ends them without --cut."""

_MAX_SHOWN_MISTAKES = 100


def add_data_arguments(group: argparse._ActionsContainer) -> None:
    """Add the arguments on how data is read."""
    group.add_argument(
        "--columns",
        nargs="+",
        type=_parse_column,
        metavar="KEY=COLUMN",
        help="the columns of a file with other names, as prompt=question completion=answer; keys: "
        + ", ".join(COLUMNS),
    )
    group.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="train without the rows that have mistakes, and name each of them",
    )
    add_chat_arguments(
        group,
        "a chat template in place of the tokenizer's; none: prompt and completion are plain text, without a template",
    )
    group.add_argument(
        "--length",
        "--max-length",
        type=parse_positive_int,
        metavar="N",
        help="tokens per row, at most (default: as 99%% of the rows have, rounded up to 64, at most "
        f"{MAX_DEFAULT_LENGTH:,} and the model's positions; {WINDOW} for .txt)",
    )
    group.add_argument(
        "--cut",
        action="store_true",
        help="train although more than a tenth of the answers lose the token that ends them to --length",
    )
    group.add_argument(
        "--show",
        type=parse_positive_int,
        metavar="N",
        help="print N examples with the tokens that are learned, and quantiles of lengths; train and write nothing",
    )


def _parse_column(text: str) -> tuple[str, str]:
    key, equals, column = text.partition("=")
    if key not in COLUMNS or not (equals and column):
        raise argparse.ArgumentTypeError(
            f"{printable_line(repr(text), 80)} must be KEY=COLUMN, where KEY is one of {', '.join(COLUMNS)}"
        )
    return key, column


@dataclass(frozen=True)
class FitTexts:
    """What is read of ``--data`` and ``--eval-data``.

    Args:
        tokenizer: the model's, with the template that is used.
        paths: of the data.
        options: how rows were read.
        notes: on the texts, to be printed behind what is said of the model.
        window: the most tokens of a window of .txt files, where it is less than ``length``.
        beta: of ``--method dpo``; None: of no preferences.
        lengths: of the rows of ``--data`` before they are cut, and of windows of .txt files.
        samples: whose prompts are to be answered.
    """

    tokenizer: Any
    beta: float | None
    paths: tuple[Path, ...]
    length: int
    texts: Texts
    held_out: Texts | None
    options: RowOptions
    chat: ChatSettings
    notes: tuple[str, ...]
    window: int | None
    lengths: tuple[int, ...]
    samples: tuple[Example, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the data without the folders of this machine; those on the Hub are whole."""
        return tuple(str(path) if is_hub_data_set_name(str(path)) else path.name for path in self.paths)

    def description(self) -> str:
        """Return the line that says what was read, as what."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.texts.kinds.items())
        names = escaped_and_truncated(", ".join(map(str, self.paths)))
        return f"data: {names}: {kinds}; up to {self.length:,} tokens in a row"

    def identity(self) -> dict[str, Any]:
        """Return what decides the tokens of the data, as JSON; None stands for what runs did before there was a
        choice."""
        are_in_template = not self.texts.kinds.keys().isdisjoint({PROMPTS_AS_CHAT, PREFERENCES_AS_CHAT})
        return {
            "method": None if self.beta is None else "dpo",
            "beta": self.beta,
            "columns": dict(self.options.columns) or None,
            "prompts": "chat" if are_in_template and self.options.prompts_as_chat else None,
            "chat_template": self.chat.template,
            "window": self.window,
            **self.chat.as_json(),
        }


def read_fit_texts(
    arguments: argparse.Namespace, tokenizer: Any, positions: int | None, run: Mapping[str, Any] | None = None
) -> FitTexts:
    """Read the data of a run.

    Args:
        arguments: of the command.
        tokenizer: the model's, of transformers.
        positions: the most tokens that the model takes; None: any number.
        run: an earlier run that goes on.

    Raises:
        FileError: a file or a row cannot be read.
        ValueError: an option does not fit the data.
    """
    from lowmem.integrations.transformers.text_tokenizer import TextTokenizer

    _check_method_options(arguments)
    recorded = ChatSettings(date=date.today().isoformat())
    if run is not None:
        recorded = parsed_chat_settings(run, run.get("chat_template"))
    chat = apply_chat_arguments(arguments, tokenizer, recorded)
    text_tokenizer = TextTokenizer(tokenizer, chat.template_kwargs)
    options = RowOptions(
        columns=_columns(arguments.columns or ()),
        system=chat.system,
        prompts_as_chat=arguments.chat_template != NO_TEMPLATE and bool(getattr(tokenizer, "chat_template", None)),
        reserved=text_tokenizer.reserved_texts(),
        preferences=arguments.method == "dpo",
    )
    rows, mistakes = _encode_data(arguments.data, text_tokenizer, options, arguments.skip_bad_rows)
    length = arguments.length
    if length is None:
        length = min(rows.default_length(window=WINDOW), MAX_DEFAULT_LENGTH, positions or MAX_DEFAULT_LENGTH)
    elif positions is not None and length > positions:
        raise ValueError(f"--length={length} is more than the {positions} positions that the model has: lower it")
    check_length(length)
    window = WINDOW if arguments.length is None else getattr(arguments, "text_window", None)
    window = window if window is not None and window < length else None
    name = ", ".join(arguments.data)
    texts = rows.texts(length, name, window)
    _check_chat_is_used(arguments, texts)
    lengths = tuple(row.token_count for row in rows.rows if row.kind != TEXT_FILE)
    lengths = lengths or tuple(len(example.ids) for example in texts.examples)
    text_notes = _text_notes(texts, name, positions)
    if texts.lost_ends > CUT_SHARE * len(texts.ends) and not arguments.cut:
        raise ValueError(f"{text_notes[0]}; or add --cut to train without them")
    notes = [*mistakes, *text_notes]
    held_out = None
    if arguments.eval_data is not None:
        held_out_name = str(arguments.eval_data)
        rows, mistakes = _encode_data([held_out_name], text_tokenizer, options, arguments.skip_bad_rows)
        held_out = rows.texts(length, held_out_name, window)
        notes += [*mistakes, *_text_notes(held_out, held_out_name, positions)]
    else:
        texts, held_out = split_held_out(texts, arguments.eval_share, arguments.seed or 0, run)
        if held_out is not None:
            count = len(held_out.examples)
            remedy = "; --eval-share 0 trains on all" if arguments.eval_share is None else ""
            notes.append(f"{count:,} of {count + len(texts.examples):,} examples are held out to evaluate on{remedy}")
    notes += [] if held_out is None else _overlap_notes(texts, held_out)
    if chat.date is not None and texts.chats:
        notes.append(f"the chat template writes today's date into prompts: that of OUT writes {chat.date} every day")
    samples: Sequence[Example] = () if held_out is None else held_out.examples
    if isinstance(arguments.samples, Path):
        rows, mistakes = _encode_data([str(arguments.samples)], text_tokenizer, options, arguments.skip_bad_rows)
        samples = rows.texts(length, str(arguments.samples), window).examples
        notes += mistakes
    samples = () if arguments.samples is None else examples_with_prompts(samples, arguments.samples)
    paths = tuple(map(Path, arguments.data))
    beta = arguments.beta or DEFAULT_BETA if options.preferences else None
    read = paths, length, texts, held_out, options, chat, tuple(notes), window, lengths, samples
    return FitTexts(tokenizer, beta, *read)


def check_data_options(arguments: argparse.Namespace) -> None:
    """Raise an error for options on data that are wrong for any model.

    Raises:
        ValueError: ``--columns`` names a key twice, or a file has another suffix.
        OSError: a file is not here.
    """
    # Those of the run that goes on are not taken yet
    if not arguments.resume and arguments.configured_run is None:
        _check_method_options(arguments)
    _columns(arguments.columns or ())
    for path in (*arguments.data, arguments.eval_data, arguments.samples):
        if path is not None and not isinstance(path, int):
            check_data_path(path)
    if arguments.chat_template not in (None, NO_TEMPLATE):
        read_text_and_sha256(Path(arguments.chat_template))


def _check_method_options(arguments: argparse.Namespace) -> None:
    if arguments.beta is not None and arguments.method != "dpo":
        raise ValueError(f"--beta={arguments.beta:g} applies to preferences: add --method dpo, or leave it out")
    if arguments.compare_dense and arguments.method == "dpo":
        raise ValueError("--compare-dense measures a perplexity, which --method dpo has none of: leave it out")


def _columns(pairs: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"--columns names {twice} more than once: give each key one column")
    return dict(pairs)


def _encode_data(
    paths: Sequence[str], tokenizer: Any, options: RowOptions, skips_bad_rows: bool
) -> tuple[EncodedRows, list[str]]:
    """Return the rows of all paths, and notes on those that are skipped.

    Raises:
        FileError: a file cannot be read, or a row has a mistake; where several have, each is printed before.
    """
    files: list[DataFile] = [file for path in paths for file in read_data_files(path)]
    rows = encode_rows(files, tokenizer, options, encode_preference if options.preferences else encode_row)
    name = ", ".join(paths)
    if not rows.mistakes:
        return rows, []
    count, total = len(rows.mistakes), len(rows.mistakes) + len(rows.rows)
    shown = [
        f"{escaped_and_truncated(place)}: {printable_line(mistake, 300)}"
        for place, mistake in rows.mistakes[:_MAX_SHOWN_MISTAKES]
    ]
    if count > len(shown):
        shown.append(f"and {count - len(shown):,} more rows with mistakes")
    if skips_bad_rows and rows.rows:
        return rows, [f"{count:,} of {total:,} rows of {name} are left out:", *shown]
    place, mistake = rows.mistakes[0]
    if not rows.rows or count == 1:
        others = f", as each of its {total:,} rows" if count > 1 else ""
        raise file_error(name, f"{place}{others}: {mistake}")
    for line in shown:
        print(f"lowmem fit: {line}", file=sys.stderr)
    raise file_error(
        name,
        f"{count:,} of {total:,} rows have mistakes, the first is {place}: mend them, or add --skip-bad-rows to "
        "train without them",
    )


def _check_chat_is_used(arguments: argparse.Namespace, texts: Texts) -> None:
    """Raise a ValueError for an option on conversations, where there are none."""
    if not texts.chats:
        for name in ("system", "template_kwargs", "chat_template"):
            value = getattr(arguments, name)
            if value is not None and (name, value) != ("chat_template", NO_TEMPLATE):
                raise ValueError(
                    f"{option_string(name)} applies to conversations, and the data has none: leave it out"
                )


def _overlap_notes(texts: Texts, held_out: Texts) -> list[str]:
    """Return a note on held-out examples that are trained, too."""
    places = held_out.places_in(texts)
    if not places:
        return []
    return [
        f"{len(places):,} of the {len(held_out.examples):,} held-out examples also stand in the part that is "
        f"trained, so that its loss is too low; the first is {places[0]}"
    ]


def _text_notes(texts: Texts, name: str, max_positions: int | None) -> list[str]:
    """Return notes on the examples of a file: at first those that do not fit, with the length that they need."""
    notes, name = [], escaped_and_truncated(name)
    if texts.cut:
        note = f"{texts.cut} of {len(texts.ends)} examples of {name} are cut to --length {texts.length}"
        if texts.lost_ends:
            need = texts.length_of_ends(0.99)
            remedy = f"--length {need} keeps 99% of the ends"
            if max_positions is not None and need > max_positions:
                remedy = f"99% of the ends take {need}, of the model's {max_positions} positions; shorten the texts"
            note += f", and {texts.lost_ends} lose the token that ends the answer: {remedy}"
        notes.append(note)
    for finding, (count, place) in texts.findings.items():
        what = f"{finding}: {count:,} rows of {name},"
        if finding == ALL_MASKED:
            what = f"{count} examples of {name} are left out, since nothing that counts is left;"
        notes.append(f"{what} the first is {place}")
    return notes
