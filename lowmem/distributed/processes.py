"""The processes that torchrun starts: how they join, and how a training loop shares its work among them."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from torch import distributed, nn

from lowmem.distributed.shard import gather, shard
from lowmem.finetuning.ranks import Ranks
from lowmem.io.checkpoint import unwrap

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in one exchange: a rank may save, or read weights, meanwhile."""

_CPU = torch.device("cpu")
_ANSWER = timedelta(seconds=5)  # how long an error of one process waits for that of rank 0


class _Processes(Ranks):
    """All processes of the default group, whose gradients are averaged."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.gradient_scale = float(self.world)

    def sum(self, value: float) -> float:
        """Return the sum of a value over the processes: the same number in each."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return float(total)


class Sharded(_Processes):
    """Each process has a part of the model (FSDP2), and adds the gradients of that part."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Share a model's weights."""
        return shard(model)

    def whole(self, model: nn.Module) -> nn.Module | None:
        """Return a whole copy of the model in rank 0."""
        return gather(model)

    def rest(self, model: nn.Module) -> None:
        """Let go of whole weights after a forward without backward."""
        if hasattr(model, "reshard"):  # not the whole model that is evaluated before
            model.reshard()  # type: ignore[operator]


class Replicated(_Processes):
    """Each process has the whole model (DistributedDataParallel)."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Let the gradients of a model be averaged."""
        return nn.parallel.DistributedDataParallel(model)

    def whole(self, model: nn.Module) -> nn.Module | None:
        """Return the model inside, in rank 0."""
        return unwrap(model) if self.rank == 0 else None

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Return a context in which gradients are exchanged for the last batch of a step alone."""
        return nullcontext() if last else model.no_sync()  # type: ignore[operator]


@contextmanager
def joined(how: str | None, device: torch.device = _CPU, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, and leave them at the end.

    Args:
        how: "shard", "replicate", or None: one process.
        device: on which this process trains; the backend is nccl for a GPU, and gloo for the CPU.
        timeout: how long a process waits for the others in one exchange.

    Raises:
        ValueError: torchrun has not started this process; it has started several, and ``how`` is None; or torch lacks
            a backend.
        ConnectionError: another process was lost, or has not answered for ``timeout``.
    """
    world = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else None
    if how is None:
        if world not in (None, "1"):
            raise ValueError(
                f"torchrun has started {world} processes, which would all do the same: add --shard or --replicate"
            )
        yield Ranks()
        return
    if world is None:
        raise ValueError(
            f"--{how} needs several processes: start it with torchrun --nproc-per-node 2 -m lowmem fit ... --{how}"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    here = distributed.is_available() and distributed.is_gloo_available()  # states go by gloo on GPUs, too
    if not here or (backend == "nccl" and not distributed.is_nccl_available()):
        raise ValueError(f"--{how}: this torch has no backend for several processes ({backend if here else 'gloo'})")
    with _lost_processes(timeout):
        _join(backend, timeout)
    try:
        with _lost_processes(timeout), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes to logits
            yield Sharded() if how == "shard" else Replicated()
    finally:
        distributed.destroy_process_group()


def started_rank() -> int:
    """Return the number of this process among those that torchrun has started; 0 if it has not started it."""
    return int(os.environ["RANK"]) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


def start_words() -> list[str]:
    """Return the words that start this command again: "lowmem", or those of torchrun and lowmem for all processes.

    They follow from the variables that torchrun documents for the processes that it starts. With several machines
    (``--nnodes``), the words start the processes of one of them, and meet at the default port of rank 0's machine.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return ["lowmem"]
    here, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    words = ["torchrun", "--nproc-per-node", str(here)]
    if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
        words += ["--max-restarts", restarts]
    if world > here:
        words += ["--nnodes", str(-(-world // here)), "--rdzv-backend", "c10d", "--rdzv-endpoint"]
        words += [f"{os.environ['MASTER_ADDR']}:29400", "--rdzv-id", os.environ["TORCHELASTIC_RUN_ID"]]
    return [*words, "-m", "lowmem"]


def is_told_by_first(line: str) -> bool:
    """Whether rank 0 ends with the same error, so that this process need not tell it; rank 0 lets the others know."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["WORLD_SIZE"] == "1":
        return False
    key, c10d = f"error-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", cast(Any, distributed)
    try:
        store, rank, _ = next(c10d.rendezvous("env://", timeout=_ANSWER))
        if rank == 0:
            store.set(key, line)
            return False
        until = time.monotonic() + _ANSWER.total_seconds()
        while not store.check([key]) and time.monotonic() < until:
            time.sleep(0.02)
        return bool(store.check([key]) and store.get(key) == line.encode())
    except RuntimeError:  # torchrun has ended: this process tells its own
        return False


def _join(backend: str, timeout: timedelta) -> None:
    """Join the others of this start: after a restart, torchrun's store may hold addresses of processes that ended."""
    c10d: Any = distributed
    store, rank, world = next(c10d.rendezvous("env://", timeout=TIMEOUT))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = c10d.PrefixStore(f"start-{start}", store)
    own.set(f"here-{rank}", "")
    own.wait([f"here-{one}" for one in range(world)], TIMEOUT)  # however short the time-out: imports take a while
    distributed.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)


@contextmanager
def _lost_processes(timeout: timedelta) -> Iterator[None]:
    """Say what PyTorch's errors on lost processes mean."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # gloo's errors are plain RuntimeErrors, and of a checkpoint one that holds those of all processes.
        if not (isinstance(error, distributed.DistError) or "gloo" in text):
            raise
        waited = "timed out" in text.lower() or "timeout" in text.lower()
        what = (
            f"has waited {timeout.total_seconds():g} s for another process, which hangs, or needs a longer --timeout"
            if waited
            else "has lost another process, whose own error says why"
        )
        raise ConnectionError(
            f"rank {os.environ.get('RANK')} {what}: start anew, and --resume goes on from the last state"
        ) from error
