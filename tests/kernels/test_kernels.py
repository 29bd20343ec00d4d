"""Every kernel against a plain product with the dequantized weight, and against bounds of accuracy and memory."""

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import FourBit, LoRA, backend, convert, kernels, quantize
from lowmem.quant.tensor import QuantizedTensor
from tests import strategies
from tests.compiled import (
    assert_exact,
    both,
    both_kinds,
    bound,
    compiled,
    compiled_bfloat16,
    dequantized,
    needs_kernel,
)
from tests.rounding import assert_sum
from tests.selection import covering

pytestmark = pytest.mark.usefixtures("poisoned")


def test_backend_says_what_serves_and_why():
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            assert backend().startswith(f"{name}: ")


def run_python(script: str, *argv: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.processes
def test_the_environment_variable_forces_a_backend():
    name = kernels.available_cpu_backend_names()[0]
    assert run_python("import lowmem; print(lowmem.backend())", LOWMEM_KERNEL=name).startswith(f"{name}: ")


def test_a_backend_that_cannot_serve_lists_the_choices():
    with (
        pytest.raises(ValueError, match=r"LOWMEM_KERNEL='sse9' cannot serve here: choose from reference"),
        kernels.temporary_cpu_backend("sse9"),
    ):
        pass


def test_a_provider_of_another_backend_is_one_line(monkeypatch):
    """What is last is the fastest, and serves unless another is named; one that has nothing says why."""

    class Backend:
        name = "accelerator"

    class Provider:
        @staticmethod
        def cpu_backends_and_description():
            return [Backend], "on its own device"

    class Absent:
        @staticmethod
        def cpu_backends_and_description():
            return [], "no driver is installed"

    before = kernels.available_cpu_backend_names()
    monkeypatch.setattr(kernels, "PROVIDERS", (*kernels.PROVIDERS, Provider, Absent))
    assert kernels.available_cpu_backend_names() == [*before, "accelerator"]
    selected, why = kernels._select_cpu_backend_and_reason(None)
    assert selected is Backend
    assert why.startswith("on its own device, the best that there is here; ")
    assert why.endswith("; no driver is installed")  # after why there is no compiled kernel, where that is so
    with pytest.raises(ValueError, match="choose from reference.*accelerator; (.*; )?no driver is installed"):
        kernels._select_cpu_backend_and_reason("another")


@pytest.mark.processes
def test_without_the_compiled_module_the_reference_serves_and_says_why():
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'lowmem.kernels._native':\n"
        "            raise ModuleNotFoundError('No module named ' + name, name=name)\n"
        "sys.meta_path.insert(0, Missing)\n"
        "import torch, lowmem; print(lowmem.backend())\n"
        "print(lowmem.convert(torch.nn.Linear(8, 8), lowmem.FourBit())(torch.ones(1, 8)).shape)"
    )
    shown = run_python(script, LOWMEM_KERNEL="")
    how = "plain torch dequantizes rows in chunks, the best that there is here"
    assert shown.startswith(f"reference: {how}; the compiled kernel cannot be imported")
    assert "(No module named lowmem.kernels._native)" in shown
    assert "needs a C compiler" in shown
    assert "torch.Size([1, 8])" in shown


# The compiled kernel against the reference, by each source that this processor runs.


@compiled
@given(
    strategies.weights(min_dims=2, max_dims=2, max_columns=300),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.integers(0, 4),
)
def test_dequantized_rows_are_the_reference_s_bit_for_bit(isa, weight, format, block_size, scales, start):
    q = quantize(weight, format, block_size=block_size, scales=scales)
    native, _ = kernels.cpu.load_native_module_and_reason()
    for dtype in (torch.float32, torch.bfloat16):
        got = kernels.cpu.CpuBackend(native, isa).dequantize(q, slice(start, None), dtype)
        with kernels.temporary_cpu_backend("reference"):
            assert torch.equal(got, q.dequantize()[start:].to(dtype))


