"""BigNet, layers and QLoRA steps on a GPU, beside PyTorch, bitsandbytes and torchao: ``pytest benchmarks -m cuda``.

A call is timed between two CUDA events, in turns with those it is compared with. A write of 1 GiB before each call
empties the L2 cache. While it runs, the host starts the call, so the GPU's time counts; where the host needs longer
than the write, as for a whole training step, the host's time counts. Each figure is a median. Memory is what torch's
allocator takes beyond the models. Peers that are not installed have no row (``pip install '.[peers]' peft``).
"""

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lowmem
from benchmarks.cases import BATCHES, inference_input
from benchmarks.test_peers import PEERS
from benchmarks.training_steps import WORKLOADS, adapt, load, loss_of
from lowmem.transforms.model_summary import aligned_table_lines

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.filterwarnings("ignore"),  # of peers
]

GPU = torch.device("cuda")
ROUNDS = 30
FLUSHED = 2**30  # bytes: more than the L2 cache of any GPU, and some hundred microseconds
SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008), "11008x4096": (11008, 4096)}  # (in, out)
ROWS = (1, 2, 4, 8, 16, 128, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = {
    "nf4": lambda dtype: lowmem.FourBit("nf4", compute_dtype=dtype),
    "8bit": lambda dtype: lowmem.EightBit(compute_dtype=dtype),
}

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


@pytest.fixture(scope="module")
def row(request):
    """Return a function that adds a row to the table, which is printed at the end."""
    rows = [("benchmark", "what", "ms", "of the first's", "peak MiB", "stored MiB")]
    yield lambda *cells: rows.append(cells)
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    served = lowmem.kernels.gpu.triton_skip_reason_or_none(GPU) or "by triton"
    terminal.section(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {served}")
    for line in aligned_table_lines(rows, right_aligned=(2, 3, 4, 5)):
        terminal.write_line(line)


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median of the GPU's time of each call."""
    for run in list(calls.values()) * 3:  # compiles, and fills the allocator's cache
        run()
    cache = torch.empty(FLUSHED, dtype=torch.int8, device=GPU)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, run in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()
    }


def compare(row: Callable[..., None], title: str, models: dict[str, nn.Module], run: Callable[..., object]) -> None:
    """Add a row for each model; ``run`` calls one."""
    times = milliseconds({name: lambda model=model: run(model) for name, model in models.items()})
    first = next(iter(times.values()))
    for name, model in models.items():
        peak = lowmem.measure.peak_bytes(lambda model=model: run(model), GPU) / 2**20
        stored = lowmem.measure.theoretical_bytes(model) / 2**20
        row(title, name, f"{times[name]:.4f}", f"{times[name] / first:.2f}", f"{peak:.2f}", f"{stored:.2f}")


def of_each(plain: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return a float32 model on the GPU in a dtype: dense, as lowmem stores it, and as peers do."""
    models = {"dense": copy.deepcopy(plain)}
    for name, technique in OURS.items():
        models[name] = lowmem.convert(copy.deepcopy(plain), technique(dtype))
    for name, convert in PEERS.items():
        if installed(name):
            models[name] = convert(copy.deepcopy(plain), dtype)
    return {name: model.to(dtype).to(GPU).eval() for name, model in models.items()}


def installed(name: str) -> bool:
    try:
        pytest.importorskip(name)
    except pytest.skip.Exception:
        return False
    return True


def assert_near(models: dict[str, nn.Module], x: torch.Tensor) -> None:
    expected = models["dense"](x)
    for model in models.values():
        output = model(x)
        assert output.dtype == x.dtype
        assert lowmem.measure.difference(expected, output).relative < 0.15


@by_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_layers(row, shape, dtype):
    torch.manual_seed(0)
    models = of_each(nn.Sequential(nn.Linear(*shape, bias=False)), dtype)
    with torch.no_grad():
        for rows in ROWS:
            x = torch.randn(rows, shape[0], dtype=dtype, device=GPU)
            assert_near(models, x)
            title = f"{shape[0]} x {shape[1]}, {dtype}, {rows} rows"
            compare(row, title, models, lambda model, x=x: model(x))


@by_dtype
def test_bignet(row, dtype):
    torch.manual_seed(0)
    models = of_each(lowmem.BigNet(), dtype)
    with torch.no_grad():
        for batch in BATCHES:
            x = inference_input(batch).to(GPU, dtype)
            assert_near(models, x)
            compare(row, f"BigNet, {dtype}, batch {batch}", models, lambda model, x=x: model(x))


@pytest.mark.parametrize("name", ["bignet16", "bignet128"])
def test_qlora_steps(row, name):
    """PEFT with bitsandbytes is the first, where both are installed; the inputs are those of ``training_steps``."""
    workload = next(one for one in WORKLOADS if one.name == name)
    ways = [*(["peer"] if installed("bitsandbytes") and installed("peft") else []), "own", "fast", "lean"]
    models = {way: adapt(load(workload, way == "peer", Path()), workload, way).to(GPU) for way in ways}
    batch = (inference_input(int(name.removeprefix("bignet"))).to(GPU),)
    optimizers = {}
    for model in models.values():
        optimizers[model] = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4)

    def step(model: nn.Module) -> None:
        loss_of(model, workload, batch).backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    before = {way: float(loss_of(model, workload, batch)) for way, model in models.items()}
    compare(row, f"QLoRA step, {name}", models, step)
    for way, model in models.items():
        assert float(loss_of(model, workload, batch)) < before[way]
