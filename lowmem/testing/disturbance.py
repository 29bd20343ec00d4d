"""Notices other work on the machine while something is timed: how long Linux let threads wait for a core, or the
involuntary switches of the process (macOS), or nothing (Windows)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

WAITED = 0.02  # of the seconds of a burst: the work of an idle system keeps threads from a core for less
# Seconds that an involuntary switch counts for
SWITCH = 0.001
OTHERS = 0.05  # of the time of all cores: an idle system takes less
# Seconds by which the counters of cores may be wrong: they move in steps of 0.01
SLACK = 0.03
# Seconds: a burst that is longer is interrupted beside other work, however often it is repeated
LONG = 0.01
# Seconds before each repetition: a thread that has slept gets a core sooner
PAUSES = (0.0, 0.002, 0.001, 0.005) * 3

T = TypeVar("T")


def thread_wait_seconds_or_none(pid: int | str = "self") -> float | None:
    """Return for how long the threads of a process have waited for a core, or None where nothing counts it.

    Args:
        pid: number of the process, or ``self``, for which involuntary switches are counted where waits are not.
    """
    ran = waited = 0
    tasks = f"/proc/{pid}/task"
    for task in os.listdir(tasks) if os.path.isdir(tasks) else ():
        try:
            with open(f"{tasks}/{task}/schedstat", "rb") as file:
                seconds = file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            # The thread has ended, or the kernel does not count
            continue
        ran, waited = ran + int(seconds[0]), waited + int(seconds[1])
    # A kernel that does not count has no such file, or says 0
    if ran:
        return waited / 1e9
    if pid != "self" or sys.platform == "win32":
        return None
    import resource

    return SWITCH * resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def busy_stolen_seconds_and_cores_or_none() -> tuple[float, float, int] | None:
    """Return for how long the cores that this process may use have worked, how much of that a hypervisor took, and
    their number; None where nothing counts it."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    usable_cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = [line.split() for line in stat.read_text().splitlines() if line.partition(" ")[0] in usable_cores]
    # user, nice, system, idle, waiting for disks, interrupts (2), stolen
    busy = sum(int(row[column]) for row in rows for column in (1, 2, 3, 6, 7, 8))
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, sum(int(row[8]) for row in rows) / tick, len(rows)


def is_burst_disturbed(wait_seconds: float | None, burst_seconds: float) -> bool:
    """Whether a burst's time is useless, since its threads waited for a core for more than ``WAITED`` of it."""
    return wait_seconds is not None and wait_seconds > WAITED * burst_seconds


class Watch:
    """Watches the rounds of one measurement in this process.

    Args:
        waited: returns the seconds that threads of this process have waited for a core, or None.
        cores: returns the seconds that cores have worked, those stolen, and the number of cores, or None.
        own: returns the seconds of cores that this process has used.
        timer: returns seconds.
        sleep: sleeps for seconds.

    Attributes:
        undisturbed: of each round, whether each turn had an undisturbed burst.
    """

    def __init__(
        self,
        waited: Callable[[], float | None] = thread_wait_seconds_or_none,
        cores: Callable[[], tuple[float, float, int] | None] = busy_stolen_seconds_and_cores_or_none,
        own: Callable[[], float] = time.process_time,
        timer: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._waited, self._cores, self._own, self._timer, self._sleep = waited, cores, own, timer, sleep
        self._began = timer(), own(), cores()
        # Turns without an undisturbed burst
        self._spoiled = 0
        self.undisturbed: list[bool] = []

    def turn(self, timed_burst: Callable[[], float], burst_count: int) -> float:
        """Return the median seconds of the undisturbed ones of some bursts; where there is none, of a few more."""
        taken: list[float] = []
        clean: list[float] = []
        pauses = iter(PAUSES)
        while len(taken) < burst_count or not clean:
            before = self._waited()
            taken.append(timed_burst())
            after = self._waited()
            if before is None or after is None or not is_burst_disturbed(after - before, taken[-1]):
                clean.append(taken[-1])
                continue
            pause = None if taken[-1] > LONG * burst_count else next(pauses, None)
            if pause is None:
                break
            if pause:
                self._sleep(pause)
        self._spoiled += not clean
        return median(clean or taken)

    def round(self, run_round: Callable[[], T]) -> T:
        """Return what a round returns, and note whether it was undisturbed."""
        spoiled, start, before = self._spoiled, self._timer(), self._cores()
        taken = run_round()
        after, seconds = self._cores(), self._timer() - start
        # A hypervisor's work makes no thread wait
        stolen = after[1] - before[1] if before and after else 0.0
        self.undisturbed.append(self._spoiled == spoiled and stolen <= OTHERS * seconds * (after[2] if after else 1))
        return taken

    def others(self) -> tuple[float, float, int] | None:
        """Return how many cores other work took so far, the hypervisor's part, and how many there are; or None."""
        (start, own_start, before), after = self._began, self._cores()
        seconds = self._timer() - start
        if before is None or after is None or not seconds:
            return None
        took = after[0] - before[0] - (self._own() - own_start) - SLACK
        return max(0.0, took / seconds), (after[1] - before[1]) / seconds, after[2]

    def disturbed(self) -> bool:
        """Whether other work took part of the cores, or, where nothing counts that, disturbed half of the rounds."""
        if other_cores := self.others():
            return other_cores[0] > OTHERS * other_cores[2]
        return 2 * sum(self.undisturbed) < len(self.undisturbed)

    def says(self) -> str:
        """Describe what disturbed."""
        rounds = f"{self.undisturbed.count(False)} of {len(self.undisturbed)} rounds were interrupted"
        if not (other_cores := self.others()):
            return f"other work disturbed the measurement: {rounds}"
        return (
            f"other work took {other_cores[0]:.1f} of {other_cores[2]} cores"
            f"{f' ({other_cores[1]:.1f} the hypervisor)' if other_cores[1] > OTHERS * other_cores[2] else ''}, and "
            f"{rounds}"
        )
