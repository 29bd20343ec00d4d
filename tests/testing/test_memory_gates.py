"""A session's memory gates: one byte fails, what is asked for is stored, and nothing else is written."""

import json

import pytest

from lowmem.errors import FileError
from lowmem.testing.memory_baseline import BaselineKey, read_baseline_figures, write_baseline_figures
from lowmem.testing.memory_gates import (
    MemoryGateSession,
    ceiling_excess,
    is_gate_of_test,
    parse_ceiling,
    stored_gate_name,
)

KEY = BaselineKey("portable", "2.13", 2)
OTHER = BaselineKey("cuda", "2.13", 2)
TEST = "test_a.py::test_small[a b]"
FIGURES = {"float32_bytes": 4, "stored_bytes": 4, "trainable_bytes": 4, "forward_bytes": 1000, "step_bytes": 2000}


@pytest.fixture
def gates(tmp_path):
    """Return a function that begins a session in a mode, in a project with these figures stored."""
    (tmp_path / "test_a.py").touch()
    write_baseline_figures(KEY.file_path(tmp_path / "baselines"), KEY, {TEST: FIGURES})
    return lambda mode="compare": MemoryGateSession(tmp_path, tmp_path / "baselines", mode)


def stored(gates, key=KEY):
    path = key.file_path(gates.directory)
    return read_baseline_figures(path, key) if path.exists() else None


def finish(session):
    """End a session as it ends beside pytest-xdist too: through a worker's dump, which JSON holds."""
    controller = MemoryGateSession(session.root, session.directory, session.mode)
    controller.merge_worker_state(json.loads(json.dumps(session.serializable_state())))
    assert controller.rows == session.rows
    return controller.write_pending_and_drop_vanished()


def moved(**changes):
    return FIGURES | {f"{figure}_bytes": size for figure, size in changes.items()}


def test_the_same_figures_pass_and_nothing_is_written(gates):
    session = gates()
    assert session.judge_figures_and_explain_failure(TEST, TEST, KEY, FIGURES) is None
    assert finish(session) == []
    assert session.verdict_table_lines() == [
        "verdict  stored  forward   step  gate",
        "same          4    1,000  2,000  test_a.py::test_small[a b]",
    ]


@pytest.mark.parametrize("figure", [name.removesuffix("_bytes") for name in FIGURES])
@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("mode", ["compare", "store"])
def test_one_byte_more_or_less_fails_and_stays_as_it_was_stored(gates, figure, by, mode):
    session = gates(mode)
    size = FIGURES[f"{figure}_bytes"]
    failure = session.judge_figures_and_explain_failure(TEST, TEST, KEY, moved(**{figure: size + by}))
    assert failure.splitlines()[0] == f"the memory of {TEST} is not what baselines/portable-torch2.13.json holds"
    rows = [line.split() for line in failure.splitlines() if line.startswith(f"{figure}_bytes")]
    assert rows == [[f"{figure}_bytes", f"{size:,}", f"{size + by:,}", f"{by:+}"]]
    assert failure.endswith(
        "If that is meant, store the new figures, and say why in the commit's message:\n"
        "    pytest --lowmem-baseline=update 'test_a.py::test_small[a b]'"
    )
    assert finish(session) == []
    assert stored(session) == {TEST: FIGURES}


def test_a_failure_says_where_the_step_is_a_forward_alone(gates):
    assert "Nothing in the model trains" in gates().judge_figures_and_explain_failure(
        TEST, TEST, KEY, moved(trainable=0)
    )
    assert "Nothing in the model trains" not in gates().judge_figures_and_explain_failure(
        TEST, TEST, KEY, moved(step=1)
    )


@pytest.mark.parametrize("mode", ["compare", "store", "update"])
@pytest.mark.parametrize("name", [TEST, "test_a.py::test_new"])
def test_what_is_over_its_ceiling_fails_in_every_mode_and_is_not_stored(gates, mode, name):
    session = gates(mode)
    over = ceiling_excess(name, "2 KB", 2004)
    failure = session.judge_figures_and_explain_failure(name, name, KEY, moved(stored=5), over)
    assert failure.startswith(f"{name} takes 2,004 bytes, and at_most='2 KB' allows 2,000: 4 too many")
    assert finish(session) == []
    assert stored(session) == {TEST: FIGURES}
    assert over in session.session_verdict(False).rows
    assert session.rows[name].verdict == "over"


