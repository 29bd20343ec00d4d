"""A plot of a run: the loss of each step, and that of the held-out text."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.errors import show
from lowmem.io.atomic import check_writable, write_atomically
from lowmem.version import install_command

__all__ = ["check_plot", "plot_losses"]

KINDS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise, before anything is trained, if a plot cannot be drawn or written.

    Raises:
        ValueError: the suffix is not one of ``KINDS``.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"plot={show(str(path))} must end in {', '.join(KINDS)}")
    _figure()
    check_writable(path)


def plot_losses(
    path: Path,
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    before: Mapping[str, float] | None = None,
) -> None:
    """Draw the losses of a run. The same figures give the same bytes.

    Args:
        path: of a ``.png``, ``.svg`` or ``.pdf`` file.
        losses: of each step, in nats per token.
        evaluations: pairs of a number of completed steps and the perplexity of the held-out text after them.
        before: perplexities of the held-out text before the first step, by name; at most three are drawn.

    Raises:
        ValueError, ImportError, OSError: as ``check_plot``.
    """
    check_plot(path)
    figure = _figure()
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9ab", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 20)
    if width > 1:
        means = [math.fsum(losses[max(0, end - width) : end]) / min(end, width) for end in steps]
        axes.plot(steps, means, color="#247", label=f"training, mean of {width} steps")
    shown = [(step, math.log(value)) for step, value in evaluations if math.isfinite(value)]
    if shown:
        axes.plot(
            *zip(*shown, strict=True),
            color="#c40",
            marker="o",
            label="held out",
        )
    finite = [(name, value) for name, value in (before or {}).items() if math.isfinite(value)]
    for style, (name, value) in zip((":", "--", "-."), finite, strict=False):
        axes.axhline(math.log(value), color="#c40", linewidth=0.8, linestyle=style, label=f"held out, {name}")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], metadata=_UNDATED[path.suffix])
    write_atomically(path, content.getvalue())


_UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Metadata that leaves dates and versions out of the file, by suffix."""


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError(f"plot needs matplotlib: {install_command('plot')}") from reason
    return Figure(figsize=(7, 4), layout="constrained")
