"""Launches compile for GPUs that are not there, within ceilings for what a program takes."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from lowmem import QuantizedTensor, quantize
from lowmem.kernels import gpu
from lowmem.quant.formats import get_format
from tests.kernels.triton.legs import launches
from tests.selection import selection

launch = launches(interpreted=False)
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (75, 80, 86, 89, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}


def on_meta(form: str, size: int, scales: str, shape=(4096, 4096)) -> QuantizedTensor:
    return QuantizedTensor.empty(torch.Size(shape), form, size, scales, "absmax", device="meta")


def dequantizing(form, size, scales, dtype, shape=(4096, 4096)):
    return launch.dequantize_launch(
        on_meta(form, size, scales, shape), torch.empty(shape, dtype=dtype, device="meta")
    )


def multiplying(batch, form, size, scales, dtype, shape=(4096, 4096), bias=None):
    x, out = (torch.empty(batch, features, dtype=dtype, device="meta") for features in reversed(shape))
    return launch.small_batch_product_launch(x, on_meta(form, size, scales, shape), bias, out)


def quantizing(form, size, shape=(4096, 4096)):
    q = on_meta(form, size, "float32", shape)
    weight, used = torch.empty(shape, device="meta"), torch.empty(q.scales.shape, dtype=torch.uint8, device="meta")
    return launch.quantize_launch(weight, q.scales, get_format(form), size, q.packed, used)


HALF, FULL, ODD = torch.bfloat16, torch.float32, (5, 4095)
# For each kernel: its launch, and the ceilings of registers of a thread, bytes of shared memory, and instructions of
# the machine (all of the kernel's) for each weight that a thread takes at a time. They are a fourth above what triton
# 3.9 needs on the target that needs most.
CASES = {
    "dequantize nf4 to bfloat16": (dequantizing("nf4", 64, "double", HALF), 68, 5120, 26),
    "dequantize bof4s to float32": (dequantizing("bof4s", 32, "double", FULL), 75, 10240, 24),
    "dequantize int8 to bfloat16": (dequantizing("int8", 64, "double", HALF), 50, 5120, 36),
    "dequantize with offsets to float16": (dequantizing("uint4", 32, "float16_offsets", torch.float16), 60, 5120, 19),
    "dequantize odd rows in blocks of 10": (dequantizing("nf4", 10, "float16", HALF, ODD), 78, 2560, 60),
    "quantize nf4": (quantizing("nf4", 64), 59, 80, 149),
    "quantize int8 in blocks of 4096": (quantizing("int8", 4096), 99, 1280, 91),
    "1 input": (multiplying(1, "bof4s", 32, "double", HALF), 79, 80, 24),
    "2 inputs": (multiplying(2, "bof4s", 32, "double", HALF), 79, 80, 52),
    "3 inputs in float32, by the kernel of 4": (multiplying(3, "nf4", 64, "double", FULL), 128, 80, 74),
    "4 inputs": (multiplying(4, "bof4s", 32, "double", HALF), 110, 80, 77),
    "8 inputs": (multiplying(8, "bof4s", 32, "double", HALF), 210, 80, 126),
    "8 inputs, odd rows in blocks of 16": (multiplying(8, "nf4", 16, "double", HALF, (64, 333)), 255, 80, 171),
    "8 inputs, odd rows in blocks of 10": (multiplying(8, "nf4", 10, "float16", HALF, ODD), 160, 2560, 328),
    "1 input, int8": (multiplying(1, "int8", 64, "double", HALF), 80, 1280, 36),
}


def compiled(job, target: GPUTarget):
    """Compile a launch as its call would: integers that 16 divides, and aligned addresses, are known."""
    signature, constants, aligned = {}, {}, {}
    for place, parameter in enumerate(job.kernel.params):
        value = job.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype] if tensor else "i32"
        if tensor or value % 16 == 0:
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(job.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": job.warps, **launch.OPTIONS})


def read_binary(tool: str, *arguments: str, code: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run(
            [NVIDIA / tool, *arguments, file.name], capture_output=True, text=True, check=True
        ).stdout


def usage(made, target: GPUTarget) -> tuple[int, int, int, int]:
    """Return registers of a thread, bytes of shared memory, bytes of stack and spills, and instructions."""
    if target.backend == "hip":
        assembly = made.asm["amdgcn"]
        read = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # noqa: E731
        lost = [read(name) for name in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")]
        instructions = len(re.findall(r"^\t[sv]_|^\t(?:global|ds|buffer)_", assembly, re.MULTILINE))
        return read("vgpr_count"), made.metadata.shared, sum(lost), instructions
    told = read_binary("cuobjdump", "-res-usage", code=made.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    text = read_binary("nvdisasm", "-c", code=made.asm["cubin"])
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", text, re.MULTILINE))
    return found["REG"], made.metadata.shared, found["STACK"] + found["LOCAL"], instructions


def weights_of_a_thread(job, target: GPUTarget) -> float:
    given = job.arguments
    codes = given["ROWS"] * given["GROUPS"] * given["GROUP"] if "ROWS" in given else given["BLOCKS"] * given["WIDTH"]
    return codes * 8 / given["BITS"] / (job.warps * target.warp_size)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_kernels_compile_and_take_no_more_than_their_ceilings(case, name):
    job, *ceilings = CASES[case]
    target = TARGETS[name]
    made = compiled(job, target)
    *taken, lost, instructions = usage(made, target)
    taken.append(instructions / weights_of_a_thread(job, target))
    print(f"{case}, {name}: {taken}")
    assert lost == 0
    if target.backend == "cuda":
        assert re.findall(r"\S*(?:approx|ftz)\S*", made.asm["ptx"]) == []
        fused = re.findall(r"\bfma\S*", made.asm["ptx"])
        assert bool(fused) == ("input" in case)  # dequantized bits are those of a product, and then a sum
    assert all(one <= ceiling for one, ceiling in zip(taken, ceilings, strict=True)), taken


VARIANTS = selection(
    [
        ["dequantize", 1, 2, 4, 8],
        ["nf4", "bof4s", "int8"],
        [8, 10, 16, 32, 64, 4096],
        ["float32", "float16", "double"],
        [torch.float32, torch.float16, torch.bfloat16],
        [(4096, 4096), (5, 4095)],
    ],
    2,
)
"""Each pair of values of what a kernel is compiled for: batch sizes, formats, block sizes, scales, dtypes, shapes."""

STACKS = {
    ("sm_100", 4, "bof4s", 64, "float16", torch.float16, (4096, 4096)): 8,
    ("sm_100", 8, "int8", 32, "float16", torch.bfloat16, (4096, 4096)): 8,
}
"""Bytes of stack: two registers, where ptxas prefers 80 or 96 and more programs at a time to 106 or 146."""


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_variant_but_those_listed_spills_or_uses_a_stack(variant, name):
    kernel, *stored, shape = variant
    job = dequantizing(*stored, shape) if kernel == "dequantize" else multiplying(kernel, *stored, shape)
    assert usage(compiled(job, TARGETS[name]), TARGETS[name])[2] == STACKS.get((name, *variant), 0)


def test_a_tile_has_groups_that_end_with_their_blocks():
    tile = launch.CodeTile(nbytes=2048, of_row=512, group=16, warps=4)
    for block_bytes in (4, 5, 12, 16, 32, 2048):
        for row_bytes in (1, 15, 16, 17, 511, 4096):
            shape = tile.shape_constants(row_bytes, block_bytes)
            assert block_bytes % shape["GROUP"] == 0
            assert all(number & (number - 1) == 0 for number in shape.values())  # Triton's tiles are powers of two
            assert shape["GROUPS"] * shape["GROUP"] <= 512
            assert shape["ROWS"] * shape["GROUPS"] * shape["GROUP"] in (1024, 2048)
    assert tile.shape_constants(4096, 32) == {"ROWS": 4, "GROUPS": 32, "GROUP": 16}


class StartsNothing:
    """A kernel without a device."""

    def __getitem__(self, grid):
        return lambda **arguments: None


@pytest.mark.parametrize(("rows", "at_most"), [(1, 52), (64, 72)])
def test_a_second_product_is_planned_no_more(rows, at_most, monkeypatch):
    """Calls of Python functions, up to those of Triton's launcher: the plan of the first launch serves."""
    for module, name in ((launch.few_inputs, "few"), (launch.of_rows, "dequantize")):
        monkeypatch.setattr(module, name, StartsNothing())
    monkeypatch.setattr(gpu, "triton_skip_reason_or_none", lambda device: None)
    q, x, calls = quantize(torch.randn(128, 256), "nf4", scales="double"), torch.randn(rows, 256), []
    for _ in range(2):
        calls.clear()
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            gpu.GpuBackend().linear(x, q, torch.float32)
        finally:
            sys.setprofile(None)
    assert "shape_constants" not in calls
    assert len(calls) <= at_most, calls
