"""The benchmark of training steps compares neighbours, holds them to the goals, and measures what it says."""

import json

import pytest

from benchmarks import training_steps
from benchmarks.training_steps import WORKLOADS, Step, Workload
from tests.benchmarks.test_resident import needs_high_water

GOALS = Workload("smollm2", "q_proj", {"fast": (0.65, 0.45, None), "lean": (0.9, 0.1, 0.38)})


def test_shares_are_of_the_neighbouring_run_of_the_peer():
    found = {
        "peer": [Step(100, 50, 100, 3.0), Step(400, 50, 100, 3.0), Step(200, 50, 100, 3.0)],
        "own": [Step(100, 50, 50, 3.0)] * 3,
        "fast": [Step(60, 50, 45, 3.0), Step(240, 50, 45, 3.0), Step(120, 50, 45, 3.0)],
        "lean": [Step(90, 40, 11, 3.1), Step(360, 40, 11, 3.1), Step(180, 40, 11, 3.1)],
    }
    peer, own, fast, lean = training_steps.compare(GOALS, found)
    assert peer["shares"] == (1, 1, 1)
    assert own["shares"] == (0.5, 0.5, 100 / 150)
    assert own["goals"] == (None, None, None)
    assert fast["shares"] == (0.6, 0.45, 95 / 150)
    assert fast["met"]
    assert (lean["milliseconds"], lean["shares"]) == (180, (0.9, 0.11, 51 / 150))
    assert not lean["met"]


def test_every_workload_is_shown_with_its_goals(monkeypatch, tmp_path, capsys):
    def measured(workload, number, steps, folder):
        yield from [(way, Step(100, 50, 50, 3.0)) for way in training_steps.WAYS for _ in range(number)]

    monkeypatch.setattr(training_steps, "prepare", lambda folder: None)
    monkeypatch.setattr(training_steps, "rounds", measured)
    assert training_steps.main(["--rounds", "2", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == len(WORKLOADS) * len(training_steps.WAYS)
    assert not any(row["met"] for row in rows if any(row["goals"]))
    shown = capsys.readouterr().out
    assert shown.count("not met") == sum(len(one.goals) for one in WORKLOADS)
    assert "smollm2, bfloat16" in shown


@pytest.mark.processes
@needs_high_water
def test_a_process_measures_a_model_that_learns(tmp_path):
    workload = next(one for one in WORKLOADS if one.name == "bignet16")
    one, three = (training_steps.measure(workload, "own", steps, tmp_path) for steps in (1, 3))
    assert three.loss < one.loss
    assert one.milliseconds > 0
    assert 50 < one.resident < 50_000  # MiB, of a process that has loaded torch: no bytes, no KiB
    assert 0 <= one.step < one.resident


@pytest.mark.parametrize("arguments", [["--only", "llama"], ["--rounds", "0"], ["--steps", "-1"]])
def test_wrong_arguments_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        training_steps.main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
