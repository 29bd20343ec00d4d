"""Each row comes once in each epoch, a step's rows follow from its number, and processes divide them among them."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from lowmem.finetuning.order import Order, part

SMALL = st.integers(1, 9)


@given(SMALL, SMALL, st.integers(1, 40), st.integers(0, 3))
def test_epochs_are_permutations_that_differ(rows, per_step, total, seed):
    order = Order(rows, per_step, seed, total)
    taken = [order.indices(step) for step in range(order.steps)]
    assert [len(indices) for indices in taken[:-1]] == [per_step] * (order.steps - 1)
    stream = [*chain(*taken)]
    assert len(stream) == total
    for start in range(0, total - rows + 1, rows):
        assert sorted(stream[start : start + rows]) == list(range(rows))
    assert order.indices(order.steps - 1) == taken[-1]  # in any order of calls


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(Order(20, 20, seed, 60).indices(epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@given(st.integers(1, 60), SMALL, st.integers(1, 5))
def test_processes_divide_the_rows_of_a_step(rows, batch_size, world):
    indices = list(range(100, 100 + rows))
    parts = [part(indices, batch_size, rank, world) for rank in range(world)]
    assert sorted(chain(*chain(*parts))) == indices
    assert {len(own) for own in parts} == {-(-rows // (batch_size * world))}
    assert all(len(batch) <= batch_size for own in parts for batch in own)
    for batches in zip(*parts, strict=True):  # none has more than one row above another
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
