"""The latency gate: verdicts from times, rounds with fakes for processes, builds, the command, and the proof."""

import io
import json
import math
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lowmem
from benchmarks import busy
from benchmarks.cases import BATCHES
from benchmarks.latency import __main__ as gate
from benchmarks.latency import builds, instructions, proof, rounds, worker, workloads
from benchmarks.latency.builds import GateError, Side
from benchmarks.latency.verdict import ALPHA, Times, judge, looks_different, needs_second_look
from lowmem import errors
from lowmem.testing.verdicts import Row, Verdict, read_verdict, write_verdict
from tests.compiled import on_threads
from tests.selection import rows_in_one_case

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def outside_of_hooks(monkeypatch):
    """Let git take the repositories that tests make, where a hook runs the tests, too, and as no user has set it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def times(slowdown=1.0, rounds=15, noise=0.01, seed=0, clock="cpu", disturbed=0):
    """Return times of a head that is so much slower, with noise in each round."""
    generator = np.random.default_rng(seed)
    base, head, again = np.exp(generator.normal(scale=noise, size=(3, rounds)))
    return Times(clock, list(base), list(head * slowdown), list(again), disturbed)


def verdict_of_one(first, second=None, threshold=0.05, others=3):
    """Judge one workload among others that stayed the same."""
    quiet = {f"other {i}": times(seed=i + 1) for i in range(others)}
    rows = judge({"one": first, **quiet}, {} if second is None else {"one": second}, threshold)
    assert [row.verdict for row in rows[1:]] == ["same"] * others
    return rows[0]


# What makes a verdict


@rows_in_one_case("seed", range(12))
def test_noise_is_no_slowdown_and_a_slowdown_beyond_five_percent_is_found(seed):
    noisy = [times(1.0, rounds, noise=0.05, seed=seed + 100 * rounds) for rounds in (6, 15)]
    assert verdict_of_one(*noisy).verdict == "same"
    every = len(workloads.workloads())  # the correction is over all of them
    row = verdict_of_one(times(1.08, 6, seed=seed), times(1.08, seed=seed + 50), others=every - 1)
    assert row.verdict == "slower"
    assert 1.05 < row.ratio == pytest.approx(1.08, abs=0.02)
    assert row.low < row.ratio < row.high


def unsteady(factor, head):
    """Return times whose second base takes ``factor`` as long, and whose head takes ``head`` as long as both."""
    found = times(noise=0.001)
    found.again = [factor * second for second in found.again]
    return replace(found, head=[head * base for base in found.of_base])


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
        (1.0, times(1.0, 6, disturbed=9), {}, "same", "in 6 fresh rounds: within the threshold"),
        (1.0, times(1.0, 5, disturbed=10), {}, "undecided", "disturbed 10 of 15 fresh rounds: measure on a quieter"),
        (1.3, times(1.3, 6, disturbed=9), {}, "undecided", "disturbed 9 of 15 fresh rounds: the rounds do not agree"),
    ],
)
def test_a_difference_counts_if_it_is_found_again_beyond_threshold_and_noise_in_rounds_that_agree(
    looked, second, options, verdict, says
):
    row = verdict_of_one(times(looked, rounds=6), second, **options)
    assert row.verdict == verdict
    assert says in row.says
    assert row.ratio == pytest.approx(second.ratio().value)  # the second look is what is shown
    assert Verdict.of_rows("latency", "b", "h", {}, [row]).passed == (verdict not in ("slower", "undecided"))


def test_the_rounds_are_enough_for_the_correction_and_let_each_side_begin_as_often():
    assert 2**-gate.AGAIN_ROUNDS * len(workloads.workloads()) < ALPHA
    assert gate.FIRST_ROUNDS % len(rounds.SIDES) == 0
    assert gate.AGAIN_ROUNDS % len(rounds.SIDES) == 0
    long = [number for number in range(gate.FIRST_ROUNDS) if number % gate.LONG_EVERY == 0]
    assert sorted(number % len(rounds.SIDES) for number in long) == [0, 1, 2]


def test_what_is_beyond_the_threshold_or_disturbed_too_often_needs_a_second_look():
    for head, different in ((1.06, True), (0.94, True), (1.04, False)):
        assert looks_different(Times("cpu", [1.0] * 6, [head] * 6, [1.0] * 6), 0.05) == different
    assert not needs_second_look(times(rounds=3, disturbed=3), 0.05)
    assert needs_second_look(times(rounds=2, disturbed=4), 0.05)


def test_head_is_compared_with_the_geometric_mean_of_two_times_of_base():
    found = Times("cpu", [1.0, 1.0], [2.0, 2.0], [4.0, 4.0])
    assert (found.of_base, found.ratio().value) == ([2.0, 2.0], 1.0)
    assert math.isclose(found.floor(), 4.0)


# Rounds


class Fake:
    """A worker without a process: a call of a workload takes as long as ``seconds`` says."""

    def __init__(self, seconds, errors=(), clocks=None, disturbed=(), name="", order=None):
        self.seconds, self.errors, self.closed = seconds, set(errors), False
        self.disturbed = iter(disturbed)  # of the turns, while there are any
        self.clocks = clocks or dict.fromkeys(seconds, "cpu")
        self.name, self.order = name, [] if order is None else order
        self.requests = [{}]

    def send(self, **request):
        self.requests.append(request)
        if "time" in request:
            self.order.append(self.name)

    def answer(self):
        request = self.requests[-1]
        name = request.get("set_up") or request.get("time")
        if name is None:
            return {"workloads": self.clocks}
        if name in self.errors:
            return {"error": "AttributeError: new"}
        return {"seconds": self.seconds[name], "disturbed": "time" in request and next(self.disturbed, False)}

    def close(self):
        self.closed = True
        self.requests.append({})  # the next round's

    def calls(self):
        return [(request["time"], request["calls"]) for request in self.requests if "time" in request]


def start_with(head, base=None, head_errors=(), base_errors=(), log=None):
    base = base or dict.fromkeys(head, 0.001)

    def start(number):
        sides = [Fake(base, base_errors), Fake(head, head_errors), Fake(base, base_errors)]
        if log is not None:
            log.append(sides)
        return sides

    return start


OPTIONS = gate.Options("main")


def compared(start, options=OPTIONS):
    return {row.name: row for row in gate.compare(start, options)}


def every(name):
    return True


@rows_in_one_case(
    ("clock", "seconds", "turns", "calls", "disturbed"),
    [
        ("wall", 0.001, [True, True, False], [20, 2, 2, 20], 0),  # repeated with fewer calls until it is not
        ("wall", 0.001, [True] * 99, [20, *[2] * 12] * 2, 1),
        ("wall", 0.5, [True, False], [1, 1], 1),
        ("cpu", 0.001, [True, True], [20, 20], 0),  # another load adds little to seconds of the processor
    ],
)
def test_a_disturbed_turn_by_the_clock_on_the_wall_is_repeated(clock, seconds, turns, calls, disturbed, monkeypatch):
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: None)
    sides = [Fake({"w": seconds}, clocks={"w": clock}, disturbed=own) for own in ((), turns, ())]
    found, _ = rounds.measure(lambda number: sides, range(1), only=every)
    assert [many for _, many in sides[1].calls()] == calls
    assert (found["w"].disturbed, len(found["w"].head)) == (disturbed, 1 - disturbed)


def test_a_workload_that_other_work_always_disturbs_is_undecided_after_a_few_more_rounds(monkeypatch):
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: None)
    log = []

    def start(number):
        log.append(number)
        clocks = {"a, waiting": "wall", "b": "cpu"}
        return [Fake({"a, waiting": 0.001, "b": 0.001}, clocks=clocks, disturbed=[True] * 999) for _ in range(3)]

    found = compared(start)
    assert {name: row.verdict for name, row in found.items()} == {"a, waiting": "undecided", "b": "same"}
    assert len(log) == gate.FIRST_ROUNDS + 6


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
    assert all(side.closed for sides in log for side in sides)


def test_the_second_look_is_of_what_looks_slower_and_ends_as_soon_as_that_is_within_the_threshold():
    """Two look slower at first. One of them still does in every round, the other one in none."""
    log = []

    def start(number):
        slow = {"a": 0.002 if number < gate.FIRST_ROUNDS else 0.001, "b": 0.002, "c": 0.001}
        return start_with(slow, log=log)(number)

    found = compared(start)
    assert {name: row.verdict for name, row in found.items()} == {"a": "same", "b": "slower", "c": "same"}
    assert "in 6 fresh rounds: within the threshold" in found["a"].says
    assert f"in {gate.AGAIN_ROUNDS} fresh rounds" in found["b"].says
    assert len(log) == gate.FIRST_ROUNDS + gate.AGAIN_ROUNDS
    assert {name for sides in log[gate.FIRST_ROUNDS :] for name, _ in sides[1].calls()} == {"a", "b"}
    assert all(side.closed for sides in log for side in sides)
    log.clear()
    assert compared(start, replace(OPTIONS, workloads="a"))["a"].verdict == "same"
    assert len(log) == gate.FIRST_ROUNDS + 6  # no process is started for nothing
    log.clear()
    compared(start, replace(OPTIONS, workloads="c"))
    assert len(log) == gate.FIRST_ROUNDS


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
    order, seconds = [], {"b": 0.001, "h": 0.5, "a": 0.001}

    def start(number):
        return [Fake({"w": own}, name=name, order=order) for name, own in seconds.items()]

    for turns in (1, 3):
        found, _ = rounds.measure(start, range(3), only=every, turns=turns)
        assert (found["w"].base, found["w"].head, found["w"].again) == ([0.001] * 3, [0.5] * 3, [0.001] * 3)
    assert "".join(order[:18]) == "bhaahb" + "habbah" + "abhhba"


def test_short_calls_fill_a_turn_and_long_ones_take_part_in_each_second_round():
    log = []
    head = {"short": 1e-4, "long": 0.5}
    found, _ = rounds.measure(start_with(head, head, log=log), range(6), only=every, long_every=2)
    assert (len(found["short"].head), len(found["long"].head)) == (6, 3)
    assert dict(log[0][1].calls()) == {"short": 200, "long": 1}
    sides = [Fake({"w": seconds}) for seconds in (0.001, 0.002, 0.004)]
    rounds.measure(lambda number: sides, range(1), only=every)
    assert [set(side.calls()) for side in sides] == [{("w", 20)}] * 3  # as many as fill a turn of base, on all sides
    log.clear()
    rounds.measure(start_with(head, head, log=log), range(1), only=every, turns=3)
    assert Counter(name for name, _ in log[0][1].calls()) == {"short": 6, "long": 2}  # there and back


def test_a_worker_that_dies_is_an_error_that_says_what_it_said(tmp_path):
    package = tmp_path / "harness" / "benchmarks" / "latency"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").write_text("")
    code = "import sys\nprint('{}', flush=True)\nsys.stdin.readline()\nsys.exit('out of luck')"
    (package / "worker.py").write_text(code)
    side = rounds.Worker(Side("aaa (HEAD)", tmp_path), tmp_path / "harness", tmp_path / "round", 0)
    assert set(side.answer()) == {"disturbed"}
    side.send(set_up="a workload")
    with pytest.raises(GateError, match=r"a worker of aaa \(HEAD\) ended \(1\) at a workload: out of luck"):
        side.answer()
    side.close()


def test_directories_and_variables_of_the_sides_are_equally_long(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(rounds, "Worker", lambda *arguments: made.append(arguments))
    base, head = Side("b", tmp_path / "base"), Side("h", tmp_path / "head")
    rounds.starter(base, head, tmp_path / "harness", tmp_path)(7)
    assert [side for side, *_ in made] == [base, head, base]
    assert len({len(str(directory)) for _, _, directory, _ in made}) == 1
    assert {seed for *_, seed in made} == {7}
    assert len({len(str(side.variables(tmp_path, 7))) for side in (base, head)}) == 1


# The worker and its workloads


def test_of_bursts_which_are_means_of_their_calls_the_quickest_counts():
    for durations, calls, least in (([9.0, 1.0, 2.0, 50.0, 3.0], 5, 1.0), ([1.0, 3.0] * 5, 10, 2.0)):
        now, left = [0.0], iter(durations)

        def run(now=now, left=left):
            now[0] += next(left)

        assert worker.least_seconds(run, calls, lambda now=now: now[0]) == least


def fails():
    raise AttributeError("not in this version")


def test_a_worker_sets_up_times_and_answers_with_errors(monkeypatch):
    calls = []
    known = {
        "good": workloads.Workload(lambda: lambda: calls.append("good")),
        "bad": workloads.Workload(fails, clock="wall"),
    }
    monkeypatch.setattr(worker, "workloads", lambda: known)
    asked = [{"set_up": "good"}, {"time": "good", "calls": 10}, {"set_up": "bad"}]
    with on_threads(2):
        said = list(worker.serve(io.StringIO("\n".join(map(json.dumps, asked)))))
    assert said[0] == {"workloads": {"good": "cpu", "bad": "wall"}}
    assert [sorted(answer) for answer in said[1:3]] == [["seconds"], ["seconds"]]
    assert said[3] == {"error": "AttributeError: not in this version"}
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


def test_a_small_layer_a_file_and_what_is_counted_are_set_up(tmp_path, monkeypatch):
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
    counted = workloads.counted()
    assert counted["portable kernel, half batch 8"]()().shape == (8, workloads.ROWS)
    (gradient,) = counted["portable kernel, int4 gradient"]()()
    assert gradient.shape == (8, workloads.COLUMNS)
    assert counted["portable kernel, quantize nf4"]()().shape == (8, 1024)


# Instructions


def test_warm_calls_alone_are_counted_and_what_fails_is_named_and_left_out(monkeypatch, capsys):
    log = []
    found = {
        "layer's Python, a": lambda: log.append("set up") or (lambda: log.append("call")),
        "bad": fails,
        "portable kernel, b": lambda: lambda: log.append("product"),
    }
    marks = SimpleNamespace(
        **{name: lambda *said, name=name: log.append((name, *said)) for name in ("begin", "zero", "dump")}
    )
    monkeypatch.setattr(worker, "counted", lambda: found)
    monkeypatch.setattr(worker, "gc", SimpleNamespace(disable=lambda: None))
    with on_threads(2):
        worker.count(marks)
    assert log == [
        *[("begin",), "set up", *["call"] * (1 + worker.WARM), ("zero",), *["call"] * worker.CALLS],
        *[("dump", b"layer's Python, a"), *["product"] * 2, ("zero",), *["product"] * 2],
        ("dump", b"portable kernel, b"),
    ]
    out, err = capsys.readouterr()
    assert (out.splitlines(), err) == (list(found), "bad: not in this version\n")


def test_two_percent_more_instructions_fail_and_fewer_do_not():
    base = {"same": 1000, "grew": 1000, "shrank": 1000, "gone": 5, "lost": 5, "come": None}
    head = {"same": 1020, "grew": 1021, "shrank": 900, "fresh": 7, "lost": None, "come": 5}
    found = {row.name: row.verdict for row in instructions.judge(base, head)}
    same = {name: name for name in ("same", "grew", "shrank")}
    assert found == same | {"gone": "missing", "fresh": "new", "lost": "missing", "come": "new"}
    with pytest.raises(GateError, match="neither side counts 'broken'"):
        instructions.judge({"same": 1, "broken": None}, {"same": 1, "broken": None})


def test_counts_are_read_by_the_name_of_their_dump(tmp_path):
    (tmp_path / "callgrind.out.1").write_text("# x\ndesc: Trigger: Client Request: a, b\nsummary: 12\ntotals: 12\n")
    (tmp_path / "callgrind.out.2").write_text("desc: Trigger: Program termination\ntotals: 99\n")
    assert instructions.read_counts(tmp_path) == {"a, b": 12}


def test_without_valgrind_the_gate_says_that_it_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    side = Side("", tmp_path)
    rows, notes = instructions.compare(side, side, tmp_path, tmp_path / "counts")
    assert [row.verdict for row in rows] == ["skipped"]
    assert "valgrind is not installed" in notes[0]
    assert Verdict.of_rows("instructions", "b", "h", {}, rows, notes).passed


# Commits and builds


def in_git(directory, *arguments):
    who = "user.name=n user.email=e@localhost commit.gpgsign=false init.defaultBranch=m"
    options = [option for setting in who.split() for option in ("-c", setting)]
    command = ["git", "-C", str(directory), *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


BUILDS = "import pathlib, sys; print('built'); pathlib.Path('lowmem/kernels/_native.abi3.so').write_text({!r})"


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits, the first of them tagged ``old``, whose kernels are a text of each."""
    root = tmp_path / "repository"
    (root / "lowmem" / "kernels").mkdir(parents=True)
    (root / "lowmem" / "kernels" / "__init__.py").write_text("")
    (root / "lowmem" / "__init__.py").write_text("def backend():\n    return 'plain'\n")
    in_git(root, "init", "-q")
    for content in ("one", "two"):
        (root / "setup.py").write_text(BUILDS.format(content))
        in_git(root, "add", "-A")
        in_git(root, "commit", "-qm", content)
    in_git(root, "tag", "old", "HEAD~1")
    return root


