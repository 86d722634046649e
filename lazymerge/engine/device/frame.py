"""A stage bound to a worker's buffers, on the host and on the device.

Blocks go through three queues, two at a time, each with its own side of the buffers:

    program       read 0   read 1        read 2   write 0       read 3   write 1
    copies in       in 0     in 1          in 2                   in 3
    computes                 block 0       block 1                block 2
    copies out                   out 0         out 1                  out 2

What must come after what is said by events: a staging buffer is filled again when its copy in is
done, a device's input when the block before on that side is computed, an output is copied out when
it is computed, and written when it has arrived. An output buffer needs no event of its own: the
program has written what it held before it hands over the next block of that side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.tensor import DTYPES
from ...graph.graph import Graph
from ...graph.node import Read, Reduce, Write
from ..arena import Arena
from ..evaluation import Evaluation
from ..execution import ReadMode
from ..inputs import InputFiles, MappedInput, Pieces, open_input
from ..stages import SIDES, DeviceLayout, Slot, stage_window
from .interface import Event, Outcome, Queue
from .rounding import round_once_on_device
from .vector import DeviceVector, Workspace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lane:
    """What one worker has of a device.

    memory: its share of the device arena, uint8.
    incoming, computing, outgoing: its queues, made in this order.
    """

    memory: Tensor
    incoming: Queue
    computing: Queue
    outgoing: Queue

    def tensor(self, slot: Slot) -> Tensor:
        """The slot's memory as a tensor of its dtype, shape (slot.elements,)."""
        import torch

        dtype = DTYPES[slot.dtype]
        size = slot.elements * dtype.item_bytes
        part = self.memory[slot.offset : slot.offset + size]
        return part.view(getattr(torch, dtype.torch_name))


