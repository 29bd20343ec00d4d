"""``lowmem info`` says what is installed, what it runs on, and which kernel serves it."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem.__main__ import main
from lowmem.kernels import gpu
from lowmem.kernels.threads import usable_cpu_count
from lowmem.tools import info


@pytest.fixture
def told(capsys):
    """Run the command and return what it prints: with --json the object, without it name -> text."""

    def told(*arguments: str):
        assert main(["info", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out) if arguments else {line[:16].strip(): line[16:] for line in out.splitlines()}

    return told


def test_json_tells_versions_processor_and_kernel(told):
    found = told("--json")
    assert found == {
        "lowmem": lowmem.__version__,
        "location": str(Path(lowmem.__file__).parent),
        "python": ".".join(map(str, sys.version_info[:3])),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": found["cpu"],
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "numpy", "safetensors", "rich")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_available": torch.cuda.is_available(),
        "cuda_devices": found["cuda_devices"],
        "backend": lowmem.backend(),
        "cuda_backend": gpu.cuda_backend_description(),
    }


def test_text_tells_the_same_one_fact_a_line(told):
    found, lines = told("--json"), told()
    assert [name.replace(" ", "_") for name in lines] == list(found)
    for name in ("lowmem", "platform", "torch", "cuda_available", "backend"):
        assert lines[name.replace("_", " ")] == str(found[name])


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: A (R) CPU @ 2 GHz\nflags\t: a\n\nmodel name\t: B\n",
            "x",
            "A (R) CPU @ 2 GHz",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64", "aarch64"),
        (None, "arm", "arm"),
        (None, "", None),
    ],
    ids=["Linux", "Linux on ARM", "not Linux", "unknown"],
)
def test_the_cpu_is_named_where_the_system_names_it(told, tmp_path, monkeypatch, cpuinfo, processor, expected):
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: processor)
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert told("--json")["cpu"] == expected
    assert told()["cpu"] == (expected or "unknown")


@pytest.mark.parametrize(
    ("available", "count", "names", "text"), [(True, 2, ["H 0", "H 1"], "H 0, H 1"), (False, 2, [], "none")]
)
def test_cuda_devices_are_named_where_cuda_can_be_used(told, monkeypatch, available, count, names, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"H {n}")
    monkeypatch.setattr(gpu, "cuda_backend_description", lambda: "triton")
    found = told("--json")
    assert (found["cuda_available"], found["cuda_devices"]) == (available, names)
    assert told()["cuda devices"] == text


def test_a_library_without_a_record_of_its_version_is_unknown(told, monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(info, "version", missing)
    assert told("--json")["numpy"] is None
    assert told()["numpy"] == "unknown"
