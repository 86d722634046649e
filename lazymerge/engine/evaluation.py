"""The Apply and Reduce nodes of one stage, bound to buffers.

What the buffers are (torch tensors, or vectors on an accelerator) and how inputs are read is the
frame's business; both are handed in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..graph.graph import Graph
from ..graph.node import Apply, Read, Reduce, Write
from ..graph.operation import ApplyOperation, BlockInput, apply_operation, reduce_operation
from .stages import NodeSlots, Slot


class Buffers:
    """Vectors that all shrink to the length of the current block."""

    def __init__(self, vectors: Sequence[Any]) -> None:
        self._whole = list(vectors)
        self.current: list[Any] = self._whole

    def resize(self, elements: int) -> None:
        self.current = [vector[:elements] for vector in self._whole]


class ApplyInput:
    """An Apply node as an input of another node: computed anew for every block."""

    def __init__(
        self,
        operation: ApplyOperation,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Buffers,
        own: Buffers,
    ) -> None:
        self.operation = operation
        self.inputs = inputs
        self.prepared = prepared
        self.scratch = scratch
        self.own = own
        self.start = 0

    def read_into(self, out: Any) -> None:
        target = self.own.current[0] if self.own.current else out
        self.operation.run(target, self.inputs, self.prepared, self.scratch.current, self.start)
        if target is not out:
            out.copy_(target)

    def raw(self, slot: int = 0) -> memoryview:
        raise TypeError("a computed block has no stored bytes")


class Evaluation:
    """A stage's nodes, ready to be evaluated for any of its blocks."""

    def __init__(
        self,
        graph: Graph,
        stage: Reduce | Write,
        nodes: Mapping[str, NodeSlots],
        prepared: Mapping[str, Any],
        buffer: Callable[[Slot], Any],
        open_read: Callable[[Read], BlockInput],
        also: Sequence[str] = (),
    ) -> None:
        """also: ids of block nodes of the stage that are looked at by themselves.

        prepared: what ApplyOperation.prepare returned, by node id.

        buffer: the vector that lies in a slot. open_read: an input tensor; called once for each.
        """
        self._graph = graph
        self._nodes = nodes
        self._prepared = prepared
        self._buffer = buffer
        self._open_read = open_read
        self._reads: dict[str, BlockInput] = {}
        self._applies: dict[str, ApplyInput] = {}
        self._buffers: list[Buffers] = []
        self._elements = -1
        self._scratch = self.buffers(())
        self._inputs: list[BlockInput] = []
        if isinstance(stage, Reduce):
            self._operation = reduce_operation(stage.operation)
            self._parameters = dict(stage.parameters)
            self._scratch = self.buffers(nodes[stage.id].scratch)
            self._inputs = [self._input(node) for node in stage.inputs]
        else:
            self._inputs = [self._input(stage.source)]
        self._also = [self._input(node) for node in also]
        # a method of the frame that holds this: a cycle, and what has been prepared would stay
        # until the garbage collector comes
        del self._open_read

    def buffers(self, slots: Sequence[Slot | None]) -> Buffers:
        """Vectors in these slots (None: no vector), resized with all others from now on."""
        buffers = Buffers([self._buffer(slot) for slot in slots if slot is not None])
        self._buffers.append(buffers)
        return buffers

    def _input(self, node_id: str) -> BlockInput:
        node = self._graph.block_node(node_id)
        if isinstance(node, Read):
            if node_id not in self._reads:
                self._reads[node_id] = self._open_read(node)
            return self._reads[node_id]
        if node_id not in self._applies:
            self._applies[node_id] = self._apply(node)
        return self._applies[node_id]

    def _apply(self, node: Apply) -> ApplyInput:
        slots = self._nodes[node.id]
        return ApplyInput(
            apply_operation(node.operation),
            [self._input(source) for source in node.inputs],
            self._prepared[node.id],
            self.buffers(slots.scratch),
            self.buffers((slots.out,)),
        )

    def seek(self, start: int, elements: int) -> None:
        """Moves to a block; the inputs have been moved by whoever opened them."""
        if elements != self._elements:
            self._elements = elements
            for buffers in self._buffers:
                buffers.resize(elements)
        for apply in self._applies.values():
            apply.start = start

    def reduce(self, state: Any, start: int) -> Any:
        """The partial result of the current block (Reduce stages)."""
        partial = self._operation.run(
            self._inputs, self._parameters, state, self._scratch.current, start
        )
        return self._operation.summary(partial, self._parameters)

    def read_others(self, vectors: Sequence[Any]) -> None:
        """Fills a vector with the current block of each node that is looked at by itself."""
        for source, vector in zip(self._also, vectors, strict=True):
            source.read_into(vector)

    def read_into(self, out: Any) -> None:
        """Fills a vector with the current block of what is written (Write stages)."""
        self._inputs[0].read_into(out)
