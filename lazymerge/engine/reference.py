"""The reference executor: whole tensors, float64, nothing clever. The definition of right.

Runs the same nodes with the same semantics as the block engine, each operation once over the
whole tensor as its only block, everything in float64 and unrounded. Memory is no object: use it
on small models, to check the block engine.

What it shares with the block engine are the operations and the placement of samples; of its
own are reading, order, buffers and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Apply, Read, Reduce, Write
from ..graph.operation import Done, Sample, apply_operation, reduce_operation

if TYPE_CHECKING:
    from torch import Tensor


def run_reference(graph: Graph) -> dict[str, Tensor]:
    """Every output tensor of a graph, by name.

    Floats as float64, not yet rounded to the output's dtype; integers and booleans in their own.

    Raises:
        InputError: integer tensors differ between models.
        OSError: an input file cannot be read.
    """
    return {write.name: _Evaluation(graph).write(write) for write in graph.writes}


class _Whole:
    """A whole tensor as the input of an operation, or a sample of it."""

    def __init__(self, stored: Tensor) -> None:
        """stored: shape (n,), in the dtype of the file or of a result."""
        self._stored = stored

    def read_into(self, out: Any) -> None:
        out.copy_(self._stored)

    def raw(self, slot: int = 0) -> memoryview:
        from torch import uint8

        data: Any = self._stored.view(uint8).numpy()
        return memoryview(data)

    def sample(self, sample: Sample) -> _Whole:
        from torch import cat

        starts = sample.starts(len(self._stored))
        return _Whole(cat([self._stored[s : s + sample.run_elements] for s in starts]))


class _Evaluation:
    """The values of one output tensor's nodes, each computed once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._values: dict[str, Tensor] = {}
        self._statistics: dict[str, Any] = {}

    def write(self, write: Write) -> Tensor:
        import torch

        if write.element_count == 0:  # nothing is ever asked for an empty tensor's blocks
            dtype = getattr(torch, DTYPES[write.dtype].torch_name)
            value = torch.empty(write.shape, dtype=dtype)
        else:
            value = self._value(write.source).reshape(write.shape)
        return value.to(torch.float64) if DTYPES[write.dtype].is_float else value

    def _value(self, node_id: str) -> Tensor:
        """A block node's elements, shape (n,): as stored for a Read, float64 for an Apply."""
        if node_id not in self._values:
            node = self._graph.block_node(node_id)
            self._values[node_id] = _read(node) if isinstance(node, Read) else self._apply(node)
        return self._values[node_id]

    def _inputs(self, node: Reduce | Apply) -> list[_Whole]:
        return [_Whole(self._value(source)) for source in node.inputs]

    def _apply(self, node: Apply) -> Tensor:
        import torch

        operation = apply_operation(node.operation)
        parameters = dict(node.parameters)
        inputs = self._inputs(node)
        prepared = operation.prepare(parameters, self._results(node.statistics))
        if operation.is_raw:
            stored = getattr(torch, DTYPES[node.working_dtype].torch_name)
            data = bytearray(operation.run_raw(inputs, prepared, 0))
            return torch.frombuffer(data, dtype=stored)
        scratch = _buffers(operation.cost(len(inputs), parameters).scratch, node.element_count)
        (out,) = _buffers(1, node.element_count)
        operation.run(out, inputs, prepared, scratch, 0)
        return out

    def _results(self, statistics: Sequence[str]) -> list[Any]:
        return [self._statistic(node_id) for node_id in statistics]

    def _statistic(self, node_id: str) -> Any:
        if node_id not in self._statistics:
            self._statistics[node_id] = self._reduce(self._graph.reduce(node_id))
        return self._statistics[node_id]

    def _reduce(self, node: Reduce) -> Any:
        operation = reduce_operation(node.operation)
        parameters = dict(node.parameters)
        whole = self._inputs(node)
        scratch_count = operation.cost(len(whole), parameters).scratch
        elements = node.element_count
        following = operation.first_pass(parameters, self._results(node.statistics), elements, 1)
        while not isinstance(following, Done):
            inputs, length = whole, elements
            if following.sample is not None:
                inputs = [source.sample(following.sample) for source in whole]
                length = following.sample.runs * following.sample.run_elements
            scratch = _buffers(scratch_count, length)
            partial = operation.run(inputs, parameters, following.state, scratch, 0)
            partial = operation.summary(partial, parameters)
            following = operation.finish(parameters, elements, following.state, [partial])
        return following.result


def _read(node: Read) -> Tensor:
    """A tensor's elements as stored, shape (n,)."""
    import torch

    info = node.tensor
    dtype = getattr(torch, DTYPES[info.dtype].torch_name)
    if info.element_count == 0:
        return torch.zeros(node.element_count, dtype=dtype)
    with (Path(node.folder) / info.file).open("rb") as file:
        file.seek(info.start)
        data = bytearray(file.read(info.size_bytes))
    stored = torch.frombuffer(data, dtype=dtype)
    return stored if node.rows is None else _rearranged(node, stored)


def _rearranged(node: Read, stored: Tensor) -> Tensor:
    """Rows of a tensor as the node's table says."""
    import torch

    assert node.rows is not None
    table = stored.view(torch.uint8).reshape(node.tensor.shape[0], -1)  # copying knows no dtype
    result = torch.zeros((len(node.rows), table.shape[1]), dtype=torch.uint8)
    for place, row in enumerate(node.rows):
        if row >= 0:
            result[place] = table[row]
    return result.reshape(-1).view(stored.dtype)


def _buffers(count: int, elements: int) -> list[Tensor]:
    """Float64 buffers of nan: what an operation must not use before it has filled it, shows."""
    import torch

    return [torch.full((elements,), torch.nan, dtype=torch.float64) for _ in range(count)]
