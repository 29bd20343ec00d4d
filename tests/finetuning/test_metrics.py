"""A line for each step, once: what a kill has cut, and steps that are done again, are dropped."""

import json
from types import SimpleNamespace

import pytest
import torch

from lowmem.errors import FileError
from lowmem.finetuning.metrics import Metrics, check_metrics, peak_memory


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_run_that_goes_on_drops_later_lines_and_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for step in (1, 2, 3, 4):
        first.write({"step": step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    for step, kept in ((3, [1, 2, 3]), (3, [1, 2, 3]), (0, [])):
        again = Metrics(path, step)
        assert steps(path) == kept
        again.close()
    path.unlink()
    new = Metrics(path, 7)  # there may be none yet
    new.write({"step": 8})
    assert steps(path) == [8]
    new.close()


def test_a_file_that_is_there_is_refused_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("mine")
    for refused in (lambda: Metrics(path), lambda: check_metrics(path, resume=False)):
        with pytest.raises(FileExistsError, match=r"metrics.jsonl' exists"):
            refused()
    for mine in ("mine", '{"text": "a"}\n', '{"step": "a"}\n'):  # also by a run that goes on
        path.write_text(mine)
        for refused in (lambda: Metrics(path, 0), lambda: check_metrics(path, resume=True)):
            with pytest.raises(FileError, match="it has no metrics of a run"):
                refused()
        assert path.read_text() == mine
    for ours in ("", '{"st', '{"step": 1, "loss": 2.0}\n'):
        path.write_text(ours)
        check_metrics(path, resume=True)
    with pytest.raises(OSError, match="cannot write"):
        check_metrics(tmp_path / "missing" / "a", resume=True)


def test_memory_is_that_of_the_process(monkeypatch):
    before = peak_memory(torch.device("cpu"))
    if before is not None:
        kept = torch.ones(2**26, dtype=torch.uint8)
        assert peak_memory(torch.device("cpu")) >= max(before, kept.nbytes)
        monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3072))
        for system, unit in (("linux", 1024), ("darwin", 1)):  # KiB, and on macOS bytes
            monkeypatch.setattr("sys.platform", system)
            assert peak_memory(torch.device("cpu")) == 3072 * unit
