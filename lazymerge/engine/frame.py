"""A stage bound to one worker's arena: offsets become tensors, nodes become inputs.

The frame owns every buffer that the stage's operations fill. A worker keeps one frame per stage
it works on and moves it from block to block. There is a kind of frame for each kind of layout
(stages.py); those of the native kernels and of accelerators are in native/frame.py and
device/frame.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Read, Reduce, Write
from ..graph.operation import apply_operation
from ..graph.operations.statistics import gathered
from .arena import Arena
from .device.frame import DeviceFrame, Lane
from .evaluation import Evaluation
from .execution import ReadMode
from .inputs import InputFiles, MappedInput, Pieces, open_input
from .native.frame import Kernels, NativeFrame
from .recent import Recent
from .rounding import round_once
from .stages import (
    DeviceLayout,
    NativeLayout,
    RawLayout,
    Slot,
    StageLayout,
    TorchLayout,
    stage_window,
)

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
        window_elements: int,
    ) -> None:
        import torch

        dtype = DTYPES[node.dtype]
        rooms = [arena.bytes(slot) for slot in slots]
        self.source = open_input(node, files, read_mode, rooms, window_elements)
        self._pieces: Pieces = ()
        self._elements = 0
        self._dtype = getattr(torch, dtype.torch_name)
        self._typed = torch.frombuffer(
            arena.memory,
            dtype=self._dtype,
            count=slots[0].elements // dtype.item_bytes,
            offset=slots[0].offset,
        )

    def seek(self, pieces: Pieces, elements: int) -> None:
        self.source.seek(pieces)
        self._pieces = pieces
        self._elements = elements

    def read_into(self, out: Any) -> None:
        if isinstance(self.source, MappedInput) and len(self._pieces) == 1:
            out.copy_(self._mapped(self.source))
        else:
            self.source.raw()
            out.copy_(self._typed[: self._elements])

    def _mapped(self, source: MappedInput) -> Tensor:
        import torch

        start = self._pieces[0][0]
        return torch.frombuffer(
            source.window, dtype=self._dtype, count=self._elements, offset=source.offset(start)
        )

    def raw(self, slot: int = 0) -> memoryview:
        return self.source.raw(slot)


class Frame(Protocol):
    """One stage of one tensor, ready to run any of its blocks."""

    def run(self, blocks: Sequence[Pieces], state: Any) -> Iterator[Any]:
        """Runs consecutive blocks.

        Reduce stages yield a partial result per block. Write stages yield the bytes of one block
        or several, in order, valid until the next are asked for.
        """

    def take_statistics(self) -> Sequence[tuple[float, ...]]:
        """What has been gathered of the blocks written since the last call, one after the other;
        nothing, where nothing is gathered."""

    def release(self) -> None:
        """Gives back what reading has left in memory."""

    def forget(self, start: int, stop: int) -> None:
        """Lets an element range of the inputs out of the system's page cache."""


