"""The backend of GPUs: when Triton serves, and why it does not. ``tests/kernels/triton`` has values."""

import ast
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import lowmem
from lowmem import AdamW8bit, EightBit, FourBit, LoRA, add_adapter, convert, kernels, quantize
from lowmem.kernels import gpu, reference
from lowmem.quant.backend import backend_for, set_backend
from lowmem.quant.tensor import cuda_memory_bytes_or_zero, device_scratch_bytes
from tests.gpu_steps import UPDATE, gpu_backend_on_cpu, record, record_step
from tests.nn.stored_cases import CASES, store

CPU = torch.device("cpu")
WITH_OFFSETS = FourBit("int4", 16, offsets=True)


@pytest.fixture(autouse=True)
def asked_again():
    """Let every test ask for itself whether Triton serves."""
    ask = gpu.triton_skip_reason_or_none
    ask.cache_clear()
    yield
    ask.cache_clear()


@pytest.fixture
def started(monkeypatch):
    """Let Triton serve every device, with kernels that do nothing; return the names of those that were started."""
    names = []

    def launch(name):
        return lambda *arguments: lambda: names.append(name)

    launched = {"small_batch_product_launch": "few", "dequantize_launch": "dequantize", "quantize_launch": "quantize"}
    launches = SimpleNamespace(**{function: launch(name) for function, name in launched.items()})
    monkeypatch.setattr(gpu, "triton_skip_reason_or_none", lambda device: None)
    monkeypatch.setattr(gpu, "_import_triton_launch", lambda: launches)
    return names


def calls_of(tree, *names):
    """Return the calls in a piece of source that are of functions with these names."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in names]


def refuse():
    raise RuntimeError("Failed to find C compiler.\nmore")


def test_it_serves_cuda_and_imports_triton_when_a_tensor_asks():
    assert isinstance(backend_for("cuda"), gpu.GpuBackend)
    assert backend_for("cuda").name == "triton"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "triton cannot be imported (import of triton halted; None in sys.modules): pip install 'triton>=3.6'"),
        ("3.5.1", "triton 3.5.1 is too old: lowmem's kernels need 3.6"),
        ("3.6.0", "triton 3.6.0 does not run on cpu: Failed to find C compiler."),
    ],
)
def test_why_triton_does_not_serve_is_said(version, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))
    monkeypatch.setattr(gpu, "_import_triton_launch", lambda: SimpleNamespace(dequantize_launch=lambda *_: refuse))
    gpu.triton_skip_reason_or_none.cache_clear()
    assert gpu.triton_skip_reason_or_none(CPU) == says
    q, x = quantize(torch.randn(6, 40), "nf4", block_size=16), torch.randn(3, 40)
    backend = gpu.GpuBackend()
    assert backend.explain(q, 3, torch.float32) == f"{reference.explain(q, 3, torch.float32)}\n  not triton: {says}"
    assert torch.equal(backend.linear(x, q, torch.float32), reference.linear(x, q, torch.float32))
    assert torch.equal(backend.dequantize(q, slice(1, 3), torch.half), q.dequantize(torch.half)[1:3])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
    ids=["torch", "triton", "host"],
)
def test_lack_of_memory_is_raised_and_not_remembered(error, monkeypatch):
    errors = [error]

    def start():
        if errors:
            raise errors.pop()

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(gpu, "_import_triton_launch", lambda: SimpleNamespace(dequantize_launch=lambda *_: start))
    with pytest.raises(type(error)):
        gpu.triton_skip_reason_or_none(CPU)
    assert gpu.triton_skip_reason_or_none(CPU) is None


class TritonError(Exception):
    """The base of Triton's errors, which is not installed."""


class SharedMemoryError(TritonError):
    pass


