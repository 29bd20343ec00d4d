"""A run of two processes goes on in four, in two and in one, from PyTorch's distributed checkpoints."""

import json
import shutil
import signal
import sys

import pytest
import torch
import torch.distributed as dist

import lowmem
from lowmem.distributed.checkpoints import Checkpoints, has_checkpoints
from lowmem.distributed.processes import Replicated, Sharded
from lowmem.errors import FileError
from lowmem.finetuning.loop import finetune
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.state import Saved, States
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


class Watched:
    """Rows that note which of them are asked for in training."""

    def __init__(self, found):
        self.__dict__.update(found=found, seen=[])

    def __getattr__(self, name):
        return getattr(self.found, name)

    def __len__(self):
        return len(self.found)

    def batch(self, indices, device="cpu"):
        self.seen.append(list(indices))
        return self.found.batch(indices, device)


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
    trained = model if ranks is None else ranks.wrap(model)
    watch = stop_after(stop) if stop else lambda step: None
    outcome = None
    try:
        outcome = finetune(trained, own, settings(world), held_out=held_out, states=states, ranks=ranks, watch=watch)
    except Stopped:
        if isinstance(states, Checkpoints):
            states.wait()
    whole = lowmem.gather(trained) if isinstance(ranks, Sharded) else model
    adapter = None if whole is None else [one.detach().clone() for one in whole.parameters() if one.requires_grad]
    return outcome, own.seen, adapter


def plain(found):
    """Return what can be sent between processes."""
    outcome, seen, adapter = found
    adapter = adapter and [one.tolist() for one in adapter]
    return (outcome and (outcome.losses, outcome.evaluations)), seen, adapter


def check_two(rank, world, folder):
    return {
        "shard": plain(run(folder, Sharded())),
        "prepared": plain(run(folder, Sharded(), memory="fast")),
        "replicate": plain(run(folder, Replicated(), memory="fast")),
        "stopped": plain(run(folder, Sharded(), Checkpoints(folder / "s", {"a": 1}), SAVED + 2)),
        "stopped copy": plain(run(folder, Replicated(), Checkpoints(folder / "r", {"a": 1}), SAVED + 2)),
    }


def check_four(rank, world, folder):
    found = {"shard": plain(run(folder, Sharded(), Checkpoints(folder / "s4", {"a": 1})))}
    found["replicate"] = plain(run(folder, Replicated(), Checkpoints(folder / "r4", {"a": 1})))
    found["of one"] = plain(run(folder, Sharded(), Checkpoints(folder / "one4", {"a": 1})))
    return found


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
        found = [json.loads((one / "record.json").read_text())["step"] for one in (tmp_path / name).glob("step-*")]
        assert sorted(found) == [SAVED - 2, SAVED]
        shutil.copytree(tmp_path / name, tmp_path / f"{name}4")
        shutil.rmtree(tmp_path / name / f"step-{SAVED - 2}")
        (tmp_path / name / f"step-{SAVED + 2}").mkdir()  # of a process that was killed while it saved
    shutil.copytree(tmp_path / "one", tmp_path / "one4")
    for rank in run_ranks(check_four, 4, tmp_path, tmp_path):
        for found in rank.values():
            same(found)
            assert len(found[1]) < len(seen)  # it went on, and did not begin anew

    for name in ("s", "r"):
        assert has_checkpoints(tmp_path / name)
        states = Checkpoints(tmp_path / name, {"a": 1})
        same(plain(run(tmp_path, states=states)))
        assert "step" in states.kept()
        states.remove()
        assert not (tmp_path / name).exists()


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    states = Checkpoints(tmp_path / "s", {"lr": 1})
    assert states.newest() is None
    with pytest.raises(Stopped):
        finetune_until(states, tmp_path)
    other = Checkpoints(tmp_path / "s", {"lr": 2})
    with pytest.raises(FileError, match="lr was 1 and is 2"):
        other.newest()
    Checkpoints(tmp_path / "s", {"lr": 2}, ("lr",)).newest()
    (data,) = (tmp_path / "s" / "step-2").glob("*.distcp")
    for file in (data, tmp_path / "s" / "step-2" / ".metadata"):
        file.write_bytes(file.read_bytes()[:-99] if file == data else b"")
        with pytest.raises(FileError, match=r"step-2': it is damaged .* remove it to go on from the one before"):
            states.newest()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size are Linux's here")
def test_a_full_disk_is_an_error_that_names_the_state_and_leaves_the_one_before(tmp_path):
    """PyTorch raises what no handler of errors sees, with those of all processes in it."""
    import resource

    def saved(step):
        return Saved(step, {"losses": torch.zeros(2**16)}, {"evaluations": []})

    states, none = (Checkpoints(tmp_path / name, {}) for name in ("s", "none"))
    states.save(saved(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100_000, 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            for own in (states, none):
                with pytest.raises(OSError, match=r"cannot write '.*step-2': "):
                    own.save(saved(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert states.kept().startswith("the last good state, after step 1,")
    assert Checkpoints(tmp_path / "s", {}).newest().step == 1
    assert [one.as_posix() for one in tmp_path.glob("*/step-*")] == [(tmp_path / "s" / "step-1").as_posix()]
    assert not (tmp_path / "none").exists()


def finetune_until(states, folder):
    model = language(technique=STORED)
    finetune(model, rows(model, texts(folder)), settings(), states=states, watch=stop_after(3))


def test_it_joins_nobody_without_processes():
    assert not dist.is_initialized()
