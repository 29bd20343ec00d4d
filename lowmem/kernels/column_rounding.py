"""Columns of a weight, each rounded to codes for what the ones before it left; a method of ``Backend``.

With the changes d of the columns before, a number of column i is rounded from

    GPTQ     w = value_i - sum_j M_ij d_j                                    d_i = (w - near) / pivot_i
    descent  w = before_i + (value_i - sum_j M_ij d_j) / pivot_i             d_i = near - before_i

where near is the level next to w / scale, times the scale. Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1;
Behdin et al., QuantEase, arXiv 2309.01885, section 3.
"""

from __future__ import annotations

import torch

from lowmem.quant.backend import ColumnPanel
from lowmem.quant.formats import Format

PANEL = 64
"""Columns of a call, at most: ``MOST_COLUMNS`` of csrc/columns.h, and what stays in a processor's cache."""


def round_columns(form: Format, columns: ColumnPanel, descends: bool) -> None:
    """Round columns one after the other; ``descends`` says whether it is a step of coordinate descent."""
    values, scales, pivots, matrix, approximate, codes = columns
    levels, boundaries = (
        torch.tensor(numbers, dtype=torch.float32, device=values.device) for numbers in (form.levels, form.boundaries)
    )
    for i, pivot in enumerate(pivots):
        left = torch.addmv(values[i], values[:i].T, matrix[i, :i], alpha=-1)
        wanted = approximate[i] + left / pivot if descends else left
        codes[i] = torch.bucketize(wanted / scales[i].masked_fill(scales[i] == 0, torch.inf), boundaries)
        near = levels[codes[i].int()] * scales[i]
        values[i] = near - approximate[i] if descends else (left - near) / pivot
        approximate[i] = near
