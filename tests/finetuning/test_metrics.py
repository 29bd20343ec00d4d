"""The metrics have one line for each step, also after a kill; the plot is drawn where matplotlib is."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowmem.errors import FileError
from lowmem.finetuning.metrics import (
    LOGS,
    JSONLinesWriter,
    check_metrics_file,
    check_plot_path,
    plot_losses,
    process_peak_bytes_or_none,
)
from lowmem.version import install_command


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_run_that_goes_on_drops_later_lines_and_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JSONLinesWriter(path)
    for step in (1, 2, 3, 4):
        first.write({"step": step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    for step, kept in ((3, [1, 2, 3]), (3, [1, 2, 3]), (0, [])):
        again = JSONLinesWriter(path, step)
        assert steps(path) == kept
        again.close()
    path.unlink()
    new = JSONLinesWriter(path, 7)  # there may be none yet
    new.write({"step": 8})
    assert steps(path) == [8]
    new.close()


def test_a_file_that_is_there_is_refused_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("mine")
    for refused in (lambda: JSONLinesWriter(path), lambda: check_metrics_file(path, resumes=False)):
        with pytest.raises(FileExistsError, match=r"metrics.jsonl' exists"):
            refused()
    for mine in ("mine", '{"text": "a"}\n', '{"step": "a"}\n'):  # also by a run that goes on
        path.write_text(mine)
        for refused in (lambda: JSONLinesWriter(path, 0), lambda: check_metrics_file(path, resumes=True)):
            with pytest.raises(FileError, match="it has no metrics of a run"):
                refused()
        assert path.read_text() == mine
    for ours in ("", '{"st', '{"step": 1, "loss": 2.0}\n'):
        path.write_text(ours)
        check_metrics_file(path, resumes=True)
    (tmp_path / "metrics.csv").write_text("step of mine,loss\n")
    with pytest.raises(FileError, match=r"metrics.csv': it has no metrics of a run"):
        LOGS["csv"](tmp_path, {}, 0)
    with pytest.raises(OSError, match="cannot write"):
        check_metrics_file(tmp_path / "missing" / "a", resumes=True)


def test_memory_is_that_of_the_process(monkeypatch):
    before = process_peak_bytes_or_none(torch.device("cpu"))
    if before is not None:
        kept = torch.ones(2**26, dtype=torch.uint8)
        assert process_peak_bytes_or_none(torch.device("cpu")) >= max(before, kept.nbytes)
        monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3072))
        for system, unit in (("freebsd14", 1024), ("darwin", 1)):  # KiB, and on macOS bytes
            monkeypatch.setattr("sys.platform", system)
            assert process_peak_bytes_or_none(torch.device("cpu")) == 3072 * unit


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no peak of a process")
def test_memory_is_not_that_of_the_process_that_started_this_one():
    mine = torch.ones(2**30, dtype=torch.uint8)
    code = "import torch; from lowmem.finetuning.metrics import process_peak_bytes_or_none as peak"
    argv = [sys.executable, "-c", f"{code}; print(peak(torch.device('cpu')))"]
    found = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert 2**20 < int(found) < mine.nbytes


@pytest.mark.thorough
def test_the_same_run_gives_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plot]'")
    losses = [3 / (1 + step) for step in range(60)]
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for suffix, start in starts.items():
        one, other, bare = (tmp_path / f"{name}{suffix}" for name in ("one", "other", "bare"))
        for path in (one, other):
            plot_losses(path, losses, [(30, 2.5), (45, float("inf")), (60, 2.0)], {"dense": 3.0, "stored": 3.5})
        plot_losses(bare, losses[:1])
        assert one.read_bytes().startswith(start)
        assert one.read_bytes() == other.read_bytes() or suffix == ".svg"  # its names are random
        assert one.read_bytes() != bare.read_bytes()


def test_a_plot_of_another_suffix_or_without_matplotlib_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"plot='a.jpeg' must end in .png, .svg, .pdf"):
        check_plot_path(tmp_path.joinpath("a.jpeg").relative_to(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape(f"plot needs matplotlib: {install_command('plot')}")):
        check_plot_path(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "kept"), [("step,loss\n1,0.5\n2,0.2", [1]), ("step,lo", []), ("", [])])
def test_a_table_that_a_kill_has_cut_goes_on_with_whole_rows(content, kept, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    log = LOGS["csv"](tmp_path, {}, 2)
    for step in (2, 3):
        log.write({"step": step, "loss": 0.25})
    log.close()
    rows = [f"{step},0.5" for step in kept] + ["2,0.25", "3,0.25"]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", *rows]
