"""The benchmark of cells: what counts as one, its limit, and the table."""

from benchmarks import cells


def test_the_fastest_call_counts_and_all_are_taken_in_turns():
    time, order = [0.0], []

    def call(name, *seconds):
        left = iter((9, *seconds))  # the first call does not count

        def run():
            order.append(name)
            time[0] += next(left)

        return run

    calls = {"a": call("a", 3, 1, 2, 2, 2), "b": call("b", 5, 6, 4, 6, 6)}
    assert cells.fastest(calls, lambda: time[0], least=0) == {"a": 1, "b": 4}
    assert order == ["a", "b"] * 6


def test_cells_above_their_limit_are_marked_and_counted(monkeypatch, capsys):
    found = {1: 4.2, 16: 1.9, 64: 2.1}
    monkeypatch.setattr(
        cells,
        "ratios",
        lambda shape, rows, name, kinds, clock, least: dict.fromkeys(kinds, found[rows] / (name == "forward" or 2)),
    )
    rows = [part for number in found for part in ("--rows", str(number))]
    assert cells.main(["--shape", "8x16", "--only", "EightBit(64)", "--dtype", "bfloat16", *rows]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "| EightBit(64) | bfloat16 | 4.2! / 2.1 | 1.9 / 0.95 | 2.1! / 1.1 |" in shown
    assert shown[-1] == "2 of 6 are above the limit"


def test_every_storage_is_multiplied_forward_and_backward(monkeypatch, capsys):
    monkeypatch.setattr(cells, "LEAST", 1)
    assert cells.main(["--shape", "32x128", "--rows", "3", "--seconds", "0"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "float" in line and line.startswith("|")]
    assert len(table) == len(cells.STORAGES) * len(cells.DTYPES)
    assert all(line.count("/") == (not line.startswith("| FourBit() in int8")) for line in table)
