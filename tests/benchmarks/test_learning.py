"""The benchmark of learning trains each way on the same batches, and judges by others."""

import json

import pytest
import torch
from torch import nn

from benchmarks import learning
from benchmarks.learning import HELD, WAYS, Task


def make_task(seen):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, 128, generator=generator)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))

    def judge(model, batch):
        seen.append((model.training, int(batch[1])))
        return nn.functional.mse_loss(model(batch[0]), batch[0].flip(1)), 0.5

    return Task(make, "0 2", [(one, torch.tensor(number)) for number, one in enumerate(x)], judge, 1e-2)


@pytest.mark.thorough
def test_ways_learn_the_same_from_the_same_batches():
    found, orders = {}, {}
    for way in WAYS:
        seen = []
        found[way] = learning.learn(make_task(seen), WAYS[way], 60)
        assert {number for training, number in seen if not training} == set(range(HELD))
        orders[way] = [number for training, number in seen if training]
        assert set(orders[way]) == set(range(HELD, 40))  # 28 batches, more than twice
    for way, got in found.items():
        assert (orders[way] == orders["plain"]) == (way != "another seed")
        assert abs(got.loss - found["plain"].loss) <= 0.02


def test_a_table_and_json_and_digits_that_are_judged_by_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(learning.TASKS, "text", lambda folder: make_task([]))
    arguments = ["--only", "text", "--steps", "2", "--ways", "plain", "lean", "--json", str(tmp_path / "out.json")]
    assert learning.main(arguments) == 0
    assert [row["way"] for row in json.loads((tmp_path / "out.json").read_text())] == ["plain", "lean"]
    assert "After 2 steps" in capsys.readouterr().out
    pytest.importorskip("sklearn", reason="digits are scikit-learn's")
    task = learning.digits(None)
    sizes = [len(labels) for _, labels in task.batches]
    assert (sum(sizes[:HELD]), sum(sizes)) == (359, 1797)
    assert task.judge(task.model(), task.batches[HELD])[0].isfinite()
