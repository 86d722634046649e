"""Made-up tensors in memory, on which a plan's own operations can be timed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from math import prod

from ..checkpoint.tensor import DTYPES
from ..engine.inputs import InputFiles
from ..engine.stages import TensorTask, bytes_read
from ..graph.graph import Graph, node_inputs
from ..graph.node import Apply, Node, Read, Reduce, Write

MOST_COPIES = 200
"""Of the tensor that is merged while time is taken."""

PATTERN_ELEMENTS = 1 << 20

SHIFT_ELEMENTS = 4099
"""Inputs begin so far from each other in the same made-up data: a prime, that no two are alike."""

ALIGNMENT = 64


@contextmanager
def made_up(graph: Graph, task: TensorTask) -> Iterator[tuple[Graph, InputFiles]]:
    """Copies of a tensor's work over made-up inputs, and the files that those lie in."""
    part = _needed(graph, task.write)
    reads = [node for node in part if isinstance(node, Read)]
    size = bytes_read(graph, task)
    copies = max(1, min(MOST_COPIES, (8 << 30) // max(1, size)))
    with closing(InputFiles()) as files:
        descriptor = os.memfd_create("lazymerge-measurement")
        try:
            starts = _fill(descriptor, reads, copies)
            made = Graph()
            for copy in range(copies):
                _add_copy(made, part, starts, descriptor, copy)
            yield made, files
        finally:
            os.close(descriptor)


def _needed(graph: Graph, write: Write) -> list[Node]:
    """What an output tensor needs, inputs before users."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.id not in found:
            for source in node_inputs(node):
                visit(graph[source])
            found[node.id] = node

    visit(write)
    return list(found.values())


def _fill(descriptor: int, reads: Sequence[Read], copies: int) -> dict[str, int]:
    """Fills a file with numbers as weights have them, and says where each input begins in it."""
    starts: dict[str, int] = {}
    offset = 0
    for dtype in dict.fromkeys(read.dtype for read in reads):
        pattern = _pattern(dtype)
        width = DTYPES[dtype].item_bytes
        of_dtype = [read for read in reads if read.dtype == dtype]
        shift = SHIFT_ELEMENTS * width
        for number, read in enumerate(of_dtype):
            starts[read.id] = offset + number * shift
        largest = max(prod(read.tensor.shape) for read in of_dtype) * width
        size = largest + len(of_dtype) * shift + copies * ALIGNMENT
        end = offset + size
        while offset < end:
            offset += os.pwrite(descriptor, pattern[: end - offset], offset)
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
    return starts


def _pattern(dtype: str) -> bytes:
    """Normal deviates of 0.02 in a dtype of floats."""
    import numpy

    deviates = numpy.random.default_rng(0).normal(0.0, 0.02, PATTERN_ELEMENTS)
    if dtype == "F64":
        return deviates.tobytes()
    single = deviates.astype(numpy.float32)
    if dtype == "F32":
        return single.tobytes()
    if dtype == "F16":
        return single.astype(numpy.float16).tobytes()
    bits = single.view(numpy.uint32) >> 16
    if dtype == "BF16":
        return bits.astype(numpy.uint16).tobytes()
    return (bits.astype(numpy.uint8) & 0xBF).tobytes()  # 8 bits, neither inf nor nan


def _add_copy(
    made: Graph, part: Sequence[Node], starts: Mapping[str, int], descriptor: int, copy: int
) -> None:
    ids: dict[str, str] = {}
    for node in part:
        match node:
            case Read():
                start = starts[node.id] + copy * ALIGNMENT
                tensor = replace(
                    node.tensor,
                    file=str(descriptor),
                    start=start,
                    stop_exclusive=start + node.tensor.size_bytes,
                )
                new: Node = Read("/proc/self/fd", tensor)
            case Write():
                new = Write(f"{copy} {node.name}", node.dtype, node.shape, ids[node.source])
            case Reduce() | Apply():
                new = replace(
                    node,
                    inputs=tuple(ids[source] for source in node.inputs),
                    statistics=tuple(ids[source] for source in node.statistics),
                )
        ids[node.id] = made.add(new)
