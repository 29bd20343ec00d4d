"""A run of two processes goes on in four, in two and in one, from states that are those of one process."""

import shutil
import signal
import sys
import threading

import pytest
import torch
import torch.distributed as dist

import lowmem
from lowmem.distributed.distributed_checkpoints import DistributedCheckpoints
from lowmem.distributed.torchrun_processes import ReplicatedProcessGroup, ShardedProcessGroup
from lowmem.errors import FileError
from lowmem.finetuning import training_state
from lowmem.finetuning.loop import finetune
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.training_state import FILES, SavedState, States
from tests.distributed.ranks import needs_ranks, run_ranks
from tests.finetuning.language import TEXT, language, rows, texts

pytestmark = needs_ranks

STORED = lowmem.FourBit("nf4", 16)
SAVED = 4


class Stopped(Exception):  # noqa: N818 - no error
    pass


def settings(world=1, **others):
    """Return settings of 8 rows a step, of which the last step has fewer."""
    return FineTuning(epochs=5, batch_size=4 // world, accumulate=2, lr=1e-2, save_every=2, eval_every=5, **others)


def stop_after(steps):
    def watch(step):
        if step.number == steps:
            raise Stopped

    return watch


class Watched(lowmem.Rows):
    """Rows that note which of them are asked for in training."""

    def __init__(self, found):
        self.__dict__.update(found.__dict__, seen=[])

    def batch(self, indices, device="cpu"):
        self.seen.append(list(indices))
        return super().batch(indices, device)


def run(folder, ranks=None, states=None, stop=None, memory=None):
    """Fine-tune as ``lowmem fit`` does; return what a process finds."""
    world = 1 if ranks is None else ranks.world
    model = language(technique=STORED)
    name = f"text-{0 if ranks is None else ranks.rank}.txt"
    own, held_out = (
        Watched(rows(model, texts(folder, TEXT[:-48], name=name))),
        rows(model, texts(folder, TEXT[:500], name=name)),
    )
    if memory:
        lowmem.prepare_training(model, memory)
    trained = model if ranks is None else ranks.wrap_model(model)
    watch = stop_after(stop) if stop else lambda step: None
    outcome = None
    try:
        outcome = finetune(trained, own, settings(world), held_out=held_out, states=states, ranks=ranks, watch=watch)
    except Stopped:
        if isinstance(states, DistributedCheckpoints):
            states.wait_for_last_save()
    whole = lowmem.gather(trained) if isinstance(ranks, ShardedProcessGroup) else model
    adapter = None if whole is None else [one.detach().clone() for one in whole.parameters() if one.requires_grad]
    return outcome, own.seen, adapter


def plain(found):
    """Return what can be sent between processes."""
    outcome, seen, adapter = found
    adapter = adapter and [one.tolist() for one in adapter]
    return (outcome and (outcome.losses, outcome.evaluations)), seen, adapter


def check_two(rank, world, folder):
    states = DistributedCheckpoints(folder / "random", {})
    states.save(SavedState(1, {"random.cpu": torch.Generator().manual_seed(rank).get_state()}, {}))
    states.wait_for_last_save()
    return {
        "shard": plain(run(folder, ShardedProcessGroup())),
        "prepared": plain(run(folder, ShardedProcessGroup(), memory="fast")),
        "replicate": plain(run(folder, ReplicatedProcessGroup(), memory="fast")),
        "stopped": plain(
            run(folder, ShardedProcessGroup(), DistributedCheckpoints(folder / "s", {"a": 1}), SAVED + 2)
        ),
        "stopped copy": plain(
            run(folder, ReplicatedProcessGroup(), DistributedCheckpoints(folder / "r", {"a": 1}), SAVED + 2)
        ),
    }


def check_four(rank, world, folder):
    own = DistributedCheckpoints(folder / "random", {}).newest().tensors_with_prefix("random")["cpu"]
    assert torch.equal(own, torch.Generator().manual_seed(rank if rank < 2 else 0).get_state())
    runs = {"s4": ShardedProcessGroup, "r4": ReplicatedProcessGroup, "one4": ShardedProcessGroup}
    return {
        name: plain(run(folder, how(), DistributedCheckpoints(folder / name, {"a": 1}))) for name, how in runs.items()
    }


@pytest.mark.distributed
def test_runs_of_one_two_and_four_processes_are_one_run(tmp_path):
    (losses, evaluations), seen, adapter = plain(run(tmp_path))
    assert len({len(one) for one in seen}) > 1  # the last step has fewer rows
    run(tmp_path, states=States(tmp_path / "one", {"a": 1}), stop=SAVED + 2)

    def same(found):
        (own, values), _, end = found
        assert own == pytest.approx(losses, abs=1e-5, rel=0)
        assert [step for step, _ in values] == [step for step, _ in evaluations]
        assert [one for _, one in values] == pytest.approx([one for _, one in evaluations], rel=1e-4)
        if end is not None:
            for one, other in zip(end, adapter, strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-3, rtol=0)

    two = run_ranks(check_two, 2, tmp_path, tmp_path)
    for how in ("shard", "prepared", "replicate"):
        for rank in two:
            same(rank[how])
    # Each process has its own rows of each step, and together they have all.
    mine, others = (one["shard"][1] for one in two)
    assert [sorted(a + b) for a, b in zip(mine, others, strict=True)] == [sorted(one) for one in seen]
    assert min(len(b) for b in others) < max(len(b) for b in others)
    assert two[0]["stopped"][0] is None

    for name in ("s", "r"):
        assert sorted(one.name for one in (tmp_path / name).iterdir()) == sorted(FILES)
        assert States(tmp_path / name, {"a": 1}).newest().step == SAVED
        shutil.copytree(tmp_path / name, tmp_path / f"{name}4")
    shutil.copytree(tmp_path / "one", tmp_path / "one4")
    for rank in run_ranks(check_four, 4, tmp_path, tmp_path):
        for found in rank.values():
            same(found)
            assert len(found[1]) < len(seen)  # it went on, and did not begin anew

    for name in ("s", "r"):
        same(plain(run(tmp_path, states=States(tmp_path / name, {"a": 1}))))


@pytest.fixture
def alone(tmp_path):
    """This process as a group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(step, value=0.0, size=3):
    return SavedState(step, {"losses": torch.full((size,), value)}, {"evaluations": []})


@pytest.mark.usefixtures("alone")
def test_a_state_of_another_run_is_refused_and_a_damaged_one_skipped(tmp_path):
    states = DistributedCheckpoints(tmp_path / "s", {"lr": 1})
    assert states.newest() is None
    for step in (1, 2, 3):
        states.save(saved(step))
    states.wait_for_last_save()
    assert sorted(one.name for one in states.folder.iterdir()) == sorted(FILES)
    with pytest.raises(FileError, match="lr was 1 and is 2"):
        DistributedCheckpoints(tmp_path / "s", {"lr": 2}).newest()
    newest = states.folder / FILES[0]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    may = DistributedCheckpoints(tmp_path / "s", {"lr": 2}, ("lr",))
    assert may.newest().step == 2
    changed, skipped = may.changed
    assert changed == "lr was 1 until here, and is 2"
    assert "it is damaged" in skipped
    newest.unlink()
    newest.mkdir()
    assert may.newest().step == 2
    assert "it is a directory" in may.changed[1]
    (states.folder / FILES[1]).write_bytes(b"")
    with pytest.raises(FileError, match="it is empty; remove it to begin anew"):
        may.newest()
    states.remove()
    assert not states.folder.exists()


@pytest.mark.usefixtures("alone")
def test_each_process_gets_its_own_random_states_and_a_new_one_those_of_the_first(tmp_path, monkeypatch):
    found = {"random.cpu": torch.zeros(1), "random.cpu@1": torch.ones(1)}
    States(tmp_path, {}).save(SavedState(1, found, {}))
    states = DistributedCheckpoints(tmp_path, {})
    for rank, value in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert states.newest().tensors_with_prefix("random")["cpu"] == value


@pytest.mark.usefixtures("alone")
def test_what_changes_while_a_state_is_written_is_not_in_it(tmp_path, monkeypatch):
    go, write = threading.Event(), training_state.write_tensors_returning_digest
    monkeypatch.setattr(
        training_state, "write_tensors_returning_digest", lambda *given: go.wait(60) and write(*given)
    )
    states, one = DistributedCheckpoints(tmp_path / "s", {}), saved(1, 1.0)
    states.save(one)
    one.tensors["losses"].zero_()
    assert States(tmp_path / "s", {}).newest() is None
    go.set()
    assert states.kept() == f"the last good state, after step 1, is kept in '{tmp_path / 's'}'"
    assert torch.equal(states.newest().tensors["losses"], torch.ones(3))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size are Linux's here")
@pytest.mark.usefixtures("alone")
def test_a_full_disk_is_an_error_that_names_the_state_and_leaves_the_one_before(tmp_path):
    import resource

    states = DistributedCheckpoints(tmp_path / "s", {})
    states.save(saved(1, size=2**16))
    states.wait_for_last_save()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        states.save(saved(2, size=2**16))
        with pytest.raises(OSError, match=r"cannot write '.*/state-1\.safetensors': "):
            states.save(saved(3))
        states.save(saved(4, size=2**16))
        kept = states.kept()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert kept.startswith("the last good state, after step 1, is kept in ")
    assert "; a later one: cannot write '" in kept
    assert DistributedCheckpoints(tmp_path / "s", {}).newest().step == 1
