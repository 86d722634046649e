"""One rounding from float64 to a narrow dtype.

torch converts float64 to 16 and 8 bits by way of float32, which rounds twice: a value just above
the middle of two bfloat16 becomes the middle, and then the wrong neighbour. Rounding to odd on
the way avoids it: where float32 is not exact, it is cut off and its last bit set, which keeps it
off every middle (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved
algorithms using rounding to odd", IEEE Transactions on Computers 57(4), 2008).

Used for merges with float64 inputs, whose arithmetic is float64. Elsewhere the arithmetic is
float32 by promise: sums made in float64 are rounded to float32, and that once to the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def round_once(value: Tensor, out: Tensor, narrowed: Tensor, spare: Tensor) -> None:
    """Fills `out` with `value`, rounded to nearest even once.

    value: shape (n,), float64; overwritten.
    out: shape (n,), a floating-point dtype of at most 16 bits.
    narrowed, spare: shape (n,), float64 scratch.
    """
    import numpy
    import torch

    count = len(value)
    single = narrowed.view(torch.float32)[:count]
    masks = narrowed.numpy().view(numpy.bool_)[4 * count :]
    inexact, grown = masks[:count], masks[count : 2 * count]
    exact, widened = value.numpy(), spare.numpy()

    single.copy_(value)
    spare.copy_(single)
    numpy.not_equal(widened, exact, out=inexact)
    numpy.greater(numpy.absolute(widened, out=widened), numpy.absolute(exact, out=exact), out=grown)
    bits = single.numpy().view(numpy.int32)
    numpy.subtract(bits, grown, out=bits)
    numpy.bitwise_or(bits, inexact, out=bits)
    out.copy_(single)
