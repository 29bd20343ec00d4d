"""Real processes on loopback: each joins a gloo group, and runs one function."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowmem.kernels.torch_versions import TORCH

needs_ranks = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
    pytest.mark.skipif(TORCH < (2, 12), reason="FSDP2 shards integers from torch 2.12 on"),
]


def starter():
    """Return what starts processes: a server is forked for each, which has imported torch and lowmem once."""
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(
            ["lowmem", "tests.distributed.ranks", "torch.distributed.fsdp", "torch._dynamo"]
        )
    return context


def run_ranks(function, world, folder, *arguments):
    """Call ``function(rank, world, *arguments)`` in processes, and return what each has returned."""
    store = os.path.join(folder, f"store{world}{function.__name__}")
    with ProcessPoolExecutor(world, starter()) as pool:
        started = [pool.submit(_rank, function, rank, world, store, arguments) for rank in range(world)]
        try:
            for one in as_completed(started, timeout=1800):
                one.result()
        except BaseException:
            for process in multiprocessing.active_children():  # the others wait for the one that failed
                process.kill()
            raise
        return [one.result() for one in started]


def _rank(function, rank, world, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    result = function(rank, world, *arguments)
    dist.destroy_process_group()
    return result


class Block(nn.Module):
    """Attention and a gated MLP, as language models have; widths that two and four do not divide."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = (nn.Linear(width, width + 9, bias=False) for _ in range(2))
        self.down = nn.Linear(width + 9, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).unbind(-3)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        h = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    """A small language model, whose head is tied to its embedding."""

    def __init__(self, vocabulary=101, width=32, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def examples():
    """Return ids and targets, (7, 12): examples of unlike lengths, so that ranks count unlike numbers of tokens."""
    ids = torch.randint(101, (7, 13), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row, length in enumerate((12, 3, 7, 12, 1, 9, 5)):
        targets[row, length:] = -100
    return ids[:, :-1], targets


def train(model, optimizer, epochs, rank=0, world=1):
    """Train on batches of 4 and 3 examples, of which each rank takes its part; return the losses of all steps.

    This is the loop of docs/guides/many-machines.md.
    """
    losses = []
    for _ in range(epochs):
        for ids, targets in zip(*(one.split(4) for one in examples()), strict=True):
            total = targets.ne(-100).sum()
            own, labels = (one.tensor_split(world)[rank] for one in (ids, targets))
            if not len(own):  # of three examples, one of four ranks gets none, and joins with one that does not count
                own, labels = ids[:1], torch.full_like(targets[:1], -100)
            logits = model(own).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum") / total
            (loss * world).backward()  # gradients of ranks are averaged
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.detach()
            if world > 1:
                dist.all_reduce(loss)
            losses.append(loss.item())
    return losses
