"""How a parameter is stored: the frozen records that a stored tensor and its module keep of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lowmem.kernels import Weight
from lowmem.kernels.frozen_weight_operator import quantization_description
from lowmem.quant.formats import get_format
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class CodedForm:
    """How a weight is stored in 4 or 8 bits. The first four arguments are attributes of ``QuantizedTensor``.

    The parts are ``packed``, uint8 (*lead, bytes), and ``scales``, the bytes of the scales as uint8, so that casts of
    a model do not change them.

    Args:
        format: a key of ``FORMATS`` or ``IMPORTED``.
        block_size: weights per scale.
        scale_encoding: a key of ``ENCODINGS``.
        method: how the scales were found.
        transposed: whether the parts hold the parameter with its last two dimensions transposed.
        gathered: whether the parts hold the columns in another order. A third part, ``order``, int32 (columns,), then
            says which column of the parameter each stored column is (``lowmem.nn.gathered_weight``).
        compute_dtype: dtype of products with the weight; None: the dtype of the input; torch.int8: 8-bit integers in
            ``Linear4Bit``, the dtype of the input elsewhere.
    """

    format: str
    block_size: int
    scale_encoding: str
    method: str
    transposed: bool = False
    gathered: bool = False
    compute_dtype: torch.dtype | None = None

    parts: ClassVar[tuple[str, ...]] = ("packed", "scales")  # a gathered form sets an attribute of its own

    def __post_init__(self) -> None:
        if self.gathered:
            object.__setattr__(self, "parts", ("packed", "order", "scales"))

    def __str__(self) -> str:
        how = f"{self.format}, block_size={self.block_size}, scales={self.scale_encoding}"
        return ", ".join([how, *self.enabled_flag_names])

    @property
    def enabled_flag_names(self) -> tuple[str, ...]:
        """Those of the names ``transposed`` and ``gathered`` whose attribute is true."""
        return tuple(name for name in ("transposed", "gathered") if getattr(self, name))

    def has_same_encoding(self, other: object) -> bool:
        """Whether parts of the other form mean the same values in this form."""
        return isinstance(other, CodedForm) and replace(other, compute_dtype=self.compute_dtype) == self

    @property
    def bits(self) -> int:
        """The number of bits of a code: 4 or 8."""
        return get_format(self.format).bits

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """Return the floating point dtype of a product with x."""
        return x.dtype if self.compute_dtype in (None, torch.int8) else self.compute_dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales, whose bytes are stored."""
        return get_scale_encoding(self.scale_encoding, get_format(self.format).signed).dtype

    @classmethod
    def from_quantized_tensor(cls, weight: QuantizedTensor) -> CodedForm:
        """Return the form of a quantized tensor, in 4 or 8 bits."""
        return cls(weight.format, weight.block_size, weight.scale_encoding, weight.method)

    def weight_from_parts(self, parts: Sequence[Tensor], columns: int) -> QuantizedTensor:
        """Return the weight (*lead, columns) over its parts, without a copy."""
        packed, *_, scales = parts
        dtype, size = self.scale_dtype, scales.shape[-1] if scales.dim() else 0
        if scales.dtype is torch.uint8 is not dtype and scales.stride(-1) == 1 and size % dtype.itemsize == 0:
            # Else check_layout says that they are not in their dtype
            scales = scales.view(dtype)
        shape = torch.Size((*packed.shape[:-1], columns))
        return QuantizedTensor(packed, scales, shape, self.format, self.block_size, self.scale_encoding, self.method)

    @staticmethod
    def codes_and_scale_bytes(weight: QuantizedTensor) -> tuple[Tensor, ...]:
        """Return the codes and the bytes of the scales of a quantized tensor, without a copy."""
        return weight.packed, weight.scales.detach().view(torch.uint8)


@dataclass(frozen=True)
class HalfForm:
    """How a weight is stored in 16 bits: the only part is ``rounded``, float16 or bfloat16 in the weight's shape."""

    dtype: torch.dtype

    parts: ClassVar[tuple[str, ...]] = ("rounded",)
    bits: ClassVar[int] = 16
    transposed: ClassVar[bool] = False
    gathered: ClassVar[bool] = False
    compute_dtype: ClassVar[None] = None

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of a product with x: float32 for a float32 x, else ``torch.promote_types`` of both."""
        return x.dtype if x.dtype is torch.float32 else torch.promote_types(x.dtype, self.dtype)

    def has_same_encoding(self, other: object) -> bool:
        """Whether parts of the other form mean the same values in this form."""
        return other == self

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def weight_from_parts(self, parts: Sequence[Tensor], columns: int) -> Tensor:
        """Return the weight (*lead, columns) of its part."""
        return parts[0]


Form: TypeAlias = CodedForm | HalfForm


class Described(NamedTuple):
    """How one parameter is stored.

    Attributes:
        form: of the parts.
        rows: leading dimensions, as in the parts: of a transposed parameter those of its transpose.
        tail: dimensions of a row, likewise.
        dtype: of the ``StoredTensor``.
        text: the form as text for ``QuantizedOperands`` in graphs; "" for 16 bits.
    """

    form: Form
    rows: tuple[int, ...]
    tail: tuple[int, ...]
    dtype: torch.dtype
    text: str

    @classmethod
    def from_form(
        cls, form: Form, leading_shape: tuple[int, ...], row_shape: tuple[int, ...], dtype: torch.dtype
    ) -> Described:
        """Describe a parameter."""
        return cls(
            form,
            leading_shape,
            row_shape,
            dtype,
            quantization_description(form, math.prod(row_shape)) if isinstance(form, CodedForm) else "",
        )


def as_frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient: ``tensor`` itself if it is one, so that shared weights stay shared."""
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def form_and_frozen_parts(
    weight: Weight, transposed: bool = False, compute_dtype: torch.dtype | None = None
) -> tuple[Form, tuple[nn.Parameter, ...]]:
    """Return the form of a weight, and its parts as frozen parameters, cached with the weight."""
    if not isinstance(weight, QuantizedTensor):
        return HalfForm(weight.dtype), (as_frozen_parameter(weight),)
    parts = weight.cache.get("parts")
    if parts is None:
        parts = weight.cache["parts"] = tuple(map(as_frozen_parameter, CodedForm.codes_and_scale_bytes(weight)))
    return replace(CodedForm.from_quantized_tensor(weight), transposed=transposed, compute_dtype=compute_dtype), parts


def parts_by_name(parameter_name: str, form: Form, parts: tuple[nn.Parameter, ...]) -> dict[str, nn.Parameter]:
    """Return the parts of a parameter by their names."""
    return {f"{parameter_name}_{part}": tensor for part, tensor in zip(form.parts, parts, strict=True)}
