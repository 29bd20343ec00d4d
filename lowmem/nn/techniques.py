"""The techniques: how weights are stored, or adapted, as frozen values without modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowmem.errors import is_one_of, short_repr
from lowmem.nn.forms import as_frozen_parameter
from lowmem.quant.formats import default_format_and_block_size, get_format
from lowmem.quant.packing import check_block_size
from lowmem.quant.quantize_tensor import checked_rounded_copy, checked_scale_method, quantize
from lowmem.quant.scale_encodings import ENCODINGS, OFFSETS, get_scale_encoding
from lowmem.quant.tensor import QuantizedTensor

QUANT_METHOD = "lowmem: import lowmem.integrations.transformers"
"""The method of a technique or a config as transformers knows it; where it is unknown, the error quotes it."""


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    """Check a ``compute_dtype``.

    Raises:
        ValueError: it is not a floating point dtype of at least 16 bits, torch.int8 or None.
    """
    choices = None, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64
    if not is_one_of(dtype, choices):
        raise ValueError(
            f"compute_dtype={short_repr(dtype)} must be a floating-point torch.dtype of 16 bits or more, or "
            "torch.int8, "
            "or None"
        )


def _frozen_quantized_tensor(weight: QuantizedTensor) -> QuantizedTensor:
    return replace(weight, packed=as_frozen_parameter(weight.packed), scales=as_frozen_parameter(weight.scales))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Half:
    """Half precision: weights and biases are stored in float16 or bfloat16 and frozen.

    Args:
        dtype: ``torch.float16`` (11 significant bits, largest number 65504) or ``torch.bfloat16`` (8 significant
            bits, the range of float32).

    Raises:
        ValueError: another dtype.
    """

    bits: ClassVar[int] = 16
    quant_method: ClassVar[str] = QUANT_METHOD
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not is_one_of(self.dtype, (torch.float16, torch.bfloat16)):
            raise ValueError(f"dtype={short_repr(self.dtype)} must be torch.float16 or torch.bfloat16")

    def store(self, tensor: Tensor, name: str = "weight") -> nn.Parameter:
        """Round a tensor to ``dtype``, as a frozen parameter.

        Raises:
            TypeError, ValueError: it is not floating point, has no values, or exceeds the range of the dtype.
        """
        return as_frozen_parameter(checked_rounded_copy(tensor, self.dtype, name))

    def skeleton(self, tensor: Tensor, name: str = "weight") -> nn.Parameter:
        """Return what ``store`` would return, on the meta device."""
        return as_frozen_parameter(torch.empty_like(tensor, dtype=self.dtype, device="meta"))


EMBEDDINGS = ("8bit", "q8_0", "4bit")
"""How ``FourBit`` can store embeddings and the output layer."""


class BlockwiseTechnique:
    """Base of ``FourBit`` and ``EightBit``.

    Attributes:
        bits: of a code.
        block_size: weights per scale; None: the format's default.
        scales: their encoding, a key of ``ENCODINGS``; None: the format's default.
        compute_dtype: dtype of products; None: the dtype of the input.
    """

    bits: ClassVar[int]
    quant_method: ClassVar[str] = QUANT_METHOD
    block_size: int | None
    scales: str | None
    compute_dtype: torch.dtype | None

    @property
    def format(self) -> str | tuple[str, ...]:
        """The key of a format; or several, of which each weight gets the one with the smallest squared error."""
        raise NotImplementedError

    @property
    def search(self) -> bool | None:
        """Whether to search for the scales with the smallest squared error; None: the format's default."""
        return None

    def store(self, weight: Tensor, name: str = "weight") -> QuantizedTensor:
        """Quantize a weight; codes and scales become frozen parameters.

        Args:
            weight: floating point (..., n), finite.
            name: unused here; replacements for this method name it in errors.

        Raises:
            TypeError, ValueError: a weight that ``quantize`` rejects.
        """
        return _frozen_quantized_tensor(
            quantize(weight, self.format, block_size=self.block_size, scales=self.scales, search=self.search)
        )

    def skeleton(self, weight: Tensor, name: str = "weight") -> QuantizedTensor:
        """Return what ``store`` would return, on the meta device.

        Raises:
            ValueError: ``format`` names several; to choose one takes the weight's values.
        """
        if not isinstance(self.format, str):
            raise ValueError(f"format={self.format!r}: without values there is no choosing; name one format")
        form = get_format(self.format)
        size = form.block_size if self.block_size is None else self.block_size
        method = checked_scale_method(form, self.search)
        return _frozen_quantized_tensor(
            QuantizedTensor.empty(weight.shape, form.name, size, self.scales or form.scales, method, device="meta")
        )


