"""The device that ``lowmem fit --device`` names."""

from __future__ import annotations

import os

import torch

__all__ = ["DEVICES", "device_of"]

DEVICES = ("cpu", "cuda")


def device_of(name: str) -> torch.device:
    """Return the device of a name; of ``cuda`` the GPU that torchrun means for this process, or the first one.

    Raises:
        ValueError: there is no GPU, or none for this process.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "finds no GPU that it can use" if built else "is built without CUDA"
        raise ValueError(
            f"--device={name}: torch {torch.__version__} {why}: leave --device out to train on the CPU, or run "
            "python -c 'import torch; torch.cuda.init()', which says what is missing"
        )
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"--device={name}: process {number} of this machine has no GPU of its own, of {count}: start as many "
            f"processes as there are GPUs, with torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
    return torch.device(name, number)
