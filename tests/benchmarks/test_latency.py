"""The latency gate: verdicts from times, rounds with processes in a fake's place, what it shows, and bad input."""

import errno
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import lowmem
from benchmarks import busy
from benchmarks.cases import BATCHES
from benchmarks.latency import builds, counted, gate, guide, instructions, proof, rounds, show, worker, workloads
from benchmarks.latency.__main__ import main, parse
from benchmarks.latency.builds import Commit, Environment, GateError
from benchmarks.latency.verdict import ALPHA, Times, judge, looks_different, needs_second_look
from lowmem import errors
from lowmem.testing.latency import Speedup
from lowmem.testing.ratios import Ratio
from lowmem.testing.verdicts import Row, Verdict, read_verdict, write_verdict
from tests.compiled import on_threads
from tests.selection import rows_in_one_case

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def outside_of_hooks(monkeypatch):
    """Let git take the repositories that tests make, where a hook runs the tests, too, and as no user has set it."""
    for name in builds.OF_A_HOOK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


BASE, HEAD = Commit("b" * 40, "main"), Commit("a" * 40, "HEAD")


def times(slowdown=1.0, rounds=15, noise=0.01, seed=0, clock="cpu"):
    """Return times of a head that is so much slower, with noise in each round."""
    generator = np.random.default_rng(seed)
    base, head, again = np.exp(generator.normal(scale=noise, size=(3, rounds)))
    return Times(clock, list(base), list(head * slowdown), list(again))


def verdicts(first, second=None, threshold=0.05, others=3):
    """Judge one workload among others that stayed the same."""
    quiet = {f"other {i}": times(seed=i + 1) for i in range(others)}
    rows = judge({"one": first, **quiet}, {} if second is None else {"one": second}, threshold)
    assert [row.verdict for row in rows[1:]] == ["same"] * others
    return rows[0]


# What makes a verdict


def test_a_slowdown_that_is_found_again_fails():
    row = verdicts(times(1.10, rounds=6), times(1.10, seed=9))
    assert row.verdict == "slower"
    assert 1.05 < row.low < row.ratio < row.high
    assert row.ratio == pytest.approx(1.10, abs=0.02)
    assert "in 15 fresh rounds" in row.says


def unsteady(factor, head):
    """Return times whose second base takes ``factor`` as long, and whose head takes ``head`` as long as both."""
    found = times(noise=0.001)
    found.again = [factor * second for second in found.again]
    return replace(found, head=[head * base for base in found.of_base()])


EIGHT = times(1.10, rounds=8, noise=0.001)  # which agree: 2 * 2**-8 is below ALPHA, 4 * 2**-8 is not
MIXED = Times("wall", [1.0] * 12, [1.6] * 7 + [0.75] * 5, [1.0] * 12)  # five rounds point the other way


@rows_in_one_case(
    ("looked", "second", "options", "verdict", "says"),
    [
        (0.8, times(0.8, seed=9), {}, "faster", "in 15 fresh rounds"),
        (1.3, times(1.0, seed=9), {}, "same", "within the threshold"),
        (1.06, times(1.04, noise=0.001), {}, "same", "within the threshold"),
        (1.08, times(1.08), {"threshold": 0.2}, "same", "within the threshold"),
        (1.10, EIGHT, {"others": 1}, "slower", "in 8 fresh rounds"),
        (1.10, EIGHT, {"others": 3}, "same", "do not agree"),
        (1.10, MIXED, {}, "same", "do not agree"),
        (1.10, unsteady(2.0, 1.3), {}, "same", "base differs from base"),
        (1.10, unsteady(0.5, 1.3), {}, "same", "base differs from base"),
    ],
)
def test_a_difference_counts_if_it_is_found_again_beyond_threshold_and_noise_in_rounds_that_agree(
    looked, second, options, verdict, says
):
    row = verdicts(times(looked, rounds=6), second, **options)
    assert row.verdict == verdict
    assert says in row.says
    assert row.ratio == pytest.approx(second.ratio().value)  # the second look is what is shown
    assert Verdict.of_rows("latency", "b", "h", {}, [row]).passed == (verdict != "slower")


def test_the_rounds_are_enough_after_the_correction_over_all_workloads():
    """Holm's correction multiplies the least p-value by the number of workloads: 2**-15 has to survive that."""
    every = len(workloads.workloads())
    assert 2**-gate.AGAIN_ROUNDS * every < ALPHA
    assert verdicts(times(1.10, rounds=6), times(1.10, seed=4), others=every - 1).verdict == "slower"


def test_rounds_let_each_side_begin_as_often():
    assert gate.FIRST_ROUNDS % len(rounds.SIDES) == 0
    assert gate.AGAIN_ROUNDS % len(rounds.SIDES) == 0
    long = [number for number in range(gate.FIRST_ROUNDS) if number % gate.LONG_EVERY == 0]
    assert sorted(number % len(rounds.SIDES) for number in long) == [0, 1, 2]


def test_what_looks_different_is_beyond_the_threshold_on_either_side():
    for head, different in ((1.06, True), (0.94, True), (1.04, False)):
        assert looks_different(Times("cpu", [1.0] * 6, [head] * 6, [1.0] * 6), 0.05) == different


def disturbed(found, number):
    """Return times whose first ``number`` rounds were disturbed, and took head twice as long."""
    head = [2 * second for second in found.head[:number]] + found.head[number:]
    flags = [False] * number + [True] * (len(head) - number)
    return replace(found, clock="wall", head=head, undisturbed=flags)


@rows_in_one_case(
    ("slowdown", "rounds_disturbed", "verdict", "says"),
    [
        (1.0, 9, "same", "in 6 fresh rounds: within the threshold"),
        (1.0, 10, "undecided", "other work disturbed 10 of 15 fresh rounds: measure on a quieter machine"),
        (1.3, 10, "undecided", "other work disturbed 10 of 15 fresh rounds"),
        (1.3, 0, "slower", "in 15 fresh rounds"),
        (1.3, 9, "undecided", "and other work disturbed 9 of 15 fresh rounds: the rounds do not agree"),
    ],
)
def test_disturbed_rounds_do_not_count_and_what_they_leave_unproven_is_undecided(
    slowdown, rounds_disturbed, verdict, says
):
    row = verdicts(times(slowdown, rounds=6), disturbed(times(slowdown, noise=0.001), rounds_disturbed))
    assert row.verdict == verdict
    assert says in row.says
    if rounds_disturbed < 14:
        assert row.ratio == pytest.approx(slowdown, rel=0.05)