@pytest.mark.parametrize("kernel", ["few", "dequantize", "quantize"])
def test_a_kernel_that_does_not_compile_is_remembered_and_no_other_is(kernel, monkeypatch):
    monkeypatch.setattr(gpu, "_refused_kernels", refused := {})
    weight, few, many, names = torch.randn(96, 128), torch.randn(3, 128), torch.randn(70, 128), []

    def start(launch):
        names.append(launch.name)
        if launch.name == kernel:
            raise SharedMemoryError("shared memory\nmore")

    def results(backend):
        q = quantize(weight, "nf4", block_size=64, search=False)
        grad, out = many[:, :96].contiguous(), torch.ones(70, 128)
        backend.add_product(out, grad, q, transposed=True)
        products = [backend.linear(x, q, torch.float32) for x in (few, many)]
        return q.packed, *products, backend.input_grad(grad, q, torch.float32), out

    with kernels.temporary_cpu_backend("reference"):
        expected = results(reference)
    with gpu_backend_on_cpu(start):
        for _ in range(2):
            for found, wanted in zip(results(backend_for("cpu")), expected, strict=True):
                torch.testing.assert_close(found, wanted)
        explained = backend_for("cpu").explain(quantize(weight, "nf4", block_size=64), 3, torch.float32)
    assert names.count(kernel) == 1
    assert refused == {(kernel, CPU): "SharedMemoryError: shared memory"}
    assert set(names) == {"few", "dequantize", "quantize"}
    assert (f"not {kernel} of triton: SharedMemoryError: shared memory" in explained) == (kernel != "quantize")
    monkeypatch.setattr(gpu, "triton_skip_reason_or_none", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert gpu.cuda_backend_description().endswith(f"; not {kernel} on cpu: SharedMemoryError: shared memory")


def test_errors_of_a_device_are_raised_and_not_remembered(monkeypatch):
    monkeypatch.setattr(gpu, "_refused_kernels", refused := {})
    q = quantize(torch.randn(96, 128), "nf4", block_size=64, search=False)
    for text in ("Triton Error [CUDA]: out of memory", "an illegal memory access was encountered"):
        launch = Mock(side_effect=RuntimeError(text))
        with gpu_backend_on_cpu(launch), pytest.raises(RuntimeError, match=re.escape(text)):
            backend_for("cpu").linear(torch.randn(3, 128), q, torch.float32)
    assert refused == {}


def test_a_version_that_runs_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.10.0+git1"))
    monkeypatch.setattr(
        gpu, "_import_triton_launch", lambda: SimpleNamespace(dequantize_launch=lambda *_: lambda: None)
    )
    assert gpu.triton_skip_reason_or_none(CPU) is None


def test_what_serves_is_described(started, monkeypatch):
    assert (
        torch.cuda.is_available()
        or gpu.cuda_backend_description() == f"none: torch finds no GPU (triton's kernels: {gpu.PROOF})"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert gpu.cuda_backend_description() == (
        "triton: values proven in Triton's interpreter; speed not measured; not measured against bitsandbytes or "
        "Unsloth: take one of these to train on a GPU"
    )
    monkeypatch.setattr(gpu, "triton_skip_reason_or_none", lambda device: f"no {device}")
    assert gpu.cuda_backend_description() == "reference: no cuda:0"


def test_explain_says_which_kernel_multiplies_and_why_not_another(started):
    backend, q = gpu.GpuBackend(), quantize(torch.randn(6, 40), "nf4", block_size=16)
    rest = f"triton dequantizes rows (columns for input_grad) in chunks and torch multiplies; {gpu.PROOF}"
    few = f"linear: few of triton, which takes 1 to 8 rows; {gpu.PROOF}"
    assert backend.explain(q, 8, torch.bfloat16) == f"{few}\ninput_grad: {rest}"
    offsets = quantize(torch.randn(6, 40), "uint4", block_size=16)
    for weight, rows, dtype, takes in (
        (q, 9, torch.float32, "1 to 8 rows"),
        (q, 1, torch.int8, "other dtypes"),
        (offsets, 1, torch.float32, "weights without offsets"),
    ):
        shown = f"linear, input_grad: {rest}\n  not few of triton, which takes {takes}"
        assert backend.explain(weight, rows, dtype) == shown
    half = torch.randn(6, 40).half()
    assert backend.explain(half, 1, torch.half).endswith("\n  not triton: it takes 4- and 8-bit weights")


def test_wrapped_traced_and_16_bit_tensors_are_left_to_plain_torch(started):
    backend, q, x = gpu.GpuBackend(), quantize(torch.randn(6, 40), "nf4", block_size=16), torch.randn(3, 40)
    half = torch.randn(6, 40).half()
    assert torch.equal(backend.linear(x, half, torch.float32), reference.linear(x, half, torch.float32))
    expected = reference.linear(x, q, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert backend.linear(torch.randn(3, 40), q, torch.float32).shape == expected.shape
    assert started == []
    backend.linear(torch._neg_view(x), q, torch.float32)  # which dequantized rows are multiplied by
    backend.linear(x, q, torch.float32)
    backend.linear(x, q, torch.float32, torch.randn(1))  # a bias that is broadcast
    assert started == ["dequantize", "few", "dequantize"]


@pytest.fixture
def on_meta(started, monkeypatch):
    """Let the GPU's backend serve the meta device, where a value that is asked for, and a shape that depends on one,
    is an error; return the names of the started kernels."""
    before = backend_for("meta")
    set_backend("meta", gpu.GpuBackend())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device does not have
    yield started
    set_backend("meta", before)


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize(
    "technique", [FourBit("nf4", 64), FourBit("nf4", 64, embeddings="4bit"), EightBit(), WITH_OFFSETS]
)
def test_layers_ask_for_no_value_and_start_one_kernel_for_each_product(technique, batch, on_meta):
    layer, table = (
        convert(one, technique).to("meta") for one in (torch.nn.Linear(64, 128), torch.nn.Embedding(50, 64))
    )
    on_meta.clear()
    assert table(torch.zeros(3, 7, dtype=torch.int64, device="meta")).shape == (3, 7, 64)
    layer(torch.randn(batch, 64, device="meta", requires_grad=True)).sum().backward()
    fused = batch == 1 and technique is not WITH_OFFSETS
    assert on_meta == ["dequantize", "few" if fused else "dequantize", "dequantize"]


@pytest.mark.parametrize("case", CASES.values())
def test_products_gathers_and_convolutions_ask_for_no_value(case, on_meta):
    x = case.make_input()
    x = x.to("meta").requires_grad_(x.is_floating_point())
    out = case.function(x, store(torch.randn(case.weight), "nf4", case.lead).to("meta"))
    if x.requires_grad:
        out.sum().backward()
    assert {"few", "dequantize"} & {*on_meta}


@pytest.mark.parametrize("padding", [None, 1])
def test_bags_of_rows_ask_for_no_value(padding, on_meta):
    bag = convert(torch.nn.EmbeddingBag(50, 64, mode="mean", padding_idx=padding), FourBit("nf4", 64)).to("meta")
    on_meta.clear()
    assert bag(torch.zeros(3, 7, dtype=torch.int64, device="meta")).shape == (3, 64)
    assert on_meta == ["dequantize"]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has grouped_mm since 2.10")
def test_experts_ask_for_no_value(on_meta):
    """Their groups are cut into blocks of at most 3 rows."""
    x, ends = torch.randn(10, 64, device="meta", requires_grad=True), torch.empty(4, dtype=torch.int32, device="meta")
    experts = store(torch.randn(4, 128, 64), "nf4").to("meta")
    F.grouped_mm(x, experts.mT, offs=ends).sum().backward()
    assert {*on_meta} == {"few", "dequantize"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW8bit])  # the first one is that of ``fit``
def test_adapters_and_optimizers_ask_for_no_value(dtype, optimizer, on_meta):
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(2)))
    model = convert(model, FourBit("nf4", 64, compute_dtype=dtype), LoRA(16)).to("meta")
    trained = [one for one in model.parameters() if one.requires_grad]
    update = optimizer(trained)
    for batch in (1, 9):
        model(torch.randn(batch, 256, device="meta")).sum().backward()
        assert all(one.grad is not None for one in trained)
        update.step()
    assert "dequantize" in on_meta


