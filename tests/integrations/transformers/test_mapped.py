"""Pages of a mapped file that were read are given back, and read again."""

import sys

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem.integrations.transformers.mapped import drop_pages


def resident(path):
    """Return how much of a mapped file is resident, in KiB."""
    with open("/proc/self/smaps") as maps:
        lines = iter(maps)
        for line in lines:
            if line.rstrip().endswith(str(path)):
                return int(next(one for one in lines if one.startswith("Rss:")).split()[1])
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are dropped on Linux only")
def test_pages_are_dropped_and_read_again(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = torch.arange(2**20, dtype=torch.float32)
    for file in (path, other):
        save_file({"a": values}, file)
    opened = [safe_open(file, framework="pt", device="cpu", backend="mmap") for file in (path, other)]
    tensors = [file.get_slice("a")[...] for file in opened]
    for tensor in tensors:
        assert torch.equal(tensor, values)
    assert resident(path) >= 4096
    drop_pages([path])
    assert resident(path) == 0
    assert resident(other) >= 4096
    assert torch.equal(tensors[0], values)