def test_the_base_is_the_merge_base_with_the_reference(repository, tmp_path, monkeypatch):
    in_git(repository, "checkout", "-qb", "side", "old")
    in_git(repository, "commit", "-qm", "side", "--allow-empty")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "of a hook"))
    old, head = builds.resolve(repository, "m")
    monkeypatch.delenv("GIT_DIR")
    assert (old, head) == (in_git(repository, "rev-parse", "old"), in_git(repository, "rev-parse", "HEAD"))
    with pytest.raises(GateError, match="rev-parse"):
        builds.resolve(tmp_path, "main")
    in_git(repository, "checkout", "-q", "--orphan", "alone")
    in_git(repository, "commit", "-qm", "alone")
    with pytest.raises(GateError, match="no common ancestor"):
        builds.resolve(repository, "m")


@rows_in_one_case("reference", ["nowhere", "", "--all", "old:setup.py", "x" * 500, "a b\nc"])
def test_a_reference_that_is_no_commit_is_refused(repository, reference):
    with pytest.raises(GateError) as refused:
        builds.resolve(repository, reference)
    named = errors.show(reference)
    assert str(refused.value) == f"--base {named} is no commit of this repository: fetch it, or name another"


@pytest.mark.gates(keep=1)
def test_a_kernel_is_built_of_what_was_committed_and_taken_from_the_cache_until_its_sources_change(
    repository, tmp_path, monkeypatch
):
    old, head = builds.resolve(repository, "old")
    (repository / "setup.py").write_text("not committed")
    cache = tmp_path / "cache"

    def build(sha, name):
        return builds.build(repository, sha, "asked", tmp_path / name, cache)

    for name, sha, content in (("a", old, "one"), ("b", head, "two")):
        side = build(sha, name)
        assert (side.tree / builds.KERNEL).read_text() == content
        assert (side.commit, side.kernel) == (f"{sha[:12]} (asked)", "plain")
    for cached in cache.glob("*.so"):
        cached.write_text("cached")
    assert (build(old, "c").tree / builds.KERNEL).read_text() == "cached"
    monkeypatch.setenv("CFLAGS", "-O1 and others")
    assert (build(old, "d").tree / builds.KERNEL).read_text() == "one"
    assert len(list(cache.glob("*.so"))) == 3