def test_too_many_disturbed_rounds_need_a_second_look():
    assert not needs_second_look(disturbed(times(rounds=6), 3), 0.05)
    assert needs_second_look(disturbed(times(rounds=6), 4), 0.05)


@rows_in_one_case(
    ("low", "high", "code", "verdict"),
    [(1.6, 1.8, 0, "same"), (1.2, 1.4, 1, "slower"), (1.4, 1.6, 2, "undecided")],
)
def test_a_run_of_the_guide_s_gate_ends_with_its_verdict(low, high, code, verdict, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        guide, "measure", lambda slower: asked.append(slower) or Speedup(Ratio(1.5, low, high, 0.5, 16), 1.5)
    )
    out = tmp_path / "guide.json"
    assert guide.main([str(out), "--slower"]) == code
    found = read_verdict(out)
    assert (found.rows[0].verdict, found.passed, asked) == (verdict, code == 0, [True])
    assert found.rows[0].says.startswith("the candidate is 1.50 times as fast")


# Rounds


class Fake:
    """A worker without a process: a call of a workload takes as long as ``seconds`` says."""

    def __init__(self, seconds, errors=(), clocks=None, disturbed=()):
        self.seconds, self.errors, self.requests, self.closed = seconds, set(errors), [], False
        self.disturbed = iter(disturbed)  # of the turns, while there are any
        self.clocks = clocks or dict.fromkeys(seconds, "cpu")

    def hello(self):
        return {"workloads": self.clocks}

    def send(self, **request):
        self.requests.append(request)

    def answer(self):
        request = self.requests[-1]
        name = request.get("set_up") or request["time"]
        if name in self.errors:
            return {"error": "AttributeError: new"}
        return {"seconds": self.seconds[name], "disturbed": "time" in request and next(self.disturbed, False)}

    def close(self):
        self.closed = True


def start_with(head, base=None, head_errors=(), base_errors=(), log=None):
    base = base or dict.fromkeys(head, 0.001)

    def start(number):
        sides = [Fake(base, base_errors), Fake(head, head_errors), Fake(base, base_errors)]
        if log is not None:
            log.append((number, sides))
        return sides

    return start


OPTIONS = gate.Options("main", 0.05, Path("unused"))


def compared(start, options=OPTIONS):
    return {row.name: row for row in gate.compare(start, options, lambda what: None)}


@rows_in_one_case(
    ("clock", "seconds", "turns", "calls", "undisturbed"),
    [
        ("wall", 0.001, [True, True, False], [20, 2, 2, 20], True),  # repeated with fewer calls until it is not
        ("wall", 0.001, [True] * 99, [20, *[2] * 12] * 2, False),
        ("wall", 0.5, [True, False], [1, 1], False),
        ("cpu", 0.001, [True, True], [20, 20], True),  # another load adds little to seconds of the processor
    ],
)
def test_a_disturbed_turn_by_the_clock_on_the_wall_is_repeated(
    clock, seconds, turns, calls, undisturbed, monkeypatch
):
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: None)
    sides = [Fake({"w": seconds}, clocks={"w": clock}, disturbed=own) for own in ((), turns, ())]
    found, _ = rounds.measure(lambda number: sides, range(1), only=lambda name: True)
    assert [request["calls"] for request in sides[1].requests if "time" in request] == calls
    assert found["w"].undisturbed == [undisturbed]


def test_a_workload_that_other_work_always_disturbs_is_undecided_after_a_few_more_rounds(monkeypatch):
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: None)
    log = []

    def start(number):
        log.append(number)
        clocks = {"a, waiting": "wall", "b": "cpu"}
        return [Fake({"a, waiting": 0.001, "b": 0.001}, clocks=clocks, disturbed=[True] * 999) for _ in range(3)]

    found = compared(start)
    assert {name: row.verdict for name, row in found.items()} == {"a, waiting": "undecided", "b": "same"}
    assert len(log) == gate.FIRST_ROUNDS + gate.FEWEST_AGAIN


@rows_in_one_case(
    ("errors", "workloads", "says"),
    [
        ({"base_errors": ["a"]}, "*", "base can run no workload"),
        (
            {"base_errors": ["a"], "head_errors": ["a"]},
            "*",
            "neither .* can run the workload 'a': AttributeError: new",
        ),
        ({}, "x", "no workload is called 'x'"),
    ],
)
def test_where_no_workload_can_be_compared_there_is_no_verdict(errors, workloads, says):
    log = []
    with pytest.raises(GateError, match=says):
        compared(start_with({"a": 0.001}, **errors, log=log), replace(OPTIONS, workloads=workloads))
    assert all(side.closed for _, sides in log for side in sides)


def test_what_looks_slower_is_measured_again_in_fresh_processes_alone():
    log = []
    found = compared(start_with({"a": 0.001, "b": 0.0012}, log=log))
    assert (found["a"].verdict, found["b"].verdict) == ("same", "slower")
    assert len(log) == gate.FIRST_ROUNDS + gate.AGAIN_ROUNDS
    again = {
        request.get("set_up") for _, sides in log[gate.FIRST_ROUNDS :] for side in sides for request in side.requests
    }
    assert again == {"b", None}
    assert all(side.closed for _, sides in log for side in sides)
    log.clear()
    assert compared(start_with({"a": 0.001}, log=log))["a"].verdict == "same"
    assert len(log) == gate.FIRST_ROUNDS  # nothing looks different


