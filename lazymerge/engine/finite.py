"""Whether a block holds inf or nan: looked at in the bytes that are written, whoever made them.

A number is not finite where all bits of its exponent are set. (F8_E4M3 has no infinity, and nan
where the mantissa's are set too.)
"""

from __future__ import annotations

from .native import library

MASKS = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
}
"""The bits that are all set in what is not finite."""

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

SLICE_BYTES = 1 << 15
"""What numpy looks at at a time: it needs room of its own."""


def has_nonfinite(data: memoryview, dtype: str) -> bool:
    """Whether there is inf or nan among some elements.

    data: writable, whole elements. dtype: of them; integers are finite.
    """
    mask = MASKS.get(dtype)
    if mask is None or not len(data):
        return False
    width = WIDTHS[dtype]
    found = library.has_bits(data, width, mask)
    if found is not None:
        return found
    import numpy

    codes = numpy.frombuffer(data, f"u{width}")
    step = SLICE_BYTES // width
    bits = codes.dtype.type(mask)
    return any(
        bool(((codes[first : first + step] & bits) == bits).any())
        for first in range(0, len(codes), step)
    )
