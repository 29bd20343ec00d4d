"""How many threads a product gets: at most the usable CPUs, and fewer while other processes compute."""

import os

import pytest

from lowmem.kernels import cpu
from lowmem.kernels.threads import usable_cpu_count
from lowmem.testing.memory import THREADS
from tests.compiled import needs_kernel

MILLISECOND = 1_000_000
LONGEST = 250 * MILLISECOND  # pause


def system(root, groups, files):
    """Write the files of /proc and /sys that tell a process's quota."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{f}": of for f, of in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {}, 64),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"cpu.max": "200000 100000\n", "a/b/cpu.max": "500000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/../elsewhere\n", {"cpu.max": "400000 100000\n"}, 4),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_usable_cpus_are_within_the_quotas_of_all_groups(tmp_path_factory, monkeypatch, groups, files, cpus):
    """None, those of groups above and of the root, parts of a CPU, a group elsewhere, and both versions."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert usable_cpu_count(system(tmp_path_factory.mktemp("root"), groups, files)) == cpus


def test_usable_cpus_are_within_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cpu_count(system(tmp_path, "0::/\n", {"cpu.max": "400000 100000\n"})) == 2


def test_without_affinity_and_groups_all_cpus_are_usable(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cpu_count(tmp_path) == 12


@needs_kernel
def test_loading_the_kernel_limits_its_threads_to_the_usable_cpus():
    native, _ = cpu.load_native_module_and_reason.__wrapped__()
    assert native.limit_threads(THREADS, False) == usable_cpu_count()


@pytest.fixture
def learned():
    """Call ``learned`` of the kernel, which has learned nothing yet and forgets it afterwards."""
    native = cpu.load_native_module_and_reason()[0]
    if native is None:
        pytest.skip("the kernel is not compiled here")
    native.limit_threads(THREADS, True)
    native.learned(0, 0, 0, 0, 0)
    yield native.learned
    native.learned(0, 0, 0, 0, 0)
    native.limit_threads(THREADS, False)


def test_regions_that_gain_keep_all_threads(learned):
    for end in range(1, 100):
        assert learned(2, 60_000, 100_000, end * 60_000, end * 60_000) == 2


def test_a_rare_interruption_is_outweighed_by_earlier_gains(learned):
    for end in range(1, 5):
        learned(2, 50_000, 100_000, end, end)
    assert learned(2, 250_000, 100_000, 10, 10) == 2  # a loss of 125 microseconds


def test_a_loss_halves_the_threads_for_twice_its_time(learned):
    end = 7 * MILLISECOND
    assert learned(8, 3 * MILLISECOND, 0, end, end) == 4
    at = lambda time, threads: learned(threads, 0, 0, end, time)  # noqa: E731 (nothing lost, nothing gained)
    assert at(end + 6 * MILLISECOND - 1, 8) == 4
    assert at(end + 6 * MILLISECOND, 8) == 8
    assert learned(4, 3 * MILLISECOND, 0, end, end) == 2  # four threads were too many, too
    assert at(end, 1) == 1


def test_failures_in_a_row_pause_twice_as_long_each_time_up_to_a_limit(learned):
    end, pauses = 0, []
    for _ in range(9):
        learned(2, 3 * MILLISECOND, 0, end, end)
        low, high = end, end + 1000 * MILLISECOND
        while low < high:  # the first time at which both threads are tried again
            middle = (low + high) // 2
            low, high = (middle + 1, high) if learned(2, 0, 0, end, middle) == 1 else (low, middle)
        pauses.append((low - end) // MILLISECOND)
        end = low
    assert pauses == [6, 12, 24, 48, 96, 192, 250, 250, 250]
    later = end + LONGEST + 1  # by then all threads were used for longer than they paused
    assert learned(2, 3 * MILLISECOND, 0, later, later + 6 * MILLISECOND - 1) == 1
    assert learned(2, 0, 0, later, later + 6 * MILLISECOND) == 2


def test_a_process_that_was_stopped_pauses_for_a_moment_only(learned):
    learned(2, 10**13, 0, 0, 0)
    assert learned(2, 0, 0, 0, 20 * MILLISECOND) == 2