def test_a_commit_that_does_not_build_is_an_error_and_nothing_is_cached(repository, tmp_path):
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    in_git(repository, "commit", "-qam", "three")
    _, head = builds.resolve(repository, "old")
    cache = tmp_path / "cache"
    with pytest.raises(GateError) as refused:
        builds.build(repository, head, "HEAD", tmp_path / "tree", cache)
    log = cache / f"build-{head[:12]}.log"
    assert str(refused.value) == f"{head[:12]} (HEAD) does not build: see {log}"
    assert "no compiler" in log.read_text()
    assert not list(cache.glob("*.so"))


# The command

ROWS = [
    Row("w|1", "cpu seconds", 1.0, 1.1, 1.1, 1.08, 1.12, "slower", "+10.0% at first"),
    Row("w2", "cpu seconds", 1.0, 1.01, 1.01, 0.99, 1.02),
    Row("w3", "cpu seconds", 1.0, 0.5, 0.5, 0.4, 0.6, "faster", "-50.0%"),
    Row("w4", "", verdict="new", says="base cannot run it"),
]
UNDECIDED = Row("w5, waiting", "wall seconds", 1.0, 1.2, 1.2, 1.0, 1.3, "undecided", "other work disturbed 9 of 15")


@pytest.fixture
def compare(monkeypatch):
    """Let the gate build nothing, and find the rows that are given."""

    def compare(latency, counts=()):
        monkeypatch.setattr(gate, "resolve", lambda root, reference: ("b" * 40, "a" * 40))
        monkeypatch.setattr(gate, "git", lambda *_: " M setup.py")
        monkeypatch.setattr(gate, "build", lambda root, sha, asked, tree, cache: Side(asked, tree, f"on {tree.name}"))
        monkeypatch.setattr(gate, "compare", lambda start, options: list(latency))
        monkeypatch.setattr(gate.instructions, "compare", lambda *_: (list(counts), ["counted"]))

    return compare


