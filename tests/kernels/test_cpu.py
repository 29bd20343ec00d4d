"""How the compiled kernel is called: threads, scratch, what it remembers of a weight, and what it refuses to read."""

import copy
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import product

import pytest
import torch

from lowmem import FourBit, Half, LoRA, QuantizedTensor, convert, kernels, measure, quantize
from lowmem.kernels import cpu, reference, tensor_checks
from lowmem.quant import backend
from tests import strategies
from tests.compiled import (
    ISAS,
    assert_close_in,
    assert_exact,
    assert_same_bytes,
    bound,
    compiled,
    compiled_bfloat16,
    needs_kernel,
    no_plain_rows,
    on_threads,
    stored,
)
from tests.kernels.test_kernels import run_python
from tests.selection import covering

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

PRODUCTS = {"linear": 10, "input_grad": 6, "dequantize": 8}


@compiled_bfloat16
def test_threads_change_no_bit_of_anything(isa):
    q = quantize(strategies.make_weight("normal", (301, 520), 0, 0))
    x = strategies.make_weight("normal", (100, 520), 0, 1)
    grad = strategies.make_weight("normal", (100, 301), 0, 2)
    a, b = strategies.make_weight("normal", (130, 520), 0, 3), strategies.make_weight("normal", (301, 130), 0, 4)
    large = strategies.make_weight("normal", (301, 900), 0, 5)
    wide, wide_x = strategies.make_weight("normal", (77, 8190), 0, 6), torch.randn(30, 8190)
    wide_weights, wide_grad = (quantize(wide), wide.half()), torch.randn(30, 77)
    results = []
    for count in (1, 2, 3, 7, 16, 64):
        with on_threads(count), kernels.temporary_cpu_backend(isa):
            made = [quantize(large, scales="double").packed, quantize(large).dequantize()]
            made += [quantize(large, "bof4s", search=True).scales]
            for batch in (1, 4, 6, 12, 13, 40, 100):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    made.append(kernels.linear(x[:batch].to(dtype), q, dtype))
                    made.append(kernels.input_grad(grad[:batch].to(dtype), q, dtype))
            made += [kernels.linear(x[:n], q, torch.int8) for n in (2, 9, 70)]
            for w, n, dtype in product(wide_weights, (3, 8, 25, 30), (torch.float32, torch.bfloat16, torch.float16)):
                made.append(kernels.linear(wide_x[:n].to(dtype), w, dtype))
                made.append(kernels.input_grad(wide_grad[:n].to(dtype), w, dtype))
            made.append(kernels.add_low_rank(grad[:3].contiguous(), x[:3].contiguous(), a, b, 0.5))
            made += [kernels.linear(x[:n].contiguous(), q, torch.float32, None, (a, b, 0.5)) for n in (3, 12)]
            results.append(made)
    assert all(torch.equal(one, other) for made in results for one, other in zip(made, results[0], strict=True))


@bound
def test_what_is_remembered_of_a_weight_follows_it(isa):
    """Changed in place, moved, copied, or shared between ISAs: the product is that of its values."""
    q = quantize(strategies.make_weight("normal", (12, 64), 0, 0))
    other = quantize(strategies.make_weight("normal", (12, 64), 0, 1))
    x = torch.randn(2, 64)
    with kernels.temporary_cpu_backend(isa):
        assert_exact(kernels.linear(x, q, torch.float32), x, q.dequantize())
        twins = copy.deepcopy(q), pickle.loads(pickle.dumps(q))
        q.packed.copy_(other.packed)
        q.scales.copy_(other.scales)
        assert_exact(kernels.linear(x, q, torch.float32), x, other.dequantize())
        for twin in twins:
            assert_exact(kernels.linear(x, twin, torch.float32), x, twin.dequantize())
            assert not torch.equal(twin.packed, q.packed)
        q.packed.data = twins[0].packed.clone()
        q.scales.data = twins[0].scales.clone()
        assert_exact(kernels.linear(x, q, torch.float32), x, twins[0].dequantize())
    with kernels.temporary_cpu_backend("portable"):
        assert_exact(kernels.linear(x, q, torch.float32), x, q.dequantize())


