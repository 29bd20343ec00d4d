"""What a page is made of: a chart is an image that is called by its caption."""

import pytest

pytest.importorskip("altair", reason="the charts need the extra: pip install '.[report]'")

from lowmem.report.charts import Drawing
from lowmem.report.content import Figure, Table


def test_a_chart_is_an_image_with_its_caption_as_name():
    figure = Figure(Drawing('<svg a="1"></svg>', '<svg a="2"></svg>', {}), 'says "<b>"', Table("", [], []))
    assert figure.svg("wide") == '<svg role="img" aria-label="says &#34;&lt;b&gt;&#34;" a="1"></svg>'
    assert 'a="2"' in figure.svg("narrow")
