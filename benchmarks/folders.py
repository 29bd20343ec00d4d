"""Resident memory of ``from_pretrained`` of transformers, while it stores a model's weights in 4 or 16 bits.

    python -m benchmarks.folders    makes a model of 709 MiB in a temporary folder, and loads it in fresh processes

It fails where the high-water mark (``VmHWM``) passes the stored model, the largest tensor (with its copy, where
``dtype=`` casts it), and ``CONSTANT``: no more than one dense tensor is ever there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.resident import ROOT, _record, environment, map_libraries, steady
from lowmem import FourBit, Half, measure
from lowmem.nn.stored_module import StoredModule

CONSTANT = 8  # MiB: names and modules, the scratch of the quantizer, and a tensor that stays dense
TECHNIQUES = {"nf4": FourBit("nf4"), "bof4s": FourBit("bof4s"), "bfloat16": Half(torch.bfloat16)}
CASES = (("nf4", "float32"), ("nf4", "bfloat16"), ("bof4s", "float32"), ("bfloat16", "float32"))
SIZES = {"n_embd": 1024, "n_layer": 12, "vocab_size": 32768}
SMALL = {"n_embd": 64, "n_layer": 1, "vocab_size": 128}


@dataclass(frozen=True)
class Loaded:
    """What loading a folder took, in MiB."""

    technique: str
    dtype: str
    peak: float
    stored: float
    largest: float

    @property
    def beyond(self) -> float:
        """The peak less the stored model and the largest tensor."""
        return self.peak - self.stored - self.largest


def make(folder: Path, sizes: dict[str, int]) -> None:
    """Write a GPT-2 with random float32 weights and tied ends, whose largest tensor is read last."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(**sizes, n_head=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200MB")


def load(folder: Path, technique: str, dtype: str) -> Loaded:
    """Load a folder in this process, which ``make`` and ``load`` of a small one have warmed."""
    from transformers import AutoModelForCausalLM

    from lowmem.integrations.transformers import LowmemConfig

    figures: dict[str, float] = {}
    config = LowmemConfig(TECHNIQUES[technique])
    model = _record(
        figures,
        "load",
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=getattr(torch, dtype), local_files_only=True
        ),
    )
    largest = max(
        module.stored_size(name)
        for module in model.modules()
        if isinstance(module, StoredModule)
        for name in module.forms
    )
    size = 4 if dtype == "float32" else 4 + getattr(torch, dtype).itemsize  # the folder's, and that of a cast copy
    return Loaded(technique, dtype, figures["load_peak"], measure.actual_bytes(model) / 2**20, largest * size / 2**20)


def _in_process(folder: Path, small: Path, technique: str, dtype: str) -> Loaded:
    command = [sys.executable, "-m", "benchmarks.folders", "--measure", technique, dtype, str(folder), str(small)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return Loaded(**json.loads(run.stdout.splitlines()[-1]))


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases, each in a fresh process; return 1 if one took too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--measure", nargs=4, metavar=("TECHNIQUE", "DTYPE", "FOLDER", "SMALL"), help=argparse.SUPPRESS
    )
    given = parser.parse_args(arguments).measure
    if given:
        technique, dtype, folder, small = given
        steady()
        load(Path(small), technique, dtype)
        map_libraries()
        print(json.dumps(asdict(load(Path(folder), technique, dtype))))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name) / "model", Path(name) / "small"
        make(folder, SIZES)
        make(small, SMALL)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{size / 2**20:.0f} MiB of float32 weights")
        for case in CASES:
            found = _in_process(folder, small, *case)
            failed |= found.beyond > CONSTANT
            print(
                f"{found.technique:<9} loaded as {found.dtype:<9} peak {found.peak:7.1f} MiB = "
                f"stored {found.stored:6.1f} "
                f"+ largest tensor {found.largest:6.1f} + {found.beyond:5.1f} (at most {CONSTANT})"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