@dataclass(frozen=True)
class FourBit(BlockwiseTechnique):
    """4-bit quantization: weights are stored as 4-bit codes with a scale per block, frozen; biases are unchanged.

    QLoRA, arXiv 2305.14314, section 2.

    Args:
        format: a key of ``FORMATS``; or several, of which each weight gets the one with the smallest squared error.
            None takes "bof4s", in blocks of 32 unless ``block_size`` is given.
        block_size: weights per scale, even, 8 to 4096; None takes the format's default.
        scales: "float32", "float16" or "double", or one of the first two with "_offsets"; None takes the format's.
        compute_dtype: dtype of products, in stored layers and in modules that read stored weights (``Conv1D``,
            experts, torch's attention); None takes the input's. With torch.int8, linear layers round inputs, to 8
            bits, and levels to steps (``lowmem.kernels.int8_rounding``), and multiply integers: the fastest
            products of 16 rows and more with AVX-512 VNNI, which add about 1.5% to a language model's perplexity.
            While gradients are recorded, layers compute in floats (``lowmem.kernels.differentiable_dtype``); other
            modules use the dtype of the input.
        search: whether to search for the scales with the smallest squared error; None does as the format's default.
        offsets: whether each block has an offset, too, the middle of its weights: scales become "float16_offsets" or
            "float32_offsets". Products then also need the sums of the input over blocks, in float32.
        embeddings: "8bit": embeddings, the output layer of a language model, and layers that share a weight with them
            are stored by ``EightBit()``; "q8_0": by ``EightBit(format="q8_0")``, as GGUF holds them; "4bit": like all
            other layers.

    Raises:
        ValueError: an unknown format or scales, a bad block size, ``search``, ``offsets`` or ``embeddings`` of
            another kind, or a ``compute_dtype`` that is neither floating point with at least 16 bits nor torch.int8.
    """

    bits: ClassVar[int] = 4
    format: str | tuple[str, ...] = None  # type: ignore[assignment]  # which __post_init__ replaces
    block_size: int | None = None
    scales: str | None = None
    compute_dtype: torch.dtype | None = None
    search: bool | None = None
    offsets: bool = False
    embeddings: str = "8bit"

    def __post_init__(self) -> None:
        if self.format is None:
            format, block_size = default_format_and_block_size(self.block_size)
            object.__setattr__(self, "format", format)
            object.__setattr__(self, "block_size", block_size)
        if not isinstance(self.format, str):
            if not isinstance(self.format, Iterable):
                raise ValueError(
                    f"format={short_repr(self.format)} must be the name of a format, as 'nf4', or several names; "
                    "dtypes of "
                    "products are compute_dtype=, and EightBit() stores 8 bits"
                )
            # A list would not be hashable
            object.__setattr__(self, "format", tuple(self.format))
        if not self.format:
            raise ValueError(f"format={self.format!r} names no format: name one, or several to choose from")
        for name in [self.format] if isinstance(self.format, str) else self.format:
            if get_format(name).bits != self.bits:
                raise ValueError(f"format={name!r} has codes of 8 bits: EightBit() stores those")
        if self.block_size is not None:
            check_block_size(self.block_size)
        if not isinstance(self.offsets, bool) or not isinstance(self.search, bool | None):
            name = "search" if isinstance(self.offsets, bool) else "offsets"
            raise ValueError(f"{name}={short_repr(getattr(self, name))} must be True or False")
        if self.offsets and not is_one_of(self.scales, OFFSETS):
            if not is_one_of(self.scales, (None, "float16", "float32")):
                raise ValueError(f"scales={short_repr(self.scales)} has no offsets: choose from {', '.join(OFFSETS)}")
            object.__setattr__(self, "scales", f"{self.scales or 'float16'}_offsets")
        if self.scales is not None:
            object.__setattr__(self, "offsets", get_scale_encoding(self.scales).offsets)
        if not is_one_of(self.embeddings, EMBEDDINGS):
            raise ValueError(f"embeddings={short_repr(self.embeddings)} must be '8bit', 'q8_0' or '4bit'")
        check_compute_dtype(self.compute_dtype)