def test_the_second_look_ends_for_each_as_soon_as_it_is_within_the_threshold():
    """Both looked slower at first. One of them still does in every round, the other one in none."""
    log = []

    def start(number):
        slow = {"a": 0.002 if number < gate.FIRST_ROUNDS else 0.001, "b": 0.002}
        return start_with(slow, log=log)(number)

    found = compared(start)
    assert (found["a"].verdict, found["b"].verdict) == ("same", "slower")
    assert f"in {gate.FEWEST_AGAIN} fresh rounds: within the threshold" in found["a"].says
    assert f"in {gate.AGAIN_ROUNDS} fresh rounds" in found["b"].says
    with_a_alone = replace(OPTIONS, workloads="a")
    log.clear()
    assert compared(start, with_a_alone)["a"].verdict == "same"
    assert len(log) == gate.FIRST_ROUNDS + gate.FEWEST_AGAIN  # no process is started for nothing


def test_what_base_lacks_is_new_and_what_head_lacks_fails():
    both = {"a": 0.001, "b": 0.001}
    found = compared(start_with(both, base_errors=["a"]))
    assert (found["a"].verdict, found["b"].verdict) == ("new", "same")
    sides = [Fake(both), Fake(both, errors=["a"], clocks={"b": "cpu"}), Fake(both)]  # head does not name it
    for start in (start_with(both, head_errors=["a"]), lambda number: sides):
        found = compared(start)
        assert (found["a"].verdict, found["b"].verdict) == ("missing", "same")
        assert "AttributeError" in found["a"].says
        assert not Verdict.of_rows("latency", "b", "h", {}, list(found.values())).passed


def test_sides_take_turns_there_and_back_and_change_who_begins():
    order = []

    class Told(Fake):
        def __init__(self, name):
            super().__init__({"w": 0.001})
            self.name = name

        def send(self, **request):
            if "time" in request:
                order.append(self.name)
            super().send(**request)

    rounds.measure(lambda number: [Told("b"), Told("h"), Told("a")], range(3), only=lambda name: True)
    assert "".join(order) == "bhaahb" + "habbah" + "abhhba"


def test_short_calls_fill_a_turn_and_long_ones_take_part_in_each_second_round():
    log = []
    head = {"short": 1e-4, "long": 0.5}
    found, _ = rounds.measure(start_with(head, head, log=log), range(6), only=lambda name: True, long_every=2)
    assert (len(found["short"].head), len(found["long"].head)) == (6, 3)
    calls = {request["time"]: request["calls"] for request in log[0][1][0].requests if "time" in request}
    assert calls == {"short": 200, "long": 1}
    sides = [Fake({"w": seconds}) for seconds in (0.001, 0.002, 0.004)]
    rounds.measure(lambda number: sides, range(1), only=lambda name: True)
    asked = [{request["calls"] for request in side.requests if "time" in request} for side in sides]
    assert asked == [{20}] * 3  # as many as fill a turn of base, on all sides
    log.clear()
    rounds.measure(start_with(head, head, log=log), range(1), only=lambda name: True, turns=3)
    times = Counter(request["time"] for request in log[0][1][0].requests if "time" in request)
    assert times == {"short": 6, "long": 2}  # there and back


def test_a_time_is_the_mean_of_the_turns_of_its_side_whoever_begins():
    for turns in (1, 3):
        found, _ = rounds.measure(start_with({"a": 0.5}), range(3), only=lambda name: True, turns=turns)
        assert (found["a"].base, found["a"].head, found["a"].again) == ([0.001] * 3, [0.5] * 3, [0.001] * 3)


def stub(tmp_path, code):
    """Return a harness whose worker runs this code."""
    package = tmp_path / "harness" / "benchmarks" / "latency"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").write_text("")
    (package / "worker.py").write_text(code)
    return tmp_path / "harness"


@pytest.fixture
def start_worker(tmp_path):
    """Return what starts a worker that runs other code, and ends it."""
    with ExitStack() as stack:

        def start(code):
            harness = stub(tmp_path, code)
            side = rounds.Worker(Environment(HEAD, Path(sys.executable), True), harness, tmp_path / "round", 0)
            stack.callback(side.close)
            return side

        yield start


def test_a_worker_that_dies_is_an_error_that_says_what_it_said(start_worker):
    side = start_worker("import sys\nprint('{}', flush=True)\nsys.stdin.readline()\nsys.exit('out of luck')")
    assert side._read("start") == {}
    side.send(set_up="a workload")
    said = r"a worker of aaaaaaaaaaaa \(HEAD\) ended \(1\) at a workload: out of luck"
    with pytest.raises(GateError, match=said):
        side.answer()


def test_a_worker_that_imports_another_lowmem_is_refused(start_worker):
    side = start_worker('print(\'{"lowmem": "/elsewhere/lowmem/__init__.py"}\', flush=True)\ninput()')
    with pytest.raises(GateError, match="imports lowmem from .*elsewhere"):
        side.hello()


