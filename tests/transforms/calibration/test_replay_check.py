"""Whether blocks get the same when those before them are not run is told by the numbers that they get."""

import pytest
import torch
from torch import nn

from lowmem.transforms.calibration.blocks import units_of
from lowmem.transforms.calibration.replay import evaluation_mode
from lowmem.transforms.calibration.replay_check import Entries, way_to_replay


class Block(nn.Module):
    """Returns an output, and leaves beside it what a test says."""

    def __init__(self, leave):
        super().__init__()
        self.layer, self.leave = nn.Linear(8, 8), leave

    def forward(self, x, state):
        self.leave(x, state)
        return x + self.layer(x)


class Model(nn.Module):
    def __init__(self, leave, between=lambda x, outputs: x):
        super().__init__()
        self.blocks = nn.ModuleList(Block(leave) for _ in range(3))
        self.between, self.head = between, nn.Linear(8, 2)

    def forward(self, x):
        state, outputs = {"kept": torch.zeros(4, 8), "empty": torch.zeros(0, 8), "cache": Cache()}, []
        for block in self.blocks:
            x = self.between(block(x, state), outputs)
            outputs.append(x)
        return self.head(x + state["kept"].to(x.dtype))


class Cache:
    """What a model passes on without looking into it."""

    def __init__(self):
        self.found = []


def way(model, batch, offload=None):
    blocks = list(model.blocks)
    with evaluation_mode(model) as overrides:
        entries = Entries([*blocks, model.head])
        with entries.noted():
            units = units_of(model, [batch], [*(one.layer for one in blocks), model.head], [blocks], (), asked=False)
        return way_to_replay(model, batch, overrides, [blocks], units, entries, offload)


def nothing(x, state):
    pass


def add(x, state):
    state["kept"] += x.mean()


def replace(x, state):
    state["kept"] = x


def cache(x, state):
    state["cache"].found.append(x)


def grow(x, state):
    state[len(state)] = x


@pytest.fixture
def batch():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("leave", [nothing, cache])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_hand_on_what_they_return_can_be_replayed(leave, dtype, batch, tmp_path):
    assert way(Model(leave).to(dtype), batch.to(dtype)) == (False, "")
    assert way(Model(leave).to(dtype), batch.to(dtype), tmp_path) == (False, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leave", [add, replace, grow])
def test_what_a_block_leaves_in_its_arguments_is_seen_at_the_next_one(leave, batch):
    assert way(Model(leave), batch) == (None, "blocks.1 gets other inputs where blocks before it are not run")


def test_what_the_last_block_leaves_is_seen_at_the_layer_that_reads_it(batch):
    model = Model(nothing)
    model.blocks[2].leave = replace
    assert way(model, batch) == (None, "head gets other inputs where blocks before it are not run")


def test_one_row_of_the_input_is_enough(batch):
    def first(x, state):
        state["kept"][0] = x[0]

    assert way(Model(first), batch)[0] is None


def test_a_model_that_reads_earlier_outputs_needs_all_of_them(batch):
    def between(x, outputs):
        return x + outputs[0] if len(outputs) > 1 else x

    assert way(Model(nothing, between), batch) == (True, "")


def test_a_models_error_says_why(batch):
    def read(x, state):
        cache(x, state)
        if x is not batch:
            assert len(state["cache"].found) > 1, "nothing was left"

    keep_all, why = way(Model(read), batch)
    assert keep_all is None
    assert why.startswith("AssertionError: nothing was left")


def test_of_a_model_whose_runs_are_not_alike_nothing_is_known(batch):
    assert way(Model(lambda x, state: state["kept"].add_(torch.rand_like(x))), batch) == (False, "")


def test_padding_that_is_nan_is_what_it_was(batch):
    batch[2] = torch.nan
    assert way(Model(nothing), batch)[0] is not None
    assert way(Model(add), batch)[0] is None
