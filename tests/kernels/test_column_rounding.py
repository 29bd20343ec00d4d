"""Columns that are rounded one after the other, in C at each ISA and in torch, against float64."""

import torch

from lowmem import kernels
from lowmem.kernels.column_rounding import PANEL
from lowmem.quant.backend import ColumnPanel, backend_for
from lowmem.quant.formats import FORMATS, get_format
from tests.rounding import gamma, unit
from tests.selection import covering


def problem(columns, out, signed):
    torch.manual_seed(columns * out)
    mixed = torch.randn(columns, columns) / 4
    matrix = mixed @ mixed.T + 0.1 * torch.eye(columns)
    scales = torch.rand(columns, out) + 0.01
    if signed:
        scales *= torch.where(torch.rand(columns, out) < 0.5, -1, 1)
    scales[:: max(1, columns - 1), :: max(1, out - 1)] = 0  # corners; where there is one column, its ends
    return torch.randn(columns, out), scales, matrix


@covering(
    2,
    backend=kernels.available_cpu_backend_names(),
    format=FORMATS,
    columns=[1, 2, 33, PANEL],
    out=[1, 15, 16, 17, 100],
    descends=[False, True],
)
def test_each_number_gets_the_code_next_to_what_the_columns_before_have_left(backend, format, columns, out, descends):
    form = get_format(format)
    values, scales, matrix = problem(columns, out, form.signed)
    pivots, before = matrix.diagonal() + 0.3, torch.randn(columns, out)
    changes, near, codes = values.clone(), before.clone(), torch.full((columns, out), 255, dtype=torch.uint8)
    with kernels.temporary_cpu_backend(backend):
        backend_for().round_columns(form, ColumnPanel(changes, scales, pivots, matrix, near, codes), descends)

    levels = torch.tensor(form.levels)
    assert torch.equal(near, levels[codes.int()] * scales)
    assert (codes[scales == 0] == form.zero_code).all()
    earlier, done = matrix.double().tril(-1), changes.double()
    left, magnitudes = values.double() - earlier @ done, values.double().abs() + earlier.abs() @ done.abs()
    error, pivot, u = gamma(columns + 2) * magnitudes, pivots.double()[:, None], unit(torch.float32)
    wanted = left
    if descends:
        assert torch.equal(changes, near - before)
        wanted = before.double() + left / pivot
        error = (error + 3 * u * left.abs()) / pivot + u * wanted.abs()
    else:
        assert ((done * pivot - (left - near.double())).abs() <= error + 3 * u * (left.abs() + near.abs())).all()
    choices = levels.double()[:, None, None] * scales.double()
    least = (wanted - choices).abs().amin(0)
    slack = 2 * (error + 4 * u * (wanted.abs() + scales.abs()))  # of the number, and of the threshold beside it
    assert ((wanted - near.double()).abs() <= least + slack).all()


def test_more_columns_than_c_takes_are_rounded_in_torch():
    form = get_format("nf4")
    values, scales, matrix = problem(PANEL + 1, 5, signed=False)
    near, codes = torch.empty_like(values), torch.empty(values.shape, dtype=torch.uint8)
    columns = ColumnPanel(values.clone(), scales, matrix.diagonal(), matrix, near, codes)
    backend_for().round_columns(form, columns, descends=False)
    levels = torch.tensor(form.levels)
    assert torch.equal(near, levels[codes.int()] * scales)
    assert torch.equal((values[0] - near[0]).abs(), (values[0] - levels[:, None] * scales[0]).abs().amin(0))
