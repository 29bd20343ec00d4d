"""A state is whole at any moment, and a run that goes on from it does what it would have done."""

import errno
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem import FileError
from lowmem.finetuning import training_state
from lowmem.finetuning.settings import OPTIMIZERS
from lowmem.finetuning.training_state import (
    FILES,
    KIND,
    SavedState,
    States,
    check_and_describe_changes,
    load_model_and_optimizer_state,
    named_trainable_parameters,
    state_tensors_and_record,
    trainable_parameters_and_buffers,
)
from lowmem.io.lowmem_file import write_tensors_returning_digest
from tests.finetuning.killed import Killed, killed_at
from tests.finetuning.language import language, rows, texts


def saved(step, value=0.0):
    return SavedState(step, {"losses": torch.full((3,), value)}, {"evaluations": []})


def test_two_files_take_turns_and_the_newer_whole_one_is_read(tmp_path):
    states = States(tmp_path / "states", {"rank": 4})
    assert states.newest() is None
    assert states.kept() == "no state was saved before"
    for step in (2, 4, 6):
        states.facts["seen"] = step
        states.save(saved(step, step))
        assert (States(states.folder, {"rank": 4}).newest()).step == step
    assert sorted(one.name for one in states.folder.iterdir()) == sorted(FILES)
    assert states.kept() == f"the last good state, after step 6, is kept in '{states.folder}'"
    newest = states.folder / FILES[0]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    again = States(states.folder, {"rank": 4})
    assert again.newest().step == 4
    assert again.facts == {"seen": 4}
    (skipped,) = again.changed
    assert skipped == (
        f"cannot read '{newest}': it is damaged: its content does not match its digest; going on from the state "
        "after step 4"
    )
    again.save(saved(5))
    assert States(states.folder, {"rank": 4}).newest().step == 5  # in place of the damaged one
    for name in FILES:
        (states.folder / name).write_bytes(b"damaged")
    with pytest.raises(
        FileError, match=r"^cannot go on from '.*states': none .* is damaged[^;]*; remove it to begin anew$"
    ):
        again.newest()
    again.remove()
    again.remove()
    assert not states.folder.exists()


def test_a_state_of_another_run_is_refused_by_what_differs(tmp_path):
    States(tmp_path, {"base": "aa", "lr": 0.1}).save(saved(2))
    for origin, why in (
        ({"base": "bb", "lr": 0.1}, "its adapter is of another base: base was 'aa' and is 'bb'"),
        ({"base": "aa"}, "lr was 0.1 and is None"),
        ({"base": "aa", "lr": 0.1, "rank": 4}, "rank was None and is 4"),
    ):
        with pytest.raises(FileError, match=f": {why}: go on"):
            States(tmp_path, origin).newest()
    may = States(tmp_path, {"base": "aa", "lr": 0.2}, ("lr",))
    for _ in range(2):
        assert may.newest().step == 2
        assert may.changed == ["lr was 0.1 until here, and is 0.2"]
    with pytest.raises(FileError, match=r"cannot go on from 'out': data was 0123456789ab\.\.\. and is None: go on"):
        check_and_describe_changes(Path("out"), {"data": "0123456789abcdef" * 4}, {})


def test_a_file_of_another_kind_is_no_state(tmp_path):
    lowmem.save(torch.nn.Linear(2, 2), tmp_path / FILES[1])
    with pytest.raises(FileError, match="it is no state of a training run"):
        States(tmp_path, {}).newest()
    for crafted in ({"step": True}, {"step": "2"}, {"origin": []}, {"facts": [3]}):
        record = {"kind": KIND, "step": 2, "origin": {}, "facts": {}} | crafted
        write_tensors_returning_digest(tmp_path / FILES[1], {"x": torch.zeros(1)}, record)
        with pytest.raises(FileError, match="it is no state of a training run"):
            States(tmp_path, {}).newest()


class Crafted:
    """Makes a file when its pickle is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def craft_states(folder, ran):
    """Write pickles that run a program: as torch's distributed checkpoints, and as states of one process."""
    (folder / "step-2").mkdir(parents=True)
    (folder / "step-2" / "record.json").write_text("{}")
    for name in ("step-2/.metadata", "step-2/__0_0.distcp", *FILES):
        (folder / name).write_bytes(pickle.dumps(Crafted(ran)))


def test_a_pickle_is_not_read(tmp_path):
    ran = tmp_path / "ran"
    craft_states(tmp_path / "states", ran)
    states = States(tmp_path / "states", {})
    with pytest.raises(
        FileError, match=r"its states are pickles .*: nothing was read or executed; remove it to begin"
    ):
        states.newest()
    (states.folder / "step-2" / ".metadata").unlink()
    with pytest.raises(FileError, match="it is a pickle or an old torch.save file: lowmem reads safetensors only"):
        states.newest()
    assert not ran.exists()
    pickle.loads(pickle.dumps(Crafted(ran)))
    assert ran.exists()


