"""What a page is made of: a chart is an image that is called by its caption, and figures can be read."""

import pytest

from tests.selection import rows_in_one_case

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report.charts import Drawing
from lowmem.report.content import Figure, Table, figure_text


def test_a_chart_is_an_image_with_its_caption_as_name():
    figure = Figure(Drawing('<svg a="1"></svg>', '<svg a="2"></svg>', {}), 'says "<b>"', Table("", [], []))
    assert figure.svg("wide") == '<svg role="img" aria-label="says &#34;&lt;b&gt;&#34;" a="1"></svg>'
    assert 'a="2"' in figure.svg("narrow")


@rows_in_one_case(
    ("value", "text"), [(None, ""), (0, "0"), (1048576, "1,048,576"), (2.0, "2"), (0.00123456, "0.001235")]
)
def test_figures_of_gates(value, text):
    assert figure_text(value) == text