class _Source:
    """One input tensor, on its way from its file to the device."""

    def __init__(
        self,
        node: Read,
        files: InputFiles,
        read_mode: ReadMode,
        arena: Arena,
        lane: Lane,
        staged: Sequence[Slot],
        raw: Sequence[Slot],
        window_elements: int,
    ) -> None:
        """staged, raw: a slot for each side. window_elements: what is mapped at a time."""
        import torch

        dtype = DTYPES[node.dtype]
        self._item_bytes = dtype.item_bytes
        self._rooms = [arena.bytes(slot) for slot in staged]
        self._staged = [arena.tensor(slot) for slot in staged]
        self._raw = [lane.tensor(slot) for slot in raw]
        self._typed = [tensor.view(getattr(torch, dtype.torch_name)) for tensor in self._raw]
        self._file = open_input(node, files, read_mode, self._rooms, window_elements)
        self._current = self._typed[0]

    def stage(self, pieces: Pieces, side: int) -> None:
        """Reads a block into the host's buffer."""
        self._file.seek(pieces)
        data = self._file.raw(side)
        if isinstance(self._file, MappedInput) and len(pieces) == 1:
            self._rooms[side][: len(data)] = data  # else it has been read to where it belongs

    def send(self, queue: Queue, elements: int, side: int) -> None:
        """Has it copied to the device."""
        size = elements * self._item_bytes
        queue.copy(self._raw[side][:size], self._staged[side][:size])

    def select(self, elements: int, side: int) -> None:
        """Makes a block on the device the one that is read."""
        self._current = self._typed[side][:elements]

    def read_into(self, out: Any) -> None:
        out.tensor.copy_(self._current)

    def raw(self, slot: int = 0) -> memoryview:
        raise TypeError("undecoded bytes are not brought back from a device")

    def release(self) -> None:
        self._file.release()

    def forget(self, start: int, stop: int) -> None:
        self._file.forget(start, stop)


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A block whose computation has been handed over."""

    side: int
    elements: int
    outcome: Outcome


class DeviceFrame:
    """One stage of one tensor, ready to run its blocks on a device."""

    def __init__(
        self,
        graph: Graph,
        stage: Reduce | Write,
        layout: DeviceLayout,
        arena: Arena,
        lane: Lane,
        files: InputFiles,
        prepared: Mapping[str, Any],
        read_mode: ReadMode,
    ) -> None:
        """prepared: what ApplyOperation.prepare returned, by node id."""
        self._is_write = isinstance(stage, Write)
        self._lane = lane
        self._workspace = _workspace(layout, arena, lane)
        self._sources: dict[str, _Source] = {}
        window = stage_window(graph, stage, "cuda")
        for number, node_id in enumerate(layout.inputs):
            node = graph.block_node(node_id)
            assert isinstance(node, Read)
            staged, raw = (
                [side[number] for side in sides] for sides in (layout.staged, layout.raw)
            )
            self._sources[node_id] = _Source(
                node, files, read_mode, arena, lane, staged, raw, window
            )
        self._evaluation = Evaluation(
            graph,
            stage,
            layout.nodes,
            prepared,
            lambda slot: DeviceVector(lane.tensor(slot), self._workspace),
            lambda node: self._sources[node.id],
        )
        self._result = self._evaluation.buffers((layout.result,))
        self._encoded = self._evaluation.buffers(layout.encoded)
        self._rounding = self._evaluation.buffers(layout.rounding)
        self._outgoing = [lane.tensor(slot) for slot in layout.encoded]
        self._received = [arena.tensor(slot) for slot in layout.received]
        self._output = [arena.bytes(slot) for slot in layout.received]
        self._item_bytes = DTYPES[stage.dtype].item_bytes if isinstance(stage, Write) else 0
        self._arrived: list[Event | None] = [None] * SIDES
        self._computed: list[Event | None] = [None] * SIDES
        self._sent: list[Event | None] = [None] * SIDES

    def run(self, blocks: Sequence[Pieces], state: Any = None) -> Iterator[Any]:
        """What each block yields, in order: its partial result (Reduce stages), or its bytes, valid
        until the next is asked for (Write stages)."""
        before: _Submitted | None = None
        self._fetch(blocks[0], 0)
        for number, pieces in enumerate(blocks):
            side = number % SIDES
            if number + 1 < len(blocks):
                self._fetch(blocks[number + 1], (number + 1) % SIDES)
            submitted = self._submit(pieces, side, state)
            if before is not None:
                yield self._deliver(before)
            before = submitted
        assert before is not None
        yield self._deliver(before)

    def _fetch(self, pieces: Pieces, side: int) -> None:
        incoming = self._lane.incoming
        arrived, computed = self._arrived[side], self._computed[side]
        if arrived is not None:
            arrived.wait()  # what lies in the staging buffers has been copied
        if computed is not None:
            incoming.after(computed)  # what lies in the device's has been read
        elements = _elements(pieces)
        for source in self._sources.values():
            source.stage(pieces, side)
            source.send(incoming, elements, side)
        self._arrived[side] = incoming.record()

    def _submit(self, pieces: Pieces, side: int, state: Any) -> _Submitted:
        start, elements = pieces[0][0], _elements(pieces)
        computing, outgoing = self._lane.computing, self._lane.outgoing
        arrived = self._arrived[side]
        assert arrived is not None
        computing.after(arrived)
        # the output buffers of that side are free: what they held has been delivered
        outcome = computing.run(lambda: self._compute(start, elements, side, state))
        computed = self._computed[side] = computing.record()
        if self._is_write:
            outgoing.after(computed)
            outgoing.copy(self._received[side][:elements], self._outgoing[side][:elements])
            self._sent[side] = outgoing.record()
        return _Submitted(side, elements, outcome)

    def _compute(self, start: int, elements: int, side: int, state: Any) -> Any:
        for source in self._sources.values():
            source.select(elements, side)
        self._evaluation.seek(start, elements)
        if not self._is_write:
            return self._evaluation.reduce(state, start)
        encoded = self._encoded.current[side]
        if not self._result.current:
            self._evaluation.read_into(encoded)
            return None
        (result,) = self._result.current
        self._evaluation.read_into(result)
        if self._rounding.current:
            scratch = [vector.tensor for vector in self._rounding.current]
            round_once_on_device(result.tensor, encoded.tensor, *scratch)
        else:
            encoded.copy_(result)
        return None

    def _deliver(self, block: _Submitted) -> Any:
        event = (self._sent if self._is_write else self._computed)[block.side]
        assert event is not None
        event.wait()
        if self._is_write:
            return self._output[block.side][: block.elements * self._item_bytes]
        return block.outcome.value

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        """The partial result of one block (Reduce stages)."""
        return next(self.run([pieces], state))

    def encode(self, start: int, stop: int) -> memoryview:
        """The bytes of one output block (Write stages), valid until the next call."""
        data: memoryview = next(self.run([((start, stop),)]))
        return data

    def take_statistics(self) -> Sequence[tuple[float, ...]]:
        return ()

    def release(self) -> None:
        """Gives back what reading an element range has left in memory."""
        for source in self._sources.values():
            source.release()

    def forget(self, start: int, stop: int) -> None:
        """Lets an element range of the inputs out of the system's page cache."""
        for source in self._sources.values():
            source.forget(start, stop)


def _workspace(layout: DeviceLayout, arena: Arena, lane: Lane) -> Workspace | None:
    import torch

    slots = layout.workspace
    if slots is None:
        return None
    assert layout.exchange is not None
    return Workspace(
        queue=lane.computing,
        spare=lane.tensor(slots.spare).view(torch.uint8),
        ranks=lane.tensor(slots.ranks),
        places=lane.tensor(slots.places),
        found=lane.tensor(slots.found),
        exchange=arena.tensor(layout.exchange).view(torch.uint8),
    )


def _elements(pieces: Pieces) -> int:
    return sum(stop - start for start, stop in pieces)
