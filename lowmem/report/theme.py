"""The colours of a report, light and dark: Okabe and Ito's palette, which colour-blind readers can distinguish, with
a contrast of 3:1 with the page, text 4.5:1 (WCAG 2.2, 1.4.3 and 1.4.11)."""

from __future__ import annotations

import re
from types import MappingProxyType

# In light, and in dark
_COLOURS = {
    "page": ("#ffffff", "#11151b"),
    "panel": ("#f5f7fa", "#1a2029"),
    "ink": ("#1a2230", "#e7ebf1"),
    "quiet": ("#525d6c", "#a7b1bf"),
    "line": ("#d9dfe6", "#313a46"),
    "link": ("#0b5cad", "#79b8ff"),
    "good": ("#0a6b45", "#4fd1a0"),
    "bad": ("#b3261e", "#ff8a80"),
    "blue": ("#0072b2", "#3f97dd"),
    "green": ("#00855c", "#1fb588"),
    "orange": ("#c65a00", "#f0994a"),
    "purple": ("#a34a86", "#dc8cbf"),
    "sky": ("#2b8fc4", "#86cdf5"),
    "olive": ("#8a7400", "#e0cc52"),
    "grey": ("#6c7685", "#8f9aaa"),
    "brown": ("#8c4a2f", "#c98a6e"),
    "navy": ("#26337a", "#aab6ff"),
    "rose": ("#d6336c", "#ff7f9f"),
}
LIGHT, DARK = (MappingProxyType({name: both[at] for name, both in _COLOURS.items()}) for at in (0, 1))

SERIES = ("blue", "green", "orange", "purple", "olive", "sky", "brown", "grey", "navy", "rose")
"""The colours of series, in the order of use; further series repeat them."""

_NAME = re.compile(r"var\(--(\w+)\)")


def series_color_css_variables(count: int) -> list[str]:
    """Return the colours of ``count`` series, as CSS variables."""
    return [f"var(--{SERIES[number % len(SERIES)]})" for number in range(count)]


def css_variable_declarations(theme: MappingProxyType[str, str]) -> str:
    """Return a theme as CSS variable declarations."""
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())


def svg_with_theme_colors(svg: str, theme: MappingProxyType[str, str]) -> str:
    """Return an SVG with its CSS variables replaced by the theme's colours."""
    return _NAME.sub(lambda match: theme[match[1]], svg)
