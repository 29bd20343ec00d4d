"""A process that runs workloads when it is told to: ``python -m benchmarks.latency.worker``, JSON lines in and out.

With the library of ``marks.c`` as an argument it runs under callgrind, and counts the instructions of workloads.
The process is the base's or the head's by the ``lowmem`` that it imports. It times with code of its own: a base may
lack what the head's ``lowmem.testing`` has.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from time import perf_counter, process_time
from typing import Any, TextIO

import torch

from benchmarks.latency.workloads import counted, workloads

BURSTS = 5  # at most; of a turn's bursts the quickest counts, as what disturbs only adds
LONG = 0.02  # seconds; of a call that takes longer, the first is not much slower than the next
CLOCKS: dict[str, Callable[[], float]] = {"cpu": process_time, "wall": perf_counter}
WARM, CALLS = 40, 20  # of a layer's Python, which Python specializes once it has run some dozen times


def least_seconds(run: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Return seconds per call: of ``calls`` calls, in up to ``BURSTS`` bursts, the least."""
    bursts = min(calls, BURSTS)
    least = float("inf")
    for _ in range(bursts):
        start = clock()
        for _ in range(calls // bursts):
            run()
        least = min(least, (clock() - start) / (calls // bursts))
    return least


def serve(requests: TextIO) -> Iterator[dict[str, Any]]:
    """Answer ``{"set_up": name}`` and ``{"time": name, "calls": n}`` with seconds per call, or an error."""
    known = workloads()
    running: dict[str, Callable[[], object]] = {}
    yield {"workloads": {name: workload.clock for name, workload in known.items()}}
    for line in requests:
        request = json.loads(line)
        name = request.get("set_up") or request["time"]
        try:
            workload = known[name]
            torch.set_num_threads(workload.threads)
            clock = CLOCKS[workload.clock]
            if "set_up" in request:
                running.clear()  # one at a time is held, beside the models that several share
                running[name] = workload.set_up()
                seconds = least_seconds(running[name], 1, clock)  # the first call makes what later ones find
                yield {"seconds": seconds if seconds > LONG else least_seconds(running[name], 1, clock)}
            else:
                run, calls = running[name], request["calls"]
                if calls > 1:
                    run()  # brings its weights back into the caches, which the other sides have used
                yield {"seconds": least_seconds(run, calls, clock)}
        except Exception as error:  # noqa: BLE001 - whatever a side's code raises is its answer
            yield {"error": f"{type(error).__name__}: {error}"}


def count(marks: Any) -> None:
    """Let callgrind dump the instructions of each workload's warm calls, and print the workloads' names."""
    torch.set_num_threads(1)
    gc.disable()  # a collection would fall into one workload or another
    marks.begin()
    for name, set_up in counted().items():
        print(name)  # what was to be counted, whether or not it can be
        warm, calls = (WARM, CALLS) if "Python" in name else (1, 2)
        try:
            run = set_up()
            run()
        except Exception as error:  # noqa: BLE001 - a base that lacks what this needs: the other side may have it
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for _ in range(warm):
            run()
        marks.zero()
        for _ in range(calls):
            run()
        marks.dump(name.encode())


def main() -> None:
    """Serve standard input; what the library prints goes to standard error."""
    if sys.argv[1:]:
        count(ctypes.CDLL(sys.argv[1]))
        return
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for answer in serve(sys.stdin):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
