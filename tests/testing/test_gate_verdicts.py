"""Verdicts of the gates are read as they are written, and anything else is refused in one line."""

import copy
import json
from dataclasses import asdict

import pytest

from lowmem.errors import FileError
from lowmem.testing import gate_verdicts
from lowmem.testing.gate_verdicts import (
    FAILING,
    FigureComparison,
    GateVerdict,
    figure_verdict,
    read_report_json,
    read_verdict,
    write_verdict,
)

ROWS = (
    FigureComparison("forward[qlora-batch1]", "ratio", 0.001, 0.0012, 1.2, 1.17, 1.24, "slower", "20% slower"),
    FigureComparison("load", "ratio", verdict="skipped"),
)
VERDICT = asdict(GateVerdict("latency", False, "origin/main", "HEAD", {"cpu": "x86_64", "threads": 2}, ROWS))


def read(tmp_path, content):
    (tmp_path / "verdict.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_verdict(tmp_path / "verdict.json")


def changed(*path, to):
    verdict = copy.deepcopy(VERDICT)
    verdict["rows"] = [dict(row) for row in verdict["rows"]]
    at = verdict
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return verdict


def test_a_verdict_is_read(tmp_path):
    verdict = read(tmp_path, VERDICT)
    assert (verdict.gate, verdict.passed, verdict.base, verdict.head) == ("latency", False, "origin/main", "HEAD")
    assert verdict.machine == {"cpu": "x86_64", "threads": "2"}
    assert verdict.rows == ROWS
    assert [row.name for row in verdict.changed_rows] == ["forward[qlora-batch1]"]


def test_texts_are_cleaned_for_what_draws_them(tmp_path):
    """The renderer of charts ends the process at a control character."""
    bad, clean = "a\x00\x1b[2J\u2028\u2029\u202e", r"a\x00\x1b[2J\u2028\u2029\u202e"
    content = changed("rows", 0, "name", to=bad) | {"base": bad, "head": bad, "machine": {bad: bad}, "notes": [bad]}
    content["rows"][0] |= {"figure": bad, "says": bad}
    found = read(tmp_path, content)
    row = found.rows[0]
    texts = (row.name, row.figure, row.says, found.base, found.head, *found.notes, *found.machine.popitem())
    assert set(texts) == {clean}


@pytest.mark.parametrize(
    ("verdicts", "outcome"),
    [
        (["same", "faster", "skipped"], "passed"),
        (["same", "undecided"], "undecided"),
        (["undecided", "slower"], "failed"),
    ],
)
def test_what_is_undecided_neither_passes_nor_fails(tmp_path, verdicts, outcome):
    rows = [FigureComparison(str(number), "", verdict=verdict) for number, verdict in enumerate(verdicts)]
    write_verdict(tmp_path / "verdict.json", GateVerdict.from_rows("latency", "b", "h", {}, rows))
    found = read_verdict(tmp_path / "verdict.json")
    assert (found.outcome, found.passed) == (outcome, outcome == "passed")
    assert not any("undecided" in failing for failing in FAILING.values())


def test_what_a_newer_gate_adds_is_passed_over(tmp_path):
    assert read(tmp_path, VERDICT | {"duration": 3}) == read(tmp_path, VERDICT)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "the JSON is broken"),
        ('{"gate": NaN}', "NaN"),
        ([], "it is no verdict of a gate: it is []"),
        ({"machine_info": {}, "benchmarks": []}, "it is no verdict of a gate: gate is missing"),
        (changed("gate", to="weather"), "gate is 'weather'"),
        (changed("passed", to=1), "passed is 1"),
        (changed("base", to=None), "base is None"),
        (changed("rows", 0, to=7), "row 0 is 7"),
        (changed("rows", 1, "verdict", to="worse"), "row 1: verdict is 'worse'"),
        (changed("rows", 1, "ratio", to=True), "row 1: ratio is True"),
        (changed("rows", 0, "ratio", to=-1), "row 0: ratio is -1"),
        (changed("rows", 0, "name", to=["x"]), "row 0: name is"),
    ],
)
def test_anything_else_is_one_clear_error(tmp_path, content, why):
    with pytest.raises(FileError, match="cannot read .*verdict.json") as refused:
        read(tmp_path, content)
    assert why in str(refused.value)
    assert "write it again with the gate" in str(refused.value)


@pytest.mark.parametrize(
    ("base", "head", "tolerance", "verdict"),
    [
        (None, 0, 0, "new"),
        (0, None, 9, "missing"),
        (10, 11, 0, "grew"),
        (10, 11, 1, "same"),
        (10, 8.9, 1, "shrank"),
    ],
)
def test_figures_may_differ_by_the_tolerance(base, head, tolerance, verdict):
    assert figure_verdict(base, head, tolerance) == verdict


def test_json_that_is_too_large_is_not_read_and_a_missing_file_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_verdicts, "MOST_BYTES", 2**20)
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 2**20 + b"]")
    with pytest.raises(FileError, match="it takes more than 1048576 bytes, which no run and no verdict does"):
        read_report_json(tmp_path / "a.json")
    with pytest.raises(OSError, match="none"):
        read_report_json(tmp_path / "none.json")