@dataclass(frozen=True)
class EightBit(BlockwiseTechnique):
    """8-bit quantization: weights are stored as integers from -127 to 127 with a scale per block, frozen.

    Biases are unchanged. A weight is off by at most 1/254 of the largest magnitude in its block, plus the effect of
    rounding the scale (``QuantizedTensor.error_bound``). It is absmax quantization as in LLM.int8(), arXiv
    2208.07339, section 2, in blocks as in arXiv 2110.02861.

    Args:
        block_size: weights per scale, even, 8 to 4096; None takes the format's, 64 or 32.
        scales: "float32", "float16" or "double" (8 bits per scale, and a float16 for each row); None takes the
            format's, "double" or "float16".
        compute_dtype: as in ``FourBit``.
        format: "int8"; or "q8_0", which has the blocks and values of GGUF's Q8_0, so that ``lowmem.export`` writes
            these with the same codes.

    Raises:
        ValueError: an unknown format or scales, a bad block size, or a ``compute_dtype`` that ``FourBit`` rejects.
    """

    bits: ClassVar[int] = 8
    block_size: int | None = None
    scales: str | None = None
    compute_dtype: torch.dtype | None = None
    format: str = "int8"

    def __post_init__(self) -> None:
        if get_format(self.format).bits != self.bits:
            raise ValueError(f"format={self.format!r} has codes of 4 bits: FourBit() stores those")
        if self.block_size is not None:
            check_block_size(self.block_size)
        if not is_one_of(self.scales, (None, *ENCODINGS)):
            why = "has offsets" if is_one_of(self.scales, OFFSETS) else "is unknown"
            raise ValueError(f"scales={short_repr(self.scales)} {why}: choose from {', '.join(ENCODINGS)}")
        check_compute_dtype(self.compute_dtype)


def embedding_and_output_technique(technique: FourBit) -> EightBit | FourBit:
    """Return the technique with which ``technique`` stores embeddings and the output layer."""
    if technique.embeddings == "4bit":
        return technique
    dtype = technique.compute_dtype
    # Logits are not rounded: what int8 was measured to lose is without it
    dtype = None if dtype is torch.int8 else dtype
    return EightBit(compute_dtype=dtype, format="q8_0" if technique.embeddings == "q8_0" else "int8")


def blockwise_technique(
    format: str | None,
    block_size: int | None = None,
    scales: str | None = None,
    compute_dtype: torch.dtype | None = None,
    search: bool | None = None,
    embeddings: str = "8bit",
) -> FourBit | EightBit:
    """Return the technique that stores weights in a format; None: ``FourBit``'s default.

    Raises:
        ValueError: what ``FourBit`` or ``EightBit`` rejects, or an unknown format.
    """
    if format is not None and get_format(format).bits == EightBit.bits:
        return EightBit(block_size, scales, compute_dtype, format)
    return FourBit(cast(str, format), block_size, scales, compute_dtype, search, embeddings=embeddings)


CHOICES: tuple[FourBit | EightBit, ...] = (
    FourBit("bof4s", 64, "double", embeddings="4bit"),
    FourBit("bof4s", 32, "double", embeddings="4bit"),
    FourBit("bof4s", 16, "double", embeddings="4bit"),
    EightBit(64, "double"),
)
"""The techniques that ``Budget`` chooses from, in order of increasing bytes and decreasing error."""

