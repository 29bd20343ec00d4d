"""Blocks that are done return what they returned, copied; what is kept no longer shows as NaN where it is read."""

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from lowmem.transforms.calibration.replay import Replay, Stale, evaluation_mode


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


def inputs_of(model, keep_all, offload=None):
    """Return what each block gets once those before it are done, and how often each was called."""
    seen = []
    with (
        evaluation_mode(model) as overrides,
        Replay(model, overrides, [list(model.blocks)], offload, keep_all) as replay,
    ):
        for block in model.blocks:
            handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
            replay.finish(block, BATCHES)
            handle.remove()
        assert all("forward" in vars(block) for block in model.blocks)
    assert not any("forward" in vars(block) for block in model.blocks)
    return seen, [block.calls for block in model.blocks]


def expected(model):
    seen = {block: [] for block in model.blocks}
    handles = [
        block.register_forward_pre_hook(lambda b, args: seen[b].append(args[0].clone())) for block in model.blocks
    ]
    for batch in BATCHES:
        model(batch)
    for handle in handles:
        handle.remove()
    for block in model.blocks:
        block.calls = 0
    return [x for block in model.blocks for x in seen[block]]


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize(("kind", "keep_all"), [(Chain, False), (Chain, True), (Skips, True)])
def test_each_block_gets_what_it_gets_in_a_whole_run_and_is_computed_once(kind, keep_all, offloads, tmp_path):
    model = kind()
    wanted = expected(model)
    seen, calls = inputs_of(model, keep_all, tmp_path / "new" if offloads else None)
    assert all(torch.equal(*both) for both in zip(seen, wanted, strict=True))
    assert calls == [3] * 4
    assert list(tmp_path.glob("*/*")) == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=f"^cannot write '{tmp_path}': .*No space .*; make room on its disk, or choose"):
        inputs_of(Chain(), False, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_kept_no_longer_is_missed():
    with pytest.raises(Stale):
        inputs_of(Skips(), keep_all=False)


def test_a_users_own_forward_comes_back():
    model = Chain()

    def own(*args):
        return Adds.forward(model.blocks[0], *args)

    model.blocks[0].forward = own
    with evaluation_mode(model) as overrides, Replay(model, overrides, [list(model.blocks)], None, False) as replay:
        replay.finish(model.blocks[0], BATCHES)
        assert model.blocks[0].forward is not own
        with replay.ending_at(model.blocks[1]):
            replay.run(0, BATCHES[0])
        assert "forward" not in vars(model.blocks[1])
    assert model.blocks[0].forward is own


def test_batches_that_change_are_refused():
    model = Chain()
    with evaluation_mode(model) as overrides, Replay(model, overrides, [list(model.blocks)], None, False) as replay:
        replay.finish(model.blocks[0], BATCHES[:2])
        with pytest.raises(ValueError, match="batch 3 of batches is another one than before"):
            replay.finish(model.blocks[1], BATCHES)


def test_a_file_that_is_gone_is_an_error_and_ends_as_any(tmp_path):
    model = Chain()
    with (
        evaluation_mode(model) as overrides,
        Replay(model, overrides, [list(model.blocks)], tmp_path, False) as replay,
    ):
        replay.finish(model.blocks[0], BATCHES)
        for file in tmp_path.glob("*/*"):
            file.unlink()
        with pytest.raises(FileNotFoundError):
            replay.finish(model.blocks[1], BATCHES)
    assert not any("forward" in vars(block) for block in model.blocks)
