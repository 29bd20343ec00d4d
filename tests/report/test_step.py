"""The bars of a training step sum to its peak, and its table has every kind of layer."""

import pytest

pytest.importorskip("altair", reason="the picture needs the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the picture needs the extra: pip install '.[report]'")

from lowmem.report.step import PARTS, chart, figure
from lowmem.training.memory import TrainingMemory

MIB = 2**20
HOSTILE = "<script>alert('1')</script>&"
FOUND = {
    HOSTILE: TrainingMemory("adamw", "update", 8 * MIB, 0, MIB, 8 * MIB, 16 * MIB, {}, MIB),
    "qlora": TrainingMemory(
        "adamw", "backward", MIB, MIB, MIB, 0, 2 * MIB, {f"Kind{n}": (5 - n) * MIB for n in range(5)}, 7
    ),
}


@pytest.mark.parametrize("narrow", [False, True])
def test_the_segments_of_a_bar_sum_to_its_peak(narrow):
    spec = chart(FOUND, narrow).to_dict()
    rows = spec["layer"][0]["data"]["values"]
    for name, one in FOUND.items():
        assert sum(row["size"] for row in rows if row["name"] == name) * MIB == pytest.approx(
            one.total_bytes, abs=1e-6
        )
    parts = [row["part"] for row in rows if row["name"] == "qlora"]
    kinds = [f"activations: {kind}" for kind in ("Kind0", "Kind1", "Kind2", "other layers")]
    assert parts == ["weights", "adapters", "inputs", "optimizer", *kinds, "scratch"]
    assert [row["order"] for row in rows if row["name"] == "qlora"] == sorted(r["order"] for r in rows[-9:])
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [*PARTS, *kinds, "scratch"]
    assert len(set(scale["range"])) == len(scale["domain"])


def test_nothing_but_weights_is_drawn():
    spec = chart({"one": TrainingMemory("sgd", "forward", 5, 0, 0, 0, 0, {}, 0)}, False).to_dict()
    assert [row["part"] for row in spec["layer"][0]["data"]["values"]] == ["weights"]


def test_the_table_has_each_kind_of_layers():
    table = figure(FOUND).table
    assert table.columns == [
        *("Model", *PARTS),
        *(f"activations: Kind{n}" for n in range(5)),
        *("scratch", "peak", "in"),
    ]
    for row, one in zip(table.rows, FOUND.values(), strict=True):
        numbers = [int(cell.replace(",", "")) for cell in row[1:-1]]
        assert sum(numbers[:-1]) == numbers[-1] == one.total_bytes
        assert row[-1] == one.moment
