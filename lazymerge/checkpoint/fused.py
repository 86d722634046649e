"""Projections that some exports of a model hold as one tensor and others as several.

The rows of `qkv_proj` are those of `q_proj`, `k_proj` and `v_proj`, one after the other, so each of
these is a byte range of the file that holds the one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .tensor import TensorInfo

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),  # phi 3
    "gate_up_proj": ("gate_proj", "up_proj"),  # phi 3, glm 4
    "kv_proj": ("k_proj", "v_proj"),
}
"""Words of names, and what stands in their place when the projections are apart."""


def taken_apart(
    tensors: Mapping[str, TensorInfo], reference: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """A model's tensors, those that the reference has in parts taken apart.

    tensors, reference: by name. Where the rows of the parts do not add up, a tensor stays.
    """
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        found |= _parts(name, tensor, reference) or {name: tensor}
    return found


def _parts(
    name: str, tensor: TensorInfo, reference: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo] | None:
    if name in reference or not tensor.shape:
        return None
    for word, parts in FUSED.items():
        if f".{word}." not in name:
            continue
        names = [name.replace(f".{word}.", f".{part}.") for part in parts]
        rows = [reference[n].shape[0] for n in names if n in reference and reference[n].shape]
        if len(rows) == len(names) and sum(rows) == tensor.shape[0]:
            starts = [sum(rows[:place]) for place in range(len(rows))]
            return {
                n: rows_of(tensor, start, start + count)
                for n, start, count in zip(names, starts, rows, strict=True)
            }
    return None


def rows_of(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """The part of a tensor that some of its rows take up on disk.

    start, stop: rows, stop exclusive.
    """
    row_bytes = tensor.size_bytes // tensor.shape[0]
    scale = tensor.scale
    return replace(
        tensor,
        scale=None if scale is None else replace(scale, first_row=scale.first_row + start),
        change=None if tensor.change is None else tensor.change.of_rows(start),
        shape=(stop - start, *tensor.shape[1:]),
        start=tensor.start + start * row_bytes,
        stop_exclusive=tensor.start + stop * row_bytes,
    )


def is_rows_of(part: TensorInfo, whole: TensorInfo) -> bool:
    """Whether a byte range is that of some of a tensor's rows."""
    if part == whole:
        return True
    if not (part.shape and whole.shape and whole.shape[0] and whole.size_bytes):
        return False
    row_bytes = whole.size_bytes // whole.shape[0]
    start, rest = divmod(part.start - whole.start, row_bytes)
    stop = start + part.shape[0]
    return (
        rest == 0 and 0 <= start <= stop <= whole.shape[0] and part == rows_of(whole, start, stop)
    )
