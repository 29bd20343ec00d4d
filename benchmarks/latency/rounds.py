"""Rounds: in each, fresh processes of base, head and base again time the same workloads in turns."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.latency.builds import GateError, Side
from benchmarks.latency.verdict import Times
from lowmem.testing.disturbance import PAUSES, is_burst_disturbed, thread_wait_seconds_or_none
from lowmem.testing.ratios import take_turns

TURN = 0.02  # seconds that a turn takes, or one call
MOST_CALLS = 10_000  # in a turn
LONG = 0.1  # seconds: a call of which there are fewer
SIDES = ("base", "head", "again")

Start = Callable[[int], Sequence[Any]]
"""Starts a round's workers of base, head, and base again; the round's number seeds their hashes."""


class Worker:
    """A worker process of one side. It is sent a request, and answers with seconds or an error.

    ``"disturbed"`` of an answer says whether other work kept threads of the process from a core meanwhile.
    """

    def __init__(self, side: Side, harness: Path, directory: Path, seed: int) -> None:
        self._commit, self._request = side.commit, "start"
        directory.mkdir(parents=True)
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.latency.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=directory,
            env=side.variables(harness, seed),
            text=True,
        )
        self._sent = 0.0, thread_wait_seconds_or_none(self._process.pid)

    def send(self, **request: Any) -> None:
        self._request = " ".join(map(str, request.values()))
        self._sent = time.perf_counter(), thread_wait_seconds_or_none(self._process.pid)
        with suppress(BrokenPipeError):  # the process has ended: answer() says why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it wrote nothing"]
            code = self._process.wait()
            raise GateError(f"a worker of {self._commit} ended ({code}) at {self._request}: {said[-1]}")
        sent, before = self._sent
        seconds, after = time.perf_counter() - sent, thread_wait_seconds_or_none(self._process.pid)
        waited = None if before is None or after is None else after - before
        return json.loads(line) | {"disturbed": is_burst_disturbed(waited, seconds)}

    def close(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


def starter(base: Side, head: Side, harness: Path, scratch: Path) -> Start:
    """Return what starts the processes of a round, each in an empty directory of its own."""

    def start(number: int) -> list[Worker]:
        sides = zip(SIDES, (base, head, base), strict=True)
        places = [(side, scratch / f"round-{number:03}" / name.ljust(5, "_")) for name, side in sides]
        return [Worker(side, harness, directory, number) for side, directory in places]

    return start


def measure(
    start: Start,
    numbers: Iterable[int],
    *,
    only: Callable[[str], bool],
    turns: int = 1,
    long_every: int = 1,
    settled: Callable[[Times], bool] = lambda _: False,
) -> tuple[dict[str, Times], dict[str, str]]:
    """Run rounds, in which a workload takes part until its times are settled.

    Base, head and base go there and back so many ``turns`` in a round. Workloads of long calls go once, in each
    ``long_every``-th round.

    Returns:
        The times of each workload, and of those that a side cannot run, which side and why: ``"base: ..."``.
    """
    found: dict[str, Times] = {}
    broken: dict[str, str] = {}
    long: set[str] = set()
    for number in numbers:
        if found and all(settled(times) for times in found.values()):
            break
        print(f"round {number}", file=sys.stderr)
        with ExitStack() as stack:
            sides = start(number)
            for side in sides:
                stack.callback(side.close)
            base, head, _ = (side.answer()["workloads"] for side in sides)
            for name, clock in (base | head).items():
                rests = name in long and number % long_every
                if not only(name) or name in broken or rests or (name in found and settled(found[name])):
                    continue
                for side in sides:
                    side.send(set_up=name)
                ready = [side.answer() for side in sides]
                if said := _complaint(name, ready):
                    broken[name] = said
                    found.pop(name, None)
                    continue
                seconds = ready[0]["seconds"]
                if seconds > LONG:
                    long.add(name)
                pauses = () if name in long or clock == "cpu" else PAUSES
                taken, disturbed = _in_turns(name, sides, seconds, 1 if name in long else turns, number, pauses)
                times = found.setdefault(name, Times(clock))
                if disturbed and clock == "wall":
                    times.disturbed += 1
                    continue
                for own, value in zip((times.base, times.head, times.again), taken, strict=True):
                    own.append(value)
    return found, broken


def _complaint(name: str, answers: list[dict[str, Any]]) -> str | None:
    base, head, again = (answer.get("error") for answer in answers)
    if head and (base or again):
        raise GateError(f"neither base nor head can run the workload {name!r}: {head}")
    if head:
        return f"head: {head}"
    return f"base: {base or again}" if base or again else None


def _in_turns(
    name: str, sides: Sequence[Any], seconds: float, turns: int, number: int, pauses: Sequence[float]
) -> tuple[list[float], bool]:
    """Return seconds per call of base, head and base, and whether a turn was disturbed.

    The side that begins changes from round to round. A turn that other work disturbs is repeated after each of the
    pauses, with fewer calls: a process that has slept, and works briefly, is often not interrupted.
    """
    spoiled = False
    calls = max(1, min(MOST_CALLS, round(TURN / max(seconds, 1e-9))))

    def turn(side: Any) -> float:
        nonlocal spoiled
        for pause, many in ((0.0, calls), *((pause, min(calls, 2)) for pause in pauses)):
            time.sleep(pause)
            side.send(time=name, calls=many)
            answer = side.answer()
            if "error" in answer:
                raise GateError(f"the workload {name!r} ran once and then failed: {answer['error']}")
            if not answer["disturbed"]:
                return answer["seconds"]
        spoiled = True
        return answer["seconds"]

    first = number % len(sides)
    order = [*range(first, len(sides)), *range(first)]
    taken = take_turns([lambda side=sides[at]: turn(side) for at in order], turns)
    by_side = dict(zip(order, taken, strict=True))
    return [sum(by_side[at]) / turns for at in range(len(sides))], spoiled
