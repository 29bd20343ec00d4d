"""The latency gate: verdicts from times, rounds with fakes for processes, builds, the command, and the proof."""

import io
import json
import os
import subprocess
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lowmem
from benchmarks.cases import BATCHES, PAST, Block
from benchmarks.latency import __main__ as gate
from benchmarks.latency import builds, instructions, proof, rounds, worker, workloads
from benchmarks.latency.builds import GateError, Side
from benchmarks.latency.verdict import ALPHA, Times, judge, looks_different, needs_second_look
from lowmem import errors
from lowmem.testing.gate_verdicts import FigureComparison, GateVerdict, read_verdict, write_verdict
from tests.compiled import on_threads

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
    quiet = {f"other {i}": times(rounds=3, seed=i + 1) for i in range(others)}
    rows = judge({"one": first, **quiet}, {} if second is None else {"one": second}, threshold)
    assert [row.verdict for row in rows[1:]] == ["same"] * others
    return rows[0]


# What makes a verdict


@pytest.mark.parametrize("seed", range(12))
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


@pytest.mark.parametrize(
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
def test_a_difference_counts_if_a_second_look_finds_it_beyond_threshold_and_noise(
    looked, second, options, verdict, says
):
    row = verdict_of_one(times(looked, rounds=6), second, **options)
    assert row.verdict == verdict
    assert says in row.says
    assert row.ratio == pytest.approx(second.ratio().value)  # the second look is what is shown
    assert GateVerdict.from_rows("latency", "b", "h", {}, [row]).passed == (verdict not in ("slower", "undecided"))


def test_the_rounds_are_enough_for_the_correction_and_let_each_side_begin_as_often():
    assert 2**-gate.AGAIN_ROUNDS * len(workloads.workloads()) < ALPHA
    assert gate.FIRST_ROUNDS % len(rounds.SIDES) == gate.AGAIN_ROUNDS % len(rounds.SIDES) == 0


def test_what_is_beyond_the_threshold_or_disturbed_too_often_needs_a_second_look():
    for head, different in ((1.06, True), (0.94, True), (1.04, False)):
        assert looks_different(Times("cpu", [1.0] * 6, [head] * 6, [1.0] * 6), 0.05) == different
    assert not needs_second_look(times(rounds=3, disturbed=3), 0.05)
    assert needs_second_look(times(rounds=2, disturbed=4), 0.05)
    found = Times("cpu", [1.0, 1.0], [2.0, 2.0], [4.0, 4.0])  # head is compared with the geometric mean of base's two
    assert (found.of_base, found.ratio().value, round(found.floor(), 9)) == ([2.0, 2.0], 1.0, 4.0)


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


def test_a_disturbed_turn_by_the_clock_on_the_wall_is_repeated(monkeypatch):
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: None)
    for clock, seconds, turns, calls, disturbed in (
        ("wall", 0.001, [True, True, False], [20, 2, 2, 20], 0),  # repeated with fewer calls until it is not
        ("wall", 0.001, [True] * 99, [20, *[2] * 12] * 2, 1),
        ("wall", 0.5, [True, False], [1, 1], 1),
        ("cpu", 0.001, [True, True], [20, 20], 0),  # another load adds little to seconds of the processor
    ):
        sides = [Fake({"w": seconds}, clocks={"w": clock}, disturbed=own) for own in ((), turns, ())]
        found, _ = rounds.measure(lambda number, sides=sides: sides, range(1), only=every)
        assert [many for _, many in sides[1].calls()] == calls
        assert (found["w"].disturbed, len(found["w"].head)) == (disturbed, 1 - disturbed)


def test_a_workload_that_is_always_disturbed_is_undecided_after_a_few_more_rounds(monkeypatch):
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: None)
    log, clocks = [], {"a, waiting": "wall", "b": "cpu"}

    def start(number):
        log.append([Fake(dict.fromkeys(clocks, 0.001), clocks=clocks, disturbed=[True] * 999) for _ in range(3)])
        return log[-1]

    found = compared(start)
    assert {name: row.verdict for name, row in found.items()} == {"a, waiting": "undecided", "b": "same"}
    assert len(log) == gate.FIRST_ROUNDS + 6


def test_where_no_workload_can_be_compared_there_is_no_verdict():
    for base, head, pattern, says in (
        (["a"], [], "*", "base can run no workload"),
        (["a"], ["a"], "*", "neither .* can run the workload 'a': AttributeError: new"),
        ([], [], "x", "no workload is called 'x'"),
    ):
        with pytest.raises(GateError, match=says):
            compared(start_with({"a": 0.001}, None, head, base), replace(OPTIONS, workloads=pattern))


