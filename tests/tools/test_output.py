"""Results alone go to stdout; tables show every figure, however narrow the terminal and whatever the names."""

import copy
import io
import json
import re
import time
from functools import partial

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import nn

from lowmem import FourBit, convert, summary
from lowmem.tools import output
from lowmem.tools.output import (
    escaped_and_truncated,
    make_rich_progress,
    print_json,
    print_layer_summary,
    print_table,
    progress_display,
    stdout_reserved_for_json,
    tokens_per_second_text,
)

HOSTILE = "w\x1b[31m\n\u202e[bold]x[/bold][/y]:warning:|<b>\\"
COLUMNS = ["Model", "Trains M", "Frozen M", "Total M", "Theory MiB", "Actual MiB", "Forward MiB", "Bits/ weight"]
FIGURES = ["12345.67", "0.01", "23456.78", "34567.89", "45678.90", "1.23", "32.00"]


@pytest.fixture
def terminal(monkeypatch):
    """Print on a terminal of some columns: return the lines, without styles."""

    def terminal(columns, what, *arguments, **options):
        screen = io.StringIO()
        monkeypatch.setattr("sys.stdout", screen)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(output.BrokenPipeRaisingConsole, "is_terminal", True)
        what(*arguments, **options)
        return re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()).splitlines()

    return terminal


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 120])
@pytest.mark.parametrize("name", ["bignet", "a.module.with.a.long.path:factory@low_precision_nf4", "語" * 30])
def test_every_figure_is_whole_and_every_name_complete_on_any_terminal(terminal, columns, name):
    lines = terminal(columns, print_table, COLUMNS, [[name, *FIGURES]])
    assert all(cell_len(line) <= columns for line in lines)
    words = " ".join(lines).split()
    assert all(figure in words for figure in FIGURES)
    assert name in "".join(word for word in words if word not in FIGURES)  # in pieces below each other


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 120, 300])
def test_a_summary_is_whole_on_any_terminal(terminal, columns):
    model = convert(nn.ModuleDict({"a_long_name_" * 3: nn.Linear(1024, 1024), "norm": nn.LayerNorm(16)}), FourBit())
    lines = terminal(columns, print_layer_summary, summary(model))
    assert all(cell_len(line) <= columns for line in lines)
    words = " ".join(lines).split()
    for row in summary(model).cells:
        assert all(row[number] in words for number in summary(model).FIGURES if row[number])
    if columns == 300:
        assert lines == str(summary(model)).splitlines()


@pytest.mark.parametrize("columns", [40, 200])
def test_names_on_a_terminal_are_neither_escape_codes_nor_markup_nor_emoji(terminal, columns):
    lines = terminal(columns, print_table, ["Name", "Count"], [[HOSTILE, "1"]])
    assert all(line.isprintable() for line in lines)
    words = " ".join(lines).split()
    assert escaped_and_truncated(HOSTILE) in "".join(word for word in words if word != "1")
    assert "[bold]x[/bold][/y]:warning:" in escaped_and_truncated(HOSTILE)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_table_in_a_pipe_keeps_to_120_columns_with_names_on_one_line(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    name, prose, form = "model.layers.0." * 5, "why it was left in words " * 9, "q4_0,scales=float16;" * 9
    tables = [
        (
            ["Layer", "Stored", "MiB", "Left because"],
            [[name, form, "12345.67", prose], ["b", "c", "1", "d"]],
            (0, 1, 3),
        ),
        (["Layer", *(f"Figure {n}" for n in range(20))], [[name, *["123456.78"] * 20]], (0,)),  # below each other
    ]
    for titles, rows, text in tables:
        print_table(titles, rows, text_columns=text)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(cell_len, lines)) <= 120
        assert any(name in line for line in lines)
        words = " ".join(lines).split()
        assert all(words.count(word) >= 9 for word in prose.split()) or prose not in rows[0]
        assert words.count("123456.78") == (20 if len(titles) > 20 else 0)


def test_a_summary_in_a_pipe_keeps_to_120_columns(capsys):
    model = nn.ModuleDict({"recurrent": nn.LSTM(16, 16, 2, bidirectional=True), "last": nn.Linear(16, 4)})
    for technique in (FourBit(("nf4", "fp4")), FourBit()):
        converted = convert(copy.deepcopy(model), technique)
        for _ in range(10):
            converted = nn.ModuleDict({"inner": converted})
        print_layer_summary(summary(converted))
        lines = capsys.readouterr().out.splitlines()
        assert max(map(cell_len, lines)) <= 120, lines
        assert any(f"{'inner.' * 10}recurrent" in line for line in lines)


def test_a_table_in_a_pipe_is_never_cut_and_has_no_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(["Name", "Some value"], [["a" * 1500, "1"], [HOSTILE, "2"]])
    text = capsys.readouterr().out
    assert "a" * 1500 in text
    assert escaped_and_truncated(HOSTILE) in text
    assert text.replace("\n", "").isprintable()


