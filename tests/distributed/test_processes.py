"""How processes join, and what they say when others are lost; ``test_checkpoints`` has how they share a run."""

import os
import socket

import pytest
import torch.distributed as dist
from torch import nn

from lowmem.distributed.processes import Replicated, Sharded, joined
from lowmem.finetuning.ranks import Alone
from tests.distributed.ranks import needs_ranks

pytestmark = needs_ranks


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_flags_need_torchrun_and_torchrun_needs_flags(monkeypatch):
    with joined(None) as ranks:
        assert isinstance(ranks, Alone)
    for how in ("shard", "replicate"):
        with pytest.raises(ValueError, match=f"--{how} needs several processes: start it with torchrun"), joined(how):
            pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="torchrun has started 2 processes, .*: add --shard or --replicate"),
        joined(None),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(None) as ranks:
        assert isinstance(ranks, Alone)


def join_and_fail(how, kind, error):
    with joined(how) as ranks:
        assert type(ranks) is kind
        assert (ranks.rank, ranks.world, ranks.gradient_scale) == (0, 1, 1.0)
        assert ranks.sum(2.5) == 2.5
        model = ranks.wrap(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        with ranks.accumulating(model, last=False):
            pass
        ranks.rest(model)
        assert type(ranks.whole(model)) is nn.Sequential
        raise error


def test_a_lost_process_is_told_apart_from_other_errors(monkeypatch):
    for number, (how, kind) in enumerate((("shard", Sharded), ("replicate", Replicated))):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
