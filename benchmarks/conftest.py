"""What the benchmarks share: the models, and how latency and memory are recorded."""

import platform
from collections.abc import Callable
from functools import cache
from time import perf_counter

import pytest
import torch

import lowmem
from lowmem import measure
from lowmem.testing.memory import THREADS


@pytest.fixture(autouse=True, scope="package")
def threads():
    """Let torch use so many threads in the benchmarks, and in nothing that runs in the same session."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model():
    """Return a variant for inference, built once; who changes a model builds another."""
    return cache(lambda variant: lowmem.build(variant).eval())


@pytest.fixture
def record_memory(benchmark):
    """Record what a model costs to keep, to run and to train on an input."""

    def record(model: torch.nn.Module, x: torch.Tensor) -> None:
        benchmark.extra_info.update(
            theoretical_bytes=measure.theoretical_bytes(model),
            actual_bytes=measure.actual_bytes(model),
            forward_bytes=measure.forward_bytes(model, x),
            backward_bytes=measure.backward_bytes(model, x),
        )

    return record


@pytest.fixture
def timed(benchmark):
    """Time a call, and right before and after it the float32 one that it is compared with."""

    def timed(run: Callable[[], object], reference: Callable[[], object]) -> object:
        if benchmark.disabled:  # memory alone is asked for
            return benchmark(run)
        before = _best_seconds(reference)
        result = benchmark(run)
        benchmark.extra_info["reference_seconds"] = min(before, _best_seconds(reference))
        return result

    return timed


def _best_seconds(run: Callable[[], object], budget: float = 0.1) -> float:
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < budget:
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return min(seconds)


def pytest_benchmark_generate_machine_info():
    """Return what memory and ratios can depend on, and nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": THREADS,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "backend": lowmem.backend(),
    }


def pytest_configure(config):
    """Declare the marker of benchmarks that run where they are asked for."""
    config.addinivalue_line("markers", "every_shape: a shape of many; runs where -m selects it.")


def pytest_collection_modifyitems(config, items):
    """Leave out what runs only where ``-m`` selects it."""
    if "every_shape" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("every_shape")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
