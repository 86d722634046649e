"""What a run into a store occupies beside what every run does."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...checkpoint.tensor import DTYPES
from ...graph.graph import Graph
from ...output.layout import Shard
from ...output.store.uploads import MOST_UPLOADS, least_window_bytes, part_bytes
from ..blocks import DeviceClass, elements_per_block
from ..scheduler import SPAN_BLOCKS
from ..stages import row_elements

MIB = 1 << 20

LIBRARIES_BYTES = 40 * MIB
"""The client of the store (s3fs, aiobotocore, botocore) and what it has read of its own files, when
it has answered once: 40.3 MiB."""

CLIENT_BYTES = LIBRARIES_BYTES + 16 * MIB
"""The same, while it uploads: pieces of parts on their way, and threads that wait."""


@dataclass(frozen=True, slots=True)
class StoreNeeds:
    """What must be held of an output on its way into a store. In bytes.

    least_bytes: of what is being written, so that a run can go on. span_bytes: of the longest span.
    part_bytes: of the longest part. total_bytes: of all shards.
    """

    least_bytes: int
    span_bytes: int
    part_bytes: int
    total_bytes: int

    @property
    def smallest_bytes(self) -> int:
        """With which a run can go on."""
        return CLIENT_BYTES + self.least_bytes

    def useful_bytes(self, workers: int) -> int:
        """More brings nothing: all workers write, and all uploads are busy with another part ready
        for each."""
        ahead = workers * self.span_bytes + 2 * MOST_UPLOADS * self.part_bytes
        return self.smallest_bytes + min(ahead, self.total_bytes)


def store_needs(graph: Graph, shards: Sequence[Shard], device: DeviceClass) -> StoreNeeds:
    """What shards need while they are written."""
    total = sum(shard.size_bytes for shard in shards)
    spans = spans_of(graph, device)
    names = (tensor.name for shard in shards for tensor in shard.tensors)
    span = max((spans[name] for name in names), default=0)
    longest = max(min(part_bytes(shard.size_bytes), shard.size_bytes) for shard in shards)
    return StoreNeeds(least_window_bytes(shards, span), span, longest, total)


def spans_of(graph: Graph, device: DeviceClass) -> Mapping[str, int]:
    """Bytes of every output tensor's spans; of one that is shorter, its own."""
    found = {}
    for write in graph.writes:
        elements = SPAN_BLOCKS * elements_per_block(device, row_elements(graph, write))
        found[write.name] = min(elements, write.element_count) * DTYPES[write.dtype].item_bytes
    return found


def held_beside_client(resident_bytes: int) -> int:
    """What a process occupies that may have the client of a store already, without it."""
    return resident_bytes - LIBRARIES_BYTES if "aiobotocore" in sys.modules else resident_bytes
