"""How processes join, and what they say when others are lost; ``test_checkpoints`` has how they share a run."""

import os
import signal
import socket
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowmem.__main__ import main
from lowmem.distributed import torchrun_processes
from lowmem.distributed.torchrun_processes import ReplicatedProcessGroup, ShardedProcessGroup, torchrun_process_group
from lowmem.finetuning.process_group import TrainingProcessGroup
from tests.distributed.ranks import needs_ranks, starter

pytestmark = needs_ranks


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    for name in (*names, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rank(monkeypatch):
    """Return a function that makes this process one of two that torchrun has started."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def rank(number, restart=0):
        for name, value in {
            "RANK": number,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": restart,
        }.items():
            monkeypatch.setenv(name, str(value))

    return rank


def test_one_process_needs_no_flag_and_several_need_one(monkeypatch):
    """What the command says without them is tests/integrations/transformers/test_many_processes.py's."""
    for _ in range(2):
        with torchrun_process_group(None) as ranks:
            assert type(ranks) is TrainingProcessGroup
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")


def test_an_error_of_all_processes_is_told_by_the_first(rank, monkeypatch, capsys):
    def line_of(*arguments):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(torchrun_processes, "_ANSWER", timedelta(seconds=0.2))
    missing = ["fit", "missing", "--data", "text.txt"]
    assert torchrun_processes.torchrun_rank_or_zero() == 0
    rank(0)
    told = line_of(*missing)
    assert "'missing' is neither an existing folder" in told
    rank(1)
    assert torchrun_processes.torchrun_rank_or_zero() == 1
    assert line_of(*missing) == ""
    assert "'other' is neither an existing folder" in line_of("fit", "other")  # an error of this one alone
    rank(1, restart=1)
    assert line_of(*missing) == told  # rank 0 has none since all were started anew
    rank(0, restart=2)
    told = line_of("fit", "lora", "--rank", "x")
    assert "--rank/--lora-r: 'x' must be a positive integer" in told
    rank(1, restart=2)
    assert line_of("fit", "lora", "--rank", "x") == ""


def test_the_words_that_start_processes_again_follow_from_what_torchrun_documents(monkeypatch):
    assert torchrun_processes.restart_command_words() == ["lowmem"]
    named = {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "0"}
    for name, value in (named | {"MASTER_ADDR": "first.example", "TORCHELASTIC_RUN_ID": "run1"}).items():
        monkeypatch.setenv(name, value)
    assert torchrun_processes.restart_command_words() == ["torchrun", "--nproc-per-node", "4", "-m", "lowmem"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert " ".join(torchrun_processes.restart_command_words()) == (
        "torchrun --nproc-per-node 4 --max-restarts 3 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint "
        "first.example:29400 --rdzv-id run1 -m lowmem"
    )


def test_processes_that_torchrun_interrupts_after_an_error_of_another_are_silent(rank, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem.__main__._parse_and_run", interrupt)
    rank(1)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == ""
    rank(0)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err.startswith("lowmem fit: interrupted")


def join_and_fail(how, kind, error):
    with torchrun_process_group(how) as ranks:
        assert type(ranks) is kind
        assert (ranks.rank, ranks.world, ranks.gradient_scale) == (0, 1, 1.0)
        assert ranks.all_reduce_sum(2.5) == 2.5
        model = ranks.wrap_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        with ranks.gradient_sync_on_last_batch(model, is_last=False):
            pass
        ranks.free_gathered_parameters(model)
        assert type(ranks.full_model_on_rank_zero(model)) is nn.Sequential
        raise error


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_gpus_talk_by_nccl(monkeypatch):
    """No test here has a GPU: this one sees what would be asked for."""
    asked = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torchrun_processes, "_initialize_process_group", lambda *given: asked.append(given))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    gpu = torch.device("cuda", 0)
    with (
        pytest.raises(ValueError, match=r"--shard: this torch has no backend .* \(nccl\)"),
        torchrun_process_group("shard", gpu),
    ):
        pass
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    for call in ("get_rank", "get_world_size"):
        monkeypatch.setattr(dist, call, lambda: 0)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with torchrun_process_group("shard", gpu, timedelta(seconds=3)):
        pass
    assert asked == [("nccl", timedelta(seconds=3))]


def wait_for_one_that_stops(rank, port, found, started, stops):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started.wait(600)  # the time-out counts from where both join
    try:
        with torchrun_process_group("replicate", timeout=timedelta(seconds=5)) as ranks:
            assert ranks.all_reduce_sum(1.0) == 2.0
            if rank == 1:
                stops.set()
                os.kill(os.getpid(), signal.SIGSTOP)
            ranks.all_reduce_sum(1.0)
    except ConnectionError as error:
        if rank == 0:
            found.put(str(error))
    os._exit(0)  # gloo's threads wait for the other


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_process_that_stops_ends_the_others_within_the_time_out():
    context = starter()
    found, port, stops = context.SimpleQueue(), free_port(), context.Event()
    given = port, found, context.Barrier(2), stops
    started = [context.Process(target=wait_for_one_that_stops, args=(rank, *given)) for rank in (0, 1)]
    for one in started:
        one.start()
    try:
        started[0].join(1200)
        assert started[0].exitcode == 0
        assert stops.is_set()
        told = found.get()
    finally:
        for one in started:
            one.kill()
            one.join()
    assert told.startswith("rank 0 has waited 5 s for another process, which hangs, or needs a longer --timeout: ")


def test_a_lost_process_is_told_apart_from_other_errors(monkeypatch):
    for number, (how, kind) in enumerate((("shard", ShardedProcessGroup), ("replicate", ReplicatedProcessGroup))):
        port = free_port()
        named = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (named | {"TORCHELASTIC_RESTART_COUNT": number}).items():
            monkeypatch.setenv(name, str(value))
        for error, text, raised in (
            (
                RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
                "rank 0 has lost",
                ConnectionError,
            ),
            (dist.DistNetworkError("no answer"), "has lost another process, .*--resume goes on", ConnectionError),
            (RuntimeError("the loss is nan"), "the loss is nan", RuntimeError),
        ):
            with pytest.raises(raised, match=text):
                join_and_fail(how, kind, error)
            assert not dist.is_initialized()
        os.environ.pop("RANK")
