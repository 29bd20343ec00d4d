"""A small report with every section, for the tests of charts, page and browser: nothing in it is measured."""

from lowmem.report.footprint import KINDS, MemoryFootprint
from lowmem.report.layer_groups import LayerGroup
from lowmem.report.page import ReportPageData
from lowmem.report.quantization_errors import SERIES, BitsAndOutputError, FormatGaussianError
from lowmem.report.relative_speeds import RelativeSpeed
from lowmem.testing.gate_verdicts import FigureComparison, GateVerdict
from lowmem.training.step_memory import TrainingMemory

HOSTILE = "<script>alert('1')</script>\"&\\"


def footprint(name, size, gradients=0, adapters=0):
    kinds = dict.fromkeys(KINDS, 0) | {"float32 weights": size, "biases, norms": 4096, "LoRA adapters": adapters}
    return MemoryFootprint(name, kinds, 20_480, step(gradients) if gradients else None)


def step(gradients):
    kinds = {"Linear": 2**19, "LayerNorm": 2**16}
    return TrainingMemory("adamw", "update", 2**20, 2**18, 4096, gradients, 2 * gradients, kinds, 1_003)


STEPS = {
    HOSTILE: TrainingMemory("adamw", "update", 2**23, 0, 2**20, 2**23, 2**24, {}, 2**20),
    "qlora": TrainingMemory(
        "adamw", "backward", 2**20, 2**20, 2**20, 0, 2**21, {f"Kind{n}": (5 - n) * 2**20 for n in range(5)}, 7
    ),
}


def report(name="small", **changes):
    """Return a report whose layers, variants and workloads are called ``name``, and some are not."""
    footprints = [footprint("dense", 2**22), footprint(name, 2**20, 2**22), footprint("lora", 2**20, 2**18, 2**18)]
    row = FigureComparison(name, "ratio", 0.001, 0.0012, 1.2, 1.17, 1.24, "slower", f"{name} is 20% slower")
    content = {
        "title": f"model {name}",
        "lead": f"What {name} costs.",
        "footprints": footprints,
        "meanings": {name: ("FourBit()", "4-bit weights"), "lora": ("Half(), LoRA(rank=32)", "LoRA of rank 32")},
        "losses": {name: 0.037, "lora": 8e-5},
        "timings": [
            *(
                RelativeSpeed("float32", name, batch, 8 / batch**0.4, 7 / batch**0.4, 9 / batch**0.4)
                for batch in (1, 8, 64)
            ),
            *(RelativeSpeed("bfloat16", "lora", batch, 2.0) for batch in (1, 8, 64)),
            *(RelativeSpeed("peers, float32", "torchao", batch, 0.4) for batch in (1, 8, 64)),
        ],
        "timed": "Measured in turns.",
        "groups": [
            LayerGroup(
                "layers.0-29.mlp.up_proj",
                "Linear",
                (64, 32),
                30,
                61440,
                245760,
                {name: 40000, "lora": 50000},
                {name: 0.09, "lora": None},
            ),
            LayerGroup(
                f"layers.0-29.{name}",
                "LayerNorm",
                (32,),
                30,
                960,
                3840,
                {name: 3840, "lora": 3840},
                {name: None, "lora": None},
            ),
        ],
        "distortions": [
            FormatGaussianError(form, scales, block, 4 + bits / block, 0.08 + block / 4000)
            for form in ("nf4", "int4")
            for scales, bits in (("float32", 32), ("double", 8))
            for block in (16, 64)
        ],
        "qualities": [
            BitsAndOutputError(series, f"{series}, {name}", 4 + at / 2 + step / 8, 0.1 / (1 + at + step), 0.99)
            for at, series in enumerate(SERIES)
            for step in range(3)
        ],
        "verdicts": [
            GateVerdict(
                "latency",
                False,
                "main",
                "HEAD",
                {"cpu": "x86_64"},
                (row, FigureComparison("load", "ratio", 1.0, 1.0, 1.0, 0.99, 1.01, "same", "")),
            ),
            GateVerdict(
                "memory",
                True,
                "stored",
                "HEAD",
                {},
                (FigureComparison(name, "stored_bytes", 10, 10, None, None, None, "same", ""),),
            ),
        ],
        "machine": {"cpu": "AMD EPYC", "threads": "2"},
    }
    return ReportPageData(**(content | changes))