NORMAL_ERRORS = (0.0815, 0.0745, 0.0658, 0.00602)
"""The relative root mean square error of each of ``CHOICES`` for normal weights in long rows."""


@dataclass(frozen=True)
class Budget:
    """A budget of bits per weight: each layer gets 4 bits in blocks of 64, 32 or 16, or 8 bits in blocks of 64.

    The loss of the model is modelled as the sum of the losses from storing each weight alone. Bits are given, step by
    step, to the layer where they lower this sum most per byte, until no further step fits the budget: a greedy choice
    on the convex hull of each layer's choices (Shoham and Gersho, Efficient bit allocation for an arbitrary set of
    quantizers, 1988).

    With ``inputs``, the loss of a weight is the expected squared change of the model's output, relative to the
    output: ``sum of g^2 (w - stored)^2``, where g is the gradient of a random projection of the output (Hutchinson's
    estimator). The squares of g are kept in factored form, as their sums over rows and over columns, and the errors
    of weights are assumed to be independent. Without ``inputs``, the loss is the squared relative error
    ``|W - stored|^2 / |W|^2`` times the number of elements of W. That is the relative error of the layer's output if
    the columns of its input are independent and equally large, and if a layer's influence is its number of elements.

    Args:
        bits: of codes and scales per weight, on average over all stored weights, each of which counts once;
            ``convert(at_most=)`` limits bytes in the same way, including those of dense parameters. The choice never
            exceeds the budget.
        inputs: typical batches, as for ``calibrate``: each a Tensor, a tuple or list of positional arguments, or a
            mapping of keyword arguments. The model runs forward and backward once on each.
        compute_dtype: as in ``FourBit``.

    Raises:
        TypeError: inputs of another type.
        ValueError: bits that are not a finite number above 0, or a ``compute_dtype`` that ``FourBit`` rejects.
    """

    quant_method: ClassVar[str] = QUANT_METHOD
    bits: float
    inputs: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        bits = self.bits
        if not (_is_number(bits) and 0 < bits < math.inf):
            raise ValueError(f"bits={short_repr(bits)} must be a number of bits a weight, as 4.4")
        if isinstance(self.inputs, Tensor | Mapping | str) or not isinstance(self.inputs, Iterable | None):
            raise TypeError(
                f"inputs is a {type(self.inputs).__name__}; pass a list of batches, if only of one: [batch]"
            )
        check_compute_dtype(self.compute_dtype)

    @property
    def choices(self) -> tuple[FourBit | EightBit, ...]:
        """``CHOICES``, with products in ``compute_dtype``."""
        return tuple(replace(technique, compute_dtype=self.compute_dtype) for technique in CHOICES)


