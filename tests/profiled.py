"""Peaks of memory: what torch's allocator gives, as its profiler saw it, and what a process has."""

import os

from torch.profiler import ProfilerActivity, profile

# For a process whose memory is measured: each thread has a stack and an arena, and torch has one for each core.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def profiled_peak(run) -> int:
    """Replay the allocator's events as torch's own profiler recorded them: the peak of their running sum."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = run()
    del kept
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
