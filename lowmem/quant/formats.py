"""The formats, as frozen data: storing and multiplying never branch on a format's name.

A format is sixteen levels in [-1, 1], or 256 evenly spaced ones. A weight is ``levels[code] * scale``, with a scale
per block. To add a format, add one entry to ``FORMATS``: tests, benchmarks and commands pick it up from there.
``IMPORTED`` has the levels of other programs' files, whose codes lowmem keeps exactly: they store, multiply and are
quantized into as the others, which lose less.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from types import MappingProxyType

from lowmem.errors import short_repr
from lowmem.quant.packing import CODE_WIDTHS, CodeWidth


@dataclass(frozen=True)
class Format:
    """Sorted levels, and the block size and scales that suit them best.

    Args:
        name: the key in ``FORMATS``, ``IMPORTED`` or ``EIGHT_BIT``.
        levels: 16 numbers in [-1, 1], ascending, of which two may be equal (the zeros of a floating-point format); or
            of 8 bits ``(code - 128) / divisor``. The last of the 16 is 1, and the first is -1 unless ``signed``: the
            largest weight of a block, divided by a scale of its magnitude, falls on a level.
        block_size: default number of weights that share a scale.
        scales: default encoding of the scales, a key of ``lowmem.quant.scale_encodings.ENCODINGS``.
        source: where the levels come from.
        signed: whether a scale takes the sign of its block's largest weight. That weight then always falls on the
            largest level, and the smallest level can be closer to zero.
        search: whether scales are chosen by search by default (``lowmem.quant.scale_search``).
        ggml_divisor: a power of two, by which levels of ggml are divided; these need not reach 1 or -1. ggml stores a
            scale divided by it, in float16, so that float16 scales here are multiples of it times 2^-24, the least
            float16.

    Raises:
        ValueError: levels that break these rules.
    """

    name: str
    levels: tuple[float, ...]
    block_size: int
    scales: str
    source: str
    signed: bool = False
    search: bool = False
    ggml_divisor: float = 1.0

    def __post_init__(self) -> None:
        counts = [2**bits for bits in CODE_WIDTHS]
        if len(self.levels) not in counts or list(self.levels) != sorted(self.levels):
            raise ValueError(
                f"format {short_repr(self.name)}: levels={short_repr(self.levels)} must be "
                f"{' or '.join(map(str, counts))} ascending numbers"
            )
        if self.width.is_centered:
            return
        if self.levels[0] < -1 or self.levels[-1] > 1:
            raise ValueError(f"format {self.name!r}: levels={self.levels} must lie in [-1, 1]")
        if self.ggml_divisor == 1 and not (self.levels[-1] == 1 and (self.signed or self.levels[0] == -1)):
            raise ValueError(
                f"format {self.name!r}: levels={self.levels} must end at 1, and begin at -1 unless signed=True: "
                "divide them by the largest magnitude"
            )

    @property
    def bits(self) -> int:
        """Bits of a code: 4 or 8."""
        return len(self.levels).bit_length() - 1

    @property
    def width(self) -> CodeWidth:
        """How codes of this format's number of bits are stored."""
        return CODE_WIDTHS[self.bits]

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The 15 or 255 thresholds: a value's nearest code is the number of thresholds below it.

        Of two equal levels only the upper code is ever chosen, so +0 and -0 get the same code in ``fp4``. The code 0
        of centered codes is never chosen, so that codes are symmetric.
        """
        boundaries: list[float] = []
        for low, high in pairwise(self.levels):
            below = boundaries[-1] if boundaries else -inf
            skipped = low == high or (self.width.is_centered and not boundaries)
            boundaries.append(below if skipped else (low + high) / 2)
        return tuple(boundaries)

    @property
    def top(self) -> float:
        """What a block's largest weight is divided by for its scale, if that is not searched for."""
        return self.levels[-1] if self.width.is_centered else 1.0

    @property
    def divisor(self) -> int:
        """Of centered codes of 8 bits: a level is ``(code - 128) / divisor``."""
        return round(127 / self.top)

    @property
    def half_gap(self) -> float:
        """Half the widest gap: the largest distance to the nearest level, for values between the end levels."""
        return max((high - low) / 2 for low, high in pairwise(self.levels))

    @property
    def end(self) -> float:
        """The magnitude of the end level (smallest or largest) that is closer to zero."""
        return min(-self.levels[0], self.levels[-1])

    @property
    def zero_code(self) -> int:
        """The code of the level nearest to zero, which zeros get."""
        return bisect_left(self.boundaries, 0.0)


def _formats_by_name(*formats: Format) -> MappingProxyType[str, Format]:
    return MappingProxyType({format.name: format for format in formats})


