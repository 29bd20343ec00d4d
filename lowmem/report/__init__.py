"""Reports on models and variants: measurements, charts and the HTML page, which need the extra ``report``.

It may import ``quant``, ``nn``, ``transforms``, ``training`` and ``testing``. Begin with ``page.py``.
"""