# Low-rank products are scaled in float32
_LARGEST_ALPHA = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: the model is frozen, and two matrices A and B per weight train (arXiv 2106.09685).

        y = W x + b + s B A x,  s = alpha / rank, or alpha / sqrt(rank) if rank-stabilized

    Ranks and alphas can differ by layer: ``LoRA(8, ranks={"*.q_proj": 32, "*.experts.down_proj": 16})``. A pattern is
    a glob that is matched against a layer's paths, and against these with the name of a parameter; the first match
    wins, and a pattern that matches no adapted layer is an error. Each expert of a stack has its own A and B. Which
    layers get adapters is an option of ``convert``.

    Args:
        rank: of ``B A``, at least 1.
        alpha: the numerator of the scaling s; None takes each layer's rank.
        dropout: probability of dropout on the input of the low-rank product, in [0, 1). There is none for embeddings,
            or where a weight's values are read.
        rank_stabilized: whether to scale by ``alpha / sqrt(rank)``, which keeps the size of gradients at high ranks
            (rsLoRA, arXiv 2312.03732).
        ranks: other ranks by pattern, a mapping or pairs; stored as a tuple of pairs.
        alphas: other alphas by pattern, likewise.
        init: "zero": B starts at zero (of an embedding, A), so a new adapter does not change the output, bit for bit
            (except for the order of sums, where layers compute in bfloat16 in training). "loftq": ``s B A`` starts as
            the best approximation, of this rank, of the base's quantization error, so that base and adapter are
            nearer to the dense weight W than the base alone (LoftQ, arXiv 2310.08659, algorithm 1):

                s B A = SVD_rank(W - dequantize(quantize(W)))

            It needs W, so the same ``convert`` must quantize the weight. Only one step of LoftQ's alternation is
            taken: the base has the same bytes as without adapters, is the same for every adapter, and stays tied.
            Merging a new adapter of this kind changes bytes.
        dtype: of A and B: ``torch.bfloat16`` halves their memory and that of their gradients; train them with
            ``lowmem.master_weights(optimizer)``. None takes float64 if the base is float64, else float32.

    Raises:
        ValueError: a rank that is not a positive integer, an alpha that is not a positive number that
            float32 can hold, a dropout outside [0, 1), a rank_stabilized that is not a bool, ranks or alphas
            that are not pairs of a pattern and a value, an unknown init, or another dtype.
    """

    quant_method: ClassVar[str] = QUANT_METHOD
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    ranks: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alphas: Mapping[str, float | None] | tuple[tuple[str, float | None], ...] = ()
    init: str = "zero"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        # A dict or a list would not be hashable
        for name in ("ranks", "alphas"):
            object.__setattr__(self, name, _checked_pattern_pairs(name, getattr(self, name)))
        for rank in (self.rank, *(rank for _, rank in _checked_pattern_pairs("ranks", self.ranks))):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank={short_repr(rank)} must be a positive integer")
        for alpha in (self.alpha, *(alpha for _, alpha in _checked_pattern_pairs("alphas", self.alphas))):
            if alpha is not None and not (_is_number(alpha) and 0 < alpha <= _LARGEST_ALPHA):
                raise ValueError(
                    f"alpha={short_repr(alpha)} must be a positive number, at most float32's largest "
                    f"({_LARGEST_ALPHA:.6g}), or None for the rank"
                )
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={short_repr(self.dropout)} must be at least 0 and below 1")
        if not isinstance(self.rank_stabilized, bool):
            raise ValueError(f"rank_stabilized={short_repr(self.rank_stabilized)} must be True or False")
        if not is_one_of(self.init, ("zero", "loftq")):
            raise ValueError(f"init={short_repr(self.init)} must be 'zero' or 'loftq'")
        if not is_one_of(self.dtype, (None, torch.bfloat16)):
            raise ValueError(f"dtype={short_repr(self.dtype)} must be torch.bfloat16, or None for float32")

    @property
    def scaling(self) -> float:
        """The factor s of ``B A x``, at the technique's own rank and alpha."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def at(self, paths: Sequence[str]) -> LoRA:
        """Return the technique for a layer with these paths: with its rank and alpha, and without patterns."""

        def first_matching_value(patterns: Any, default: Any) -> Any:
            return next((value for p, value in patterns if any(fnmatchcase(path, p) for path in paths)), default)

        rank, alpha = first_matching_value(self.ranks, self.rank), first_matching_value(self.alphas, self.alpha)
        return replace(self, rank=rank, alpha=alpha, ranks=(), alphas=())


def _checked_pattern_pairs(argument_name: str, patterns: Any) -> tuple[tuple[str, Any], ...]:
    """Return patterns and values as a tuple of pairs."""
    try:
        pairs = tuple(
            (pattern, value) for pattern, value in (patterns.items() if isinstance(patterns, Mapping) else patterns)
        )
    except (TypeError, ValueError):
        pairs = ((None, None),)
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern, _ in pairs):
        raise ValueError(
            f"{argument_name}={short_repr(patterns)} must map glob patterns of paths to values, as {{'*.q_proj': 32}}"
        )
    return pairs
