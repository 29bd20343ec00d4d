"""Settings that cannot be are refused before anything is done."""

import pytest

from lowmem import FineTuning
from lowmem.finetuning.settings import LARGEST_LR

NONE = (0, -1, 1.5, True, "3")


def test_values_out_of_their_range_are_named():
    bad = [(name, value) for name in ("steps", "epochs", "batch_size", "accumulate", "save_every") for value in NONE]
    bad += [("warmup", -1), ("warmup", 1.0), ("seed", -1), ("seed", 2**63), ("decay", "exp"), ("weight_decay", -0.1)]
    bad += [(name, value) for name in ("lr", "clip") for value in (0, -1, float("nan"), float("inf"), "1", True)]
    bad += [("lr", LARGEST_LR * 1.01), ("patience", 3), ("eval_every", 0)]
    for name, value in bad:
        with pytest.raises(ValueError, match=f"^{name}="):
            FineTuning(**{name: value})
    with pytest.raises(ValueError, match="leave one out"):
        FineTuning(steps=3, epochs=1)
    assert FineTuning(lr=LARGEST_LR, clip=None, patience=1, eval_every=1).clip is None


def test_how_many_rows_all_steps_take():
    assert FineTuning(batch_size=3, accumulate=2, epochs=2).total_rows(10) == 20
    assert FineTuning(batch_size=3).total_rows(10) == 10
    assert FineTuning(batch_size=3, accumulate=2, steps=5).total_rows(10, 2) == 60
    assert FineTuning(batch_size=4, warmup=2).total_rows(9) == 9
    with pytest.raises(ValueError, match="warmup=3 must be below the 3 steps"):
        FineTuning(batch_size=4, warmup=3).total_rows(9)
