"""Rows of an export, and their errors."""

import math

import pytest
import torch

import lowmem
from lowmem import kernels
from lowmem.io.formats.export_results import Exported, combined_relative_rms_error, squares_of_error_and_weight
from lowmem.io.shards import LazyWeight
from lowmem.kernels import reference


def row_of(before, after, **options):
    weight = LazyWeight("a", tuple(before.shape), torch.float32, 7, lambda: before)
    return Exported.compare(weight, "b", "kind", before, after, 5, **options)


def test_an_error_is_that_of_differences_in_float32_and_none_where_no_value_changed():
    weight = torch.randn(37, 96)
    stored = lowmem.quantize(weight, "nf4")
    row = row_of(weight, stored)
    lost = (weight.double() - stored.dequantize().double()).norm() / weight.double().norm()
    assert row.error == pytest.approx(float(lost), rel=2**-24, abs=0)  # each difference is rounded once
    assert (row.name, row.target, row.kind, row.shape, row.kept) == ("a", "b", "kind", (37, 96), "float32")
    assert (row.before_bytes, row.after_bytes) == (7, 5)
    for same in (None, stored, stored.dequantize()):
        assert row_of(stored, same).error is None
    assert row_of(stored, weight, measured=False).error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_squares_what_it_can_read(dtype, monkeypatch):
    weight, other = torch.randn(300, 96).to(dtype), torch.randn(300, 96).to(dtype)
    lost, size = (float(one.double().square().sum()) for one in (weight.float() - other.float(), weight))
    monkeypatch.setattr(
        reference, "squares", reference.squares if kernels.available_cpu_backend_names() == ["reference"] else None
    )
    assert squares_of_error_and_weight(weight, other) == (
        pytest.approx(lost, rel=1e-12),
        pytest.approx(size, rel=1e-12),
    )
    stored = lowmem.quantize(weight, "nf4")
    assert row_of(weight, stored).error == pytest.approx(stored.squares.relative_error, rel=5.001e-4)  # of 4 digits


def test_the_error_over_all_weights_counts_those_that_did_not_change():
    small, large = torch.randn(8, 32), 10 * torch.randn(40, 32)
    rows = [row_of(small, small + 1), row_of(large, None)]
    whole = math.sqrt(small.numel() / float(small.double().square().sum() + large.double().square().sum()))
    assert combined_relative_rms_error(rows) == pytest.approx(whole, rel=1e-6)
    assert combined_relative_rms_error([]) == 0.0


def test_squares_of_what_overflows_float32_and_of_scalars():
    huge = torch.tensor([[1e30, 2e30]])
    assert squares_of_error_and_weight(huge, None) == (0.0, pytest.approx(5e60))
    assert squares_of_error_and_weight(torch.tensor(3.0), torch.tensor(1.0)) == (4.0, 9.0)