@rows_in_one_case(
    ("rows", "code", "says"),
    [
        (ROWS, 1, "FAILED: 1 slower"),
        ([*ROWS, UNDECIDED], 1, "FAILED: 1 slower, 1 undecided"),
        (ROWS[1:], 0, "passed: 1 faster"),
        ([*ROWS[1:], UNDECIDED], 2, "UNDECIDED: 1 undecided, 1 faster"),
    ],
)
def test_the_exit_code_says_whether_it_passed_and_verdicts_are_written(rows, code, says, compare, tmp_path, capsys):
    compare(rows, ROWS[1:2])
    assert gate.main(["--base", "main", "--output", str(tmp_path / "out")]) == code
    out = capsys.readouterr().out
    assert f"latency: {says}" in out
    assert "instructions: passed" in out
    found = read_verdict(tmp_path / "out" / "latency.json")
    assert (found.passed, found.rows) == (not code, tuple(rows))
    assert (found.base, found.head, found.machine["kernel"]) == ("merge base of HEAD and main", "HEAD", "on head")
    assert list(found.notes) == [
        "The working tree differs from HEAD: what is not committed is not measured.",
        "Base runs the kernel on base here, and head on head.",
    ]


def test_the_table_shows_what_differs_failures_first_and_the_summary_of_a_job_gets_it(compare, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("earlier\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    compare(ROWS)
    gate.main(["--base", "main", "--gate", "latency"])
    text = summary.read_text()
    assert text.startswith("earlier\n### latency: head HEAD against base merge base")
    assert "| w\\|1 | 1.100 | 1.080 to 1.120 | SLOWER | +10.0% at first |" in text
    assert text.index("SLOWER") < text.index("faster") < text.index("| new") < text.index("FAILED: 1 slower")
    assert "w2" not in text
    assert "1 the same, from +1.0% to +1.0%" in text
    gate.main(["--base", "main", "--gate", "latency", "--all"])
    assert "| w2 |" in summary.read_text()


def test_bad_input_ends_with_2_before_anything_is_built(tmp_path, capsys):
    assert gate.main(["--base", "no/such" * 100]) == 2
    assert capsys.readouterr().err.startswith("latency gate: ")
    (tmp_path / "file").write_text("")
    assert gate.main(["--base", "HEAD", "--output", str(tmp_path / "file" / "out")]) == 2
    for threshold in ("0", "-5", "nan", "inf", "five", "", "1001", "5%%"):
        with pytest.raises(SystemExit, match="2"):
            gate.main(["--base", "HEAD", f"--threshold={threshold}"])
    assert gate.percent("7.5%") == gate.percent("7.5") == 0.075


# The proof


@rows_in_one_case("case", [case for case in proof.CASES if case.file])
def test_each_fault_can_be_planted(case):
    text = (ROOT / case.file).read_text()
    assert text.count(case.found) == 1
    assert case.planted not in text
    if case.file.endswith(".py"):
        compile(text.replace(case.found, case.planted), case.file, "exec")


def run_of(case, *gates, undecided=None):
    return {
        "case": case.name,
        "alarms": {gate: ["a row"] for gate in gates},
        "undecided": undecided or {},
        "seconds": 60,
    }


def test_the_proof_holds_when_all_runs_are_there_and_right():
    calm, fault = proof.CASES[0], proof.CASES[2]
    assert proof.holds(calm, [run_of(calm)] * 10)
    assert not proof.holds(calm, [run_of(calm)] * 9)
    assert not proof.holds(calm, [run_of(calm)] * 9 + [run_of(calm, "latency")])
    assert proof.holds(fault, [run_of(fault, "latency")] * 5)
    assert not proof.holds(fault, [run_of(fault, "latency")] * 4 + [run_of(fault)])
    undecided = run_of(calm, undecided={"latency": ["a row"]})
    assert not proof.holds(calm, [run_of(calm)] * 9 + [undecided])
    some = replace(calm, undecided=7)
    assert proof.holds(some, [run_of(calm)] * 3 + [undecided] * 7)
    assert not proof.holds(some, [run_of(calm)] * 2 + [undecided] * 8)
    assert not proof.holds(some, [run_of(calm)] * 3 + [undecided] * 7 + [run_of(calm, "latency")])


def test_gates_of_memory_run_beside_each_other_and_what_they_say_is_kept(tmp_path, monkeypatch):
    rows = {"memory": Row("one", "bytes", verdict="grew", says="one byte more"), "resident": UNDECIDED}
    monkeypatch.setattr(proof, "busy_cores", lambda number: nullcontext())

    def run(command, **options):
        name = next(name for name in rows if any(f"{name}.json" in part for part in command))
        if name in verdicts:
            write_verdict(tmp_path / f"{name}.json", Verdict.of_rows(name, "b", "h", {}, [rows[name]]))
        return subprocess.CompletedProcess(command, 2, "", "first line\nno baseline\n")

    monkeypatch.setattr(proof.subprocess, "run", run)
    monkeypatch.setattr(proof, "git", lambda *_: "0123abc")
    case, verdicts = proof.Case("two gates", gates=proof.OF_MEMORY), rows
    found = proof.run_case(case, tmp_path / "clone")
    assert found["alarms"] == {"memory": ["one bytes: one byte more"]}
    assert found["undecided"] == {"resident": ["w5, waiting wall seconds: other work disturbed 9 of 15"]}
    (tmp_path / "memory.json").unlink()
    verdicts = ()
    with pytest.raises(GateError, match="^two gates: the memory gate ended with 2: no baseline$"):
        proof.run_case(case, tmp_path / "clone")


def test_the_proof_goes_on_where_it_stopped_and_writes_its_table(tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "proof.jsonl", tmp_path / "page.md"
    calm, fault = proof.CASES[0], proof.CASES[2]
    done = [run_of(calm)] * 8 + [run_of(fault, "latency", "instructions")] * 5
    results.write_text("".join(f"{json.dumps(run)}\n" for run in done))
    ran = []
    monkeypatch.setattr(proof, "planted", lambda case: nullcontext(tmp_path))
    monkeypatch.setattr(proof, "run_case", lambda case, _: ran.append(case) or run_of(case))
    arguments = ["--results", str(results), "--case", "base against base"]
    assert proof.main(arguments) == 0
    assert len(ran) == 2 + 10
    assert proof.main(arguments) == 0
    assert len(ran) == 12
    page.write_text((ROOT / "docs" / "benchmarking.md").read_text())
    proof.main([*arguments, "--table", "--page", str(page)])
    assert "| 10% in a kernel | 5 | 5 | 5 of 5 | 0 | instructions in 5, latency in 5 | 60 to 60 |" in page.read_text()
    for path in (page, results):
        path.write_text("nothing")
        assert proof.main(["--table", "--results", str(results), "--page", str(page)]) == 2
        results.write_text("")
    assert "has no marks" in capsys.readouterr().err


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


def test_the_page_shows_a_proof_that_holds():
    written = (ROOT / "docs" / "benchmarking.md").read_text().partition(proof.BEGIN)[2].partition(proof.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines()[2:]]
    assert [row[0] for row in rows] == [case.name for case in proof.CASES]
    for (_, runs, alarms, wanted, undecided, *_), case in zip(rows, proof.CASES, strict=True):
        assert int(runs) >= case.runs
        assert int(alarms) == (int(runs) - int(undecided) if case.alarm else 0)
        assert wanted == f"{(case.runs - case.undecided) * case.alarm} of {case.runs}"