def test_the_second_look_is_of_what_looks_slower_and_ends_within_the_threshold():
    """Two look slower at first. One of them still does in every round, the other one in none."""
    log = []

    def start(number):
        slow = {"a": 0.002 if number < gate.FIRST_ROUNDS else 0.001, "b": 0.002, "c": 0.001}
        return start_with(slow, log=log)(number)

    found = compared(start)
    assert {name: row.verdict for name, row in found.items()} == {"a": "same", "b": "slower", "c": "same"}
    assert "in 6 fresh rounds: within the threshold" in found["a"].says
    assert f"in {gate.AGAIN_ROUNDS} fresh rounds" in found["b"].says
    assert {name for sides in log[gate.FIRST_ROUNDS :] for name, _ in sides[1].calls()} == {"a", "b"}
    assert all(side.closed for sides in log for side in sides)
    for only, again in (("b", gate.AGAIN_ROUNDS), ("a", 6), ("c", 0)):  # no process is started for nothing
        log.clear()
        compared(start, replace(OPTIONS, workloads=only))
        assert len(log) == gate.FIRST_ROUNDS + again


def test_what_base_lacks_is_new_and_what_head_lacks_fails():
    both = {"a": 0.001, "b": 0.001}
    found = compared(start_with(both, base_errors=["a"]))
    assert (found["a"].verdict, found["b"].verdict) == ("new", "same")
    sides = [Fake(both), Fake(both, errors=["a"], clocks={"b": "cpu"}), Fake(both)]  # head does not name it
    for start in (start_with(both, head_errors=["a"]), lambda number: sides):
        found = compared(start)
        assert (found["a"].verdict, found["b"].verdict) == ("missing", "same")
        assert "AttributeError" in found["a"].says
        assert not GateVerdict.from_rows("latency", "b", "h", {}, list(found.values())).passed


def test_sides_take_turns_there_and_back_and_change_who_begins():
    order, seconds = [], {"b": 0.001, "h": 0.5, "a": 0.001}

    def start(number):
        return [Fake({"w": own}, name=name, order=order) for name, own in seconds.items()]

    for turns in (1, 3):
        found, _ = rounds.measure(start, range(3), only=every, turns=turns)
        assert (found["w"].base, found["w"].head, found["w"].again) == ([0.001] * 3, [0.5] * 3, [0.001] * 3)
    assert "".join(order[:18]) == "bhaahb" + "habbah" + "abhhba"


def test_short_calls_fill_a_turn_of_base_and_long_ones_join_each_second_round():
    log, base, head = [], {"short": 1e-4, "long": 0.5}, {"short": 2e-4, "long": 1.0}
    found, _ = rounds.measure(start_with(head, base, log=log), range(6), only=every, long_every=2, turns=3)
    assert (len(found["short"].head), len(found["long"].head)) == (6, 3)
    for side in log[0]:
        assert Counter(side.calls()) == {("short", 200): 6, ("long", 1): 2}  # there and back


def test_a_worker_that_dies_is_an_error_that_says_what_it_said(tmp_path):
    package = tmp_path / "benchmarks" / "latency"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").write_text("")
    (package / "worker.py").write_text(
        "import sys\nprint('{}', flush=True)\nsys.stdin.readline()\nsys.exit('bad luck')"
    )
    side = rounds.Worker(Side("aaa (HEAD)", tmp_path), tmp_path, tmp_path / "round", 0)
    assert set(side.answer()) == {"disturbed"}
    side.send(set_up="a workload")
    with pytest.raises(GateError, match=r"a worker of aaa \(HEAD\) ended \(1\) at a workload: bad luck"):
        side.answer()
    side.close()


def test_directories_and_variables_of_the_sides_are_equally_long(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "Worker", lambda *arguments: arguments)
    base, head = Side("b", tmp_path / "base"), Side("h", tmp_path / "head")
    made = rounds.starter(base, head, tmp_path / "harness", tmp_path)(7)
    assert [(side, seed) for side, _, _, seed in made] == [(base, 7), (head, 7), (base, 7)]
    assert len({(len(str(place)), len(str(side.variables(tmp_path, 7)))) for side, _, place, _ in made}) == 1


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