TRACED = {
    "product_4bit": (lambda: torch.nn.Linear(64, 128), torch.randn(3, 64)),
    "dequantize_rows": (lambda: torch.nn.Embedding(50, 64), torch.zeros(3, 7, dtype=torch.int64)),
    "convolve": (lambda: torch.nn.Conv2d(64, 32, 3, groups=2), torch.randn(2, 64, 8, 8)),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", [*TRACED])
def test_graphs_hold_operators_that_have_kernels_for_gpus(name, adapted):
    """Of torch.compile, without a break, and of torch.export; a value that is asked for would be an error."""
    make, x = TRACED[name]
    model = convert(torch.nn.Sequential(make()), FourBit("nf4", 64, embeddings="4bit"))
    if adapted:
        add_adapter(model, "a", LoRA(4), where=lambda *_: True)
    model = model.requires_grad_(False).to("meta")  # torch for CPUs has no gradients of fake tensors on a GPU
    graphs = []

    def keep(graph, _):
        graphs.append(graph.graph)
        return graph

    def compile_in_mode(graph, inputs):
        with TracingContext.patch(fake_mode=mode):  # torch 2.9 takes no fake tensors of another mode than this
            return aot_autograd(fw_compiler=keep)(graph, inputs)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model.to_empty(device="cuda")
        x = torch.empty(x.shape, dtype=x.dtype, device="cuda")
        graphs.append(torch.export.export(model, (x,)).graph)
        torch._dynamo.reset()
        torch.compile(model, backend=compile_in_mode, fullgraph=True)(x)
    for graph in graphs:
        assert f"lowmem.{name}.default" in {str(node.target) for node in graph.nodes}
    assert len(graphs) == 2
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowmem::{name}", "CUDA")


@pytest.mark.parametrize("batch", [1, 8, 9, 600])
def test_a_product_starts_one_kernel_or_one_for_each_chunk(batch, started, monkeypatch):
    """A million weights are one chunk on a GPU. On the CPU, which the test takes, a chunk is 1 MiB of scratch."""
    q = quantize(torch.randn(1024, 256), "nf4", block_size=64)
    backend, x, grad = gpu.GpuBackend(), torch.randn(batch, 256), torch.randn(batch, 1024)
    chunks = 1024 * 256 * 18 // 2**20 + 1
    started.clear()
    backend.linear(x, q, torch.float32)
    assert started == (["few"] if batch <= 8 else ["dequantize"] * chunks)
    started.clear()
    backend.input_grad(grad, q, torch.float32)
    assert started == ["dequantize"]  # columns of all rows: no cache of a processor
    monkeypatch.setattr(gpu, "device_scratch_bytes", lambda device: 1024 * 4 * 100)  # 64 columns
    started.clear()
    backend.input_grad(grad, q, torch.float32)
    assert started == ["dequantize"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["nf4", "int8", "bfloat16"])
def test_the_gradient_of_inputs_is_one_product_in_their_dtype(dtype, stored, monkeypatch):
    """By columns of the weight, in several chunks: each number within one rounding of the float64 product."""
    monkeypatch.setattr(gpu, "device_scratch_bytes", lambda device: 70 * 2 * 100)
    dense, grad = torch.randn(70, 300), torch.randn(40, 70).to(dtype)
    weight = dense.bfloat16() if stored == "bfloat16" else quantize(dense, stored, block_size=16)
    exact = (weight.to(dtype) if stored == "bfloat16" else weight.dequantize(dtype)).double()
    base = torch.randn(40, 300).to(dtype)
    with gpu_backend_on_cpu():
        found = kernels.input_grad(grad, weight, dtype)
        added = kernels.add_product(base.clone(), grad, weight, True)
    magnitudes = grad.double().abs() @ exact.abs()
    for got, expected, terms in (
        (found, grad.double() @ exact, magnitudes),
        (added, base.double() + grad.double() @ exact, magnitudes + base.double().abs()),
    ):
        assert got.dtype is dtype
        unit = torch.finfo(dtype).eps / 2
        assert ((got.double() - expected).abs() <= 1.01 * unit * expected.abs() + 72 * 2**-24 * terms).all()


def test_rows_that_plain_torch_refuses_are_refused(started):
    backend, q = gpu.GpuBackend(), quantize(torch.randn(6, 40), "nf4", block_size=16)
    x = torch.randn(3, 40)
    with pytest.raises(RuntimeError, match="must end in in_features=40"):
        backend.linear(torch.randn(3, 41), q, torch.float32)
    for bias in (torch.randn(5), torch.randn(2, 6)):
        with pytest.raises(RuntimeError, match="must match|doesn't match"):
            backend.linear(x, q, torch.float32, bias)
    assert "few" not in started
    started.clear()
    with pytest.raises(ValueError, match="NaN"):
        backend.quantize_rows(torch.full((6, 40), torch.nan), q, slice(None), None)
    assert started == []


def test_kernels_multiply_no_tiles_and_sum_only_what_starts_as_float32():
    """Triton's interpreter is wrong for ``tl.dot`` and for sums of bfloat16, so it could not prove them."""
    files = sorted((Path(gpu.__file__).parent / "triton").glob("*.py"))
    trees = {path.stem: ast.parse(path.read_text()) for path in files}
    refused = ("tl.dot", "tl.dot_scaled", "tl.reduce", "tl.cumsum", "tl.associative_scan")
    assert [name for name, tree in trees.items() if calls_of(tree, *refused) or "bfloat16" in ast.dump(tree)] == []
    functions = [one for tree in trees.values() for one in tree.body if isinstance(one, ast.FunctionDef)]
    summing = [one for one in functions if calls_of(one, "tl.sum")]
    assert [one.name for one in summing] == ["few"]
    for function in summing:
        assigned = [one for one in ast.walk(function) if isinstance(one, ast.Assign)]
        zeros = {ast.unparse(one.targets[0]) for one in assigned if calls_of(one.value, "tl.zeros")}
        assert all(ast.unparse(one.args[1]) == "tl.float32" for one in calls_of(function, "tl.zeros"))
        for call in calls_of(function, "tl.sum"):
            assert {one.id for one in ast.walk(call.args[0]) if isinstance(one, ast.Name)} & zeros


def assert_product_on(device):
    """Hold a layer's output and gradient on a GPU to those on the CPU; inputs arrive behind long work there."""
    torch.manual_seed(0)
    layer, x = convert(torch.nn.Linear(64, 128), FourBit("nf4", 64)), torch.randn(3, 64, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    layer, given, busy = layer.to(device), torch.zeros(3, 64, device=device), torch.ones(4096, 4096, device=device)
    for _ in range(8):
        busy = busy @ busy / 4096
    given.copy_(x.detach().to(device) * busy[0, 0])
    given.requires_grad_()
    found = layer(given)
    (got,) = torch.autograd.grad(found.sum(), given)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.cpu(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_another_device_than_the_current_one_computes():
    with torch.cuda.device(0):
        assert_product_on(torch.device("cuda", 1))
        assert torch.cuda.current_device() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_another_stream_than_the_default_one_computes():
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_product_on(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [3, 40])
def test_steps_do_not_wait_for_a_gpu_and_a_graph_captures_them(batch):
    layer, x = convert(torch.nn.Linear(64, 128), FourBit("nf4", 64)).cuda(), torch.randn(batch, 64, device="cuda")
    x.requires_grad_()

    def step():
        out = layer(x)
        return out.detach(), *torch.autograd.grad(out.sum(), x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


def test_readme_and_documentation_say_what_is_proven():
    root = Path(gpu.__file__).parents[2]
    for page in ("README.md", "docs/kernels.md"):
        assert gpu.PROOF in " ".join((root / page).read_text(encoding="utf8").split()).replace("Values", "values")


def test_chunks_are_those_of_a_device_and_not_of_a_processor_s_cache(monkeypatch):
    """A loss of 600 rows, an update of 300,000 elements, and saved tensors have one chunk each."""
    hidden, weight = torch.randn(600, 8, requires_grad=True), torch.randn(5000, 8).bfloat16()
    parameter = torch.nn.Parameter(torch.randn(1000, 300))
    parameter.grad, optimizer = torch.randn(1000, 300), AdamW8bit([parameter])
    optimizer.step()
    loss = record(lambda: lowmem.linear_cross_entropy(hidden, weight, torch.arange(600)))
    assert (loss.kernels["_log_softmax"], loss.kernels["mm"]) == (1, 2)
    assert record(optimizer.step).kernels == record_step(UPDATE).kernels
    device = torch.device("cuda", 7)
    assert device_scratch_bytes(device) == 144 * 2**20
    cuda_memory_bytes_or_zero.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    try:
        assert device_scratch_bytes(device) == 80 * 2**30 // 64
    finally:
        cuda_memory_bytes_or_zero.cache_clear()
