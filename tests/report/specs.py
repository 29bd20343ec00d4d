"""What holds of every chart, by its specification: marks and ticks within the axes, panels within the column."""

PHONE = 360 - 2 * 16  # pixels of the page's column on a phone, within its padding
DESK = 60 * 16 - 2 * 16  # of the widest column
PADDING, SPACING = 4 + 14, 18  # beside a chart's panels, and between two
NUMBERS = 60  # pixels that an axis of numbers and its title take, or less


def assert_readable(chart, narrow):
    """Assert that a reader of a page sees all that a chart draws, on axes that say something."""
    spec = chart.to_dict()
    side_by_side = spec.get("hconcat", [])
    drawn = [{"data": spec.get("data"), **panel} for panel in side_by_side or spec.get("vconcat", [spec])]
    widths = [panel["width"] + _beside(panel) for panel in drawn]
    taken = sum(widths) + SPACING * (len(widths) - 1) if side_by_side else max(widths)
    assert taken + PADDING <= (PHONE if narrow else DESK)
    for panel in drawn:
        for mark in (layer["mark"] for layer in panel.get("layer", [panel])):
            assert mark.get("opacity", 1) > 0
            assert mark["type"] != "point" or mark["filled"]  # else its colour hardly shows
        for axis in "xy":
            _hold(axis, list(_encodings(panel, axis)))


def _layers(panel):
    """Yield the encodings of each layer with the rows of data that it draws."""
    for layer in panel.get("layer", [panel]):
        yield layer["encoding"], layer.get("data", panel.get("data"))["values"]


def _encodings(panel, axis):
    """Yield what stands at an axis, with its values."""
    for encoding, rows in _layers(panel):
        for channel in (axis, f"{axis}2"):
            given = encoding.get(channel, {})
            if "field" in given and given.get("type") != "nominal":
                yield given, [row[given["field"]] for row in rows if row.get(given["field"]) is not None]


def _beside(panel):
    """Return the pixels left of a panel: names that are shown have a place of their own."""
    axes = [encoding["y"]["axis"] for encoding, _ in _layers(panel) if "axis" in encoding.get("y", {})]
    shown = [axis for axis in axes if axis.get("labels", True)]
    return max((axis.get("minExtent", NUMBERS) for axis in shown), default=0)


def _hold(axis, encodings):
    if not encodings:
        return
    scales = [given["scale"] for given, _ in encodings if "scale" in given]
    low, high = scales[0]["domain"]
    assert low < high
    assert low > 0 or scales[0].get("type") != "log"
    assert all(scale["domain"] == [low, high] and scale["nice"] is False for scale in scales)  # else Vega widens it
    for given, values in encodings:
        assert all(low <= value <= high for value in values), (axis, given["field"])
        ticks = given.get("axis", {}).get("values")
        if ticks is not None:
            assert ticks == sorted(set(ticks))
            assert any(low <= tick <= high for tick in ticks), (axis, ticks)