def test_workloads_are_of_each_variant_batch_and_format_and_waits_are_timed():
    found = workloads.workloads()
    names = [f"inference {variant} batch {batch}" for variant in lowmem.VARIANTS for batch in BATCHES]
    names += [f"training step {variant}" for variant in lowmem.VARIANTS]
    names += [f"quantize {form}" for form in lowmem.FORMATS]
    names += [f"decode step, {dtype}{cores}" for dtype in ("float32", "bfloat16") for cores in ("", ", all cores")]
    assert {*names, "save", "load", "save, waiting", "load, waiting"} <= found.keys()
    for name, workload in found.items():
        on_all = name.endswith("all cores")
        assert workload.threads == (workloads.CORES if on_all else 1), name
        assert workload.clock == ("wall" if on_all or name.endswith(", waiting") else "cpu"), name


def test_a_decode_step_computes_the_last_token_of_a_sequence_whose_others_are_cached():
    torch.manual_seed(0)
    block, tokens = Block().double(), torch.randn(1, PAST + 1, 576, dtype=torch.float64)
    angles = torch.outer(torch.arange(PAST + 1), 10_000 ** -(torch.arange(32) / 32))
    y, rotation = block.attention_norm(tokens), torch.polar(torch.ones(()), angles)[:, None]
    query, key, value = (layer(y).unflatten(-1, (-1, 64))[0] for layer in (block.query, block.key, block.value))
    query, key = (torch.complex(*one.chunk(2, -1)) * rotation for one in (query, key))  # (tokens, heads, 32)
    block.keys[0, :, :PAST] = torch.cat((key.real, key.imag), -1).transpose(0, 1)[:, :PAST].detach()
    block.values[0, :, :PAST] = value.transpose(0, 1)[:, :PAST].detach()
    scores = torch.stack([(query[-1, head].conj() * key[:, head // 3]).real.sum(-1) for head in range(9)]) / 8
    attended = torch.stack([scores[head].softmax(-1) @ value[:, head // 3] for head in range(9)]).flatten()
    x = tokens[0, -1] + block.output(attended)
    z = block.norm(x)
    expected = x + block.down(torch.nn.functional.silu(block.gate(z)) * block.up(z))
    with torch.no_grad():
        for _ in range(2):  # a step leaves the others as they were
            assert torch.allclose(block(tokens[:, -1:])[0, 0], expected, rtol=0, atol=1e-5)


def test_a_small_layer_a_file_and_what_is_counted_are_set_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known, counted = workloads.workloads(), workloads.counted()
    assert known["small layer qlora_nf4"].set_up()().shape == (1, workloads.SMALL)
    assert known["decode step, bfloat16"].set_up()().dtype is torch.bfloat16
    assert counted["portable kernel, half batch 8"]()().shape == (8, workloads.ROWS)
    assert counted["portable kernel, int4 gradient"]()()[0].shape == (8, workloads.COLUMNS)
    assert counted["portable kernel, quantize nf4"]()().shape == (8, 1024)
    monkeypatch.setattr(workloads, "dense_model", lambda: lowmem.bignet.nn.Linear(8, 8))
    workloads._saved.cache_clear()
    known["save"].set_up()()
    assert isinstance(known["load"].set_up()(), lowmem.Linear4Bit)
    workloads._saved.cache_clear()


# Instructions


def test_warm_calls_alone_are_counted_and_what_fails_is_named_and_left_out(monkeypatch, capsys):
    log = []
    found = {"bad": fails, "portable kernel, b": lambda: log.append("set up") or (lambda: log.append("call"))}
    names = ("begin", "zero", "dump")
    marks = SimpleNamespace(**{name: lambda *said, name=name: log.append((name, *said)) for name in names})
    monkeypatch.setattr(worker, "counted", lambda: found)
    monkeypatch.setattr(worker, "gc", SimpleNamespace(disable=lambda: None))
    with on_threads(2):
        worker.count(marks)
    dump = ("dump", b"portable kernel, b")
    assert log == [("begin",), "set up", "call", "call", ("zero",), "call", "call", dump]
    assert capsys.readouterr() == ("bad\nportable kernel, b\n", "bad: not in this version\n")


def test_two_percent_more_instructions_fail_and_fewer_do_not():
    base = {"same": 1000, "grew": 1000, "shrank": 1000, "gone": 5, "lost": 5, "come": None}
    head = {"same": 1020, "grew": 1021, "shrank": 900, "fresh": 7, "lost": None, "come": 5}
    found = {row.name: row.verdict for row in instructions.judge(base, head)}
    same = {name: name for name in ("same", "grew", "shrank")}
    assert found == same | {"gone": "missing", "fresh": "new", "lost": "missing", "come": "new"}
    with pytest.raises(GateError, match="neither side counts 'broken'"):
        instructions.judge({"same": 1, "broken": None}, {"same": 1, "broken": None})


def test_counts_are_read_by_the_name_of_their_dump_and_skipped_without_valgrind(tmp_path, monkeypatch):
    (tmp_path / "callgrind.out.1").write_text("# x\ndesc: Trigger: Client Request: a, b\nsummary: 12\ntotals: 12\n")
    (tmp_path / "callgrind.out.2").write_text("desc: Trigger: Program termination\ntotals: 99\n")
    assert instructions.read_counts(tmp_path) == {"a, b": 12}
    monkeypatch.setenv("PATH", str(tmp_path))
    side = Side("", tmp_path)
    rows, notes = instructions.compare(side, side, tmp_path, tmp_path / "counts")
    assert "valgrind is not installed" in notes[0]
    assert GateVerdict.from_rows("instructions", "b", "h", {}, rows, notes).passed


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


@pytest.mark.parametrize("reference", ["nowhere", "", "--all", "old:setup.py", "x" * 500, "a b\nc"])
def test_a_reference_that_is_no_commit_is_refused(repository, reference):
    with pytest.raises(GateError) as refused:
        builds.resolve(repository, reference)
    named = errors.short_repr(reference)
    assert str(refused.value) == f"--base {named} is no commit of this repository: fetch it, or name another"


@pytest.mark.gates(keep=1)
def test_a_kernel_is_built_of_the_commit_and_cached_until_its_sources_change(repository, tmp_path, monkeypatch):
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
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    in_git(repository, "commit", "-qam", "three")
    _, head = builds.resolve(repository, "old")
    log = cache / f"build-{head[:12]}.log"
    with pytest.raises(GateError, match=rf"^{head[:12]} \(asked\) does not build: see {log}$"):
        build(head, "e")
    assert "no compiler" in log.read_text()
    assert len(list(cache.glob("*.so"))) == 3


# The command

ROWS = [
    FigureComparison("w|1", "cpu seconds", 1.0, 1.1, 1.1, 1.08, 1.12, "slower", "+10.0% at first"),
    FigureComparison("w2", "cpu seconds", 1.0, 1.01, 1.01, 0.99, 1.02),
    FigureComparison("w3", "cpu seconds", 1.0, 0.5, 0.5, 0.4, 0.6, "faster", "-50.0%"),
    FigureComparison("w4", "", verdict="new", says="base cannot run it"),
]
UNDECIDED = FigureComparison(
    "w5, waiting", "wall seconds", 1.0, 1.2, 1.2, 1.0, 1.3, "undecided", "other work disturbed 9 of 15"
)


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


@pytest.mark.parametrize(
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


def test_the_table_shows_failures_first_and_the_summary_of_a_job_gets_it(compare, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    compare(ROWS)
    gate.main(["--base", "main", "--gate", "latency"])
    text = summary.read_text()
    assert "| w\\|1 | 1.100 | 1.080 to 1.120 | SLOWER | +10.0% at first |" in text
    assert text.index("SLOWER") < text.index("faster") < text.index("| new") < text.index("FAILED: 1 slower")
    assert "w2" not in text
    gate.main(["--base", "main", "--gate", "latency", "--all"])
    assert "| w2 |" in summary.read_text()


def test_bad_input_ends_with_2_before_anything_is_built(tmp_path, capsys):
    assert gate.main(["--base", "no/such" * 100]) == 2
    assert capsys.readouterr().err.startswith("latency gate: ")
    (tmp_path / "file").write_text("")
    assert gate.main(["--base", "HEAD", "--output", str(tmp_path / "file" / "out")]) == 2
    for threshold in ("0", "-5", "nan", "five", "1001", "5%%"):
        with pytest.raises(SystemExit, match="2"):
            gate.main(["--base", "HEAD", f"--threshold={threshold}"])
    assert gate.percent("7.5%") == gate.percent("7.5") == 0.075


# The proof


@pytest.mark.parametrize("case", [case for case in proof.CASES if case.file])
def test_each_fault_can_be_planted(case):
    text = (ROOT / case.file).read_text()
    assert text.count(case.found) == 1
    assert case.planted not in text
    if case.file.endswith(".py"):
        compile(text.replace(case.found, case.planted), case.file, "exec")


def run_of(case, *gates, undecided=None):
    alarms = {gate: ["a row"] for gate in gates}
    return {"case": case.name, "alarms": alarms, "undecided": undecided or {}, "seconds": 60}


@pytest.mark.parametrize(
    ("case", "right", "wrong", "undecided", "holds"),
    [
        (proof.CASES[0], 10, 0, 0, True),
        (proof.CASES[0], 9, 0, 0, False),
        (proof.CASES[0], 9, 1, 0, False),
        (proof.CASES[0], 9, 0, 1, False),
        (proof.CASES[2], 5, 0, 0, True),
        (proof.CASES[2], 4, 1, 0, False),
        (replace(proof.CASES[0], undecided=7), 3, 0, 7, True),
        (replace(proof.CASES[0], undecided=7), 2, 0, 8, False),
        (replace(proof.CASES[0], undecided=7), 3, 1, 7, False),
    ],
)
def test_the_proof_holds_when_all_runs_are_there_and_right(case, right, wrong, undecided, holds):
    alarm, calm = run_of(case, "latency"), run_of(case)
    runs = [alarm if case.alarm else calm] * right + [calm if case.alarm else alarm] * wrong
    runs += [run_of(case, undecided={"latency": ["a row"]})] * undecided
    assert proof.holds(case, runs) == holds


def test_what_gates_say_is_kept_as_alarms_or_undecided(tmp_path, monkeypatch):
    rows = {"memory": FigureComparison("one", "bytes", verdict="grew", says="one byte more"), "resident": UNDECIDED}

    def run(command, **options):
        name = next((name for name in rows if any(f"{name}.json" in part for part in command)), None)
        if name:
            write_verdict(tmp_path / f"{name}.json", GateVerdict.from_rows(name, "b", "h", {}, [rows[name]]))
        return subprocess.CompletedProcess(command, 2, "", "first line\nno baseline\n")

    monkeypatch.setattr(proof.subprocess, "run", run)
    monkeypatch.setattr(proof, "git", lambda *_: "0123abc")
    found = proof.run_case(proof.Case("two gates", gates=proof.OF_MEMORY), tmp_path / "clone")
    assert found["alarms"] == {"memory": ["one bytes: one byte more"]}
    assert found["undecided"] == {"resident": ["w5, waiting wall seconds: other work disturbed 9 of 15"]}
    with pytest.raises(GateError, match="^times: the latency gate ended with 2: no baseline$"):
        proof.run_case(proof.Case("times"), tmp_path / "clone")


def test_the_proof_goes_on_where_it_stopped_and_writes_its_table(tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "proof.jsonl", tmp_path / "page.md"
    done = [run_of(proof.CASES[0])] * 8 + [run_of(proof.CASES[2], "latency", "instructions")] * 5
    results.write_text("".join(f"{json.dumps(run)}\n" for run in done))
    ran = []
    monkeypatch.setattr(proof, "planted", lambda case: nullcontext(tmp_path))
    monkeypatch.setattr(proof, "run_case", lambda case, _: ran.append(case) or run_of(case))
    arguments = ["--results", str(results), "--case", "base against base"]
    for _ in range(2):
        assert proof.main(arguments) == 0
        assert len(ran) == 2 + 10
    page.write_text((ROOT / "docs" / "benchmarking.md").read_text())
    proof.main([*arguments, "--table", "--page", str(page)])
    assert "| 10% in a kernel | 5 | 5 | 0 | instructions in 5, latency in 5 | 60 to 60 |" in page.read_text()
    page.write_text("nothing")
    assert proof.main([*arguments, "--table", "--page", str(page)]) == 2
    assert "has no marks" in capsys.readouterr().err


def test_the_page_shows_a_proof_that_holds():
    written = (ROOT / "docs" / "benchmarking.md").read_text().partition(proof.BEGIN)[2].partition(proof.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines()[2:]]
    assert [row[0] for row in rows] == [case.name for case in proof.CASES]
    for (_, runs, alarms, undecided, *_), case in zip(rows, proof.CASES, strict=True):
        assert int(runs) >= case.runs
        assert int(alarms) == (int(runs) - int(undecided) if case.alarm else 0)
        assert int(runs) - int(undecided) >= case.runs - case.undecided