def test_markdown_cells_stay_in_their_columns(capsys):
    print_table(["Name", "Note", "Count"], [["a|b\nc", "<b>*x*[y](z)\\", "1"]], text_columns=(0, 1), markdown=True)
    assert capsys.readouterr().out.splitlines() == [
        "| Name | Note | Count |",
        "| :-- | :-- | --: |",
        "| a\\|b\\\\nc | \\<b>\\*x\\*\\[y](z)\\\\ | 1 |",
    ]


def test_only_json_goes_to_stdout_where_results_are_alone(capsys):
    with stdout_reserved_for_json(True, owns_process=False):
        print("noise")
        print_json({"name": HOSTILE})
    print("after")
    out, err = capsys.readouterr()
    assert err == "noise\n"
    document, _, rest = out.rpartition("}\n")
    assert json.loads(document + "}") == {"name": HOSTILE}
    assert rest == "after\n"
    with stdout_reserved_for_json(False, owns_process=False):
        print("text")
    assert capsys.readouterr() == ("text\n", "")


def test_an_error_in_the_block_gives_stdout_back(capsys):
    with pytest.raises(ValueError, match="bad"), stdout_reserved_for_json(True, owns_process=False):
        raise ValueError("bad")
    print_json([])
    assert capsys.readouterr().out == "[]\n"


def test_progress_refuses_a_field_that_no_figure_shows():
    with (
        pytest.raises(TypeError, match="no figure shows the field 'wide_columns'"),
        progress_display("quantize", "rows {task.fields[rows]}", rows="1", wide_columns=[TransferSpeedColumn]),
    ):
        pass


@pytest.mark.parametrize("columns", [40, 50, 60, 80])
@pytest.mark.parametrize("name", ["quantize", "a.module.with.a.long.path:factory@low_precision_nf4"])
def test_figures_of_progress_are_whole_on_any_terminal(monkeypatch, columns, name):
    monkeypatch.setenv("COLUMNS", str(columns))
    size = partial(DownloadColumn, binary_units=True)
    for shown_total, display in (
        ("38.3/115.0 GiB", make_rich_progress([size, TimeRemainingColumn], [TransferSpeedColumn])),
        ("41152263004/123456789012", make_rich_progress([MofNCompleteColumn, "steps"])),
    ):
        display.add_task(name, total=123456789012, completed=123456789012 // 3)
        screen = io.StringIO()
        Console(file=screen, width=columns).print(display.get_renderable())
        lines = screen.getvalue().splitlines()
        assert shown_total in lines[0]
        assert "\N{HORIZONTAL ELLIPSIS}" not in screen.getvalue()
        assert all(cell_len(line) <= columns for line in lines)
        assert ("\N{BOX DRAWINGS HEAVY HORIZONTAL}" in lines[0]) == (columns >= 60)


def test_without_a_terminal_long_work_prints_plain_lines_that_are_flushed(monkeypatch):
    class Stream(io.StringIO):
        lines = flushed = 0

        def flush(self):
            Stream.flushed, Stream.lines = Stream.flushed + 1, self.getvalue().count("\n")

    size = partial(DownloadColumn, binary_units=True)
    cases = {
        "quantize: 1.0/3.0 GiB": ([size, TimeRemainingColumn], {"total": 3 * 2**30}, {"advance": 2**30}),
        "llama: 2/9 steps 0.3 tokens/s": (
            [MofNCompleteColumn, "steps {task.fields[figures]}"],
            {"figures": ""},
            {"completed": 2, "total": 9, "figures": "0.3 tokens/s"},
        ),
        "[bold]: 0:00 so far": ([], {}, {}),
    }
    monkeypatch.setattr(output, "SECONDS_APART", 0.01)
    for expected, (figures, fields, update) in cases.items():
        screen = Stream()
        monkeypatch.setattr("sys.stderr", screen)
        with progress_display(expected.partition(":")[0], *figures, **fields) as change:
            change(**update)
            written = screen.getvalue().count("\n")
            for _ in range(6000):  # until two lines are flushed, of which the second has what was changed
                if Stream.lines >= written + 2:
                    break
                time.sleep(0.01)
        assert expected in screen.getvalue().splitlines()[-1]
        assert screen.getvalue().endswith(" so far\n")
        lines = screen.getvalue()
        time.sleep(0.05)
        assert screen.getvalue() == lines  # none after the block
        Stream.lines = 0


def test_on_a_terminal_no_plain_lines_are_printed(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(output.BrokenPipeRaisingConsole, "is_terminal", True)
    monkeypatch.setattr(output, "SECONDS_APART", 0.01)
    with progress_display("quantize", total=3):
        time.sleep(0.1)
    assert "so far" not in screen.getvalue()


def test_a_rate_below_ten_has_two_digits():
    assert [tokens_per_second_text(value) for value in (0.0, 0.0312, 0.3, 2.67, 9.94, 9.96, 47.4, 1150.2)] == [
        *("0", "0.031", "0.3", "2.7", "9.9", "10", "47", "1150")
    ]
