"""A stage bound to one worker's arena: offsets become tensors, nodes become inputs.

The frame owns every buffer that the stage's operations fill. A worker keeps one frame per stage
it works on and moves it from block to block. There is a kind of frame for each kind of layout
(stages.py); the one of the native kernels is in native/frame.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Apply, Read, Reduce, Write
from ..graph.operation import ApplyOperation, BlockInput, apply_operation, reduce_operation
from .arena import Arena
from .execution import ReadMode
from .inputs import InputFiles, MappedInput, Pieces, open_input
from .native.frame import NativeFrame
from .rounding import round_once
from .stages import NativeLayout, RawLayout, Slot, StageLayout, TorchLayout

if TYPE_CHECKING:
    from torch import Tensor


class _TensorInput:
    """One input tensor, decoded by torch."""

    def __init__(
        self,
        node: Read,
        files: InputFiles,
        read_mode: ReadMode,
        arena: Arena,
        slots: Sequence[Slot],
    ) -> None:
        import torch

        dtype = DTYPES[node.dtype]
        self.source = open_input(node, files, read_mode, [arena.bytes(slot) for slot in slots])
        self._elements = 0
        memory: Any = arena.memory
        offset, elements = slots[0].offset, slots[0].elements // dtype.item_bytes
        if isinstance(self.source, MappedInput):
            memory = self.source.map
            offset, elements = node.tensor.start, node.tensor.element_count
        self._typed = torch.frombuffer(
            memory, dtype=getattr(torch, dtype.torch_name), count=elements, offset=offset
        )

    def seek(self, pieces: Pieces, elements: int) -> None:
        self.source.seek(pieces)
        self._elements = elements

    def read_into(self, out: Any) -> None:
        if isinstance(self.source, MappedInput):
            filled = 0
            for start, stop in self.source.pieces:
                out[filled : filled + stop - start].copy_(self._typed[start:stop])
                filled += stop - start
        else:
            self.source.raw()
            out.copy_(self._typed[: self._elements])

    def raw(self, slot: int = 0) -> memoryview:
        return self.source.raw(slot)


class _Buffers:
    """Tensors that all shrink to the length of the current block."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._whole = list(tensors)
        self.current = self._whole

    def resize(self, elements: int) -> None:
        self.current = [tensor[:elements] for tensor in self._whole]