@compiled
@covering(dtype=[torch.float16, torch.bfloat16])
def test_16bit_weights_of_every_value_are_read_as_torch_reads_them(isa, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    with kernels.temporary_cpu_backend(isa):
        for batch in (1, 4, 20):
            got = kernels.linear(torch.ones(batch, 1), every, torch.float32)
            expected = every.float().t().expand(batch, -1)
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@compiled
def test_strides_change_nothing(isa):
    dense = strategies.make_weight("normal", (301, 520), 0, 0)
    for w, batch in product((quantize(dense), dense.half()), (1, 3, 9)):
        wide = strategies.make_weight("normal", (batch, 1040), 0, 1)[:, ::2]
        grad = torch.randn(batch, 602)[:, ::2]
        with kernels.temporary_cpu_backend(isa):
            for x, g in ((wide, grad), (wide.t().contiguous().t(), grad.t().contiguous().t())):
                assert torch.equal(
                    kernels.linear(x, w, torch.float32), kernels.linear(wide.contiguous(), w, torch.float32)
                )
                got = kernels.input_grad(g, w, torch.float32)
                assert torch.equal(got, kernels.input_grad(grad.contiguous(), w, torch.float32))


@bound
def test_what_c_cannot_read_goes_to_the_reference(isa):
    q = quantize(strategies.make_weight("normal", (6, 40), 0, 0), block_size=8)
    x, dense = torch.randn(3, 40), q.dequantize()
    strided = replace(q, packed=q.packed.t().contiguous().t(), scales=q.scales.t().contiguous().t())
    odd = quantize(dense, block_size=10)
    with kernels.temporary_cpu_backend(isa):
        assert_exact(kernels.linear(x, strided, torch.float32), x, dense)
        assert_exact(kernels.linear(x, odd, torch.float32), x, odd.dequantize())
        assert kernels.linear(x[:0], q, torch.float32).shape == (0, 6)
        meta = replace(q, packed=q.packed.to("meta"), scales=q.scales.to("meta"))
        assert kernels.linear(x.to("meta"), meta, torch.float32).shape == (3, 6)
        for w in (q, dense.half()):
            with pytest.raises(RuntimeError, match="in_features=40"):
                kernels.linear(x[:, :10], w, torch.float32)
            with pytest.raises(RuntimeError, match="out_features=6"):
                kernels.input_grad(x[:, :10], w, torch.float32)


@bound
@both_kinds
def test_any_bias_that_broadcasts_is_added(isa, weight):
    w, x = both(weight), torch.randn(3, 40)
    for bias in (torch.ones(1), torch.ones(6, dtype=torch.float64), torch.arange(12.0)[::2]):
        with kernels.temporary_cpu_backend(isa):
            got = kernels.linear(x, w, torch.float32, bias)
        assert_exact(got, x, dequantized(w, torch.float32), bias.float().expand(6))


# Of a weight (6, 40) in blocks of 8 with float16 scales, packed is (6, 20) and scales are (6, 5).
WRONG_LAYOUTS = {
    "fewer rows": lambda packed, scales: (packed[:5], scales[:5]),
    "more rows of codes": lambda packed, scales: (packed.repeat(2, 1), scales),
    "fewer rows of scales": lambda packed, scales: (packed, scales[:5]),
    "fewer columns": lambda packed, scales: (packed[:, :10].contiguous(), scales),
    "one scale a row": lambda packed, scales: (packed, scales[:, :1].contiguous()),
    "as many codes in other rows": lambda packed, scales: (packed.view(12, 10), scales),
    "as many scales in other rows": lambda packed, scales: (packed, scales.view(5, 6)),
    "flat codes": lambda packed, scales: (packed.view(-1), scales),
    "a dimension more": lambda packed, scales: (packed[None], scales[None]),
    "no codes": lambda packed, scales: (packed[:0], scales[:0]),
    "signed codes": lambda packed, scales: (packed.view(torch.int8), scales),
    "wide scales": lambda packed, scales: (packed, scales.float()),
    "scales as bytes": lambda packed, scales: (packed, scales.view(torch.uint8)),
}
few_kernels = pytest.mark.parametrize(
    "kernel", sorted({*kernels.available_cpu_backend_names()[:2], kernels.available_cpu_backend_names()[-1]})
)


def layout_of(packed, scales):
    """Match what is found and what is needed, in the words of an error."""
    tensors = {"packed": packed, "scales": scales}
    found = (f"{name}.shape={tuple(tensor.shape)}, dtype={tensor.dtype}" for name, tensor in tensors.items())
    needed = "need (6, 20), torch.uint8 and (6, 5), torch.float16"
    return ".*".join(map(re.escape, (*found, "(6, 40)", needed)))


@few_kernels
def test_stored_tensors_of_another_layout_are_an_error_that_names_both(kernel):
    """However they come there, some at the address of the right ones, and whatever is made of them."""
    q = quantize(strategies.make_weight("normal", (6, 40), 0, 0), block_size=8, scales="float16")
    a, b = torch.randn(2, 40), torch.randn(6, 2)
    uses = (
        lambda q: kernels.linear(torch.randn(1, 40), q, torch.float32),
        lambda q: kernels.linear(torch.randn(9, 40), q, torch.float32, torch.randn(6)),
        lambda q: kernels.linear(torch.randn(1, 40), q, torch.float32, None, (a, b, 0.5)),
        lambda q: kernels.linear(torch.randn(3, 40).bfloat16(), q, torch.bfloat16),
        lambda q: kernels.linear(torch.randn(3, 40).double(), q, torch.float64),
        lambda q: kernels.linear(torch.randn(3, 40), q, torch.int8),
        lambda q: kernels.input_grad(torch.randn(3, 6), q, torch.float32),
        lambda q: kernels.input_grad(torch.randn(3, 6).double(), q, torch.float64),
        lambda q: q.dequantize(),
        lambda q: q.dequantize(torch.float64),
        lambda q: q.dequantize_rows(slice(1, 3), torch.float16),
        lambda q: q.as_matrix(),
        lambda q: q.error_bound(),
    )
    with kernels.temporary_cpu_backend(kernel):
        for wrong, use in product(WRONG_LAYOUTS.values(), uses):
            packed, scales = wrong(q.packed, q.scales)
            kept = replace(q, packed=nn.Parameter(q.packed, False), scales=nn.Parameter(q.scales, False))
            use(kept)  # which the kernel remembers
            for broken in (replace(q, packed=packed, scales=scales), kept):
                kept.packed.data, kept.scales.data = packed, scales
                with pytest.raises(RuntimeError, match=layout_of(packed, scales)):
                    use(broken)
            kept.packed.data, kept.scales.data = q.packed, q.scales
            use(kept)


# Of layers, which store scales as bytes: these are right, or are the same bytes where they were, seen in another way.
RIGHT_IN_LAYERS = {"scales as bytes"}
SAME_IN_PLACE = {"as many scales in other rows", "fewer rows of scales"}
LAYER_LAYOUT = r"packed.shape=.* do not hold a weight of shape \(6, 40\) in nf4"


def with_stored(layer, wrong, how):
    """Return what calls a layer with other codes and scales."""
    packed, scales = wrong(layer.quantized.packed.detach(), layer.quantized.scales.detach())
    if scales.dtype == torch.float16 and scales.dim() == 2:
        scales = scales.contiguous().view(torch.uint8)  # as layers store them
    if how == "data":
        layer.weight_packed.data, layer.weight_scales.data = packed, scales
        return layer
    if how == "call":
        state = {"weight_packed": packed, "weight_scales": scales}
        return lambda x: torch.func.functional_call(layer, state, (x,))
    layer.weight_packed, layer.weight_scales = nn.Parameter(packed, False), nn.Parameter(scales, False)
    return layer


@few_kernels
@covering(how=["data", "call", "assign"])
def test_layers_with_stored_tensors_of_another_layout_name_what_is_found_and_needed(kernel, how):
    technique = FourBit("nf4", 8, "float16", embeddings="4bit")
    cases = (
        (nn.Linear(40, 6), (), torch.randn(3, 40)),
        (nn.Linear(40, 6), (LoRA(2),), torch.randn(2, 3, 40, requires_grad=True)),
        (nn.Embedding(6, 40), (), torch.tensor([0, 3])),
        (nn.Embedding(6, 40), (), torch.tensor([], dtype=torch.int64)),
        (nn.Conv2d(10, 6, 2), (), torch.randn(2, 10, 4, 4, requires_grad=True)),
    )
    with kernels.temporary_cpu_backend(kernel):
        fits = RIGHT_IN_LAYERS | (SAME_IN_PLACE if how == "data" else set())
        wrongs = [wrong for name, wrong in WRONG_LAYOUTS.items() if name not in fits]
        for wrong, (dense, adapter, x) in product(wrongs, cases):
            layer = convert(copy.deepcopy(dense), technique, *adapter)
            layer(x)
            call = with_stored(layer, wrong, how)
            with pytest.raises(RuntimeError, match=LAYER_LAYOUT):
                call(x)


FORKED = """
import os, sys, torch
from lowmem import kernels, quantize
torch.set_num_threads(2)
w, x = quantize(torch.randn(64, 32)), torch.randn(2, 32)
for isa in sys.argv[1:]:
    with kernels.temporary_cpu_backend(isa):
        expected = kernels.linear(x, w, torch.float32)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(kernels.linear(x, w, torch.float32), expected) else 1)
        print(os.waitpid(child, 0)[1])
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@needs_kernel
def test_a_small_layer_works_in_a_forked_process():
    isas = bound.args[1]
    shown = run_python("import warnings; warnings.simplefilter('ignore')\n" + FORKED, *isas)
    assert shown.split() == ["0"] * len(isas)


PAGE_EDGE = """
import sys, torch
from dataclasses import replace
from lowmem import QuantizedTensor, kernels, quantize
from lowmem.quant.formats import get_format
from lowmem.quant.scale_encodings import get_scale_encoding
from tests.guard_pages import at_the_edge

native, _ = kernels.cpu.load_native_module_and_reason()

def multiply(kernel, operation, x, weight, dtype, *bias):
    # Where torch multiplies, only codes and scales lie at the edge, which C reads: torch's own products may read past
    # an end, as oneDNN does in whole tiles.
    torch_attention = "torch" in kernel.tried_kernels(weight, len(x), dtype, operation)[-1][1]
    if not torch_attention or isinstance(weight, QuantizedTensor):
        getattr(kernels, operation)(x if torch_attention else at_the_edge(x), weight, dtype, *bias)

def stored(weight, form="nf4", **options):
    q = quantize(weight, form, **options)
    return replace(q, packed=at_the_edge(q.packed), scales=at_the_edge(q.scales))

def both(kernel, x, grad, weight, *bias):
    multiply(kernel, "linear", x, weight, x.dtype, *bias)
    multiply(kernel, "input_grad", grad, weight, x.dtype)

def run_everything(kernel):
    for columns in (1, 7, 31, 33, 100, 127, 129, 1023, 1025, 8200):
        for scales in ("float16", "float32", "double"):
            for block in (8, 10, 16, 64):
                weight, how = at_the_edge(torch.randn(5, columns)), {"block_size": block, "scales": scales}
                q, signed, eight = (stored(weight, form, **how) for form in ("nf4", "bof4s", "int8"))
                kernel.quantize_rows(weight, q, slice(None), None)
                for importance in (None, at_the_edge(torch.rand(columns))):
                    kernel.quantize_rows(weight, replace(q, method="search"), slice(None), importance)
                    kernel.quantize_rows(weight, signed, slice(None), importance)
                kernel.dequantize(signed, slice(0, 5), torch.float32)
                both(kernel, torch.randn(2, columns), torch.randn(2, 5), signed)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    kernel.dequantize(eight, slice(0, 5), dtype)
                    multiply(kernel, "linear", torch.randn(3, columns).to(dtype), eight, dtype)
                    kernel.dequantize(q, slice(0, 5), dtype)
                    for batch in (1, 5, 13):
                        x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 5).to(dtype)
                        both(kernel, x, grad, q, at_the_edge(torch.randn(5)))
                        kernels.linear(at_the_edge(x), q, torch.int8)  # torch multiplies a rounded copy, if at all
        for dtype in (torch.float16, torch.bfloat16):
            half = at_the_edge(torch.randn(5, columns).to(dtype))
            for batch in (1, 5, 13):
                kernels.linear(at_the_edge(torch.randn(batch, columns)), half, torch.float32)
                kernels.input_grad(at_the_edge(torch.randn(batch, 5)), half, torch.float32)
            for rows in (5, 32):  # whole tiles are read where they lie
                dense = torch.randn(rows, columns)
                for weight in (stored(dense, block_size=16), at_the_edge(dense.to(dtype))):
                    for batch in (16, 37):
                        x, grad = torch.randn(batch, columns).bfloat16(), torch.randn(batch, rows).bfloat16()
                        both(kernel, x, grad, weight)
        for rank in (1, 3, 16):
            shapes = (2, 5), (2, columns), (rank, columns), (5, rank)
            base, x, a, b = (at_the_edge(torch.randn(shape)) for shape in shapes)
            kernels.add_low_rank(base, x, a, b, 0.5)
            kernels.linear(x, half, torch.float32, None, (a, b, 0.5))

