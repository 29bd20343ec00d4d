"""Pages that nothing needs go back to the system after what frees much, and before the process would have to grow."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import resident
from lowmem.resident import HeapTrimmer, drop_mapped_file_pages

needs_pages = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are dropped on Linux only")


@pytest.fixture
def trims(monkeypatch):
    """Return what stands for malloc_trim: it notes how many of the ``watched`` storages are still alive."""

    def trim(_):
        trim.alive.append(sum(one() is not None for one in trim.watched))

    trim.alive, trim.watched = [], []
    monkeypatch.setattr(resident, "_malloc_trim_function_or_none", lambda: trim)
    monkeypatch.setattr(resident, "_SMALL", 1)
    return trim


def dense():
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 24), nn.Linear(24, 24))


def qlora():
    model = lowmem.convert(dense(), lowmem.FourBit("nf4"), lowmem.LoRA(2))
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    return model


CHANGES = {
    "convert": (dense, lambda model: lowmem.convert(model, lowmem.FourBit("nf4"))),
    "calibrate": (dense, lambda model: lowmem.calibrate(model, [torch.arange(50)])),
    "restore": (qlora, lowmem.restore),
    "merge": (qlora, lowmem.merge),
    "merge with a report": (qlora, lambda model: lowmem.merge(model, torch.bfloat16, report=True)),
    "merge_adapter": (qlora, lambda model: lowmem.merge_adapter(model, "default")),
    "delete_adapter": (qlora, lambda model: lowmem.delete_adapter(model, "default")),
}


@pytest.mark.filterwarnings("ignore:merge quantized")
@pytest.mark.parametrize("name", CHANGES)
def test_free_pages_are_returned_when_all_that_the_model_no_longer_holds_is_free(trims, name):
    before, change = CHANGES[name]
    model = before()
    trims.alive.clear()
    trims.watched = [weakref.ref(one.untyped_storage()) for one in model.parameters()]
    gc.disable()
    try:
        result = change(model)
        assert trims.alive == [sum(one() is not None for one in trims.watched)]
    finally:
        gc.enable()
    del result
    assert name == "merge_adapter" or trims.alive < [len(trims.watched)]


def test_loading_returns_free_pages(trims, tmp_path):
    model = qlora()
    lowmem.save(model, tmp_path / "model")
    lowmem.save_adapter(model, tmp_path / "adapter")
    trims.alive.clear()
    lowmem.load(tmp_path / "model", dense)
    lowmem.load_adapter(model, tmp_path / "adapter")
    assert len(trims.alive) == 2


def test_preparing_returns_the_pages_that_its_trials_freed(trims):
    model = lowmem.convert(dense(), lowmem.FourBit("nf4"))
    trims.alive.clear()
    lowmem.prepare_inference(model)
    assert len(trims.alive) == 1


def test_small_models_and_calls_that_fail_return_no_pages(trims, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(resident, "_malloc_trim_function_or_none", lambda: trims)
    lowmem.convert(nn.Linear(511, 1024, bias=False), lowmem.Half(torch.float16))  # 2 KiB less than a megabyte
    assert trims.alive == []
    lowmem.convert(nn.Linear(512, 1024, bias=False), lowmem.Half(torch.float16))
    assert trims.alive == [0]
    with pytest.raises(ValueError, match="no technique"):
        lowmem.convert(nn.Linear(1024, 1024))
    monkeypatch.setattr(resident, "_malloc_trim_function_or_none", lambda: None)  # another C library
    lowmem.convert(nn.Linear(512, 1024), lowmem.Half(torch.float16))
    assert trims.alive == [0]


def test_holes_are_returned_only_before_the_process_grows_beyond_what_it_had_to_be():
    # A heap of 100 MiB in use, with holes that grow: what is resident counts both.
    used, holes, trimmed, mib = 100, 0, [], 2**20

    def trim(_):
        nonlocal holes
        trimmed.append(holes)
        holes = 0

    heap = HeapTrimmer(trim, lambda: (used + holes) * mib)
    heap.trim_if_allocation_raises_peak(3 * mib)  # too little to walk over the heap
    assert trimmed == []
    heap.trim_if_allocation_raises_peak(10 * mib)  # 110 are needed: the mark
    holes = 5
    heap.trim_if_allocation_raises_peak(5 * mib)  # 110 with the holes
    assert trimmed == [0]
    holes = 20
    heap.trim_if_allocation_raises_peak(5 * mib)  # 125 with the holes, 105 without
    assert trimmed == [0, 20]
    used, holes = 60, 40
    heap.trim_if_allocation_raises_peak(10 * mib)  # the mark stayed at 110
    assert trimmed == [0, 20]
    used = 120
    heap.trim_if_allocation_raises_peak(10 * mib)
    used, holes = 110, 15
    heap.trim_if_allocation_raises_peak(5 * mib)  # 130 is the new mark
    assert trimmed == [0, 20, 40]


def mapped_kib(path):
    """Return how much of a mapped file is resident, in KiB."""
    with open("/proc/self/smaps") as maps:
        lines = iter(maps)
        for line in lines:
            if line.rstrip().endswith(str(path)):
                return int(next(one for one in lines if one.startswith("Rss:")).split()[1])
    return 0


@needs_pages
def test_pages_are_dropped_and_read_again(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = torch.arange(2**20, dtype=torch.float32)
    for file in (path, other):
        save_file({"a": values}, file)
    opened = [safe_open(file, framework="pt", device="cpu") for file in (path, other)]
    tensors = [file.get_slice("a")[...] for file in opened]
    for tensor in tensors:
        assert torch.equal(tensor, values)
    assert mapped_kib(path) >= 4096
    drop_mapped_file_pages([path])
    assert mapped_kib(path) == 0
    assert mapped_kib(other) >= 4096
    assert torch.equal(tensors[0], values)


@needs_pages
def test_what_convert_reads_of_a_mapped_file_does_not_stay_resident(tmp_path):
    path = tmp_path / "dense"
    lowmem.save(nn.Sequential(*(nn.Linear(512, 512) for _ in range(2)), nn.LayerNorm(512)), path)
    model = lowmem.load(path, lambda: nn.Sequential(*(nn.Linear(512, 512) for _ in range(2)), nn.LayerNorm(512)))
    held = model[0].weight, model[1].weight
    values = [weight.detach().clone() for weight in held]
    with torch.no_grad():
        held[1][100] = values[1][100] = 3.0
    assert mapped_kib(path) >= 2048
    lowmem.convert(model, lowmem.FourBit("nf4"))
    assert mapped_kib(path) <= 1024 + 16  # the changed weight's, and pages at the edges
    assert all(map(torch.equal, held, values))


STEPS = """
import resource
import torch
from lowmem.resident import raise_heap_trim_threshold

def step():
    activations = [torch.zeros(2**18) for _ in range(40)]  # 1 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

raise_heap_trim_threshold()
step()
first = step()
print((step() - first) / 40)
"""


@pytest.mark.skipif(
    resident._malloc_trim_function_or_none() is None, reason="only glibc returns freed memory at the top of its heap"
)
@pytest.mark.parametrize(("setting", "keeps"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": str(2**20)}, False)])
def test_a_step_gets_the_memory_that_the_step_before_has_freed(setting, keeps):
    """Of 40 MiB next to no page is new; what the user has set stays."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=environment | setting, capture_output=True, text=True, check=True)
    assert (float(done.stdout) < 2) == keeps  # page faults for 1 MiB, which has at least 16 pages
