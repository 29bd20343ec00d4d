"""Before `lowmem fit` starts, memory is compared with what is left: rows are split, or options that fit are named."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem.__main__ import main
from lowmem.nn.techniques import FourBit
from lowmem.tools import fit_memory
from lowmem.tools.fit_dry_run import plan_and_peak_bytes
from lowmem.tools.fit_memory import available_memory_or_none

GIB = 2**30
MACHINE = f"MemTotal: {64 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MACHINE}, 8 * GIB),
        (
            {
                "proc/meminfo": MACHINE,
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
                "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0\n",
                "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/a/memory.stat": f"active_file 9\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        (
            {
                "proc/meminfo": MACHINE,
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "100\n",
                "sys/fs/cgroup/memory.current": "300\n",
                "sys/fs/cgroup/memory.stat": "",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MACHINE,
                "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
            },
            3 * GIB // 2,
        ),
    ],
    ids=["no linux", "machine", "version 2", "full", "version 1"],
)
def test_what_is_left_is_that_of_the_machine_and_of_all_control_groups(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory_or_none(tmp_path) == expected


@pytest.fixture
def planned(monkeypatch):
    """Let memory be a product of numbers, and note which jobs were measured."""
    measured = []

    def peak(job, is_measured=True):
        size = job.settings.batch_size * job.length * (1 if job.memory_mode == "lean" else 2)
        size *= 1 if isinstance(job.technique, FourBit) else 3
        measured.extend([job] if is_measured else [])
        return None, size * 2**20 * (1 if is_measured else 10)

    monkeypatch.setattr(fit_memory, "plan_and_peak_bytes", peak)
    return measured


def leave(monkeypatch, mib):
    monkeypatch.setattr(fit_memory, "available_memory_or_none", lambda: mib * 2**20)


ARGV = ["fit", "llama", "--data", "text.txt", "--length", "64", "--steps", "1", "--batch-size", "6", "--json"]


def test_rows_of_a_step_are_split_where_memory_does_not_suffice(place, capsys, monkeypatch, planned):
    for mib, size in ((7680, None), (768, 6), (767, 3), (384, 3), (383, 1), (128, 1)):
        leave(monkeypatch, mib)
        planned.clear()
        assert main(ARGV) == 0
        told = capsys.readouterr()
        run = json.loads(told.out)["run"]
        assert (run["batch_size"], run["accumulate"]) == (size or 6, 6 // (size or 6))
        note = f"{size} of 6 rows are computed at a time, which takes {128 * (size or 0):.2f} MiB"
        assert (note in told.err) is (size in (1, 3))
        assert (f"{mib:.2f} MiB of memory are left: a dry run measures" in told.err) is bool(planned) is bool(size)


def test_what_does_not_fit_is_refused_with_the_options_that_fit(place, capsys, monkeypatch, planned):
    lean = ("--memory", "lean")
    cases = {
        (
            127,
            (),
        ): "takes 128.00 MiB of memory, and 127.00 MiB are left: --memory lean takes 64.00 MiB; or add --anyway",
        (60, lean): "takes 64.00 MiB of memory, and 60.00 MiB are left: take a smaller model; or add --anyway to try",
        (100, (*lean, "--format", "int8")): "are left: --format bof4s takes 64.00 MiB; or add --anyway to try",
        (
            1,
            ("--format", "int8"),
        ): "the least is 64.00 MiB, with --memory lean --format bof4s: take a smaller model",
    }
    for (mib, options), text in cases.items():
        leave(monkeypatch, mib)
        assert main([*ARGV, *options]) == 2
        assert text in capsys.readouterr().err.splitlines()[-1], options
    monkeypatch.setattr(fit_memory, "LEAST_LENGTH", 32)
    leave(monkeypatch, 127)
    assert main(ARGV) == 2
    text = "--memory lean takes 64.00 MiB; --length 32 takes 64.00 MiB; --memory lean --length 32 takes 32.00 MiB; or"
    assert text in capsys.readouterr().err
    planned.clear()
    assert main([*ARGV, "--anyway"]) == 0
    assert planned == []


def test_the_bound_that_is_planned_is_above_what_is_measured(place, monkeypatch):
    jobs = []
    monkeypatch.setattr(fit_memory, "available_memory_or_none", lambda: 0)
    monkeypatch.setattr(fit_memory, "plan_and_peak_bytes", lambda job, **named: jobs.append(job) or (None, 1))
    for name in ("bof4s", "dense"):
        assert main(["fit", "llama", "--data", "text.txt", "--format", name, "--length", "64"]) == 2
        for memory in ("plain", "fast"):
            job = replace(jobs[-1], memory_mode=memory)
            bound, measured = (plan_and_peak_bytes(job, is_measured)[1] for is_measured in (False, True))
            assert 0.98 * measured <= bound < 3 * measured, (name, memory)
