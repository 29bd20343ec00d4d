"""Blocks that are done return what they returned; a model that reads more than they return is told apart."""

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from lowmem.transforms.calibration.block_replay import (
    BlockReplay,
    DroppedOutputRead,
    keep_all_outputs_and_refusal,
    recording_first_input_samples,
)
from lowmem.transforms.calibration.calibration_units import run_and_group_into_units
from lowmem.transforms.calibration.model_runs import evaluation_without_gradients


class Adds(nn.Module):
    """Adds its number, and counts its calls."""

    def __init__(self, number):
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, x, shown=None):
        self.calls += 1
        return x + self.number, {"shown": shown, "name": "added"}


class Chain(nn.Module):
    def __init__(self, count=4):
        super().__init__()
        self.blocks = nn.ModuleList(Adds(10.0**number) for number in range(count))

    def forward(self, x):
        for block in self.blocks:
            x, more = block(x, x > 0)
            assert more["name"] == "added"
            assert more["shown"].dtype == torch.bool
            x += 0.5  # in place: what a block returns is the model's own
        return x


class Skips(Chain):
    def forward(self, x):
        outputs = []
        for block in self.blocks:
            x = block(x + (outputs[0] if len(outputs) > 2 else 0.0))[0]
            outputs.append(x)
        return x


BATCHES = [torch.full((2, 3), float(number)) for number in range(3)]


def finish_all(model, keep_all, offload=None):
    """Finish one block after the other, as calibration does."""
    with evaluation_without_gradients(model), BlockReplay(model, [list(model.blocks)], offload, keep_all) as replay:
        for block in model.blocks:
            replay.cache_and_replay_block(block, BATCHES)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=f"^cannot write '{tmp_path}': .*No space .*; make room on its disk, or choose"):
        finish_all(Chain(), False, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_reads_a_dropped_output_is_noticed():
    with pytest.raises(DroppedOutputRead):
        finish_all(Skips(), keep_all=False)


def test_a_users_own_forward_comes_back():
    model = Chain()

    def own(*args):
        return Adds.forward(model.blocks[0], *args)

    model.blocks[0].forward = own
    with evaluation_without_gradients(model), BlockReplay(model, [list(model.blocks)], None, False) as replay:
        replay.cache_and_replay_block(model.blocks[0], BATCHES)
        assert model.blocks[0].forward is not own
        with replay.runs_stopped_after(model.blocks[1]):
            replay.run_batch_until_stop(0, BATCHES[0])
        assert "forward" not in vars(model.blocks[1])
    assert model.blocks[0].forward is own


def test_batches_that_change_are_refused():
    model = Chain()
    with evaluation_without_gradients(model), BlockReplay(model, [list(model.blocks)], None, False) as replay:
        replay.cache_and_replay_block(model.blocks[0], BATCHES[:2])
        with pytest.raises(ValueError, match="batch 3 of batches is another one than before"):
            replay.cache_and_replay_block(model.blocks[1], BATCHES)


def test_a_file_that_is_gone_is_an_error_and_ends_as_any(tmp_path):
    model = Chain()
    with evaluation_without_gradients(model), BlockReplay(model, [list(model.blocks)], tmp_path, False) as replay:
        replay.cache_and_replay_block(model.blocks[0], BATCHES)
        for file in tmp_path.glob("*/*"):
            file.unlink()
        with pytest.raises(FileNotFoundError):
            replay.cache_and_replay_block(model.blocks[1], BATCHES)
    assert not any("forward" in vars(block) for block in model.blocks)


class Leaving(nn.Module):
    """Returns an output, and leaves beside it what a test says."""

    def __init__(self, leave):
        super().__init__()
        self.layer, self.leave = nn.Linear(8, 8), leave

    def forward(self, x, state):
        self.leave(x, state)
        return x + self.layer(x)


class Leaves(nn.Module):
    def __init__(self, leave, between=lambda x, outputs: x):
        super().__init__()
        self.blocks = nn.ModuleList(Leaving(leave) for _ in range(3))
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
    with evaluation_without_gradients(model):
        with recording_first_input_samples([*blocks, model.head]) as entries:
            units = run_and_group_into_units(
                model, [batch], [*(one.layer for one in blocks), model.head], [blocks], (), blocks_requested=False
            )
        return keep_all_outputs_and_refusal(model, batch, [blocks], units, entries, offload)


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


def change_one_row(x, state):
    state["kept"][0] = x[0]


@pytest.fixture
def batch():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("leave", [nothing, cache])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_hand_on_what_they_return_can_be_replayed(leave, dtype, batch, tmp_path):
    assert way(Leaves(leave).to(dtype), batch.to(dtype)) == (False, "")
    assert way(Leaves(leave).to(dtype), batch.to(dtype), tmp_path) == (False, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leave", [add, replace, grow, change_one_row])
def test_what_a_block_leaves_in_its_arguments_is_seen_at_the_next_one(leave, batch):
    assert way(Leaves(leave), batch) == (None, "blocks.1 gets other inputs where blocks before it are not run")


def test_what_the_last_block_leaves_is_seen_at_the_layer_that_reads_it(batch):
    model = Leaves(nothing)
    model.blocks[2].leave = replace
    assert way(model, batch) == (None, "head gets other inputs where blocks before it are not run")


def test_a_model_that_reads_earlier_outputs_needs_all_of_them(batch):
    def between(x, outputs):
        return x + outputs[0] if len(outputs) > 1 else x

    assert way(Leaves(nothing, between), batch) == (True, "")


def test_a_models_error_says_why(batch):
    def read(x, state):
        cache(x, state)
        if x is not batch:
            assert len(state["cache"].found) > 1, "nothing was left"

    keep_all, why = way(Leaves(read), batch)
    assert keep_all is None
    assert why.startswith("AssertionError: nothing was left")


def test_a_model_whose_runs_differ_passes(batch):
    assert way(Leaves(lambda x, state: state["kept"].add_(torch.rand_like(x))), batch) == (False, "")


def test_padding_that_is_nan_is_what_it_was(batch):
    batch[2] = torch.nan
    assert way(Leaves(nothing), batch)[0] is not None
    assert way(Leaves(add), batch)[0] is None
