"""Every colour of the report can be told from its page, in light and in dark."""

import re

import pytest

from lowmem.report.theme import DARK, LIGHT, SERIES, css_variable_declarations, svg_with_theme_colors

BACKGROUNDS, TEXT = ("page", "panel"), ("ink", "quiet", "link", "good", "bad")


def luminance(colour):
    """WCAG 2.2, relative luminance of an sRGB colour."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_that_of_wcag_aa(theme):
    for background in BACKGROUNDS:
        for name in TEXT:
            assert contrast(theme[name], theme[background]) >= 4.5, (name, background)
    for name in SERIES:
        assert contrast(theme[name], theme["page"]) >= 3, name


def test_names_become_colours():
    assert (
        svg_with_theme_colors('<path fill="var(--blue)" stroke="var(--page)"/>', DARK)
        == '<path fill="#3f97dd" stroke="#11151b"/>'
    )
    assert re.fullmatch(r"(--\w+: #[0-9a-f]{6}; ?)+", css_variable_declarations(LIGHT))
