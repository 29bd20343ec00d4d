"""Rounds: in each, fresh processes of base, head and base again time the same workloads in turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.latency.builds import Environment, GateError
from benchmarks.latency.verdict import Times
from lowmem.testing.disturbance import PAUSES, disturbs, seconds_waited
from lowmem.testing.ratios import take_turns

TURN = 0.02  # seconds that a turn takes, or one call
MOST_CALLS = 10_000  # in a turn
LONG = 0.1  # seconds: a call of which there are fewer
PATIENCE = 600.0  # seconds until a worker that does not answer is ended
SIDES = ("base", "head", "again")

PASSED_ON = ("PATH", "HOME", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH", "LOWMEM_KERNEL")


Start = Callable[[int], Sequence[Any]]
"""Starts a round's workers of base, head, and base again; the round's number seeds their hashes."""


class Worker:
    """A worker process of one side. It is sent a request, and answers with seconds or an error.

    ``"disturbed"`` of an answer says whether other work kept threads of the process from a core meanwhile.
    """

    def __init__(self, environment: Environment, harness: Path, directory: Path, seed: int) -> None:
        self.environment = environment
        directory.mkdir(parents=True, exist_ok=True)
        self._errors = (directory / "errors.txt").open("wb")
        self._process = subprocess.Popen(
            [environment.python, "-m", "benchmarks.latency.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=directory,
            env=worker_environment(harness, seed),
            text=True,
        )

    def hello(self) -> dict[str, Any]:
        said = self._read("start")
        own = self.environment.python.parent.parent
        if not Path(said["lowmem"]).is_relative_to(own):
            raise GateError(f"{self.environment.commit} imports lowmem from {said['lowmem']}, not from {own}")
        return said

    def send(self, **request: Any) -> None:
        assert self._process.stdin is not None
        self._request = " ".join(map(str, request.values()))
        self._sent = time.perf_counter(), seconds_waited(self._process.pid)
        with suppress(BrokenPipeError):  # the process has ended: answer() says why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        answer = self._read(self._request)
        sent, before = self._sent
        seconds, after = time.perf_counter() - sent, seconds_waited(self._process.pid)
        waited = None if before is None or after is None else after - before
        return answer | {"disturbed": disturbs(waited, seconds)}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()

    def _read(self, request: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            code = self._process.wait()
            said = Path(self._errors.name).read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
            raise GateError(f"a worker of {self.environment.commit} ended ({code}) at {request}: {said[-1]}")
        return json.loads(line)


def worker_environment(harness: Path, seed: int) -> dict[str, str]:
    """Return the environment variables of a worker: the same for all sides of a round."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # The processes that wait for their turn must not spin.
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    return {**kept, **quiet, "PYTHONPATH": str(harness), "PYTHONHASHSEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1"}


def copy_harness(root: Path, directory: Path) -> None:
    """Copy what workers import of ``benchmarks``: beside the repository's ``lowmem`` they would import that."""
    package = directory / "benchmarks"
    (package / "latency").mkdir(parents=True)
    for name in ("__init__.py", "cases.py", "latency/__init__.py", "latency/workloads.py", "latency/worker.py"):
        shutil.copy(root / "benchmarks" / name, package / name)


def starter(base: Environment, head: Environment, harness: Path, scratch: Path) -> Start:
    """Return what starts the processes of a round, each in an empty directory of its own."""

    def start(number: int) -> list[Worker]:
        workers: list[Worker] = []
        for side, environment in zip(SIDES, (base, head, base), strict=True):
            directory = scratch / f"round-{number:03}" / side.ljust(5, "_")
            workers.append(Worker(environment, harness, directory, number))
        return workers

    return start


def measure(
    start: Start,
    numbers: Iterable[int],
    *,
    only: Callable[[str], bool],
    turns: int = 1,
    long_every: int = 1,
    settled: Callable[[Times], bool] = lambda _: False,
    progress: Callable[[str], None] = lambda _: None,
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
        progress(f"round {number}")
        with ExitStack() as stack:
            sides = []
            for side in start(number):
                stack.callback(side.close)
                sides.append(side)
            base, head, _ = (side.hello()["workloads"] for side in sides)
            clocks = head | {name: clock for name, clock in base.items() if name not in head}  # these are missing
            for name in filter(only, clocks):
                if name in broken or (name in long and number % long_every):
                    continue
                if name in found and settled(found[name]):
                    continue
                for side in sides:
                    side.send(set_up=name)
                ready = [side.answer() for side in sides]
                if said := _complaint(name, ready):
                    broken[name] = said
                    found.pop(name, None)
                    continue
                if ready[0]["seconds"] > LONG:
                    long.add(name)
                times = found.setdefault(name, Times(clocks[name]))
                again = () if name in long or times.clock == "cpu" else PAUSES
                seconds, disturbed = _in_turns(
                    name, sides, ready[0]["seconds"], 1 if name in long else turns, number, again
                )
                times.undisturbed.append(times.clock == "cpu" or not disturbed)
                for own, value in zip((times.base, times.head, times.again), seconds, strict=True):
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
    name: str, sides: Sequence[Any], seconds: float, turns: int, number: int, again: Sequence[float]
) -> tuple[list[float], bool]:
    """Return seconds per call of base, head and base, and whether a turn was disturbed.

    Who begins changes from round to round. A turn that other work disturbs is repeated after each of the pauses
    ``again``, with fewer calls: a process that has slept, and works briefly, is often not interrupted.
    """
    spoiled: list[str] = []
    calls = max(1, min(MOST_CALLS, round(TURN / max(seconds, 1e-9))))

    def turn(side: Any) -> Callable[[], float]:
        def run() -> float:
            for pause, many in ((0.0, calls), *((pause, min(calls, 2)) for pause in again)):
                time.sleep(pause)
                side.send(time=name, calls=many)
                answer = side.answer()
                if "error" in answer:
                    raise GateError(f"the workload {name!r} ran once and then failed: {answer['error']}")
                if not answer.get("disturbed"):
                    break
            else:
                spoiled.append(name)
            return answer["seconds"]

        return run

    first = number % len(sides)
    order = [*range(first, len(sides)), *range(first)]
    taken = take_turns([turn(sides[at]) for at in order], turns)
    by_side = dict(zip(order, taken, strict=True))
    return [sum(by_side[at]) / turns for at in range(len(sides))], bool(spoiled)
