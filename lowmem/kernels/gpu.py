"""The backend of GPUs: Triton's kernels (``triton/``) for 4- and 8-bit weights, where triton 3.6 or newer runs. What
they do not take falls back to ``reference``: other weights, dtypes and functions, wrapped and traced tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowmem.kernels import reference
from lowmem.kernels.tensor_checks import (
    TYPES,
    has_plain_memory,
    hide_from_selective_checkpoints,
    is_batched_or_under_functorch,
    is_recording_operations,
)
from lowmem.quant.backend import LowRank, Weight
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import ROW_MULTIPLE, QuantizedTensor, Squares, device_scratch_bytes

# Earlier ones flush subnormal quotients to zero (3.4 and 3.5), or have no tl.gather
OLDEST = (3, 6)
PROOF = "values proven in Triton's interpreter; speed not measured"
TRAINING = "not measured against bitsandbytes or Unsloth: take one of these to train on a GPU"


@lru_cache(maxsize=64)
def triton_skip_reason_or_none(device: torch.device) -> str | None:
    """Return why Triton's kernels do not serve a device, or None.

    A small kernel is compiled and started: a driver, a GPU or a missing C compiler may refuse. Lack of memory is
    raised and not remembered: it says nothing about the next call.
    """
    try:
        import triton
    except ImportError as error:
        oldest = _dotted_version(OLDEST)
        return f"triton cannot be imported ({_first_line_of_error(error)}): pip install 'triton>={oldest}'"
    installed = tuple(int(number) for number in triton.__version__.split(".")[:2])
    if installed < OLDEST:
        return f"triton {triton.__version__} is too old: lowmem's kernels need {_dotted_version(OLDEST)}"
    try:
        weight = QuantizedTensor.empty(torch.Size((1, 8)), "nf4", 8, "float32", "absmax", device=device)
        _import_triton_launch().dequantize_launch(weight, torch.empty(1, 8, dtype=torch.float32, device=device))()
    except Exception as error:  # of the compiler, the linker or the driver; plain torch serves then
        # Triton's launcher raises a RuntimeError with the driver's text
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error).lower():
            raise
        return f"triton {triton.__version__} does not run on {device}: {_first_line_of_error(error)}"
    return None


_refused_kernels: dict[tuple[str, torch.device], str] = {}
"""Why the compiler refused a kernel on a device: plain torch serves for it from then on, and the others go on."""


def _start_unless_refused(kernel: str, device: torch.device, launch: Callable[[], object]) -> bool:
    """Start a kernel; return False, and remember why, where Triton cannot compile it. Other errors are raised."""
    if (kernel, device) in _refused_kernels:
        return False
    try:
        launch()
    except Exception as error:
        # Of Triton's own classes: compilation, ptxas, too much shared memory. Its driver raises RuntimeErrors.
        if "TritonError" not in {base.__name__ for base in type(error).__mro__}:
            raise
        _refused_kernels[kernel, device] = f"{type(error).__name__}: {_first_line_of_error(error)}"
        return False
    return True


def cuda_backend_description() -> str:
    """Return what serves CUDA's tensors, and why, as one line of text."""
    if not torch.cuda.is_available():
        return f"none: torch finds no GPU (triton's kernels: {PROOF})"
    reason = triton_skip_reason_or_none(torch.device("cuda", torch.cuda.current_device()))
    refused = "".join(f"; not {kernel} on {device}: {why}" for (kernel, device), why in _refused_kernels.items())
    return f"triton: {PROOF}; {TRAINING}{refused}" if reason is None else f"reference: {reason}"


