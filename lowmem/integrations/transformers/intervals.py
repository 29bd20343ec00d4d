"""How far a mean over parts of a text may be off, since another text would have had other parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["interval"]

RESAMPLES = 2000  # another seed moves the ends of an interval by some hundredths of its width


def interval(
    sums: Tensor, counts: Tensor, of: Callable[[Tensor], Tensor] = lambda mean: mean
) -> tuple[float, float] | None:
    """Return the 95% interval of a mean, as the percentile bootstrap over parts gives it; None of a single part.

    Parts (windows, paragraphs) are drawn as often as there are, with replacement, and ``sum(sums) / sum(counts)`` is
    computed of those drawn (Efron, Bootstrap methods: another look at the jackknife, 1979). Of fewer than ten parts
    the interval is too narrow. The seed is fixed: the same sums give the same interval.

    Args:
        sums: (parts,) of a quantity.
        counts: (parts,) of what it is summed over.
        of: a monotone function of the mean, such as ``torch.exp``.
    """
    parts = len(sums)
    if parts < 2:
        return None
    drawn = torch.randint(parts, (RESAMPLES, parts), generator=torch.Generator().manual_seed(0))
    means = of(sums.double()[drawn].sum(1) / counts.double()[drawn].sum(1))
    low, high = means.sort().values[[int(0.025 * RESAMPLES), int(0.975 * RESAMPLES)]].tolist()
    return low, high