def test_a_ceiling_is_inclusive_and_its_own_error_where_it_is_no_size():
    assert parse_ceiling(None) is None
    assert (parse_ceiling("2 GiB"), parse_ceiling(7)) == (2**31, 7)
    assert ceiling_excess(TEST, "2 KB", 2000) is ceiling_excess(TEST, None, 2**60) is None
    for bad, error in (("2 elephants", ValueError), (0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"^at_most={bad!r} must be a .*size such as 2GB or 500MiB$"):
            parse_ceiling(bad)


def test_updating_stores_what_moved_and_keeps_the_rest(gates):
    session = gates("update")
    assert session.judge_figures_and_explain_failure(TEST, TEST, KEY, moved(step=1)) is None
    assert session.judge_figures_and_explain_failure("test_b.py::test", "test_b.py::test", KEY, FIGURES) is None
    assert [row.verdict for row in session.rows.values()] == ["updated", "stored"]
    assert finish(session) == ["baselines/portable-torch2.13.json"]
    assert stored(session) == {TEST: moved(step=1), "test_b.py::test": FIGURES}
    session = gates("update")
    assert session.judge_figures_and_explain_failure(TEST, TEST, KEY, moved(step=1)) is None
    assert finish(session) == []  # nothing moved


def test_an_unknown_gate_fails_with_the_command_that_stores_it(gates):
    session = gates()
    failure = session.judge_figures_and_explain_failure("test_b.py::test", "test_b.py::test", KEY, FIGURES)
    assert "portable-torch2.13.json holds no figures of test_b.py::test: it is new, or was renamed" in failure
    assert failure.endswith("    pytest --lowmem-baseline=store test_b.py::test")
    assert finish(session) == []


def test_a_key_without_a_file_fails_and_names_the_versions_of_torch_that_have_one(gates):
    for name in ("avx2-torch2.13", "avx2-torch2.9", "resident-avx2-torch2.15"):
        (gates().directory / f"{name}.json").touch()
    failure = gates().judge_figures_and_explain_failure(TEST, TEST, OTHER, FIGURES)
    assert failure.splitlines()[0] == (
        "no figures are stored for torch 2.13 and backend cuda: baselines holds those for torch 2.9 (avx2), "
        "torch 2.13 (avx2, portable)"
    )
    assert "Run with one of these, or store new figures and commit baselines/cuda-torch2.13.json:" in failure
    for mode in ("store", "update"):
        session = gates(mode)
        assert session.judge_figures_and_explain_failure(TEST, TEST, OTHER, FIGURES) is None
        assert finish(session) == ["baselines/cuda-torch2.13.json"]
        assert (stored(session, OTHER), stored(session)) == ({TEST: FIGURES}, {TEST: FIGURES})
        OTHER.file_path(session.directory).unlink()


@pytest.mark.parametrize(
    ("stored_name", "collected", "complete", "passed", "gone"),
    [
        ("test_a.py::test_gone", {TEST}, {"test_a.py"}, {TEST}, True),
        ("test_a.py::test_gone", {TEST}, set(), {TEST}, False),  # a part of the file was asked for
        ("test_a.py::test_skipped", {TEST, "test_a.py::test_skipped"}, {"test_a.py"}, {TEST}, False),
        ("test_a.py::test_gone | b", {TEST, "test_a.py::test_gone"}, set(), {"test_a.py::test_gone"}, True),
        ("test_a.py::test_failed | b", {"test_a.py::test_failed"}, set(), {TEST}, False),
        (TEST, {TEST}, {"test_a.py"}, {TEST}, False),
    ],
)
def test_a_stored_gate_that_no_test_measures_fails_the_session_until_it_is_removed(
    gates, stored_name, collected, complete, passed, gone
):
    for mode in ("compare", "store", "update"):
        session = gates(mode)
        write_baseline_figures(KEY.file_path(session.directory), KEY, {TEST: FIGURES, stored_name: FIGURES})
        session.judge_figures_and_explain_failure(TEST, TEST, KEY, FIGURES)
        session.record_vanished_gates(collected, complete.__contains__, passed)
        removed = gone and mode == "update"
        assert bool(finish(session)) == removed
        assert (stored_name in stored(session)) != removed
        assert bool(session.missing_gate_rows()) == (gone and not removed)
        for row in session.missing_gate_rows():
            assert (row.name, row.verdict) == (stored_name, "missing")
            assert row.says.endswith(
                "bring its test back, or remove its figures: delete them there, or run with --lowmem-baseline=update"
            )
        assert session.session_verdict(True).passed != bool(session.missing_gate_rows())


def test_what_another_worker_measured_has_not_vanished(gates):
    write_baseline_figures(KEY.file_path(gates().directory), KEY, {TEST: FIGURES, "test_a.py::test_b": FIGURES})
    controller = gates("update")
    for name in (TEST, "test_a.py::test_b"):
        worker = gates("update")
        worker.judge_figures_and_explain_failure(name, name, KEY, FIGURES)
        worker.record_vanished_gates({TEST}, {"test_a.py"}.__contains__, {name})
        controller.merge_worker_state(json.loads(json.dumps(worker.serializable_state())))
    assert controller.write_pending_and_drop_vanished() == []
    assert controller.missing_gate_rows() == []
    assert stored(controller).keys() == {TEST, "test_a.py::test_b"}


@pytest.mark.parametrize("mode", ["compare", "store", "update"])
def test_a_damaged_baseline_is_refused_once_for_all_gates_and_not_overwritten(gates, mode):
    session = gates(mode)
    path = KEY.file_path(session.directory)
    for content in ("{", "it is read for the first gate alone"):
        path.write_text(content)
        with pytest.raises(FileError, match="restore it from version control"):
            session.judge_figures_and_explain_failure(TEST, TEST, KEY, FIGURES)
    session.record_vanished_gates({TEST}, {"test_a.py"}.__contains__, {TEST})
    assert finish(session) == []
    assert path.read_text() == content


def test_a_baseline_that_is_damaged_meanwhile_is_not_overwritten(gates):
    session = gates("update")
    session.judge_figures_and_explain_failure(TEST, TEST, KEY, moved(step=1))
    path = KEY.file_path(session.directory)
    path.write_text("{")
    with pytest.raises(FileError, match="restore it from version control"):
        session.write_pending_and_drop_vanished()
    assert path.read_text() == "{"


def test_a_test_that_is_run_again_counts_with_its_last_figures(gates):
    session = gates("update")
    for step in (1, 2):
        assert session.judge_figures_and_explain_failure(TEST, TEST, KEY, moved(step=step)) is None
    finish(session)
    assert stored(session) == {TEST: moved(step=2)}


def test_a_gate_with_a_name_belongs_to_its_test_alone():
    assert stored_gate_name(TEST, "") == TEST
    assert is_gate_of_test(stored_gate_name(TEST, "b"), TEST)
    assert is_gate_of_test(TEST, TEST)
    assert not is_gate_of_test(TEST + "x", TEST)
    assert not is_gate_of_test(stored_gate_name("test_a.py::test_small", "b"), "test_a.py::test")