class GpuBackend:
    """The backend of GPUs. Dequantized columns of a weight take ``device_scratch_bytes`` at most, and rows less."""

    name = "triton"
    fast_bfloat16 = True
    is_asynchronous = True

    def __getattr__(self, name: str) -> Any:
        """Return the function of plain torch, where Triton has no kernel."""
        return getattr(reference, name)

    @hide_from_selective_checkpoints
    def linear(
        self,
        x: Tensor,
        weight: Weight,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (..., in) -> (..., out)."""
        if x.dim() != 2:
            return reference.call_on_flattened_batch(self.linear, x, weight, dtype, bias, low_rank)
        out = self._small_batch_product_or_none(x, weight, dtype, bias)
        if out is None:
            return reference.linear(x, weight, dtype, bias, low_rank, _dequantize_by_triton_or_torch)
        return out if low_rank is None else reference.add_low_rank(out, x, *low_rank)

    def _small_batch_product_or_none(
        self, x: Tensor, weight: Weight, dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor | None:
        """Return ``x @ W.T + bias`` of a few inputs by one kernel; None where it does not take them."""
        others = (x,) if bias is None else (x, bias)
        if not isinstance(weight, QuantizedTensor) or not _can_use_triton(weight, dtype, *others):
            return None
        if (
            _unmet_small_batch_requirement_or_none(weight, len(x), dtype)
            or x.shape[1:] != weight.shape[1:]
            or not x.is_floating_point()
        ):
            return None
        # The kernel would read beyond it
        if bias is not None and bias.shape != weight.shape[:1]:
            return None
        weight.check_layout()
        out = x.new_empty(len(x), weight.shape[0], dtype=dtype)
        launch = _import_triton_launch().small_batch_product_launch(x.to(dtype), weight, bias, out)
        return out if _start_unless_refused("few", out.device, launch) else None

    def input_grad(self, grad: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return ``grad @ W``: (batch, out) -> (batch, in), each number by one product, in ``dtype``."""
        if grad.shape[1] != weight.shape[0] or not _can_multiply_by_columns(weight, dtype, grad):
            return reference.input_grad(grad, weight, dtype, _dequantize_by_triton_or_torch)
        out = grad.new_empty(len(grad), weight.shape[1], dtype=dtype)
        return _multiply_by_columns(out, grad.to(dtype), weight, is_added=False)

    def add_product(self, out: Tensor, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
        """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place."""
        if transposed and _can_multiply_by_columns(weight, x.dtype, x, out):
            return _multiply_by_columns(out, x, weight, is_added=True)
        return reference.add_product(out, x, weight, transposed, _dequantize_by_triton_or_torch)

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of a quantized matrix (out, in), dequantized in float32 and rounded once to ``dtype``."""
        if _can_use_triton(weight, dtype):
            return _dequantize_by_triton_or_torch(weight, rows, dtype)
        return reference.dequantize(weight, rows, dtype)

    def quantize_rows(self, rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> Squares:
        """Quantize rows (rows, n) into the rows ``chunk`` of the matrix ``into``; scales are those of torch."""
        packed = into.packed[chunk]
        if not _can_use_triton(into, rows.dtype, rows) or not rows.numel() or packed.stride(1) != 1:
            return reference.quantize_rows(rows, into, chunk, importance)
        form = get_format(into.format)
        weights = rows.float().contiguous()
        rows, stored = reference.subtract_offsets_and_encode_scales(weights, into, importance)
        scales = into.encoding.decode(stored)  # (rows, blocks)
        used = torch.empty(scales.shape, dtype=torch.uint8, device=rows.device)
        launch = _import_triton_launch().quantize_launch(rows, scales, form, into.block_size, packed, used)
        if not _start_unless_refused("quantize", rows.device, launch):
            return reference.quantize_rows(weights, into, chunk, importance)
        into.scales[chunk] = reference.zero_unused_scales(stored, used.bool(), form)
        return reference.chunk_square_sums(weights, into, chunk)

    def explain(self, weight: Weight, rows: int, dtype: torch.dtype) -> str:
        """Return what computes each product of an input of ``rows`` rows, and why not Triton's kernels."""
        device = (weight.packed if isinstance(weight, QuantizedTensor) else weight).device
        refused = (
            triton_skip_reason_or_none(device)
            if isinstance(weight, QuantizedTensor)
            else "it takes 4- and 8-bit weights"
        )
        if refused is not None or not isinstance(weight, QuantizedTensor):
            return f"{reference.explain(weight, rows, dtype)}\n  not triton: {refused}"
        rest = f"triton dequantizes rows (columns for input_grad) in chunks and torch multiplies; {PROOF}"
        if why := _refused_kernels.get(("dequantize", device)):
            rest = f"torch dequantizes and multiplies\n  not dequantize of triton: {why}"
        if why := _unmet_small_batch_requirement_or_none(weight, rows, dtype):
            return f"linear, input_grad: {rest}\n  not few of triton, which takes {why}"
        if why := _refused_kernels.get(("few", device)):
            return f"linear, input_grad: {rest}\n  not few of triton: {why}"
        return f"linear: few of triton, which takes {_FEW_ROWS}; {PROOF}\ninput_grad: {rest}"


_FEW_ROWS = "1 to 8 rows"


def _unmet_small_batch_requirement_or_none(weight: QuantizedTensor, rows: int, dtype: torch.dtype) -> str | None:
    """Return what the kernel of a few inputs takes in place of these, or None."""
    if not 1 <= rows <= 8:
        return _FEW_ROWS
    if dtype not in TYPES:
        return "other dtypes"
    return "weights without offsets" if weight.has_offsets else None


def _dequantize_by_triton_or_torch(
    weight: Weight, rows: slice, dtype: torch.dtype, levels: tuple[float, ...] | None = None
) -> Tensor:
    """Do what ``reference.dequantized_rows`` does, by Triton where it serves."""
    if not isinstance(weight, QuantizedTensor) or not _can_use_triton(weight, dtype):
        return reference.dequantized_rows(weight, rows, dtype, levels)
    weight.check_layout()
    packed, scales = weight.packed[rows], weight.scales[rows]
    out = torch.empty(len(packed), weight.shape[1], dtype=dtype, device=packed.device)
    if out.numel():
        launch = _import_triton_launch().dequantize_launch(
            replace(weight, packed=packed, scales=scales, shape=out.shape), out, levels
        )
        if not _start_unless_refused("dequantize", out.device, launch):
            return reference.dequantized_rows(weight, rows, dtype, levels)
    return out


def _can_multiply_by_columns(weight: Weight, dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether ``_multiply_by_columns`` takes a weight and other tensors: a stored 16-bit one needs no Triton."""
    if isinstance(weight, QuantizedTensor):
        refused = ("dequantize", weight.packed.device) in _refused_kernels
        return not refused and _can_use_triton(weight, dtype, *tensors)
    return weight.dim() == 2 and dtype in TYPES and _have_plain_memory_on_one_device(weight, *tensors)


def _multiply_by_columns(out: Tensor, x: Tensor, weight: Weight, is_added: bool) -> Tensor:
    """Write ``x @ W`` to out (batch, in), or add it, in x's dtype: as many columns of W at a time as scratch holds.

    A chunk is of whole blocks. It has all rows of W, so each sum is one product's, which is rounded once. Chunks of
    rows would need float32 sums, and products in float32.
    """
    rows, columns = weight.shape
    step = columns
    if isinstance(weight, QuantizedTensor):
        weight.check_layout()
    if isinstance(weight, QuantizedTensor) or weight.dtype is not x.dtype:
        least = math.lcm(weight.block_size if isinstance(weight, QuantizedTensor) else 1, ROW_MULTIPLE)
        step = max(1, device_scratch_bytes(x.device) // (x.itemsize * max(1, rows)) // least) * least
    for start in range(0, columns, max(1, step)):
        chosen = slice(start, min(start + step, columns))
        if isinstance(weight, QuantizedTensor):
            part = x.new_empty(rows, chosen.stop - start)
            launch = _import_triton_launch().dequantize_launch(weight, part, None, start)
            if not _start_unless_refused("dequantize", x.device, launch):
                part = reference.dequantized_rows(weight, slice(None), x.dtype)[:, chosen]
        else:
            part = weight.detach()[:, chosen].to(x.dtype)
        if is_added:
            out[:, chosen].addmm_(x, part)
        else:
            torch.mm(x, part, out=out[:, chosen])
        # Before the next one is dequantized
        del part
    return out


def _can_use_triton(weight: QuantizedTensor, dtype: torch.dtype, *extra_tensors: Tensor) -> bool:
    """Whether Triton may read a matrix and other tensors, and writes a dtype: plain memory of one device, and nothing
    that records operations."""
    if dtype not in TYPES or len(weight.shape) != 2 or not weight.shape.numel():
        return False
    # Rows and columns are counted in 32 bits
    if max(weight.shape) >= 2**31 or not _have_plain_memory_on_one_device(
        weight.packed, weight.scales, *extra_tensors
    ):
        return False
    return triton_skip_reason_or_none(weight.packed.device) is None


def _have_plain_memory_on_one_device(first: Tensor, *others: Tensor) -> bool:
    """Whether operations may write to memory of tensors: nothing records or batches them."""
    if is_recording_operations():
        return False
    for tensor in (first, *others):
        if not has_plain_memory(tensor) or is_batched_or_under_functorch(tensor) or tensor.device != first.device:
            return False
    return True


def _import_triton_launch() -> ModuleType:
    from lowmem.kernels.triton import launch

    return launch


def _first_line_of_error(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _dotted_version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
