"""Times of a benchmark run, and those that are measured in turns, as ratios to the dense model."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem.errors import FileError
from lowmem.report.relative_speeds import (
    DENSE,
    RelativeSpeed,
    inference_speeds_from_benchmarks,
    measure_relative_speed,
    read_relative_speeds_and_machine,
)
from lowmem.testing.latency import Speedup
from lowmem.testing.ratios import Ratio

STORED = Path(__file__).parents[2] / "benchmarks" / "baselines" / "0001_baseline.json"


def bench(name, seconds=1.0, reference=2.0, file="test_inference"):
    return {
        "fullname": f"benchmarks/{file}.py::{name}",
        "stats": {"min": seconds},
        "extra_info": {"reference_seconds": reference},
    }


def test_a_ratio_is_how_many_times_as_fast():
    stored = bench("test_inference[qlora-batch8]", 1.0, 2.5)
    live = {key: value for key, value in stored.items() if key != "stats"} | stored["stats"]  # within a session
    assert (
        inference_speeds_from_benchmarks([stored])
        == inference_speeds_from_benchmarks([live])
        == [RelativeSpeed("float32", "qlora", 8, 2.5)]
    )
    assert inference_speeds_from_benchmarks([stored | {"extra_info": {}}]) == []  # without a reference


def test_precisions_and_peers_have_panels_of_their_own():
    found = inference_speeds_from_benchmarks(
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


def test_the_stored_run_is_read():
    timings, machine = read_relative_speeds_and_machine(STORED)
    assert {t.panel for t in timings} == {"float32", "bfloat16", "8-bit integers"}
    assert {t.batch for t in timings} == {1, 8, 32, 128, 512}
    assert machine["threads"] == "2"
    assert all(isinstance(value, str) for value in machine.values())


def test_texts_of_the_machine_are_cleaned_for_what_draws_them(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": [], "machine_info": {"a\0": ["\u2028\x1b"]}}))
    assert read_relative_speeds_and_machine(tmp_path / "run.json")[1] == {r"a\x00": r"['\u2028\x1b']"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "the JSON is broken"),
        ("[]", "it is no run of pytest-benchmark"),
        ('{"benchmarks": 3, "machine_info": {}}', "it is no run of pytest-benchmark"),
        ('{"benchmarks": [3], "machine_info": {}}', "benchmark 0 is 3"),
        (json.dumps({"benchmarks": [bench("a") | {"fullname": 3}], "machine_info": {}}), "benchmark 0 is"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", "fast")], "machine_info": {}}), "'fast'"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", 0)], "machine_info": {}}), "0"),
        (json.dumps({"benchmarks": [bench("test_inference[a-batch1]", True)], "machine_info": {}}), "True"),
    ],
)
def test_a_damaged_run_is_one_clear_error(tmp_path, content, why):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FileError, match="cannot read .*run.json") as refused:
        read_relative_speeds_and_machine(tmp_path / "run.json")
    assert why in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_the_speed_is_that_of_the_gate_of_latency_with_its_interval(monkeypatch):
    dense, other, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(3, 4)
    found = measure_relative_speed("other", dense, other, x, seconds=0.01)
    assert (found.panel, found.name, found.batch) == (DENSE, "other", 3)
    assert 0 < found.low <= found.speed <= found.high

    def measured(candidate, reference, *inputs, seconds):
        assert (candidate, reference, inputs, seconds) == (other, dense, (x,), 60)
        return Speedup(Ratio(2.0, 1.5, 2.5, 0.1, 8), 1.0)

    monkeypatch.setattr("lowmem.report.relative_speeds.measure_speedup", measured)
    assert measure_relative_speed("other", dense, other, x, seconds=60) == RelativeSpeed(
        DENSE, "other", 3, 2.0, 1.5, 2.5
    )