MAKE = {
    "folder": lambda path: (path / "within").mkdir(parents=True),
    "link": lambda path: path.symlink_to("nowhere"),
    "link to a folder": lambda path: path.symlink_to("."),
}
if hasattr(os, "mkfifo"):
    MAKE["pipe"] = os.mkfifo


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_folder_a_pipe_or_a_link_to_nowhere_is_skipped_and_replaced(tmp_path, make):
    states = States(tmp_path, {})
    make(tmp_path / FILES[0])
    with pytest.raises(
        FileError, match=r"'.*state-0.safetensors': it is a .* link to nowhere; remove it to begin anew$"
    ):
        states.newest()
    os.rename(tmp_path / FILES[0], tmp_path / FILES[1])
    states.save(saved(1))
    again = States(tmp_path, {})
    assert again.newest().step == 1
    (line,) = again.changed
    assert line.startswith(f"cannot read '{tmp_path / FILES[1]}': it is a directory, a device, a pipe or a link")
    again.save(saved(2))
    assert States(tmp_path, {}).newest().step == 2
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(FILES)


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    states = States(tmp_path, {})
    states.save(saved(1))

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_state, "write_tensors_returning_digest", full)
    with pytest.raises(OSError, match="No space left"):
        States(tmp_path / "new", {}).save(saved(1))
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="No space left"):
        states.save(saved(2))
    assert states.kept().startswith("the last good state, after step 1,")
    assert States(tmp_path, {}).newest().step == 1
    assert [one.name for one in tmp_path.iterdir()] == [FILES[0]]


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_and_optimizer_come_back_to_the_bit(kind, tmp_path):
    def made(seed):
        with pytest.warns(UserWarning, match="add nothing"):  # more than the layers' ranks
            model = language(seed, rank=64)  # B of 64 x 96: moments in 8 bits
        return model, kind(named_trainable_parameters(model).values(), lr=0.01)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in named_trainable_parameters(model).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    model, optimizer = made(0)
    step(model, optimizer, 1)
    tensors, record = state_tensors_and_record(model, optimizer)
    States(tmp_path, {}).save(SavedState(1, tensors, record))
    other, its = made(5)
    load_model_and_optimizer_state(States(tmp_path, {}).newest(), other, its)
    for one in ((model, optimizer), (other, its)):
        step(*one, 2)
    assert all(
        torch.equal(value, named_trainable_parameters(other)[name])
        for name, value in named_trainable_parameters(model).items()
    )
    wrong, its = made(6)
    before = {name: value.clone() for name, value in named_trainable_parameters(wrong).items()}
    tensors, record = state_tensors_and_record(language(0, rank=2), torch.optim.AdamW([torch.zeros(1)]))
    with pytest.raises(ValueError, match=r"lora_a' of shape \(2, 64\), and the model one of \(64, 64\)"):
        load_model_and_optimizer_state(SavedState(1, tensors, record), wrong, its)
    assert all(torch.equal(value, named_trainable_parameters(wrong)[name]) for name, value in before.items())


SETTINGS = lowmem.FineTuning(
    steps=5, batch_size=2, accumulate=2, lr=1e-2, warmup=2, save_every=1, eval_every=2, patience=50
)


def run(folder):
    """Do what the command does with a model and a text: train, write the adapter, and remove the states."""
    model = language(technique=lowmem.FourBit("nf4"), dropout=0.2)
    found = rows(model, texts(folder))
    states = States(folder / "states", {"base": "tiny"})
    outcome = lowmem.finetune(model, found, SETTINGS, held_out=found, states=states)
    lowmem.save_adapter(model, folder / "out")
    states.remove()
    return outcome


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    """Its n-th life ends at its n-th action on files: in each of the steps, and while it ends."""
    whole, often = tmp_path / "whole", tmp_path / "often"
    whole.mkdir(), often.mkdir()
    expected, lives = run(whole), 0
    seen = set()
    for number in range(1, 99):
        with killed_at(number) as killed, suppress(Killed):
            outcome = run(often)
        if not killed:
            break
        lives += 1
        states = States(often / "states", {"base": "tiny"})
        newest = states.newest()
        seen.add(0 if newest is None else newest.step)
        assert len(list(often.glob("states/*.safetensors"))) <= 2
    assert lives > 8
    assert len(seen) > 3
    assert outcome == expected
    assert (often / "out").read_bytes() == (whole / "out").read_bytes()
    assert sorted(one.name for one in often.iterdir()) == ["out", "text.txt"]


class Normed(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


def test_running_statistics_come_back_too(tmp_path):
    torch.manual_seed(0)
    model, other = (lowmem.add_adapter(Normed(), "a", lowmem.LoRA(2)) for _ in range(2))
    model(torch.randn(32, 8) + 3)
    optimizer = torch.optim.SGD(named_trainable_parameters(model).values(), 0.1)
    tensors, record = state_tensors_and_record(model, optimizer)
    assert {name for name in tensors if name.startswith("buffers.")} == {
        f"buffers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    States(tmp_path, {}).save(SavedState(1, tensors, record))
    load_model_and_optimizer_state(States(tmp_path, {}).newest(), other, optimizer)
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert int(other[1].num_batches_tracked) == 1
    lowmem.deactivate(other)
    assert int(other[1].num_batches_tracked) == 0
    assert trainable_parameters_and_buffers(model).keys() == {*named_trainable_parameters(model)} | {
        f"1.{name}" for name in dict(model[1].named_buffers(recurse=False))
    }
