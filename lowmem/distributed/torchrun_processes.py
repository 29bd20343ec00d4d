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
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.io.checkpoint import unwrap_data_parallel

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in one exchange: a rank may save, or read weights, meanwhile."""

_CPU = torch.device("cpu")
# How long an error of one process waits for that of rank 0
_ANSWER = timedelta(seconds=5)


class _AveragingProcessGroup(TrainingProcessGroup):
    """All processes of the default group, whose gradients are averaged."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.gradient_scale = float(self.world)

    def all_reduce_sum(self, value: float) -> float:
        """Return the sum of a value over the processes: the same number in each."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return float(total)


class ShardedProcessGroup(_AveragingProcessGroup):
    """Each process has a part of the model (FSDP2), and adds the gradients of that part."""

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Share a model's weights."""
        return shard(model)

    def full_model_on_rank_zero(self, model: nn.Module) -> nn.Module | None:
        """Return a whole copy of the model in rank 0."""
        return gather(model)

    def free_gathered_parameters(self, model: nn.Module) -> None:
        """Let go of whole weights after a forward without backward."""
        # Not the whole model that is evaluated before
        if hasattr(model, "reshard"):
            model.reshard()  # type: ignore[operator]


class ReplicatedProcessGroup(_AveragingProcessGroup):
    """Each process has the whole model (DistributedDataParallel)."""

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Let the gradients of a model be averaged."""
        return nn.parallel.DistributedDataParallel(model)

    def full_model_on_rank_zero(self, model: nn.Module) -> nn.Module | None:
        """Return the model inside, in rank 0."""
        return unwrap_data_parallel(model) if self.rank == 0 else None

    def gradient_sync_on_last_batch(self, model: nn.Module, is_last: bool) -> AbstractContextManager[object]:
        """Return a context in which gradients are exchanged for the last batch of a step alone."""
        return nullcontext() if is_last else model.no_sync()  # type: ignore[operator]


@contextmanager
def torchrun_process_group(
    strategy: str | None, device: torch.device = _CPU, timeout: timedelta = TIMEOUT
) -> Iterator[TrainingProcessGroup]:
    """Join the processes that torchrun has started, and leave them at the end.

    Args:
        strategy: "shard", "replicate", or None: one process.
        device: on which this process trains; the backend is nccl for a GPU, and gloo for the CPU.
        timeout: how long a process waits for the others in one exchange.

    Raises:
        ValueError: torchrun has not started this process; it has started several, and ``strategy`` is None; or torch
            lacks a backend.
        ConnectionError: another process was lost, or has not answered for ``timeout``.
    """
    world = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else None
    if strategy is None:
        if world not in (None, "1"):
            raise ValueError(
                f"torchrun has started {world} processes, which would all do the same: add --shard or --replicate"
            )
        yield TrainingProcessGroup()
        return
    if world is None:
        raise ValueError(
            f"--{strategy} needs several processes: start it with torchrun --nproc-per-node 2 -m lowmem fit ... "
            f"--{strategy}"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    # States go by gloo on GPUs, too
    here = distributed.is_available() and distributed.is_gloo_available()
    if not here or (backend == "nccl" and not distributed.is_nccl_available()):
        raise ValueError(
            f"--{strategy}: this torch has no backend for several processes ({backend if here else 'gloo'})"
        )
    with _translated_distributed_errors(timeout):
        _initialize_process_group(backend, timeout)
    try:
        with _translated_distributed_errors(timeout), warnings.catch_warnings():
            # Nothing writes to logits
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield ShardedProcessGroup() if strategy == "shard" else ReplicatedProcessGroup()
    finally:
        distributed.destroy_process_group()


def torchrun_rank_or_zero() -> int:
    """Return the number of this process among those that torchrun has started; 0 if it has not started it."""
    return int(os.environ["RANK"]) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


def restart_command_words() -> list[str]:
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


def share_error_and_check_rank_zero(error_line: str) -> bool:
    """Whether rank 0 ends with the same error, so that this process need not tell it; rank 0 lets the others know."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["WORLD_SIZE"] == "1":
        return False
    key, c10d = f"error-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", cast(Any, distributed)
    try:
        store, rank, _ = next(c10d.rendezvous("env://", timeout=_ANSWER))
        if rank == 0:
            store.set(key, error_line)
            return False
        until = time.monotonic() + _ANSWER.total_seconds()
        while not store.check([key]) and time.monotonic() < until:
            time.sleep(0.02)
        return bool(store.check([key]) and store.get(key) == error_line.encode())
    except RuntimeError:
        # Torchrun has ended: this process tells its own
        return False


def _initialize_process_group(backend: str, timeout: timedelta) -> None:
    """Join the others of this start: after a restart, torchrun's store may hold addresses of processes that ended."""
    c10d: Any = distributed
    store, rank, world = next(c10d.rendezvous("env://", timeout=TIMEOUT))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    restart_store = c10d.PrefixStore(f"start-{start}", store)
    restart_store.set(f"here-{rank}", "")
    restart_store.wait(
        [f"here-{other_rank}" for other_rank in range(world)], TIMEOUT
    )  # however short the time-out: imports take a while
    distributed.init_process_group(backend, store=restart_store, rank=rank, world_size=world, timeout=timeout)


@contextmanager
def _translated_distributed_errors(timeout: timedelta) -> Iterator[None]:
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
