"""The peak of what torch's allocator gives, as its profiler saw it."""

from torch.profiler import ProfilerActivity, profile


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
