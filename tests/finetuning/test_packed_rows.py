"""Rows hold each example once, apart from the others; steps take each row once in each epoch."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.finetuning.calling_convention import CallingConvention
from lowmem.finetuning.packed_rows import Rows, ShuffledRowOrder, pack_into_rows, rank_batches
from lowmem.finetuning.text_examples import IGNORED, Example
from tests.finetuning.language import VOCABULARY, Language

SMALL = st.integers(1, 9)
LENGTHS = [5, 17, 3, 9, 12, 20, 2]


def examples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Example.of(tokens, [number % 3 > 0 for number in range(len(tokens))]) for tokens in made]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(0, 6))
def test_rows_hold_all_and_are_few(lengths, more):
    length = max(lengths) + more
    rows = pack_into_rows(lengths, length)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[one] for one in row) <= length for row in rows)
    least = -(-sum(lengths) // length)
    assert sum(sum(lengths[one] for one in row) <= length // 2 for row in rows) <= 1  # of two such one would do
    assert len(rows) <= 2 * least


@pytest.mark.parametrize(
    "calling", [CallingConvention(True, True, False, True), CallingConvention(True, True), CallingConvention()]
)
def test_packed_and_padded_rows_give_the_logits_of_each_example_alone(calling):
    torch.manual_seed(0)
    model, found = Language().eval(), examples()
    rows = Rows(found, 20, calling)
    assert len(rows) == (4 if calling.isolates_texts else len(found))
    assert int(rows.counted.sum()) == sum(one.counted for one in found)
    seen = []
    for batch in (rows.batch(range(start, min(start + 3, len(rows)))) for start in range(0, len(rows), 3)):
        logits = model(**batch.inputs)
        for row in range(len(batch.targets)):
            counts = batch.targets[row] != IGNORED
            picked = logits[row][counts].log_softmax(-1).gather(1, batch.targets[row][counts][:, None])
            seen += picked.flatten().tolist()
    alone = []
    for one in found:
        counts = one.targets != IGNORED
        logits = model(one.ids.long()[None])[0][counts]
        alone += logits.log_softmax(-1).gather(1, one.targets[counts].long()[:, None]).flatten().tolist()
    assert sorted(seen) == pytest.approx(sorted(alone), abs=1e-5)


def test_a_batch_is_as_long_as_its_longest_row_and_counts_its_tokens():
    rows = Rows(examples(), 20, CallingConvention(True, True))
    batch = rows.batch([2, 0])
    assert batch.inputs["input_ids"].shape == batch.targets.shape == (2, 5)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert "position_ids" not in batch.inputs
    assert batch.tokens == 8
    assert rows.counted.tolist() == [one.counted for one in examples()]


def test_a_batch_of_no_rows_counts_nothing():
    batch = Rows(examples(), 20, CallingConvention(True, True, False, True)).batch([])
    assert batch.inputs["input_ids"].shape == (1, 1)
    assert batch.targets.tolist() == [[IGNORED]]
    assert batch.tokens == 0


def test_no_examples_and_long_examples_are_refused():
    with pytest.raises(ValueError, match=r"examples=\[\]"):
        Rows([], 20, CallingConvention())
    with pytest.raises(ValueError, match="length=19 must be at least that of the longest example, 20 tokens"):
        Rows(examples(), 19, CallingConvention())
    assert Rows.of(Language(), examples(), 20, VOCABULARY).calling.isolates_texts


@given(SMALL, SMALL, st.integers(1, 40), st.integers(0, 3))
def test_epochs_are_permutations_that_differ(rows, per_step, total, seed):
    order = ShuffledRowOrder(rows, per_step, seed, total)
    taken = [order.row_indices(step) for step in range(order.step_count)]
    assert [len(indices) for indices in taken[:-1]] == [per_step] * (order.step_count - 1)
    stream = [*chain(*taken)]
    assert len(stream) == total
    for start in range(0, total - rows + 1, rows):
        assert sorted(stream[start : start + rows]) == list(range(rows))
    assert order.row_indices(order.step_count - 1) == taken[-1]  # in any order of calls


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(ShuffledRowOrder(20, 20, seed, 60).row_indices(epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@given(st.integers(1, 60), SMALL, st.integers(1, 5))
def test_processes_divide_the_rows_of_a_step(rows, batch_size, world):
    indices = list(range(100, 100 + rows))
    parts = [rank_batches(indices, batch_size, rank, world) for rank in range(world)]
    assert sorted(chain(*chain(*parts))) == indices
    assert {len(own) for own in parts} == {-(-rows // (batch_size * world))}
    assert all(len(batch) <= batch_size for own in parts for batch in own)
    for batches in zip(*parts, strict=True):  # none has more than one row above another
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
