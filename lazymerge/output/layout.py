"""Where every output tensor will lie, decided before the first byte is read.

Names, shapes and dtypes are known at plan time, so each shard's header can be written first and
every tensor has its final byte range: tensors may finish in any order and nothing is buffered.

    shard  =  8 bytes: length of the header, little endian
              header:  JSON, padded with spaces to a multiple of 8
              data:    the tensors, without gaps

Within a shard, tensors are ordered by falling element size, so that each starts at a multiple of
its element size (as the safetensors library itself orders them); between shards the given order
is kept.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..checkpoint.tensor import DTYPES

INDEX_NAME = "model.safetensors.index.json"
HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """One output tensor's place.

    dtype: safetensors name.
    start, stop_exclusive: byte range within the shard's file, header included.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop_exclusive: int

    @property
    def size_bytes(self) -> int:
        return self.stop_exclusive - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file.

    file: its final name.
    header_bytes: length of everything before the data.
    tensors: in the order of the data.
    """

    file: str
    header_bytes: int
    tensors: tuple[Placement, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return self.tensors[-1].stop_exclusive if self.tensors else self.header_bytes


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """What is to be placed."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].item_bytes


def lay_out(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Distributes tensors over shards of at most `max_shard_bytes` of data each.

    A tensor larger than the maximum gets a shard of its own. The order of the tensors is kept
    from shard to shard.
    """
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.size_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size_bytes
    count = len(groups)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return tuple(_place(file, group) for file, group in zip(names, groups, strict=True))


def _place(file: str, tensors: Sequence[OutputTensor]) -> Shard:
    ordered = sorted(tensors, key=lambda t: -DTYPES[t.dtype].item_bytes)
    relative = []
    offset = 0
    for tensor in ordered:
        stop = offset + tensor.size_bytes
        relative.append(Placement(tensor.name, tensor.dtype, tensor.shape, offset, stop))
        offset = stop
    header_bytes = len(_header(relative, 0))
    placed = tuple(
        Placement(p.name, p.dtype, p.shape, p.start + header_bytes, p.stop_exclusive + header_bytes)
        for p in relative
    )
    return Shard(file, header_bytes, placed)


def shard_header(shard: Shard) -> bytes:
    """The bytes that the shard's file starts with."""
    return _header(shard.tensors, shard.header_bytes)


def _header(tensors: Sequence[Placement], data_start: int) -> bytes:
    """Length prefix and padded JSON; offsets are relative to the data's start."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start - data_start, tensor.stop_exclusive - data_start],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def index_json(shards: Sequence[Shard]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {t.name: shard.file for shard in shards for t in shard.tensors}
    total = sum(t.size_bytes for shard in shards for t in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"
