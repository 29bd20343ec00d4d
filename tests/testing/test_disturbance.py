"""Other work is noticed by counters, which tests make up; what the operating system counts is only read."""

import sys
import threading
from pathlib import Path

import pytest

from lowmem.testing import disturbance
from lowmem.testing.disturbance import (
    PAUSES,
    Watch,
    busy_stolen_seconds_and_cores_or_none,
    is_burst_disturbed,
    thread_wait_seconds_or_none,
)


class Machine:
    """Two cores, on which other work takes ``others`` of each second, and steals ``stolen`` more."""

    def __init__(self, others=0.0, stolen=0.0):
        self.now = self.waited = self.own = 0.0
        self.others, self.stolen, self.slept = others, stolen, []

    def work(self, seconds, waits=0.0):
        """Let this process take a core for some seconds, while its threads wait for a share of them."""
        self.now += seconds
        self.own += seconds
        self.waited += waits * seconds

    def watch(self, **changes):
        def cores():
            return self.own + (self.others + self.stolen) * self.now, self.stolen * self.now, 2

        counters = {"waited": lambda: self.waited, "cores": cores, "own": lambda: self.own, "timer": lambda: self.now}
        return Watch(**(counters | {"sleep": self.slept.append} | changes))

    def burst(self, waits, seconds=0.001):
        """Return a burst whose threads wait for the next of these shares of its seconds."""
        shares = iter(waits)

        def run():
            self.work(seconds, next(shares))
            taken.append(seconds * (1 + len(taken) / 8))
            return taken[-1]

        taken = []
        return run


@pytest.mark.parametrize(
    ("waited", "disturbed"), [(None, False), (0.0, False), (0.019e-3, False), (0.021e-3, True), (1.0, True)]
)
def test_a_burst_is_disturbed_when_threads_waited_for_more_than_a_fiftieth_of_it(waited, disturbed):
    assert is_burst_disturbed(waited, 0.001) is disturbed


@pytest.mark.parametrize(
    ("waits", "takes", "slept"),
    [
        ([0, 0, 0], 1.125, 0),
        ([0, 1, 0], 1.125, 0),  # the mean of the first and the third
        ([1, 1, 0], 1.25, 1),
        ([1, 1, 1, 1, 0.01], 1.5, 3),
    ],
)
def test_a_turn_takes_what_its_undisturbed_bursts_take_and_more_where_there_is_none(waits, takes, slept):
    machine = Machine()
    watch = machine.watch()
    assert watch.round(lambda: watch.turn(machine.burst(waits), 3)) == pytest.approx(takes * 0.001)
    assert (watch.undisturbed, len(machine.slept)) == ([True], slept)


@pytest.mark.parametrize(("seconds", "bursts"), [(0.001, len(PAUSES) + 1), (0.05, 1)])
def test_a_turn_that_stays_disturbed_spoils_its_round_and_a_long_one_at_once(seconds, bursts):
    machine = Machine()
    watch, left = machine.watch(), iter([1.0] * bursts)
    watch.round(lambda: watch.turn(machine.burst(left, seconds), 1))
    watch.round(lambda: watch.turn(machine.burst([0, 0]), 1))
    assert watch.undisturbed == [False, True]
    assert next(left, None) is None


def test_what_a_hypervisor_takes_spoils_a_round_though_no_thread_waits():
    machine = Machine()
    watch = machine.watch()
    for machine.stolen in (0.0, 0.05, 0.3):
        watch.round(machine.burst([0], seconds=1.0))
    assert watch.undisturbed == [True, True, False]


@pytest.mark.parametrize(
    ("others", "stolen", "disturbed", "says"),
    [
        (0.05, 0.0, False, "other work took 0.0 of 2 cores, and 2 of 3 rounds were interrupted"),
        (1.2, 0.0, True, "other work took 1.2 of 2 cores, and 2 of 3 rounds were interrupted"),
        (0.5, 0.5, True, "other work took 1.0 of 2 cores (0.5 the hypervisor), and 3 of 3 rounds were interrupted"),
    ],
)
def test_other_work_is_what_the_cores_did_beyond_this_process(others, stolen, disturbed, says):
    machine = Machine(others, stolen)
    watch = machine.watch()
    for waits in (0, 1, 1):
        watch.round(lambda waits=waits: watch.turn(machine.burst([waits], seconds=1.0), 1))
    assert watch.disturbed() is disturbed
    assert watch.says() == says


@pytest.mark.parametrize(("waits", "disturbed"), [((0, 0, 0, 0), False), ((0, 0, 1, 1), False), ((0, 1, 1, 1), True)])
def test_where_nothing_counts_the_cores_interrupted_rounds_show_other_work(waits, disturbed):
    machine = Machine()
    watch = machine.watch(cores=lambda: None)
    for share in waits:
        watch.round(lambda share=share: watch.turn(machine.burst([share], seconds=1.0), 1))
    assert watch.disturbed() is disturbed
    said = f"other work disturbed the measurement: {sum(waits)} of 4 rounds were interrupted"
    assert watch.says() == said


def test_where_nothing_is_counted_nothing_is_noticed():
    machine = Machine(others=2.0)
    watch = machine.watch(waited=lambda: None, cores=lambda: None)
    watch.round(lambda: watch.turn(machine.burst([1, 1, 1]), 3))
    assert (watch.undisturbed, watch.disturbed(), machine.slept) == ([True], False, [])


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not count waits")
def test_linux_counts_the_waits_of_all_threads_and_of_other_processes(monkeypatch):
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    read = []
    monkeypatch.setattr("builtins.open", lambda path, mode, opened=open: read.append(path) or opened(path, mode))
    try:
        assert thread_wait_seconds_or_none() >= 0
        assert len(read) >= 2
        assert thread_wait_seconds_or_none(1) is None or thread_wait_seconds_or_none(1) >= 0
        assert thread_wait_seconds_or_none(10**9) is None
    finally:
        over.set()
        thread.join()
    assert isinstance(thread_wait_seconds_or_none("self"), float)
    busy, stolen, cores = busy_stolen_seconds_and_cores_or_none()
    assert busy >= stolen >= 0
    assert cores >= 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count switches")
def test_where_waits_are_not_counted_involuntary_switches_are(monkeypatch):
    import resource
    from types import SimpleNamespace

    monkeypatch.setattr(disturbance.os.path, "isdir", lambda path: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=3))
    assert thread_wait_seconds_or_none() == pytest.approx(0.003)
    assert thread_wait_seconds_or_none(1) is None
    monkeypatch.setattr(disturbance.sys, "platform", "win32")
    assert thread_wait_seconds_or_none() is None
    monkeypatch.setattr(disturbance.Path, "is_file", lambda path: False)
    assert busy_stolen_seconds_and_cores_or_none() is None
