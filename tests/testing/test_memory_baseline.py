"""A baseline survives its file, names each byte that moved, and refuses what it did not write."""

import json
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.errors import FileError
from lowmem.testing.memory_baseline import (
    BaselineKey,
    comparison_rows,
    difference_table_lines,
    read_baseline_figures,
    write_baseline_figures,
)

KEY = BaselineKey("portable", "2.13", 2)
NAME = "tests/test_model.py::test_small[a b]"
STORED = {NAME: {"stored_bytes": 10, "forward_bytes": 0}}

figures = st.dictionaries(st.text(string.ascii_letters, min_size=1), st.integers(0, 2**60), min_size=1, max_size=4)


@pytest.fixture
def file(tmp_path):
    path = KEY.file_path(tmp_path / "baselines")
    write_baseline_figures(path, KEY, STORED)
    return path


@given(st.dictionaries(st.text(min_size=1), figures, max_size=4))
def test_a_baseline_is_read_as_it_was_written(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("baselines") / "x.json"
    write_baseline_figures(path, KEY, found)
    assert read_baseline_figures(path, KEY) == found
    before = path.read_bytes()
    write_baseline_figures(path, KEY, dict(reversed(found.items())))  # tests in another order make no diff
    assert path.read_bytes() == before


def test_the_file_of_a_key_is_lines_that_a_reviewer_reads_in_a_diff(file):
    assert file.name == "portable-torch2.13.json"
    assert file.read_text().splitlines() == [
        "{",
        '  "version": 1,',
        '  "backend": "portable",',
        '  "torch": "2.13",',
        '  "threads": 2,',
        '  "figures": {',
        f'    "{NAME}": {{',
        '      "stored_bytes": 10,',
        '      "forward_bytes": 0',
        "    }",
        "  }",
        "}",
    ]


@given(figures, st.data())
def test_every_byte_more_or_less_is_a_change_and_nothing_else_is(stored, data):
    now = dict(stored)
    assert {row.verdict for row in comparison_rows("n", stored, now)} == {"same"}
    figure = data.draw(st.sampled_from(sorted(stored)))
    now[figure] += data.draw(st.sampled_from([1, -1]))
    (row,) = (row for row in comparison_rows("n", stored, now) if row.verdict != "same")
    assert (row.name, row.figure, row.base, row.head) == ("n", figure, stored[figure], now[figure])
    assert row.verdict == ("grew" if now[figure] > stored[figure] else "shrank")


def test_a_figure_of_one_side_alone_is_new_or_missing_even_where_it_is_zero():
    rows = comparison_rows("n", {"gone": 0, "same": 1}, {"same": 1, "come": 0})
    assert [row.verdict for row in rows] == ["same", "new", "missing"]
    assert rows[1].says == "n: come is 0, and the baseline has -: new"


def test_the_table_says_before_after_and_difference_in_aligned_columns():
    lines = difference_table_lines(comparison_rows("n", {"a": 1, "b": 5000}, {"a": 1001, "c": 7}))
    assert [line.split() for line in lines] == [
        ["bytes", "before", "after", "difference"],
        ["a", "1", "1,001", "+1,000"],
        ["c", "-", "7", "+7"],
        ["b", "5,000", "-", "-5,000"],
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"<<<<<<< HEAD\n{}",
        b'{"version": 1, "backend": "portable", "torch": "2.13", "threads": 2}',
        b'{"version": 2, "figures": {}}',
    ],
)
def test_a_damaged_file_is_one_line_that_names_it_and_the_remedy(file, content):
    file.write_bytes(content)
    with pytest.raises(FileError) as raised:
        read_baseline_figures(file, KEY)
    said = str(raised.value)
    assert said.isprintable()
    assert file.name in said
    assert said.endswith("restore it from version control, or remove it and store the figures again")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"figures": []}, r"figures=\[\] must be an object"),
        ({"figures": {"a": {}}}, "'a' must be one or more"),
        ({"figures": {"a": 3}}, "'a' must be an object"),
        ({"figures": {"a": {"x": True}}}, "'x' is True and must be a number of bytes"),
        ({"figures": {"a": {"x": -1}}}, "'x' is -1 and must be a number of bytes"),
        ({"more": 1}, "must hold version, backend, torch, threads and figures, and nothing else"),
        ({"version": 2, "more": 1}, "it has version=2, and this lowmem reads 1: upgrade lowmem; restore"),
        ({"version": None}, "it has version=None, and this lowmem reads 1; restore"),
        ({"backend": "avx2"}, "of backend='avx2', torch='2.13', threads=2, and this run is backend=portable"),
        ({"torch": "2.4"}, "of backend='portable', torch='2.4', threads=2, and this run"),
        ({"threads": 1}, "of backend='portable', torch='2.13', threads=1, and this run"),
    ],
)
def test_a_file_that_does_not_hold_this_key_is_refused(file, changes, said):
    write_baseline_figures(file, KEY, STORED)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(FileError, match=said):
        read_baseline_figures(file, KEY)


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed(file):
    with file.open("ab") as grown:
        grown.truncate(2**40)  # a sparse file, which is read in part
    with pytest.raises(FileError, match="it takes more than 16777216 bytes"):
        read_baseline_figures(file, KEY)


def test_a_name_that_stands_twice_is_refused(file):
    file.write_text(file.read_text().replace('"forward_bytes"', '"stored_bytes"'))
    with pytest.raises(FileError, match="the JSON has a name twice"):
        read_baseline_figures(file, KEY)


def test_a_directory_that_cannot_be_made_is_named_and_nothing_is_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"cannot write '.*file/x\.json': .*; choose another directory"):
        write_baseline_figures(tmp_path / "file" / "x.json", KEY, STORED)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