def test_directories_and_variables_of_the_sides_are_equally_long(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(rounds, "Worker", lambda *arguments: made.append(arguments))
    one, other = (Environment(commit, tmp_path, True) for commit in (BASE, HEAD))
    rounds.starter(one, other, tmp_path / "harness", tmp_path)(7)
    assert [environment.commit for environment, *_ in made] == [BASE, HEAD, BASE]
    assert len({len(str(directory)) for _, _, directory, _ in made}) == 1
    assert {seed for *_, seed in made} == {7}


def test_a_compiled_kernel_is_not_compared_with_plain_torch():
    for base, head, without in ((True, False, HEAD), (False, True, BASE), (True, True, None), (False, False, None)):
        sides = Environment(BASE, Path(), base), Environment(HEAD, Path(), head)
        said = "" if without is None else f"the C kernel of {re.escape(str(without))} does not compile"
        with pytest.raises(GateError, match=said) if said else nullcontext():
            gate.check_kernels(*sides)


def test_a_gate_builds_both_sides_and_gives_its_verdicts_where_scratch_cannot_be_removed(monkeypatch, tmp_path):
    """The verdicts of both gates have the sides, their notes, and the kernel of head; latency is the first."""
    kernels = {"base": "avx2", "head": "avx512"}
    scratches, done = [], []

    def build_wheel(root, commit, cache, scratch):
        done.append(f"wheel of {commit}")
        (scratch / "held open").touch()
        scratches.append(scratch)
        return tmp_path / commit.sha

    def install(wheel, commit, directory):
        assert (wheel.name, directory.parent) == (commit.sha, scratches[0])
        return Environment(commit, tmp_path / directory.name, has_kernel=False)

    def unlink(path, *arguments, of=os.unlink, **how):
        if Path(os.fsdecode(path)).name == "held open":  # as Windows refuses a library that a process has loaded
            raise OSError(errno.EBUSY, "held open", path)
        of(path, *arguments, **how)

    def count(base, head, harness, counts):
        assert (base.commit, head.commit, harness.name, done[-1]) == (BASE, HEAD, "harness", f"wheel of {HEAD}")
        return [Row("i", "instructions", 1, 1, 1.0)], ["counted twice"]

    slower = Row("w", "cpu seconds", 1.0, 2.0, 2.0, 1.9, 2.1, "slower")
    monkeypatch.setattr(builds, "resolve", lambda root, reference: (BASE, HEAD, True))
    monkeypatch.setattr(builds, "build_wheel", build_wheel)
    monkeypatch.setattr(builds, "install", install)
    monkeypatch.setattr(builds, "backend", lambda environment: kernels[environment.python.name])
    monkeypatch.setattr(instructions, "compare", count)
    monkeypatch.setattr(gate, "compare", lambda start, options, progress: [slower])
    monkeypatch.setattr(gate.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "unlink", unlink)
    latency, counts = gate.run(replace(OPTIONS, cache=tmp_path), lambda what: None, ROOT)
    assert done == [f"wheel of {BASE}", f"wheel of {HEAD}"]
    assert [(found.gate, found.passed) for found in (latency, counts)] == [("latency", False), ("instructions", True)]
    for found in (latency, counts):
        assert (found.base, found.head, found.machine["kernel"]) == (str(BASE), str(HEAD), "avx512")
    assert latency.notes == [
        "The working tree differs from HEAD: what is not committed is not measured.",
        "Neither side has a compiled kernel: plain torch was timed.",
        "Base runs the kernel avx2 here, and head avx512.",
    ]
    assert counts.notes == [*latency.notes, "counted twice"]
    monkeypatch.setattr(builds, "resolve", lambda root, reference: (HEAD, HEAD, False))
    with_kernel = Environment(HEAD, tmp_path / "head", has_kernel=True)
    monkeypatch.setattr(builds, "install", lambda wheel, commit, directory: with_kernel)
    (latency,) = gate.run(replace(OPTIONS, cache=tmp_path, gates=("latency",)), lambda what: None, ROOT)
    assert latency.notes == ["Base and head are the same commit: nothing changed between them."]


# The worker and its workloads


def test_of_bursts_which_are_means_of_their_calls_the_quickest_counts():
    for durations, calls, least in (([9.0, 1.0, 2.0, 50.0, 3.0], 5, 1.0), ([1.0, 3.0] * 5, 10, 2.0)):
        now, left = [0.0], iter(durations)

        def run(now=now, left=left):
            now[0] += next(left)

        assert worker.least_seconds(run, calls, lambda now=now: now[0]) == least


def test_a_worker_sets_up_times_and_answers_with_errors(monkeypatch):
    calls = []

    def fails():
        raise AttributeError("not in this version")

    known = {
        "good": workloads.Workload(lambda: lambda: calls.append("good")),
        "bad": workloads.Workload(fails, clock="wall"),
    }
    monkeypatch.setattr(workloads, "workloads", lambda: known)
    asked = [{"set_up": "good"}, {"time": "good", "calls": 10}, {"set_up": "bad"}, {"time": "good", "calls": 1}]
    with on_threads(2):
        said = list(worker.serve(io.StringIO("\n".join(map(json.dumps, asked)))))
    assert said[0]["workloads"] == {"good": "cpu", "bad": "wall"}
    assert said[0]["lowmem"] == lowmem.__file__
    assert [sorted(answer) for answer in said[1:4]] == [["seconds"], ["seconds"], ["error"]]
    assert said[3]["error"] == "AttributeError: not in this version"
    assert len(calls) >= 11


def test_workloads_are_of_each_variant_batch_and_format_and_what_waits_is_timed_by_the_clock():
    found = workloads.workloads()
    assert {f"inference {v} batch {b}" for v in lowmem.VARIANTS for b in BATCHES} <= found.keys()
    assert {f"training step {v}" for v in lowmem.VARIANTS} <= found.keys()
    assert {f"quantize {form}" for form in lowmem.FORMATS} <= found.keys()
    assert {"save", "load", "save, waiting", "load, waiting"} <= found.keys()
    for name, workload in found.items():
        on_all = name.endswith("all cores")
        assert workload.threads == (workloads.CORES if on_all else 1), name
        assert workload.clock == ("wall" if on_all or name.endswith(", waiting") else "cpu"), name


def test_a_small_layer_and_a_file_are_set_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = workloads.workloads()
    assert known["small layer qlora_nf4"].set_up()().shape == (1, workloads.SMALL)
    monkeypatch.setattr(workloads, "dense_model", lambda: lowmem.bignet.nn.Linear(8, 8))
    workloads._saved.cache_clear()
    try:
        known["save"].set_up()()
        assert isinstance(known["load"].set_up()(), lowmem.Linear4Bit)
        assert len(list(tmp_path.glob("*/again"))) == 1
    finally:
        workloads._saved.cache_clear()


def test_the_harness_has_what_workers_import_and_no_lowmem(tmp_path):
    rounds.copy_harness(ROOT, tmp_path)
    assert (tmp_path / "benchmarks" / "latency" / "worker.py").is_file()
    assert not list(tmp_path.glob("lowmem*"))


# Instructions


def test_each_product_is_counted_with_its_own_technique_and_batch(monkeypatch):
    asked = []
    product = counted.product
    monkeypatch.setattr(counted, "product", lambda *a, **k: asked.append((*a, *k.values())))
    names = [name for name in counted.counted() if name.startswith("portable") and "quantize" not in name]
    for name in names:
        counted.counted()[name]()
    wanted = {"nf4": lowmem.FourBit("nf4"), "int4": lowmem.FourBit("int4", block_size=16), "half": lowmem.Half()}
    assert dict(zip(names, asked, strict=True)) == {
        **{f"portable kernel, {name} batch {b}": (t, b) for name, t in wanted.items() for b in (1, 8, 32)},
        **{f"portable kernel, {name} gradient": (t, 8, True) for name, t in wanted.items()},
    }
    assert product(lowmem.Half(), 3)().shape == (3, counted.ROWS)
    (gradient,) = product(lowmem.Half(), 3, gradient=True)()
    assert gradient.shape == (3, counted.COLUMNS)


def test_warm_calls_alone_are_counted_and_what_fails_is_named_and_left_out(monkeypatch, capsys):
    log = []

    def fails():
        raise AttributeError("not in this version")

    found = {
        "layer's Python, a": lambda: log.append("set up") or (lambda: log.append("call")),
        "bad": fails,
        "portable kernel, b": lambda: lambda: log.append("product"),
    }
    marks = SimpleNamespace(
        **{name: lambda *said, name=name: log.append((name, *said)) for name in ("begin", "zero", "dump")}
    )
    monkeypatch.setattr(counted, "counted", lambda: found)
    monkeypatch.setattr(counted.ctypes, "CDLL", lambda path: marks)
    monkeypatch.setattr(counted, "gc", SimpleNamespace(disable=lambda: None))
    monkeypatch.setattr(sys, "argv", ["counted", "marks.so"])
    with on_threads(2):
        counted.main()
    assert log == [
        *[("begin",), "set up", *["call"] * (1 + counted.WARM), ("zero",), *["call"] * counted.CALLS],
        *[("dump", b"layer's Python, a"), *["product"] * 2, ("zero",), *["product"] * 2],
        ("dump", b"portable kernel, b"),
    ]
    out, err = capsys.readouterr()
    assert out.splitlines() == list(found)
    assert err == "bad: not in this version\n"


def test_two_percent_more_instructions_fail_and_fewer_do_not():
    base = {"same": 1000, "grew": 1000, "shrank": 1000, "gone": 5, "lost": 5, "come": None}
    head = {"same": 1020, "grew": 1021, "shrank": 900, "fresh": 7, "lost": None, "come": 5}
    found = {row.name: row.verdict for row in instructions.judge(base, head)}
    same = {name: name for name in ("same", "grew", "shrank")}
    assert found == same | {"gone": "missing", "fresh": "new", "lost": "missing", "come": "new"}


def test_counting_nothing_or_a_workload_on_neither_side_is_no_verdict():
    broken = {"same": 1000, "broken": None}
    with pytest.raises(GateError, match="neither base nor head can run 'broken'"):
        instructions.judge(broken, broken)
    with pytest.raises(GateError, match="callgrind counted nothing"):
        instructions.judge({}, {})


def test_counts_are_read_by_the_name_of_their_dump(tmp_path):
    (tmp_path / "callgrind.out.1").write_text("# x\ndesc: Trigger: Client Request: a, b\nsummary: 12\ntotals: 12\n")
    (tmp_path / "callgrind.out.2").write_text("desc: Trigger: Program termination\ntotals: 99\n")
    assert instructions.read_counts(tmp_path) == {"a, b": 12}


def test_without_valgrind_the_gate_says_that_it_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = Environment(HEAD, Path(sys.executable), True)
    rows, notes = instructions.compare(environment, environment, tmp_path, tmp_path / "counts")
    assert [row.verdict for row in rows] == ["skipped"]
    assert "valgrind is not installed" in notes[0]
    verdict = Verdict.of_rows("instructions", "b", "h", {}, rows, notes)
    assert verdict.passed
    assert "SKIPPED: valgrind is not installed" in show.headline(verdict)


# What is shown


ROWS = [
    Row("w|1", "cpu seconds", 1.0, 1.1, 1.1, 1.08, 1.12, "slower", "+10.0% at first"),
    Row("w2", "cpu seconds", 1.0, 1.01, 1.01, 0.99, 1.02),
    Row("w3", "cpu seconds", 1.0, 0.5, 0.5, 0.4, 0.6, "faster", "-50.0%"),
    Row("w4", "", verdict="new", says="base cannot run it"),
]
VERDICT = Verdict.of_rows("latency", "bbb (main)", "aaa (HEAD)", {"cores": 2}, ROWS, ["a note"])


def printed(verdict, **how):
    console = Console(file=io.StringIO(), width=120)
    show.print_verdict(verdict, console, **how)
    return console.file.getvalue()


def test_the_table_shows_what_differs_failures_first_and_the_verdict_last():
    text = printed(VERDICT)
    lines = text.splitlines()
    assert lines[-1] == "latency: FAILED: 1 slower, 1 faster, 1 new, 1 same"
    assert text.index("SLOWER") < text.index("faster") < text.index("new")
    assert "w2" not in text
    assert "1 the same, from +1.0% to +1.0%" in text
    assert "a note" in text
    assert "w2" in printed(VERDICT, everything=True)
    slow = [Row(str(ratio), "", ratio=ratio, verdict="slower") for ratio in (1.1, 1.5, 1.2)]
    assert [row.ratio for row in show.in_order(slow)] == [1.5, 1.2, 1.1]


def test_markdown_folds_what_stayed_the_same_and_escapes_names():
    text = show.markdown(VERDICT)
    assert text.startswith("### latency: FAILED")
    assert "| w\\|1 | 1.100 | 1.080 to 1.120 | SLOWER | +10.0% at first |" in text
    assert text.index("<details>") < text.index("| w2 ")


def test_the_verdict_is_written_as_json_and_after_what_earlier_steps_wrote(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("earlier\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    show.write([VERDICT], tmp_path / "new" / "out")
    found = read_verdict(tmp_path / "new" / "out" / "latency.json")
    assert (found.gate, found.passed, found.rows) == ("latency", False, tuple(ROWS))
    assert summary.read_text() == "earlier\n" + show.markdown(VERDICT)


def test_a_verdict_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(GateError, match="cannot be written"):
        show.write([VERDICT], tmp_path / "file" / "out")


# Commits and builds


def in_git(directory, *arguments):
    who = "user.name=n user.email=e@localhost commit.gpgsign=false init.defaultBranch=m"
    options = [option for setting in who.split() for option in ("-c", setting)]
    command = ["git", "-C", str(directory), *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(root, message):
    in_git(root, "add", "-A")
    in_git(root, "commit", "-qm", message)


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits, the first of them tagged ``old``."""
    root = tmp_path / "repository"
    root.mkdir()
    in_git(root, "init", "-q")
    for content in ("one", "two"):
        (root / "setup.py").write_text(content)
        commit(root, content)
    in_git(root, "tag", "old", "HEAD~1")
    return root


def test_the_base_is_the_merge_base_with_the_reference(repository):
    in_git(repository, "checkout", "-qb", "side", "old")
    (repository / "other").write_text("")
    commit(repository, "side")
    base, head, dirty = builds.resolve(repository, "m")
    assert base.sha == in_git(repository, "rev-parse", "old")
    assert head.sha == in_git(repository, "rev-parse", "HEAD")
    assert not dirty
    (repository / "other").write_text("changed")
    assert builds.resolve(repository, "m")[2]


@pytest.mark.parametrize("reference", ["nowhere", "", "--all", "old:setup.py", "x" * 500, "a b\nc"])
def test_a_reference_that_is_no_commit_is_refused(repository, reference):
    with pytest.raises(GateError) as refused:
        builds.resolve(repository, reference)
    named = errors.show(reference)
    assert str(refused.value) == f"--base {named} is no commit of this repository: fetch it, or name another"


def test_what_git_cannot_give_is_refused(repository, tmp_path, monkeypatch):
    with pytest.raises(GateError, match="is no git repository with a commit: git rev-parse: .*git"):
        builds.resolve(tmp_path, "main")
    in_git(repository, "checkout", "-q", "--orphan", "alone")
    in_git(repository, "commit", "-qm", "alone")
    with pytest.raises(GateError, match="no common ancestor"):
        builds.resolve(repository, "m")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GateError, match="git is not installed"):
        builds.resolve(repository, "m")


def test_a_commit_is_exported_as_it_was_committed(repository, tmp_path):
    (repository / "setup.py").write_text("not committed")
    builds.export(repository, builds.resolve(repository, "old")[0], tmp_path / "tree")
    assert (tmp_path / "tree" / "setup.py").read_text() == "one"
    (repository / "link").symlink_to("/outside")
    commit(repository, "link")
    if hasattr(tarfile, "data_filter"):
        with pytest.raises(GateError, match=r"\(HEAD\) cannot be exported: .*link"):
            builds.export(repository, builds.resolve(repository, "old")[1], tmp_path / "of the link")


def test_a_base_that_does_not_build_is_an_error_and_nothing_is_cached(repository, tmp_path):
    base, _, _ = builds.resolve(repository, "old")
    with pytest.raises(GateError) as refused:
        builds.build_wheel(repository, base, tmp_path / "cache", tmp_path / "scratch")
    log = tmp_path / "cache" / f"build-{base.sha[:12]}.log"
    assert str(refused.value) == f"{base.sha[:12]} (merge base of HEAD and old) does not build: see {log}"
    assert log.stat().st_size
    assert not list((tmp_path / "cache").rglob("*.whl"))


@pytest.mark.gates
def test_a_wheel_is_built_in_the_cache_which_may_lie_on_another_file_system_than_scratch(
    repository, tmp_path, monkeypatch
):
    asked = []
    cache = tmp_path / "of" / "all" / "cache"
    _, head, _ = builds.resolve(repository, "old")
    for number, (code, content) in enumerate([(1, "half"), (0, None), (0, "built"), (0, "again")]):

        def run(command, code=code, content=content, **how):
            if "wheel" not in command:
                return subprocess.run(command, **how)
            asked.append(Path(command[command.index("-w") + 1]))
            if content:
                (asked[-1] / "lowmem-0-py3-none-any.whl").write_text(content)
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(builds, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
        scratch = tmp_path / f"scratch {number}"
        with pytest.raises(GateError, match="does not build") if code or content is None else nullcontext():
            wheel = builds.build_wheel(repository, head, cache, scratch)
            assert wheel.read_text() == content
            assert not any(scratch.iterdir())
            wheel.unlink()  # its folder stays
        assert asked[number].is_relative_to(cache)
        assert not asked[number].exists()


@pytest.mark.gates
def test_a_wheel_is_taken_from_the_cache_until_something_in_it_changes(repository, tmp_path, monkeypatch):
    _, head, _ = builds.resolve(repository, "old")
    cached = tmp_path / "wheels" / builds._key(repository, head, builds.PACKAGED) / "lowmem-0-py3-none-any.whl"
    cached.parent.mkdir(parents=True)
    cached.write_text("")
    assert builds.build_wheel(repository, head, tmp_path, tmp_path / "scratch") == cached
    (repository / "notes").write_text("no part of a wheel")
    commit(repository, "notes")
    _, head, _ = builds.resolve(repository, "old")
    assert builds.build_wheel(repository, head, tmp_path, tmp_path / "scratch") == cached
    (repository / "setup.py").write_text("three")
    in_git(repository, "commit", "-qam", "three")
    _, head, _ = builds.resolve(repository, "old")
    keys = {cached.parent.name, builds._key(repository, head, builds.PACKAGED)}
    for command in (["/no/such/compiler"], [sys.executable, "-I"]):
        monkeypatch.setattr(builds, "compiler", lambda command=command: command)
        keys.add(builds._key(repository, head, builds.PACKAGED))
    monkeypatch.setenv("CFLAGS", "-O1 and others")
    keys.add(builds._key(repository, head, builds.PACKAGED))
    assert len(keys) == 5


def test_only_the_compiled_kernel_is_kept_of_an_earlier_build_and_is_newer_than_its_sources(tmp_path):
    kept, stale = tmp_path / "lib" / "_native.abi3.so", tmp_path / "lib" / "removed.py"
    kept.parent.mkdir()
    for path in (kept, stale):
        path.write_text("")
    os.utime(kept, (0, 0))
    exported = time.time() - 1  # clocks of file systems are coarse
    builds._keep_kernel_alone(tmp_path)
    assert kept.stat().st_mtime > exported
    assert not stale.exists()


@pytest.mark.parametrize(
    ("files", "has_kernel"), [(["_native.pyi", "_native.abi3.so"], True), (["_native.pyi", "ops.py"], False)]
)
def test_a_stub_in_a_wheel_is_no_kernel(files, has_kernel, tmp_path, monkeypatch):
    wheel = tmp_path / "lowmem.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in files:
            archive.writestr(f"lowmem/kernels/{name}", "")
    monkeypatch.setattr(builds, "_run", lambda command, otherwise: f"{tmp_path}\n")  # no environment is made
    assert builds.install(wheel, HEAD, tmp_path / "environment").has_kernel is has_kernel
    assert (tmp_path / "dependencies.pth").read_text().splitlines() == builds.dependencies()


def test_in_a_hook_git_takes_the_repository_that_is_asked_for(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "of the hook"))
    assert builds.git(repository, "tag") == "old"


def test_what_an_environment_needs_is_found_or_named(tmp_path, monkeypatch):
    for place in builds.dependencies():
        assert Path(place).is_dir()
    (tmp_path / "without_a_file").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("no_such_package", "without_a_file"):
        monkeypatch.setattr(builds, "VISIBLE", ("torch", name))
        with pytest.raises(GateError, match=f"^{name} is not installed beside .*: both sides need it$"):
            builds.dependencies()
    for code, said in (
        ("print('one'); raise SystemExit('two\\nthree')", "three"),
        ("print('four\\nfive'); raise SystemExit(7)", "five"),
        ("raise SystemExit(7)", "exit code 7"),
    ):
        with pytest.raises(GateError, match=f"^no wheel: {said}$"):
            builds._run([sys.executable, "-I", "-S", "-c", code], "no wheel")


# The command


def said(capsys):
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert len(err) <= 300
    assert "Traceback" not in err
    assert not out
    return err


def test_a_reference_that_does_not_exist_is_one_line_and_exit_code_2(capsys):
    assert main(["--base", "no/such" * 100]) == 2
    line = said(capsys)
    assert "is no commit of this repository" in line or "is no git repository" in line  # as an unpacked sdist


@rows_in_one_case(
    ("arguments", "says"),
    [
        *(
            (["--base", "HEAD", f"--threshold={threshold}"], "must be a percentage")
            for threshold in ("0", "-5", "nan", "inf", "five", "", "1001", "5%%")
        ),
        ([], "--base"),
    ],
)
def test_bad_arguments_are_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert says in said(capsys)


def test_a_threshold_is_a_percentage():
    assert parse(["--base", "m", "--threshold", "7.5%"])[0].threshold == pytest.approx(0.075)
    assert parse(["--base", "m"])[0].threshold == 0.05


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_built(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--base", "HEAD", "--output", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in said(capsys)


UNDECIDED = Row("w5, waiting", "wall seconds", 1.0, 1.2, 1.2, 1.0, 1.3, "undecided", "other work disturbed 9 of 15")


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        (ROWS, 1, "FAILED: 1 slower"),
        ([*ROWS, UNDECIDED], 1, "FAILED: 1 slower, 1 undecided"),
        (ROWS[1:], 0, "passed: 1 faster"),
        ([*ROWS[1:], UNDECIDED], 2, "UNDECIDED: 1 undecided, 1 faster"),
    ],
)
def test_the_exit_code_says_whether_it_passed(rows, code, says, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    verdict = Verdict.of_rows("latency", "bbb (main)", "aaa (HEAD)", {"cores": 2}, rows)
    other = Verdict.of_rows("instructions", "bbb (main)", "aaa (HEAD)", {"cores": 2}, ROWS[1:2])
    monkeypatch.setattr(gate, "run", lambda options, progress: [verdict, other])
    assert main(["--base", "HEAD", "--output", str(tmp_path)]) == code
    out = capsys.readouterr().out
    assert f"latency: {says}" in out
    assert "instructions: passed" in out
    assert json.loads((tmp_path / "latency.json").read_text())["passed"] is not bool(code)


def test_an_interrupted_gate_gives_no_verdict(monkeypatch, capsys):
    def interrupted(options, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "run", interrupted)
    assert main(["--base", "HEAD"]) == 2
    assert "interrupted" in said(capsys)


def test_the_command_names_the_extra_that_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "statsmodels.stats.multitest", None)
    for name in ("__main__", "gate", "verdict", "rounds"):
        monkeypatch.delitem(sys.modules, f"benchmarks.latency.{name}", raising=False)
    monkeypatch.delattr("benchmarks.latency.gate", raising=False)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("benchmarks.latency.__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "latency gate: it needs statsmodels: pip install '.[gate]'\n"


# The proof


@rows_in_one_case("case", [case for case in proof.CASES if case.file])
def test_each_fault_can_be_planted(case):
    text = (ROOT / case.file).read_text()
    assert text.count(case.found) == 1
    assert case.planted not in text
    if case.file.endswith(".py"):
        compile(text.replace(case.found, case.planted), case.file, "exec")


def run_of(case, *gates):
    return {"case": case.name, "alarms": {gate: ["a row"] for gate in gates}, "seconds": 60}


def test_the_proof_holds_when_all_runs_are_there_and_right():
    calm, fault = proof.CASES[0], proof.CASES[2]
    assert proof.holds(calm, [run_of(calm)] * 10)
    assert not proof.holds(calm, [run_of(calm)] * 9)
    assert not proof.holds(calm, [run_of(calm)] * 9 + [run_of(calm, "latency")])
    assert proof.holds(fault, [run_of(fault, "latency")] * 5)
    assert not proof.holds(fault, [run_of(fault, "latency")] * 4 + [run_of(fault)])
    undecided = run_of(calm) | {"undecided": {"latency": ["a row"]}}
    assert not proof.holds(calm, [run_of(calm)] * 9 + [undecided])
    some = replace(calm, decided=3)
    assert proof.holds(some, [run_of(calm)] * 3 + [undecided] * 7)
    assert not proof.holds(some, [run_of(calm)] * 2 + [undecided] * 8)
    assert not proof.holds(some, [run_of(calm)] * 3 + [undecided] * 7 + [run_of(calm, "latency")])
    assert "| 10 | 0 | 0 of 10 | 7 |" in proof.table([run_of(calm)] * 3 + [undecided] * 7)
    assert proof.outcome(undecided) == "a row, 60 s"


@pytest.fixture
def run_proof(tmp_path, monkeypatch):
    """Return what runs a case of the proof, with exit codes and verdicts of its gates that are given."""
    cores = []
    monkeypatch.setattr(proof, "busy_cores", lambda number: cores.append(number) or nullcontext())
    monkeypatch.setattr(proof, "git", lambda *_: "0123abc")
    (tmp_path / "clone").mkdir()

    def run_proof(case, results):
        beside = threading.Barrier(len(case.gates), timeout=30)

        def run(command, **options):
            beside.wait()  # the gates of a case run beside each other
            target = next(Path(part.removeprefix("--lowmem-json=")) for part in command if part.endswith(".json"))
            code, verdict = results[target.stem]
            if verdict is not None:
                write_verdict(target, verdict)
            return subprocess.CompletedProcess(command, code, "", "first line\nno baseline\n")

        monkeypatch.setattr(proof.subprocess, "run", run)
        return proof.run_case(case, tmp_path / "clone", tmp_path, "*")

    run_proof.cores = cores
    return run_proof


def test_gates_of_memory_run_beside_each_other_and_their_alarms_are_kept(run_proof):
    rows = [Row("one", "bytes", verdict="grew", says="one byte more"), Row("other", "bytes")]
    found = {
        gate: (int(not passed), Verdict(gate, passed, "b", "h", {}, rows))
        for gate, passed in (("memory", True), ("resident", False))
    }
    case = proof.Case("two gates", gates=proof.OF_MEMORY)
    run = run_proof(case, found)
    assert run["alarms"] == {"resident": ["one bytes: one byte more"]}
    assert (run["case"], run["beside"], run["commit"]) == ("two gates", "nothing", "0123abc")
    assert run_proof(replace(case, busy=1), found)["beside"] == "a loop"
    assert run_proof.cores == [0, 1]


def test_an_undecided_gate_is_neither_an_alarm_nor_an_error_of_the_proof_and_one_without_a_verdict_ends_it(run_proof):
    case = proof.Case("the guide's", gates=("guide",))
    run = run_proof(case, {"guide": (2, Verdict.of_rows("latency", "b", "h", {}, [UNDECIDED]))})
    assert run["alarms"] == {}
    assert run["undecided"] == {"latency": ["w5, waiting wall seconds: other work disturbed 9 of 15"]}
    with pytest.raises(proof.GateError, match="^two gates: the memory gate ended with 2: no baseline$"):
        run_proof(proof.Case("two gates", gates=("memory",)), {"memory": (2, None)})


def test_the_proof_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    results = tmp_path / "proof.json"
    calm = proof.CASES[0]
    proof.write_results(results, [run_of(calm)] * 8)
    ran = []

    monkeypatch.setattr(proof, "planted", lambda case: nullcontext(tmp_path))
    monkeypatch.setattr(proof, "run_case", lambda case, *_: ran.append(case) or run_of(case))
    arguments = ["--results", str(results), "--case", "base against base"]
    assert proof.main(arguments) == 0
    assert len(ran) == 2 + 10
    assert proof.main(arguments) == 0
    assert len(ran) == 12
    out, err = capsys.readouterr()
    assert "base against base" in out
    assert err.splitlines() == [f"{case.name}: {proof.outcome(run_of(case))}" for case in ran]  # as each run ends


@pytest.mark.skipif(os.name != "posix", reason="processes of Windows keep the number of a parent that has ended")
def test_what_keeps_a_core_busy_ends_with_a_proof_that_is_killed():
    killed = (
        "import os, subprocess, sys\n"
        f"busy = subprocess.Popen([sys.executable, '-c', {busy.BUSY!r}, str(os.getpid())], stdout=2)\n"
        "print(busy.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    try:  # until it has closed stderr, which it holds: that it has ended does not show where nobody waits for orphans
        subprocess.run([sys.executable, "-c", killed], capture_output=True, check=False, timeout=60)
    except subprocess.TimeoutExpired as late:
        os.kill(number := int(late.stdout), 9)
        raise AssertionError(f"process {number} goes on") from late


@rows_in_one_case("text", ["", "[]", "{}"])
def test_damaged_results_and_a_page_without_a_place_for_the_table_are_refused_and_kept(text, tmp_path, capsys):
    results, page = tmp_path / "proof.json", tmp_path / "page.md"
    results.write_text(text)
    page.write_text("nothing")
    assert proof.main(["--results", str(results), "--table"]) == 2
    assert "holds no results of a proof" in capsys.readouterr().err
    assert proof.main(["--table", "--results", str(tmp_path / "none.json"), "--page", str(page)]) == 2
    assert "has no marks" in capsys.readouterr().err
    assert (results.read_text(), page.read_text()) == (text, "nothing")


def test_the_geometric_mean_of_two_times_of_base_is_what_head_is_compared_with():
    found = Times("cpu", [1.0, 1.0], [2.0, 2.0], [4.0, 4.0])
    assert (found.of_base(), found.ratio().value) == ([2.0, 2.0], 1.0)
    assert math.isclose(found.floor(), 4.0)


def test_the_table_of_a_proof_takes_the_place_of_the_one_in_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarking.md").read_text())
    found = [run_of(proof.CASES[2], "latency", "instructions")] * 5
    proof.update_page(page, found)
    assert "| 10% in a kernel | 5 | 5 | 5 of 5 | 0 | instructions in 5, latency in 5 | 60 to 60 |" in page.read_text()
    assert proof.table(found) in page.read_text()


def test_the_page_shows_a_proof_that_holds():
    written = (ROOT / "docs" / "benchmarking.md").read_text().partition(proof.BEGIN)[2].partition(proof.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines()[2:]]
    assert [row[0] for row in rows] == [case.name for case in proof.CASES]
    for (_, runs, alarms, wanted, undecided, *_), case in zip(rows, proof.CASES, strict=True):
        assert int(runs) >= case.runs
        assert int(alarms) == (int(runs) - int(undecided) if case.alarm else 0)
        assert wanted == f"{(case.decided or case.runs) if case.alarm else 0} of {case.runs}"