class _ApplyInput:
    """An Apply node as an input of another node: computed anew for every block."""

    def __init__(
        self,
        operation: ApplyOperation,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: _Buffers,
        own: _Buffers,
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


class Frame(Protocol):
    """One stage of one tensor, ready to run any of its blocks."""

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        """The partial result of one block (Reduce stages)."""

    def encode(self, start: int, stop: int) -> memoryview:
        """The bytes of one output block (Write stages), valid until the next call."""

    def release(self, start: int, stop: int) -> None:
        """Gives back what reading an element range has left in memory."""


def make_frame(
    graph: Graph,
    stage: Reduce | Write,
    layout: StageLayout,
    arena: Arena,
    files: InputFiles,
    prepared: Mapping[str, Any],
    read_mode: ReadMode,
) -> Frame:
    """The frame for a layout. prepared: what ApplyOperation.prepare returned, by node id."""
    if isinstance(layout, NativeLayout):
        return NativeFrame(graph, stage, layout, arena, files, prepared, read_mode)
    if isinstance(layout, RawLayout):
        assert isinstance(stage, Write)
        return RawFrame(graph, stage, layout, arena, files, prepared, read_mode)
    return TorchFrame(graph, stage, layout, arena, files, prepared, read_mode)


class RawFrame:
    """A stage that passes bytes on."""

    def __init__(
        self,
        graph: Graph,
        stage: Write,
        layout: RawLayout,
        arena: Arena,
        files: InputFiles,
        prepared: Mapping[str, Any],
        read_mode: ReadMode,
    ) -> None:
        self._source = graph.block_node(stage.source)
        self._prepared = prepared
        slots = [arena.bytes(slot) for slot in layout.raw]
        self._inputs = [
            open_input(read, files, read_mode, slots) for read in graph.reads_of(stage.source)
        ]

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        raise TypeError("a stage of raw bytes reduces nothing")

    def encode(self, start: int, stop: int) -> memoryview:
        for source in self._inputs:
            source.seek(((start, stop),))
        if isinstance(self._source, Read):
            return self._inputs[0].raw()
        operation = apply_operation(self._source.operation)
        return operation.run_raw(self._inputs, self._prepared[self._source.id], start)

    def release(self, start: int, stop: int) -> None:
        for source in self._inputs:
            source.release(start, stop)


class TorchFrame:
    """A stage that torch computes."""

    def __init__(
        self,
        graph: Graph,
        stage: Reduce | Write,
        layout: TorchLayout,
        arena: Arena,
        files: InputFiles,
        prepared: Mapping[str, Any],
        read_mode: ReadMode,
    ) -> None:
        self._graph = graph
        self._layout = layout
        self._arena = arena
        self._files = files
        self._prepared = prepared
        self._read_mode = read_mode
        self._reads: dict[str, _TensorInput] = {}
        self._applies: dict[str, _ApplyInput] = {}
        self._buffers: list[_Buffers] = []
        self._elements = -1

        self._scratch = self._node_buffers(())
        self._inputs: list[BlockInput] = []
        self._result = self._node_buffers([layout.result] if layout.result else ())
        self._encoded = self._node_buffers([layout.encoded] if layout.encoded else ())
        self._rounding = self._node_buffers(layout.rounding)
        self._source: _TensorInput | _ApplyInput | None = None
        self._output_item_bytes = 0
        if isinstance(stage, Reduce):
            self._reduce_operation = reduce_operation(stage.operation)
            self._parameters = dict(stage.parameters)
            self._scratch = self._node_buffers(layout.nodes[stage.id].scratch)
            self._inputs = [self._input(node) for node in stage.inputs]
        else:
            source = self._input(stage.source)
            assert isinstance(source, _TensorInput | _ApplyInput)
            self._source = source
            self._output_item_bytes = DTYPES[stage.dtype].item_bytes

    def _node_buffers(self, slots: Sequence[Slot]) -> _Buffers:
        buffers = _Buffers([self._arena.tensor(slot) for slot in slots])
        self._buffers.append(buffers)
        return buffers

    def _input(self, node_id: str) -> BlockInput:
        node = self._graph.block_node(node_id)
        if isinstance(node, Read):
            if node_id not in self._reads:
                self._reads[node_id] = _TensorInput(
                    node, self._files, self._read_mode, self._arena, self._layout.raw
                )
            return self._reads[node_id]
        if node_id not in self._applies:
            self._applies[node_id] = self._apply(node)
        return self._applies[node_id]

    def _apply(self, node: Apply) -> _ApplyInput:
        slots = self._layout.nodes[node.id]
        return _ApplyInput(
            apply_operation(node.operation),
            [self._input(source) for source in node.inputs],
            self._prepared[node.id],
            self._node_buffers(slots.scratch),
            self._node_buffers([slots.out] if slots.out else ()),
        )

    def _seek(self, pieces: Pieces, start: int) -> None:
        elements = sum(stop - first for first, stop in pieces)
        if elements != self._elements:
            self._elements = elements
            for buffers in self._buffers:
                buffers.resize(elements)
        for read in self._reads.values():
            read.seek(pieces, elements)
        for apply in self._applies.values():
            apply.start = start

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        start = pieces[0][0]
        self._seek(pieces, start)
        return self._reduce_operation.run(
            self._inputs, self._parameters, state, self._scratch.current, start
        )

    def encode(self, start: int, stop: int) -> memoryview:
        self._seek(((start, stop),), start)
        size = (stop - start) * self._output_item_bytes
        source = self._source
        encoded = self._encoded.current
        if isinstance(source, _ApplyInput):
            result = self._result.current[0]
            source.read_into(result)
            if not encoded:
                assert self._layout.result is not None
                return self._arena.bytes(self._layout.result)[:size]
            self._round(result, encoded[0])
        else:
            assert source is not None
            if self._rounding.current:
                source.read_into(self._result.current[0])
                self._round(self._result.current[0], encoded[0])
            else:
                source.read_into(encoded[0])
        assert self._layout.encoded is not None
        return self._arena.bytes(self._layout.encoded)[:size]

    def _round(self, result: Tensor, encoded: Tensor) -> None:
        if self._rounding.current:
            round_once(result, encoded, *self._rounding.current)
        else:
            encoded.copy_(result)

    def release(self, start: int, stop: int) -> None:
        for read in self._reads.values():
            read.source.release(start, stop)
