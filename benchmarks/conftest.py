"""How the benchmarks record and show latency."""

import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
import torch

import lowmem
from lowmem.testing.memory import THREADS
from lowmem.transforms.model_summary import aligned_table_lines


@pytest.fixture(autouse=True, scope="package")
def threads():
    """Let torch use so many threads in the benchmarks, and in nothing that runs in the same session."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


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


class Ratios:
    """Shows the latency of each benchmark as a ratio to its reference in the same run, beside the stored ratio."""

    def __init__(self) -> None:
        self.now: dict[str, tuple[float, float]] = {}  # seconds and ratio, by the benchmark's name
        self.stored: dict[str, float] = {}

    def pytest_benchmark_group_stats(self, benchmarks):
        for bench in benchmarks:
            reference = bench["extra_info"].get("reference_seconds")
            if reference and bench["path"] is None:
                self.now[bench["fullname"]] = bench["min"], bench["min"] / reference
            elif reference:  # of a run that is compared with
                self.stored[bench["fullname"]] = bench["min"] / reference

    def pytest_terminal_summary(self, terminalreporter):
        if not self.now:
            return
        rows = [("benchmark", "min ms", "ratio", "stored")]
        for name, (seconds, ratio) in self.now.items():
            stored = f"{self.stored[name]:.2f}" if name in self.stored else "-"
            rows.append((name.partition("::test_")[2], f"{1e3 * seconds:.2f}", f"{ratio:.2f}", stored))
        terminalreporter.section("latency, as a ratio to the reference in the same run")
        for line in aligned_table_lines(rows, right_aligned=(1, 2, 3)):
            terminalreporter.write_line(line)


def pytest_configure(config):
    config.pluginmanager.register(Ratios(), "benchmark-ratios")


def pytest_collection_modifyitems(config, items):
    """Leave out what measures a GPU unless ``-m cuda`` asks for it; and without times what measures no memory."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    left_out = [] if "cuda" in config.option.markexpr else [one for one in here if one.get_closest_marker("cuda")]
    if config.option.benchmark_disable:
        left_out = [item for item in here if "memory_gate" not in item.fixturenames]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