@bound
@covering(
    kind=["half", "bfloat16", "nf4", "int8", "uint4"],  # the last has offsets
    given=[torch.float32, torch.bfloat16, torch.float16],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_products_are_computed_in_the_dtype_that_is_asked_for_whatever_the_input_s(isa, kind, given, dtype):
    w, dense = stored(kind, strategies.make_weight("normal", (12, 64), 0, 0))
    x, grad = torch.randn(20, 64).to(given), torch.randn(20, 12).to(given)
    with kernels.temporary_cpu_backend(isa):
        factors = (kernels.linear, x, dense.double().t()), (kernels.input_grad, grad, dense.double())
        for multiply, rows, factor in factors:
            got = multiply(rows, w, dtype)
            off = (got.double() - rows.double() @ factor).abs()
            assert (off <= 0.03 * rows.double().abs() @ factor.abs()).all()  # of three roundings to bfloat16
            assert got.dtype is dtype
            assert torch.equal(got, multiply(rows.to(dtype), w, dtype))


# To make them takes longest.
normal = lru_cache(maxsize=4)(partial(strategies.make_weight, "normal", exponent=0, seed=0))
of_normal = lru_cache(maxsize=16)(lambda kind, shape: stored(kind, normal(shape=shape))[0])


@pytest.mark.thorough
@bound
@covering(
    1,
    sizes=[
        *(
            (*shape, *work)
            for shape in ((4096, 256), (1024, 1280))
            for work in ((8, 4), (100, 2), (64, 4), (240, 4), (64, 8), (512, 8), (512, 16), (512, 18))
        ),
        *((64, 28672, *work) for work in ((4, 2), (16, 1), (8, 4), (64, 4), (512, 16))),
        *((2048, 2304, *work) for work in ((13, 18), (64, 17), (64, 18), (130, 18))),
        *((512, 8200, *work) for work in ((12, 18), (128, 14), (128, 18))),
    ],
    kind=["half", "bfloat16", "nf4"],
)
def test_scratch_of_gradients_and_products_of_every_dtype_stays_within_a_mebibyte(isa, sizes, kind):
    """Where torch multiplies, it is 768 rows or columns of the weight at most."""
    rows, columns, batch, threads = sizes
    w = of_normal(kind, (rows, columns))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, grad = normal(shape=(batch, columns)).to(dtype), normal(shape=(batch, rows)).to(dtype)
        with on_threads(threads), kernels.temporary_cpu_backend(isa):
            forward = measure.peak_bytes(lambda x=x, dtype=dtype: kernels.linear(x, w, dtype))
            backward = measure.peak_bytes(lambda grad=grad, dtype=dtype: kernels.input_grad(grad, w, dtype))
            tried = backend.backend_for().tried_kernels
            takes = [tried(w, batch, dtype, name)[-1][1] for name in ("linear", "input_grad")]
        chunk = 768 * dtype.itemsize  # of each column, or each row in the gradient
        assert forward <= (chunk * columns if takes[0] == "torch" else 2**20) + batch * rows * dtype.itemsize
        assert backward <= (chunk * rows if takes[1] == "grad_torch" else 2**20) + batch * columns * dtype.itemsize


@bound
@covering(
    1,
    shape=[(64, 8192), (64, 28672), (256, 4096), (3000, 4224)],
    kind=["half", "bfloat16", "int4", "nf4"],
    threads=[1, 2],
)
def test_scratch_of_a_few_inputs_is_less_than_256_kib_a_thread(isa, shape, kind, threads):
    rows, columns = shape
    w = of_normal(kind, (rows, columns))
    with on_threads(threads), kernels.temporary_cpu_backend(isa):
        for batch in (1, 4, 8):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x, grad = normal(shape=(batch, columns)).to(dtype), normal(shape=(batch, rows)).to(dtype)
                forward = measure.peak_bytes(lambda x=x, dtype=dtype: kernels.linear(x, w, dtype))
                backward = measure.peak_bytes(lambda grad=grad, dtype=dtype: kernels.input_grad(grad, w, dtype))
                assert forward <= 2**18 * threads + batch * rows * dtype.itemsize
                assert backward <= 2**18 * threads + batch * columns * dtype.itemsize


@needs_kernel
def test_memory_that_cannot_be_written_is_left_to_plain_torch():
    weight = strategies.make_weight("normal", (4, 16), 0, 0)
    expected = quantize(weight, scales="float16", block_size=16)
    packed = torch.empty(8, 4, dtype=torch.uint8).t()
    stored = torch.empty(1, 4, dtype=torch.float16).t()
    kernel = cpu.CpuBackend(cpu.load_native_module_and_reason()[0], kernels.available_cpu_backend_names()[-1])
    kernel.quantize_rows(weight, replace(expected, packed=packed, scales=stored), slice(None), None)
    assert torch.equal(packed, expected.packed)
    assert torch.equal(stored, expected.scales)
    strided = torch.rand(32)[::2]
    expected = quantize(weight, scales="float16", block_size=16, search=True, importance=strided)
    searched = replace(expected, packed=torch.zeros_like(expected.packed), scales=torch.zeros_like(expected.scales))
    kernel.quantize_rows(weight, searched, slice(None), strided)
    assert_same_bytes(searched, expected)
    meta = replace(expected, packed=expected.packed.to("meta"), scales=expected.scales.to("meta"))
    assert kernel.dequantize(meta, slice(1, 3), torch.float32).shape == (2, 16)
    assert torch.equal(
        reference.dequantize(expected, slice(1, 3), torch.float64)[0], expected.dequantize()[1].double()
    )


@needs_kernel
@covering(function=[*PRODUCTS, "quantize", "update", "prepare", "order"])
def test_a_wrong_number_of_arguments_is_an_error(function):
    native, _ = cpu.load_native_module_and_reason()
    with pytest.raises(TypeError, match="arguments, got"):
        getattr(native, function)(0, 1)
    if function in PRODUCTS:
        numbers = [0] * (PRODUCTS[function] - 3)
        with pytest.raises(ValueError, match="PyCapsule"):
            getattr(native, function)(0, object(), torch.zeros(2), *numbers)


@contextmanager
def read_by_capsules():
    """As where torch has no table of functions for C, which 2.10 is the first to have."""
    native, _ = cpu.load_native_module_and_reason()
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    shared, scratch = (torch.Tensor, torch.nn.Parameter), torch.empty(0, dtype=torch.uint8)
    assert not native.use_torch(*shared, None, torch._C._to_dlpack, scratch)
    try:
        yield
    finally:
        assert native.use_torch(*shared, table, torch._C._to_dlpack, scratch) is (table is not None)


@bound
@covering(dtype=[torch.float32, torch.bfloat16, torch.float16], batch=[1, 30])
def test_either_way_to_read_a_tensor_is_as_good(isa, dtype, batch):
    dense = strategies.make_weight("normal", (33, 70), 0, 0)
    q, half = quantize(dense, block_size=16), dense.half()
    x, grad, bias = torch.randn(batch, 70).to(dtype), torch.randn(batch, 33).to(dtype), torch.randn(33)
    a, b = torch.randn(4, 70), torch.randn(33, 4)

    def run():
        made = [q.dequantize(dtype), kernels.add_low_rank(grad[:3].float(), x[:3].float(), a, b, 0.5)]
        for weight in (q, half):
            made += [kernels.linear(x, weight, dtype, bias), kernels.input_grad(grad, weight, dtype)]
        return made, measure.peak_bytes(lambda: kernels.linear(x, q, dtype))

    with kernels.temporary_cpu_backend(isa):
        expected, memory = run()
        with read_by_capsules():
            got, same = run()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert memory == same > x.shape[0] * 33 * dtype.itemsize  # the scratch is seen


OLD_CAPSULES = not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")  # of which torch gives none for freed memory


@bound
def test_what_c_cannot_read_never_reaches_it(isa):
    """Wrong shapes, dtypes, devices, layouts and sizes: None, so that plain torch serves or says what is wrong."""
    native, _ = cpu.load_native_module_and_reason()
    index = [name for name, _ in native.isas()].index(isa)
    half, x = torch.randn(5, 8).half(), torch.randn(3, 8)
    lazy = torch._neg_view(torch.randn(3, 8))

    class Wrapped(torch.Tensor):
        pass

    def linear(weight=half, x=x, bias=None, handle=None, scales=None):
        return native.linear(index, handle, weight, scales, x, bias, 2, None, None, None)

    def everywhere():
        assert linear().shape == (3, 5)
        assert linear(x=torch.nn.Parameter(x)).shape == (3, 5)
        assert torch.equal(linear(x=x[None, :, None]), linear()[None, :, None])
        for bad in (x[:, :7], x[:0], x[0], x.double(), x.int(), x.t(), x[::2], x[:, ::2], x.to("meta")):
            assert linear(x=bad) is None
        for bad in (lazy, x.to_sparse(), torch._efficientzerotensor((3, 8)), x.as_subclass(Wrapped), None, 3):
            assert linear(x=bad) is None
        for bad in (half.float(), half.t(), half[:, :4], half[0], half[:, :0], half.byte(), half.to("meta"), None):
            assert linear(weight=bad) is None
        for bad in (torch.zeros(4), torch.zeros(5, 1), torch.zeros(10)[::2], torch.zeros(5).double(), lazy[0, :5]):
            assert linear(bias=bad) is None
        for given in ({"x": torch.randn(3, 8)}, {"weight": torch.randn(5, 8).half()}):
            for freed in given.values():
                freed.untyped_storage().resize_(0)
            try:
                refused = linear(**given) is None
            except ValueError as error:
                refused = "no memory" in str(error)
            else:
                assert OLD_CAPSULES
            assert refused

    everywhere()
    with read_by_capsules():
        everywhere()


@bound
def test_a_weight_that_has_moved_or_changed_its_size_is_not_read_as_it_was(isa):
    native, _ = cpu.load_native_module_and_reason()
    index = [name for name, _ in native.isas()].index(isa)
    q = quantize(strategies.make_weight("normal", (6, 64), 0, 0), block_size=16)
    x = torch.randn(2, 64)
    with kernels.temporary_cpu_backend(isa):
        kernels.linear(x, q, torch.float32)
    handle = q.cache["prepared"].handle

    def linear(packed=q.packed, scales=q.scales):
        return native.linear(index, handle, packed, scales, x, None, 2, None, None, None)

    assert linear() is not None
    assert linear(packed=q.packed.clone()) is None
    assert linear(scales=q.scales.clone()) is None
    assert linear(packed=q.packed[:5]) is None
    assert linear(scales=q.scales[:5]) is None
    assert linear(packed=q.packed[1:]) is None
    assert native.dequantize(index, handle, q.packed, q.scales, 4, 0, torch.empty(3, 64), 2) is None  # beyond the end
    assert native.dequantize(index, handle, q.packed, q.scales, -1, 0, torch.empty(3, 64), 2) is None
    assert native.dequantize(index, handle, q.packed, q.scales, 4, 0, torch.empty(2, 63), 2) is None
    assert native.dequantize(index, handle, q.packed, q.scales, 4, 0, torch.empty(2, 64), 2) is not None
    for other, name in enumerate(name for name, runs in native.isas() if runs):
        found = native.linear(other, handle, q.packed, q.scales, x, None, 2, None, None, None)
        lanes = {"portable": 4, "neon": 4, "avx2": 8, "avxvnni": 8}
        assert (found is not None) == (lanes.get(name, 16) == lanes.get(isa, 16))


# Run where glibc overwrites freed memory: what is read from there is no product of anything.
SWAPS = """
import sys, torch
from torch.overrides import TorchFunctionMode
from lowmem import QuantizedTensor, kernels, quantize

class Swaps(TorchFunctionMode):
    # Whenever C calls torch, between its look at the tensors and the product, does what another thread could do then.
    def __init__(self, swap):
        super().__init__()
        self.swap, self.count = swap, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("new_empty", "is_neg"):
            self.swap()
            self.count += 1
        return made

torch.manual_seed(0)
torch.set_num_threads(1)
tried = 0

def check(name, tensor, other, run):
    # Run while a tensor, which alone holds its memory, is given that of another: the result is one of the two.
    global tried
    values = tensor.detach().clone(), other
    expected = []
    for value in values[::-1]:
        tensor.data = value.clone()
        expected.append(run())
    assert not torch.equal(*expected), name
    with Swaps(lambda: setattr(tensor, "data", other.clone())) as swaps:
        got = run()
    assert swaps.count, name
    # Plain torch may have served, whose sums of 256 products are as exact; other values are much further off.
    assert any((got - one).abs().max() <= 1e-4 * one.abs().max() for one in expected), name
    tensor.data = values[0]
    tried += 1

def forget(q):
    q.cache.pop("prepared", None)
    kernels.cpu.c_float_array.cache_clear()

ROWS, COLUMNS = 300, 256
def run_everything():
    for form, scales in (("nf4", "float16"), ("int4", "double")):
        q, r = (quantize(torch.randn(ROWS, COLUMNS), form, block_size=16, scales=scales) for _ in range(2))
        half, other_half = torch.randn(ROWS, COLUMNS).half(), torch.randn(ROWS, COLUMNS).half()
        for batch in (1, 6, 40):
            make = lambda *shape: (torch.randn(shape), torch.randn(shape))
            (x, x1), (grad, grad1), (bias, bias1) = make(batch, COLUMNS), make(batch, ROWS), make(ROWS)
            (a, a1), (b, b1), (base, base1) = make(4, COLUMNS), make(ROWS, 4), make(batch, ROWS)
            linear = lambda w: lambda: kernels.linear(x, w, torch.float32, bias, (a, b, 0.5))
            adapter, own = ((x, x1), (bias, bias1), (a, a1), (b, b1)), ((q.packed, r.packed), (q.scales, r.scales))
            for tensor, other in (*own, *adapter):
                check("linear", tensor, other, linear(q))
            for tensor, other in ((half, other_half), *adapter):
                check("linear, 16 bits", tensor, other, linear(half))
            for w, pairs in ((q, (*own, (grad, grad1))), (half, ((half, other_half),))):
                for tensor, other in pairs:
                    check("input_grad", tensor, other, lambda: kernels.input_grad(grad, w, torch.float32))
            for tensor, other in ((base, base1), (x, x1), (a, a1), (b, b1)):
                check("add_low_rank", tensor, other, lambda: kernels.add_low_rank(base, x, a, b, 0.5))
            low, low1 = x.bfloat16(), x1.bfloat16()
            for tensor, other in (*own, (low, low1)):
                check("bfloat16", tensor, other, lambda: kernels.linear(low, q, torch.bfloat16))
            for tensor, other in (*own, (x, x1), (bias, bias1)):
                check("int8", tensor, other, lambda: kernels.linear(x, q, torch.int8, bias))
            for run in (linear(q), lambda: kernels.input_grad(grad, q, torch.float32)):
                expected = run()
                with Swaps(lambda: forget(q)) as swaps:
                    assert torch.equal(run(), expected)
                assert swaps.count
        for tensor, other in ((q.packed, r.packed), (q.scales, r.scales)):
            check("dequantize", tensor, other, q.dequantize)

for isa in sys.argv[1:]:
    with kernels.temporary_cpu_backend(isa):
        run_everything()
print(tried)
"""

OVERWRITTEN = {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.thorough
@needs_kernel
def test_memory_that_is_given_up_during_a_call_stays_for_as_long_as_it_is_read():
    """As where another thread assigns ``.data``: C holds what it reads, and what it knows of a weight."""
    isas = bound.args[1]
    assert int(run_python(SWAPS, *isas, **OVERWRITTEN)) == len(isas) * 2 * (3 * (6 + 5 + 4 + 4 + 3 + 4) + 2)


@bound
def test_no_call_keeps_what_it_has_read(isa):
    """What C holds during a call it gives back, or no memory of a model would ever be freed."""
    q = quantize(strategies.make_weight("normal", (21, 70), 0, 0))
    x, bias, calls = torch.randn(3, 70), torch.randn(21), 50
    a, b = torch.randn(2, 70), torch.randn(21, 2)
    storages = [tensor.untyped_storage() for tensor in (q.packed, q.scales, x, bias, a, b)]
    with kernels.temporary_cpu_backend(isa):
        before = [sys.getrefcount(storage) for storage in storages]
        for _ in range(calls):
            kernels.linear(x, q, torch.float32, bias, (a, b, 0.5))
            kernels.add_low_rank(torch.zeros(3, 21), x, a, b, 0.5)
            kernels.input_grad(x[:, :21].contiguous(), q, torch.float32)
            q.dequantize()
        after = [sys.getrefcount(storage) for storage in storages]
    assert all(new - old < calls for new, old in zip(after, before, strict=True))


@needs_kernel
def test_a_weight_is_known_to_two_kernels_at_once():
    """Each takes what the other has put there for its own, in the middle of its calls."""
    native, _ = cpu.load_native_module_and_reason()
    q, x = quantize(strategies.make_weight("normal", (64, 256), 0, 0)), torch.randn(3, 256)
    served = [cpu.CpuBackend(native, isa) for isa in (ISAS[0], ISAS[-1]) for _ in range(2)]
    expected = [kernel.linear(x, q, torch.float32) for kernel in served]

    def multiply(kernel, alone):
        return all(torch.equal(kernel.linear(x, q, torch.float32), alone) for _ in range(100))

    with ThreadPoolExecutor(len(served)) as pool:
        assert all(pool.map(multiply, served, expected))


@compiled_bfloat16
@covering(
    1,
    blocks=[("nf4", 64), ("nf4", 4096), ("nf4", 10), ("int4", 24), ("half", None)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_packing_a_wide_input_looks_at_each_column_about_once(isa, blocks, dtype):
    """Columns are packed in parts, of which each may look at the blocks that reach into it and at no others."""
    kind, block_size = blocks
    native, _ = cpu.load_native_module_and_reason()
    columns, part = 5 * 8192 + 100, 4096  # the least that a part is
    dense = strategies.make_weight("normal", (3, columns), 0, 0)
    w, dense = stored(kind, dense, **({"block_size": block_size} if block_size else {}))
    beside = 2 * (block_size or 0) + 32  # of each part: a block that reaches into it on either side, and a vector
    for batch in (1, 4, 6, 32):
        x = strategies.make_weight("normal", (batch, columns), 0, 1).to(dtype)
        with on_threads(1), kernels.temporary_cpu_backend(isa):
            before = native.visited()
            got = kernels.linear(x, w, dtype)
            seen = native.visited() - before
        assert seen <= batch * (columns + -(-columns // part) * beside)
        if batch <= 4 and kind == "nf4" and block_size % 8 == 0 and dtype == torch.float32:
            assert seen >= batch * columns  # nobody else packs them
        if dtype == torch.float32:
            assert_exact(got, x, dense)
        else:
            assert_close_in(dtype, got, x.float(), dense)


@needs_kernel
@pytest.mark.parametrize("kind", ["4-bit", "half", "4-bit, LoRA", "half, LoRA", "4-bit, int8"])
def test_parameters_are_handed_to_c_as_they_are(kind, monkeypatch):
    """One call of a layer is one call of C, with the layer's own parameters, trained or frozen: no view, no copy."""
    int8 = kind.endswith("int8")
    technique = FourBit(compute_dtype=torch.int8 if int8 else None) if kind.startswith("4-bit") else Half()
    layer = convert(torch.nn.Linear(256, 24), technique, *([LoRA(4)] if "LoRA" in kind else []))
    calls = []
    kernel = cpu.CpuBackend(cpu.load_native_module_and_reason()[0], kernels.available_cpu_backend_names()[-1])
    name = "_native_linear_inputs8" if int8 else "_linear"
    run = getattr(kernel, name)
    monkeypatch.setattr(kernel, name, lambda *given: calls.append((given, run(*given))) or calls[-1][1])
    monkeypatch.setitem(backend._backends, "cpu", kernel)
    x = torch.nn.Parameter(torch.randn(3, 256))
    with torch.no_grad():
        out = layer(x)
    ((given, made),) = calls
    assert out is made
    if technique == Half():
        own = [layer.weight_rounded, layer.bias_rounded]
    else:
        own = [layer.weight_packed, layer.bias]
        assert any(one is layer.quantized.scales for one in given)  # a view of the bytes, made once
    own += [x] + ([layer.lora_a, layer.lora_b] if "LoRA" in kind else [])
    assert all(type(parameter) is torch.nn.Parameter for parameter in own)
    assert all(any(parameter is one for one in given) for parameter in own)


def test_a_parameter_is_as_real_as_a_tensor():
    class Wrapped(torch.Tensor):
        pass

    tensor = torch.randn(4)
    for real in (tensor, torch.nn.Parameter(tensor)):
        assert tensor_checks.is_plain_cpu_tensor(real)
        assert tensor_checks.is_c_readable_float32(real)
        assert tensor_checks.is_c_vector(real, 4)
    for other in (tensor.as_subclass(Wrapped), torch.nn.Parameter(tensor.as_subclass(Wrapped)), tensor.to("meta")):
        assert not tensor_checks.is_plain_cpu_tensor(other)


@cache  # for all ISAs
def of_wide_rows(kind, dtype, rows, batch, bias_dtype):
    """A wide weight, inputs, a bias, their product in float64, and how far off one in a 16-bit dtype may be."""
    generator = torch.Generator().manual_seed(rows + batch)
    columns = 8200  # more than come at a time, so that sums are kept between parts
    if kind == "nf4":
        w = QuantizedTensor.empty(torch.Size((rows, columns)), "nf4", 64, "float16", "absmax", device="cpu")
        w.packed.copy_(torch.randint(256, w.packed.shape, generator=generator, dtype=torch.uint8))
        w.scales.copy_(torch.rand(w.scales.shape, generator=generator))
        dense = w.dequantize(torch.float64)
    else:
        w = torch.randn(rows, columns, generator=generator).to(dtype)
        dense = w.double()
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    bias = (1000 * torch.randn(rows, generator=generator)).to(bias_dtype)
    expected = x.double() @ dense.t() + bias.double()
    magnitudes = x.double().abs() @ dense.abs_().t() + bias.double().abs()
    unit = torch.finfo(dtype).eps / 2  # of both factors and of the result, each rounded once; sums are in float32
    return w, x, bias, expected, unit * (2.1 * magnitudes + 1.1 * expected.abs())


@compiled_bfloat16
@covering(
    1,
    case=[
        ("nf4", 9, 150, "same"),  # of which 128 inputs are added up at a time
        ("nf4", 1000, 100, "same"),
        ("nf4", 3000, 8, "same"),
        ("nf4", 3000, 8, "float32"),
        ("16 bits", 3000, 8, "same"),
    ],
    dtype=[torch.bfloat16, torch.float16],
)
def test_rows_and_inputs_that_come_in_parts_are_written_and_biased_each_in_its_place(isa, case, dtype):
    """Sums of more than 8192 columns are kept in float32 for as many rows at a time as scratch has room for."""
    kind, rows, batch, of_bias = case
    bias_dtype = dtype if of_bias == "same" else torch.float32
    w, x, bias, expected, allowed = of_wide_rows(kind, dtype, rows, batch, bias_dtype)
    with kernels.temporary_cpu_backend(isa):
        got = kernels.linear(x, w, dtype, bias)
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= allowed).all()


LARGE = pytest.mark.skipif(not os.environ.get("LOWMEM_LARGE"), reason="4 GiB addressed: set LOWMEM_LARGE to run it")


def zeros_before(last: torch.Tensor, rows: int) -> torch.Tensor:
    """Return so many rows, all zeros but for the last: pages of zeros take no memory until they are written."""
    whole = torch.zeros(rows, last.shape[1], dtype=last.dtype)
    whole[-len(last) :] = last
    return whole


@LARGE
@compiled
@covering(kind=["codes", "scales", "half"])
def test_rows_behind_2_to_31_bytes_or_weights_are_found(isa, kind):
    """The last rows of a weight whose offsets 32 bits do not hold, and beside them what they make alone."""
    columns, few = 2**16, 40
    dense = strategies.make_weight("normal", (few, columns), 0, 0)
    if kind == "half":
        rows, last = 2**15 + few, dense.half()  # 2^31 weights, in 4 GiB
        w = zeros_before(last, rows)
    else:  # 2^31 bytes of codes, or as many of codes and of float32 scales of blocks of 8
        rows, size = 2**16 + few, 4096 if kind == "codes" else 8
        last = quantize(dense, block_size=size, scales="float32")
        packed, scales = zeros_before(last.packed, rows), zeros_before(last.scales, rows)
        w = replace(last, packed=packed, scales=scales, shape=torch.Size((rows, columns)))
    x, grad = torch.randn(16, columns), torch.randn(16, few)
    with kernels.temporary_cpu_backend(isa):
        for batch in (1, 16):
            one, back = x[:batch], grad[:batch]
            got = kernels.linear(one, w, torch.float32)
            torch.testing.assert_close(got[:, -few:], kernels.linear(one, last, torch.float32))
            assert not got[:, :-few].any()
            padded = torch.cat([torch.randn(batch, rows - few), back], 1)  # rows of zeros add nothing
            got = kernels.input_grad(padded, w, torch.float32)
            torch.testing.assert_close(got, kernels.input_grad(back, last, torch.float32))
        if kind != "half":
            assert torch.equal(w.dequantize_rows(slice(rows - few, rows), torch.float32), last.dequantize())


@bound
def test_a_weight_that_another_thread_keeps_moving_is_taken_by_c_all_the_same(isa, monkeypatch):
    """Plain torch, which reads it in several operations, could mix what was there before and after."""
    q = quantize(strategies.make_weight("normal", (8, 64), 0, 0))
    x, dense, prepare = torch.randn(3, 64), q.dequantize(), cpu.CpuBackend._make_and_cache_handle_or_none

    def move(*given):
        kept = prepare(*given)
        q.packed.data = q.packed.data.clone()
        return kept

    monkeypatch.setattr(cpu.CpuBackend, "_make_and_cache_handle_or_none", move)
    monkeypatch.setattr(kernels.reference, "linear", None)
    monkeypatch.setattr(kernels.reference, "input_grad", None)
    with kernels.temporary_cpu_backend(isa), no_plain_rows():
        assert_exact(kernels.linear(x, q, torch.float32), x, dense)
        assert_exact(kernels.input_grad(x[:, :8].contiguous(), q, torch.float32), x[:, :8], dense.t())
        assert torch.equal(q.dequantize(), dense)


def test_torch_finds_no_number_that_is_not_finite_behind_a_row_that_is():
    """It reads bfloat16 rows in tiles of 32 columns on some processors, and 0 times infinity is NaN."""
    x = torch.randn(5, 333).bfloat16()
    assert cpu.pad_memory_against_nan_leak(x) is x
    for bad in (torch.inf, torch.nan):
        x[3, 18] = bad  # the last column that a tile of the row before may hold
        apart = cpu.pad_memory_against_nan_leak(x)
        torch.testing.assert_close(apart, x, rtol=0, atol=0, equal_nan=True)
        behind = apart.as_strided((5, 352), (apart.stride(0), 1))[:, 333:]
        assert apart.stride(0) >= 352
        assert not behind.any()
    whole = torch.full((5, 64), torch.inf).bfloat16()
    assert cpu.pad_memory_against_nan_leak(whole) is whole