def make_frame(
    graph: Graph,
    stage: Reduce | Write,
    layout: StageLayout,
    arena: Arena,
    files: InputFiles,
    prepared: Mapping[str, Any],
    read_mode: ReadMode,
    recent: Recent,
    kernels: Kernels,
    lane: Lane | None = None,
) -> Frame:
    """The frame for a layout.

    prepared: what ApplyOperation.prepare returned, by node id.
    recent: what workers have found out and share.
    kernels: what the worker has made of it.
    lane: the worker's share of a device, where one computes.
    """
    if isinstance(layout, DeviceLayout):
        assert lane is not None
        return DeviceFrame(graph, stage, layout, arena, lane, files, prepared, read_mode)
    if isinstance(layout, NativeLayout):
        return NativeFrame(graph, stage, layout, arena, files, prepared, read_mode, recent, kernels)
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
        window = stage_window(graph, stage, "cpu")
        self._inputs = [
            open_input(read, files, read_mode, slots, window)
            for read in graph.reads_of(stage.source)
        ]

    def run(self, blocks: Sequence[Pieces], state: Any) -> Iterator[Any]:
        for ((start, stop),) in blocks:
            yield self.encode(start, stop)

    def encode(self, start: int, stop: int) -> memoryview:
        for source in self._inputs:
            source.seek(((start, stop),))
        if isinstance(self._source, Read):
            return self._inputs[0].raw()
        operation = apply_operation(self._source.operation)
        return operation.run_raw(self._inputs, self._prepared[self._source.id], start)

    def take_statistics(self) -> Sequence[tuple[float, ...]]:
        return ()

    def release(self) -> None:
        for source in self._inputs:
            source.release()

    def forget(self, start: int, stop: int) -> None:
        for source in self._inputs:
            source.forget(start, stop)


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
        self._is_reduction = isinstance(stage, Reduce)
        self._layout = layout
        self._arena = arena
        self._files = files
        self._read_mode = read_mode
        self._window_elements = stage_window(graph, stage, "cpu")
        self._reads: list[_TensorInput] = []
        statistics = layout.statistics
        self._evaluation = Evaluation(
            graph,
            stage,
            layout.nodes,
            prepared,
            arena.tensor,
            self._open_read,
            () if statistics is None else statistics.gathering.inputs,
        )
        self._changes = self._evaluation.buffers(() if statistics is None else statistics.vectors)
        self._gathered: list[tuple[float, ...]] = []
        self._result = self._evaluation.buffers((layout.result,))
        self._encoded = self._evaluation.buffers((layout.encoded,))
        self._rounding = self._evaluation.buffers(layout.rounding)
        self._output = layout.encoded or layout.result

    def _open_read(self, node: Read) -> _TensorInput:
        read = _TensorInput(
            node,
            self._files,
            self._read_mode,
            self._arena,
            self._layout.raw,
            self._window_elements,
        )
        self._reads.append(read)
        return read

    def _seek(self, pieces: Pieces, start: int) -> int:
        elements = sum(stop - first for first, stop in pieces)
        self._evaluation.seek(start, elements)
        for read in self._reads:
            read.seek(pieces, elements)
        return elements

    def run(self, blocks: Sequence[Pieces], state: Any) -> Iterator[Any]:
        for pieces in blocks:
            if self._is_reduction:
                yield self.reduce(pieces, state)
            else:
                ((start, stop),) = pieces
                yield self.encode(start, stop)

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        start = pieces[0][0]
        self._seek(pieces, start)
        return self._evaluation.reduce(state, start)

    def encode(self, start: int, stop: int) -> memoryview:
        elements = self._seek(((start, stop),), start)
        vectors = [*self._result.current, *self._encoded.current]
        self._evaluation.read_into(vectors[0])
        if len(vectors) > 1:
            self._round(*vectors)
        if self._changes.current:
            self._gather(vectors[-1])
        assert self._output is not None
        return self._arena.bytes(self._output)[: elements * DTYPES[self._output.dtype].item_bytes]

    def _gather(self, written: Tensor) -> None:
        """Statistics of the block that is about to be written."""
        *inputs, output = self._changes.current
        self._evaluation.read_others(inputs)
        output.copy_(written)
        for change in (*inputs[1:], output):
            change.sub_(inputs[0])
        self._gathered.append(gathered(inputs[0], [*inputs[1:], output], is_merge=True))

    def take_statistics(self) -> Sequence[tuple[float, ...]]:
        taken, self._gathered = self._gathered, []
        return taken

    def _round(self, result: Tensor, encoded: Tensor) -> None:
        if self._rounding.current:
            round_once(result, encoded, *self._rounding.current)
        else:
            encoded.copy_(result)

    def release(self) -> None:
        for read in self._reads:
            read.source.release()

    def forget(self, start: int, stop: int) -> None:
        for read in self._reads:
            read.source.forget(start, stop)
