"""The benchmark of training steps compares neighbours, and measures what it says."""

import json

import pytest

from benchmarks import training_steps
from benchmarks.training_steps import WORKLOADS, Step
from tests.benchmarks.test_resident import needs_high_water


def test_shares_are_of_the_neighbouring_run_of_the_peer():
    found = {
        "peer": [Step(100, 50, 100, 3.0), Step(400, 50, 100, 3.0), Step(200, 50, 100, 3.0)],
        "own": [Step(100, 50, 50, 3.0)] * 3,
        "fast": [Step(60, 50, 45, 3.0), Step(240, 50, 45, 3.0), Step(120, 50, 45, 3.0)],
    }
    peer, own, fast = training_steps.compare(WORKLOADS[0], found)
    assert (peer["time share"], peer["process share"]) == (1, 1)
    assert (own["time share"], own["step's share"], own["process share"]) == (0.5, 0.5, 100 / 150)
    assert (fast["milliseconds"], fast["time share"], fast["step's share"]) == (120, 0.6, 0.45)


@pytest.mark.processes
@needs_high_water
def test_a_process_measures_a_model_that_learns(tmp_path, monkeypatch, capsys):
    workload = next(one for one in WORKLOADS if one.name == "bignet16")
    one, three = (training_steps.measure(workload, "own", steps, tmp_path) for steps in (1, 3))
    assert three.loss < one.loss
    assert one.milliseconds > 0
    assert 50 < one.resident < 50_000  # MiB, of a process that has loaded torch: no bytes, no KiB
    assert 0 <= one.step < one.resident
    monkeypatch.setattr(training_steps, "prepare", lambda folder: None)
    monkeypatch.setattr(training_steps, "rounds", lambda *_: [(way, one) for way in training_steps.WAYS])
    assert training_steps.main(["--only", "vit", "--json", str(tmp_path / "out.json")]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())) == len(training_steps.WAYS)
    assert "vit" in capsys.readouterr().out