for isa in sys.argv[1:]:
    print(isa, flush=True)
    with kernels.temporary_cpu_backend(isa):
        run_everything(kernels.cpu.CpuBackend(native, isa))
print("fine")
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it")
@needs_kernel
def test_nothing_past_the_end_is_read():
    isas = compiled_bfloat16.args[1]
    assert run_python(PAGE_EDGE, *isas).split() == [*isas, "fine"]


def test_products_are_added_in_place_and_rounded_once():
    """Also chunks, offsets, 16-bit weights of either dtype, and a weight whose storage has moved."""
    torch.manual_seed(0)
    weight = torch.randn(700, 72)
    offsets = quantize(weight, "int4", block_size=16, scales="float16_offsets")
    given = [quantize(weight, "nf4", block_size=16), offsets, weight.to(torch.bfloat16), weight.half()]
    for name, dtype in product(kernels.available_cpu_backend_names(), (torch.float32, torch.bfloat16)):
        with kernels.temporary_cpu_backend(name):
            moved = quantize(weight, "nf4", block_size=16)
            for stored, transposed in product((*given, moved), (False, True)):
                exact = (stored.dequantize() if isinstance(stored, QuantizedTensor) else stored).double()
                if stored is moved:
                    kernels.linear(torch.randn(2, 72), moved, torch.float32)  # a handle is cached
                    moved.packed.data = moved.packed.data.clone()
                factor = exact if transposed else exact.t()
                x, out = (torch.randn(66, size).to(dtype) for size in factor.shape)
                wanted = out.double() + x.double() @ factor
                most = out.double().abs() + x.double().abs() @ factor.abs()
                assert kernels.add_product(out, x, stored, transposed) is out
                assert_sum(out, wanted, most, len(factor) + 4, rounded=[dtype] * 2)