# Magnitudes of a float with 2 exponent bits and 1 mantissa bit
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FORMATS = _formats_by_name(
    Format(
        name="int4",
        levels=tuple((2 * code - 15) / 15 for code in range(16)),
        block_size=16,
        scales="float16",
        source="16 evenly spaced levels from -1 to 1; there is no exact zero",
    ),
    Format(
        name="nf4",
        levels=(
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
        block_size=64,
        scales="double",
        source="NormalFloat: QLoRA, arXiv 2305.14314, appendix E",
    ),
    Format(
        name="fp4",
        levels=tuple(-m / 6 for m in reversed(_E2M1)) + tuple(m / 6 for m in _E2M1),
        block_size=32,
        scales="float16",
        source="E2M1 divided by 6: OCP Microscaling Formats v1.0, section 5.3.3",
    ),
    Format(
        name="bof4s",
        levels=(
            -0.82273,
            -0.63426,
            -0.49414,
            -0.37775,
            -0.27434,
            -0.17893,
            -0.08872,
            0.0,
            0.08422,
            0.17130,
            0.26377,
            0.36355,
            0.47513,
            0.60593,
            0.77183,
            1.0,
        ),
        block_size=64,
        scales="double",
        source="fitted to blocks of 64 normal weights with signed scales, as BOF4-S (arXiv 2505.06653), and with "
        "the scales searched for: each level is the mean of what falls to it, weighted by the scale squared",
        signed=True,
        search=True,
    ),
)

# Divided by powers of two, so that the quotients are exact, and so is the scale times the same power: both products
# are rounded alike. Signed and searched, since one end is shorter.
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_BNB_FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)

IMPORTED = _formats_by_name(
    Format(
        name="q4_0",
        levels=tuple((code - 8) / 8 for code in range(16)),
        block_size=32,
        scales="float16",
        source="signed 4-bit integers: Q4_0 of ggml, symmetric GPTQ, AWQ and compressed-tensors",
        signed=True,
        search=True,
        ggml_divisor=8.0,
    ),
    Format(
        name="iq4_nl",
        levels=tuple(value / 128 for value in _IQ4_NL),
        block_size=32,
        scales="float16",
        source="IQ4_NL and IQ4_XS of ggml",
        signed=True,
        search=True,
        ggml_divisor=128.0,
    ),
    Format(
        name="uint4",
        levels=tuple(code / 16 for code in range(16)),
        block_size=32,
        scales="float16_offsets",
        source="4-bit integers with offsets: Q4_1 and Q4_K of ggml, asymmetric GPTQ and AWQ",
        ggml_divisor=16.0,
    ),
    Format(
        name="bnb_fp4",
        levels=tuple(-m / 12 + 0.0 for m in reversed(_BNB_FP4)) + tuple(m / 12 for m in _BNB_FP4),
        block_size=64,
        scales="float32",
        source="fp4 of bitsandbytes",
    ),
)
"""Formats of other programs' files: the levels as those programs define them, whatever suits quantizing best."""


DEFAULT, DEFAULT_BLOCK_SIZE = "bof4s", 32
"""What 4 bits are where no format is named: of the choices that need no data and cost no speed, the one that loses
least (``benchmarks.quality``). A format that is named has its own block size."""

EIGHT_BIT = _formats_by_name(
    Format(
        name="int8",
        levels=tuple((code - 128) / 127 for code in range(256)),
        block_size=64,
        scales="double",
        source="integers from -127 to 127, plus 128: absmax quantization, arXiv 2208.07339, section 2",
    ),
    Format(
        name="q8_0",
        levels=tuple(code - 128.0 for code in range(256)),
        block_size=32,
        scales="float16",
        source="Q8_0 of ggml, integers from -128 to 127, plus 128, and its scale as it is: this is the largest "
        "magnitude divided by 127",
    ),
)
"""Formats whose codes have 8 bits: a byte each. Code 0 is in other programs' files alone."""


def default_format_and_block_size(block_size: int | None) -> tuple[str, int]:
    """Return the format and block size where no format is named; ``block_size`` is the one that is given, if any."""
    return DEFAULT, DEFAULT_BLOCK_SIZE if block_size is None else block_size


def get_format(format_name: str) -> Format:
    """Return the format of that name: of ``FORMATS``, ``IMPORTED`` or ``EIGHT_BIT``.

    Raises:
        ValueError: there is no such format; the choices are listed.
    """
    known = (FORMATS, IMPORTED, EIGHT_BIT)
    try:
        for formats in known:
            if format_name in formats:
                return formats[format_name]
    except TypeError:  # of a name that has no hash
        pass
    names = [name_of_format for formats in known for name_of_format in formats]
    raise ValueError(f"format={short_repr(format_name)} is unknown: choose from {', '.join(names)}")
