"""The plan that selects a kernel, what ``explain`` says of it, and the page that shows it."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FourBit, Half, convert, kernels, quantize
from lowmem.kernels.cpu import CpuBackend
from lowmem.kernels.native_loader import load_native_module_and_reason
from tests import kernel_table as table
from tests import strategies
from tests.compiled import ISAS, compiled_bfloat16, needs_kernel
from tests.selection import covering

WEIGHTS = st.sampled_from(sorted(table.WEIGHTS))
DTYPES = st.sampled_from(sorted(table.DTYPES))
OPERATIONS = st.sampled_from(sorted(table.PRODUCTS))
edges = st.sampled_from([191, 192, 193, 255, 256, 257, 511, 512, 513, 4096])
rows_at_edges = st.one_of(st.integers(1, 40), edges, st.integers(1, 10**6))


def kernel_of(isa: str) -> CpuBackend:
    native, _ = load_native_module_and_reason()
    assert native is not None
    return CpuBackend(native, isa)


def test_the_page_shows_the_plan():
    page = table.PAGE.read_text(encoding="utf8")
    shown = table.TABLE.search(page)
    assert shown, "docs/kernels.md has no table between <!-- plan --> and <!-- end -->"
    assert shown.group() == table.drawn(shown.group()), "write it again: python -m tests.kernel_table"


@needs_kernel
def test_the_page_shows_what_explain_says():
    page = table.PAGE.read_text(encoding="utf8")
    weight = quantize(torch.zeros(1, 64), "nf4")
    if "avx512bf16" not in table.compiled_isas():
        pytest.skip("avx512bf16 is not compiled for this processor")
    assert kernel_of("avx512bf16").explain(weight, 8, torch.bfloat16) in page


@needs_kernel
@given(st.data(), WEIGHTS, DTYPES, OPERATIONS, rows_at_edges)
def test_the_first_kernel_that_accepts_a_product_computes_it(data, weight, dtype, operation, rows):
    isa = data.draw(st.sampled_from(sorted(table.compiled_isas())))
    *refused, chosen = kernel_of(isa).tried_kernels(table.WEIGHTS[weight], rows, table.DTYPES[dtype], operation) or [
        None
    ]
    assert all(why in ("operation", "weight", "dtype", "rows") for *_, why in refused)
    for _, _, least, most, why in refused:
        assert why != "rows" or not least <= rows <= most
    if chosen is None:
        assert operation == "linear_inputs8"  # every other product has a kernel, whatever the weight
    else:
        _, _, least, most, why = chosen
        assert why is None
        assert least <= rows <= most


@needs_kernel
def test_a_row_of_a_table_computes_all_that_it_claims():
    """Each ISA's own rows; an ISA that extends it may compute some of their products."""
    for name, kernel in table.compiled_isas().items():
        for operation, (dtype, of_x), stored in product(table.PRODUCTS, table.DTYPES.items(), table.WEIGHTS.values()):
            claimed, computed = {}, Counter()
            for rows in range(1, table.MOST + 1):
                for isa, row, least, most, why in kernel.tried_kernels(stored, rows, of_x, operation):
                    if isa == name and why in ("rows", None):
                        claimed[row, least] = min(most, table.MOST) - least + 1
                        computed[row, least] += why is None
            assert claimed == computed, f"{name}: {operation} of {dtype}"


@compiled_bfloat16
@given(
    st.sampled_from([8, 10, 64, 256, "half", "bfloat16"]),
    DTYPES,
    st.sampled_from(["linear", "input_grad"]),
    st.sampled_from([1, 8, 9, 15, 16, 191, 192, 255, 256, 511, 512]),
    strategies.seeds,
)
def test_c_leaves_to_torch_what_the_plan_does(isa, kind, dtype, operation, rows, seed):
    kernel, generator = kernel_of(isa), torch.Generator().manual_seed(seed)
    dense = torch.randn(24, 40, generator=generator)
    weight = quantize(dense, "nf4", block_size=kind) if isinstance(kind, int) else dense.to(getattr(torch, kind))
    x = torch.randn(rows, 40 if operation == "linear" else 24, generator=generator).to(table.DTYPES[dtype])
    name = kernel.tried_kernels(weight, rows, x.dtype, operation)[-1][1]
    given = kernel._cached_native_weight_or_none(weight)
    if operation == "linear":
        out = kernel.native.linear(kernel._isa, *given, x, None, 2, None, None, 0.0)
    else:
        out = kernel.native.input_grad(kernel._isa, *given, x, 2)
    assert (out is False) == ("torch" in name)


@needs_kernel
@pytest.mark.parametrize(
    ("isa", "rows", "dtype", "name"),
    [("avx2", 8, torch.bfloat16, "few_int16"), ("avx512", 24, torch.float32, "fused"), ("portable", 1, None, "few")],
)
def test_explain_names_the_kernel(isa, rows, dtype, name, capsys):
    if isa not in kernels.available_cpu_backend_names():
        pytest.skip(f"this processor has no {isa}")
    with kernels.temporary_cpu_backend(isa):
        text = kernels.explain(quantize(torch.zeros(4, 64), "nf4"), rows, dtype)
    assert text.startswith(f"linear: {name} of {isa}, which takes ")
    assert "\ninput_grad: " in text
    assert capsys.readouterr().out == text + "\n"


