"""Times of a benchmark run, and those that are measured in turns, as ratios to the dense model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem.errors import FileError
from lowmem.report.timings import DENSE, Timing, from_benchmarks, read_run, time_in_turns
from tests.selection import rows_in_one_case

STORED = Path(__file__).parents[2] / "benchmarks" / "baselines" / "0001_baseline.json"


def bench(name, seconds=1.0, reference=2.0, file="test_inference"):
    return {
        "fullname": f"benchmarks/{file}.py::{name}",
        "stats": {"min": seconds},
        "extra_info": {"reference_seconds": reference},
    }


def test_a_ratio_is_how_many_times_as_fast():
    (found,) = from_benchmarks([bench("test_inference[qlora-batch8]", 1.0, 2.5)])
    assert found == Timing("float32", "qlora", 8, 2.5)


def test_precisions_and_peers_have_panels_of_their_own():
    found = from_benchmarks(
        [
            bench("test_inference_in_bfloat16[low_precision-batch1]", file="test_kernels"),
            bench("test_inference_in_int8[low_precision-batch1]", file="test_kernels"),
            bench("test_peer[torchao-bfloat16-batch512]", file="test_peers"),
            bench("test_call[half]", file="test_kernels"),
            bench("test_training_step[lora]", file="test_training"),
        ]
    )
    assert [(t.panel, t.name, t.batch) for t in found] == [
        ("bfloat16", "low_precision", 1),
        ("8-bit integers", "low_precision", 1),
        ("peers, bfloat16", "torchao", 512),
    ]


def test_benchmarks_without_a_reference_are_left_out():
    assert from_benchmarks([bench("test_inference[qlora-batch8]") | {"extra_info": {}}]) == []


def test_live_benchmarks_have_their_times_beside_their_names():
    live = bench("test_inference[lora-batch1]")
    live |= live.pop("stats")
    assert from_benchmarks([live]) == [Timing("float32", "lora", 1, 2.0)]


def test_the_stored_run_is_read():
    timings, machine = read_run(STORED)
    assert {t.panel for t in timings} == {"float32", "bfloat16", "8-bit integers"}
    assert {t.batch for t in timings} == {1, 8, 32, 128, 512}
    assert machine["threads"] == "2"
    assert all(isinstance(value, str) for value in machine.values())


def test_texts_of_the_machine_are_cleaned_for_what_draws_them(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": [], "machine_info": {"a\0": ["\u2028\x1b"]}}))
    assert read_run(tmp_path / "run.json")[1] == {r"a\x00": r"['\u2028\x1b']"}


@rows_in_one_case(
    ("content", "why"),
    [
        ("", "the JSON is broken"),
        ("{", "the JSON is broken"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "it is no run of pytest-benchmark"),
        ('{"benchmarks": 3, "machine_info": {}}', "it is no run of pytest-benchmark"),
        ('{"benchmarks": [], "machine_info": []}', "it is no run of pytest-benchmark"),
        ('{"benchmarks": [3], "machine_info": {}}', "benchmark 0 is 3"),
        (json.dumps({"benchmarks": [bench("a") | {"fullname": 3}], "machine_info": {}}), "benchmark 0 is"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", "fast")], "machine_info": {}}), "'fast'"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", 0)], "machine_info": {}}), "0"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", 1, -1)], "machine_info": {}}), "-1"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", True)], "machine_info": {}}), "True"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch0]")], "machine_info": {}}), "batch0"),
    ],
)
def test_a_damaged_run_is_one_clear_error(tmp_path, content, why):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FileError, match="cannot read .*run.json") as refused:
        read_run(tmp_path / "run.json")
    assert why in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_missing_run_is_an_error(tmp_path):
    with pytest.raises(OSError, match="cannot read .*none.json"):
        read_run(tmp_path / "none.json")
    with pytest.raises(OSError, match="directory"):
        read_run(tmp_path)


def test_both_models_run_in_turns_and_are_left_as_they_were():
    calls = []
    dense, other = nn.Linear(4, 4), nn.Linear(4, 4)
    for name, model in (("dense", dense), ("other", other)):
        model.register_forward_hook(lambda *_, name=name: calls.append((name, torch.is_grad_enabled())))
    before = copy.deepcopy(dense.state_dict())

    found = time_in_turns("other", dense, other, torch.ones(3, 4), seconds=0)

    assert (found.panel, found.name, found.batch) == (DENSE, "other", 3)
    assert 0 < found.low <= found.speed <= found.high
    names = [name for name, _ in calls]
    assert names[:4] == ["dense", "other", "dense", "other"]  # to warm up, and to see how long a round is
    assert names[4:] == ["dense", "other", "other", "dense"] * 5
    assert not any(gradients for _, gradients in calls)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_the_speed_is_how_many_times_as_long_the_dense_model_takes(monkeypatch):
    """Under a clock by which a dense call takes 2 s, and one of the other 1 s."""
    now = [0.0]

    def after(seconds):
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    dense, other = nn.Identity(), nn.Identity()
    dense.register_forward_hook(after(2.0))
    other.register_forward_hook(after(1.0))
    monkeypatch.setattr("lowmem.report.timings.clock", lambda: now[0])
    found = time_in_turns("other", dense, other, torch.ones(1, 4), seconds=60)
    assert [found.speed, found.low, found.high] == pytest.approx([2, 2, 2])
    assert now[0] == 2 * 3 + 10 * 6  # two calls of each, and ten rounds of 6 s
