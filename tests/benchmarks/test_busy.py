"""The benchmark beside busy processes: what it takes the mean of, and what it leaves behind."""

import os
import subprocess
import sys

import pytest

from benchmarks import busy


@pytest.fixture
def started(monkeypatch):
    """Collect the processes that are started: they sleep, and nothing waits for them to compute."""
    found = []

    class Process(subprocess.Popen):
        def __init__(self, arguments):
            super().__init__([*arguments[:2], "import time; time.sleep(600)"])
            found.append(self)

    monkeypatch.setattr(busy.subprocess, "Popen", Process)
    monkeypatch.setattr(busy, "SETTLED", 0)
    return found


def test_means_are_of_all_calls_and_neighbours_end(started, monkeypatch):
    times = {"dense": iter([9, 1, 3, 3, 5]), "nf4": iter([9, 2, 8, 2, 10])}  # a warm-up, then quiet and busy in turns
    monkeypatch.setattr(busy, "measure", lambda call, seconds: (2, call()) if seconds else None)
    calls = {name: lambda own=own: next(own) for name, own in times.items()}
    assert busy.means(calls, 3, 1.0, 2) == {"dense": (1.0, 2.0), "nf4": (1.0, 4.5)}
    assert len(started) == 6
    assert all(process.returncode is not None for process in started)


def test_calls_are_counted_until_the_time_is_over_and_the_table_tells_the_slowdown(started, monkeypatch, capsys):
    calls, seconds = busy.measure(lambda: None, 0.001)
    assert calls >= 1
    assert seconds >= 0.001
    monkeypatch.setattr(busy, "WORKLOADS", {"sums": {"dense": lambda: lambda: sum(range(99))}})
    monkeypatch.setattr(busy, "means", lambda calls, *given: dict.fromkeys(calls, (0.001, 0.0025)))
    assert busy.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| sums | dense | 1.00 | 2.50 | 2.5 |"


@pytest.mark.skipif(os.name != "posix", reason="processes of Windows keep the number of a parent that has ended")
def test_what_keeps_a_core_busy_ends_with_its_parent_that_is_killed():
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