@needs_kernel
@pytest.mark.parametrize(
    ("least", "takes"), [(1, "any number of rows"), (2, "2 rows and more"), (25, "25 rows and more")]
)
def test_explain_says_what_each_kernel_takes_that_was_asked_before(least, takes, monkeypatch):
    """But of those that compute another operation: nobody expects them to serve."""
    asked = [
        ("fast", "codes", 1, 4, "weight"),
        ("fast", "few", 2, 16, "rows"),
        ("fast", "grad", 1, 2**63 - 1, "operation"),
        ("slow", "halves", 1, 8, "dtype"),
        ("slow", "tiled", least, 2**63 - 1, None),
    ]
    monkeypatch.setattr(CpuBackend, "tried_kernels", lambda *_: asked)
    says = [
        f"tiled of slow, which takes {takes}",
        "  not codes of fast, which takes other weights",
        "  not few of fast, which takes 2 to 16 rows",
        "  not halves of slow, which takes other dtypes",
    ]
    text = kernel_of(ISAS[0]).explain(torch.zeros(2, 2).half(), 30, torch.float32)
    assert text == "\n".join(["linear: " + says[0], *says[1:], "input_grad: " + says[0], *says[1:]])


@needs_kernel
@pytest.mark.parametrize(
    ("isa", "rows", "dtype", "format", "gain"),
    [
        ("avx512vnni", 16, torch.float32, "nf4", "tiled_inputs8 of avx512vnni takes about 0.45"),
        ("avx512vnni", 8, torch.float32, "nf4", "few_inputs8 of avx512vnni takes about 0.6"),
        ("avx512bf16", 512, torch.bfloat16, "nf4", "tiled_inputs8 of avx512vnni takes about 0.7"),
        ("avx512amx", 16, torch.float32, "nf4", "tiled_inputs8 of avx512vnni takes about 0.45"),
        ("avx512amx", 16, torch.bfloat16, "nf4", None),
        ("avx512bf16", 15, torch.bfloat16, "nf4", None),
        ("avx512bf16", 16, torch.bfloat16, "int8", "tiled_inputs8 of avx512vnni takes about 0.3"),
        ("avx512bf16", 16, torch.int8, "nf4", None),
        ("avx512", 16, torch.float32, "nf4", "tiled_inputs8 of avx512 takes about 0.8"),
        ("avx2", 63, torch.float32, "nf4", "tiled_inputs8 of avx2 takes about 0.8"),
        ("avx2", 64, torch.float16, "nf4", "tiled_inputs8 of avx2 takes about 0.85"),
        ("avx2", 16, torch.bfloat16, "nf4", None),
        ("portable", 16, torch.float32, "nf4", None),
    ],
)
def test_explain_recommends_8_bit_integers_where_they_are_faster(isa, rows, dtype, format, gain):
    if isa not in table.compiled_isas():
        pytest.skip(f"{isa} is not compiled for this processor")
    text = kernel_of(isa).explain(quantize(torch.zeros(1, 64), format), rows, dtype)
    line = f"\nwithout gradients, compute_dtype=torch.int8: {gain} of the time, and rounds inputs to 8 bits"
    assert text.endswith(line) if gain else "takes about" not in text


@covering(
    name=sorted({"reference", *ISAS[:1], *ISAS[-1:]}),
    technique=[FourBit(), FourBit(compute_dtype=torch.int8), Half(), Half(torch.bfloat16)],
)
def test_explain_takes_layers(name, technique):
    layer = convert(torch.nn.Linear(64, 64), technique)
    stored = layer.quantized if isinstance(technique, FourBit) else layer.weight
    dtype = getattr(technique, "compute_dtype", None)
    with kernels.temporary_cpu_backend(name):
        text = kernels.explain(layer, 3)
        assert text == kernels.explain(stored, 3, dtype or torch.float32)
    assert text.startswith("linear")


def test_explain_takes_the_dtype_in_which_a_weight_or_a_changed_layer_computes():
    weight = convert(torch.nn.LSTM(64, 64), FourBit(compute_dtype=torch.bfloat16)).weight_hh_l0
    assert kernels.explain(weight, 80) == kernels.explain(weight.kernel_weight, 80, torch.bfloat16)
    assert kernels.explain(weight, 80, torch.float32) == kernels.explain(weight.kernel_weight, 80, torch.float32)
    layer = convert(torch.nn.Linear(64, 64), FourBit(compute_dtype=torch.bfloat16))
    layer.compute_dtype = None
    assert kernels.explain(layer, 80) == kernels.explain(layer.weight.kernel_weight, 80, torch.float32)


def test_explain_refuses_what_it_cannot_explain():
    half = torch.zeros(2, 2).half()
    for weight, rows, dtype, error, says in (
        (torch.nn.Linear(2, 2), 1, None, TypeError, "Linear stores no weight in 4 or 16 bits"),
        (torch.zeros(2, 2), 1, None, TypeError, "Tensor stores no weight in 4 or 16 bits"),
        (torch.nn.ReLU(), 1, None, TypeError, "ReLU stores no weight"),
        (half, 1, torch.int8, TypeError, "dtype=torch.int8 is for weights of 4 bits"),
        (half, 0, None, ValueError, "rows=0 must be at least 1"),
        (half, 1, torch.float64, ValueError, "dtype=torch.float64 must be"),
    ):
        with pytest.raises(error, match=says):
            kernels.explain(weight, rows, dtype)
