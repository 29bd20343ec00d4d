"""``lowmem fit --shard`` and ``--replicate`` under torchrun end with the adapter of one process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem
from lowmem.__main__ import main
from lowmem.finetuning.calling_convention import CallingConvention
from lowmem.finetuning.packed_rows import Rows
from lowmem.finetuning.text_examples import Example
from lowmem.tools import fit_language
from tests.distributed.ranks import needs_ranks
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer

pytestmark = needs_ranks

ROOT = Path(__file__).parents[3]
KILLED = ROOT / "tests" / "integrations" / "transformers" / "killed_fit.py"
OPTIONS = ["--data", "text.txt", "--eval-share", "0.2", "--length", "48", "--lr", "0.01", "--rank", "4"]
OPTIONS += ["--steps", "6", "--save-every", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, a text, and the adapter that one process has trained."""
    place = tmp_path_factory.mktemp("many")
    write_tokenizer(write(place / "base"))
    text = "".join(f"item {n} costs {n * 7 % 10} and {n * 3 % 10}. " for n in range(80))
    (place / "text.txt").write_text(text)
    before = Path.cwd()
    os.chdir(place)
    try:
        one = ["fit", "base", *OPTIONS, "--batch-size", "4", "--save", "one", "--metrics", "one.jsonl"]
        assert main(one) == 0
    finally:
        os.chdir(before)
    return place


def torchrun(place, processes, *arguments, restarts=0, program=("-m", "lowmem")):
    """Start processes; return the exit code and what they wrote to stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), *program, "fit", "base", *OPTIONS, *arguments]
    named = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **named}, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


def assert_is_that_of_one(place, name):
    expected, found = (
        [json.loads(line) for line in (place / f"{one}.jsonl").read_text().splitlines()] for one in ("one", name)
    )
    assert [one["step"] for one in found] == [one["step"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5, rel=0)
        assert one["tokens"] == other["tokens"]
    assert found[-1]["perplexity"] == pytest.approx(expected[-1]["perplexity"], rel=1e-5)
    adapters = [load_file(place / one / "adapter_model.safetensors") for one in ("one", name)]
    assert adapters[0].keys() == adapters[1].keys()
    for key, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], value, atol=1e-3, rtol=0)
    assert not (place / f"{name}.training").exists()


def test_a_killed_process_ends_the_others_and_torchrun_goes_on(place):
    """What the other process says is in tests/distributed/test_torchrun_processes.py: torchrun may end it before."""
    arguments = ["--batch-size", "2", "--shard", "--save", "shard", "--metrics", "shard.jsonl", "--resume"]
    code, out, errors = torchrun(place, 2, *arguments, restarts=1, program=(str(KILLED),))
    assert code == 0, errors
    assert out.count("step 3/6") == 2  # the state after two steps was whole
    assert out.count("step 1/6") == 1
    assert out.count("perplexity of the held-out text, adapted") == 1  # one process tells
    assert_is_that_of_one(place, "shard")


def test_a_run_of_replicas_ends_in_four_parts_and_in_one_process(place, monkeypatch, capsys):
    arguments = ["--batch-size", "1", "--accumulate", "2", "--save", "copies", "--metrics", "copies.jsonl"]
    arguments += ["--resume"]
    code, _, errors = torchrun(place, 2, *arguments, "--replicate", program=(str(KILLED),))
    assert code == 1, errors
    assert [*(place / "copies.training").glob("state-*.safetensors")] != []
    shutil.copytree(place / "copies.training", place / "four.training")
    shutil.copy(place / "copies.jsonl", place / "four.jsonl")
    four = ["--batch-size", "1", "--shard", "--save", "four", "--metrics", "four.jsonl", "--resume"]
    code, out, errors = torchrun(place, 4, *four)
    assert code == 0, errors
    assert "step 1/6" not in out
    assert_is_that_of_one(place, "four")
    monkeypatch.chdir(place)
    arguments[1:4] = ["4"]
    assert main(["fit", "base", *OPTIONS, "--batch-size", "3", *arguments[2:]]) == 2
    assert "rows_of_a_step was 4 and is 3" in capsys.readouterr().err
    assert main(["fit", "base", *OPTIONS, *arguments]) == 0
    told = capsys.readouterr()
    assert "batch_size was 1 until here, and is 4" in told.err
    assert "processes was 2 until here, and is 1" in told.err
    assert "step 1/6" not in told.out
    assert_is_that_of_one(place, "copies")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
@pytest.mark.usefixtures("terminal_signals")
def test_ctrl_c_under_torchrun_ends_all_processes_and_one_tells_how_to_continue(place):
    """Torchrun's own exit code, 1 where its agent was interrupted, is not lowmem's to choose."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lowmem"]
    command += [
        "fit",
        "base",
        *OPTIONS[:-4],
        "--steps",
        "100000",
        "--save-every",
        "1",
        "--replicate",
        "--save",
        "stopped",
    ]
    named = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=place, env={**os.environ, **named}, start_new_session=True, **streams)
    try:
        until = time.monotonic() + 240
        while not [*place.glob("stopped.training/state-*.safetensors")]:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun then sends it to its processes again
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 1
    told = [line for line in errors.splitlines() if line.startswith("lowmem")]
    assert re.fullmatch(r"lowmem fit: \d+ of \d+ examples are held out to evaluate on", told.pop(0))
    (told,) = told
    assert told.startswith("lowmem fit: interrupted; the last good state, after step ")
    assert " is kept in 'stopped.training', as --save-every 1 says: continue with " in told
    assert "`torchrun --nproc-per-node 2 -m lowmem fit base " in told
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process is left
    assert sorted(one.name for one in place.glob("stopped*")) == ["stopped.training"]


@pytest.mark.parametrize(
    ("arguments", "environment", "text"),
    [
        (["--shard"], {}, "--shard needs several processes: start it with torchrun --nproc-per-node 2"),
        (["--replicate"], {}, "--replicate needs several processes: start it with torchrun"),
        (
            [],
            {"RANK": "0", "WORLD_SIZE": "2"},
            "torchrun has started 2 processes, which would all do the same: add",
        ),
        (["--shard", "--replicate"], {}, "argument --replicate: not allowed with argument --shard"),
        (["--shard", "--dry-run"], {}, "--dry-run plans one process: leave --shard out"),
    ],
)
def test_flags_without_processes_are_one_line(place, monkeypatch, refused, arguments, environment, text):
    monkeypatch.chdir(place)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert text in refused("fit", "base", *OPTIONS, *arguments)


def test_more_processes_than_rows_and_a_classifier_are_refused(refused):
    class Three(fit_language.TrainingProcessGroup):
        world = 99

    rows = Rows([Example.of([1, 2], [True, True])], 2, CallingConvention())
    with pytest.raises(ValueError, match="99 processes cannot share 1 rows of text: start fewer, or take more text"):
        lowmem.finetune(torch.nn.Linear(2, 2), rows, lowmem.FineTuning(), ranks=Three())
    told = "--shard does not apply to model='lora', which is not the folder of a language model"
    assert told in refused("fit", "lora", "--shard")
