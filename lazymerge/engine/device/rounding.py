"""engine/rounding.py, in calls that a device can do: same steps, same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def round_once_on_device(value: Tensor, out: Tensor, narrowed: Tensor, spare: Tensor) -> None:
    """Fills `out` with `value`, rounded to nearest even once.

    value: shape (n,), float64; overwritten.
    out: shape (n,), a floating-point dtype of at most 16 bits.
    narrowed, spare: shape (n,), float64 scratch.
    """
    import torch

    count = len(value)
    single = narrowed.view(torch.float32)[:count]
    flags = narrowed.view(torch.int8)[4 * count :]
    inexact, grown = flags[:count], flags[count : 2 * count]

    single.copy_(value)
    spare.copy_(single)
    torch.ne(spare, value, out=inexact.view(torch.bool))
    torch.gt(spare.abs_(), value.abs_(), out=grown.view(torch.bool))
    single.view(torch.int32).sub_(grown).bitwise_or_(inexact)
    out.copy_(single)
