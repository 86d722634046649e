"""The four kinds of node a merge is made of.

A node is a frozen value: kind, operation, parameters, the ids of its inputs, the dtype and shape
of what it yields. Its id is a hash of exactly that, so identical work has one node wherever it
is asked for, and an id never depends on order, process or machine.

    Read   ──blocks──►  Apply ──blocks──► Write
       └────blocks──►  Reduce ──statistic──┘

Dashed by block: a Read and an Apply are streamed in blocks of consecutive elements; a Reduce
yields one small result per tensor (a statistic) once all its passes are done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import prod
from typing import Union

from ..checkpoint.tensor import DTYPES, TensorInfo
from .rows import RowTable

ParameterValue = Union[None, bool, int, float, str, tuple["ParameterValue", ...]]  # noqa: UP007
"""What a node's parameter may be: JSON's scalars and (nested) tuples of them."""

ID_BYTES = 16
"""128 bits: the chance of two of a million nodes colliding is below 1e-26."""


_as_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def _remember(node: object, content: tuple[object, ...]) -> str:
    """Works out a node's id when it is first asked for, and keeps it."""
    # a path that is not UTF-8 reaches Python with lone surrogates in it
    text = _as_json(content).encode("utf-8", "surrogatepass")
    node_id = blake2b(text, digest_size=ID_BYTES).hexdigest()
    object.__setattr__(node, "_id", node_id)
    return node_id


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor of one checkpoint, or its leading rows, or rows of it in another order.

    folder: absolute path of the checkpoint's folder.
    tensor: name, dtype, shape and byte range of what is read.
    rows: which of its rows (along the first dimension) stands where; None: as they are.
    """

    folder: str
    tensor: TensorInfo
    rows: RowTable | None = None
    _id: str = field(default="", init=False, compare=False, repr=False)

    @property
    def id(self) -> str:
        """Hash of the content."""
        return self._id or _remember(self, self._content())

    def _content(self) -> tuple[object, ...]:
        t = self.tensor
        content = ("read", self.folder, t.file, t.start, t.stop_exclusive, t.dtype, t.shape)
        return content if self.rows is None else (*content, self.rows.digest)

    @property
    def dtype(self) -> str:
        """safetensors name of the stored dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is None:
            return self.tensor.shape
        return (len(self.rows), *self.tensor.shape[1:])

    @property
    def element_count(self) -> int:
        return prod(self.shape)

    @property
    def row_elements(self) -> int:
        """Elements of one row, along all dimensions but the first."""
        return prod(self.tensor.shape[1:])

    @property
    def size_bytes(self) -> int:
        """Bytes that are read for all of it."""
        if self.rows is None:
            return self.tensor.size_bytes
        return self.rows.present * self.row_elements * DTYPES[self.dtype].item_bytes


@dataclass(frozen=True, slots=True)
class Reduce:
    """A statistic over whole tensors, made by streaming their blocks in one or more passes.

    operation: name of a registered ReduceOperation.
    parameters: sorted (name, value) pairs.
    inputs: ids of the block-valued nodes (Read or Apply) it streams, all of one shape.
    statistics: ids of the Reduce nodes whose results it uses.
    shape: the shape of each input.
    working_dtype: "F32" or "F64", the dtype its blocks are computed in.
    """

    operation: str
    parameters: tuple[tuple[str, ParameterValue], ...]
    inputs: tuple[str, ...]
    statistics: tuple[str, ...]
    shape: tuple[int, ...]
    working_dtype: str
    _id: str = field(default="", init=False, compare=False, repr=False)

    @property
    def id(self) -> str:
        """Hash of the content."""
        return self._id or _remember(self, self._content())

    def _content(self) -> tuple[object, ...]:
        return (
            "reduce",
            self.operation,
            self.parameters,
            self.inputs,
            self.statistics,
            self.shape,
            self.working_dtype,
        )

    @property
    def element_count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Apply:
    """A block function of its input blocks and of finished statistics.

    operation: name of a registered ApplyOperation.
    parameters: sorted (name, value) pairs.
    inputs: ids of the block-valued nodes (Read or Apply) it consumes, all of one shape.
    statistics: ids of the Reduce nodes whose results it uses.
    shape: of the result and of each input.
    working_dtype: "F32" or "F64", the dtype its blocks are computed in; for operations on
        undecoded bytes the dtype of the inputs.
    """

    operation: str
    parameters: tuple[tuple[str, ParameterValue], ...]
    inputs: tuple[str, ...]
    statistics: tuple[str, ...]
    shape: tuple[int, ...]
    working_dtype: str
    _id: str = field(default="", init=False, compare=False, repr=False)

    @property
    def id(self) -> str:
        """Hash of the content."""
        return self._id or _remember(self, self._content())

    def _content(self) -> tuple[object, ...]:
        return (
            "apply",
            self.operation,
            self.parameters,
            self.inputs,
            self.statistics,
            self.shape,
            self.working_dtype,
        )

    @property
    def dtype(self) -> str:
        """The dtype its blocks have before the output's rounding."""
        return self.working_dtype

    @property
    def element_count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Write:
    """One output tensor.

    name: its key in the output checkpoint.
    dtype: safetensors name of the stored dtype; the value is rounded to it once.
    source: id of the Read or Apply that yields it. A Read of equal dtype is copied undecoded.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    _id: str = field(default="", init=False, compare=False, repr=False)

    @property
    def id(self) -> str:
        """Hash of the content."""
        return self._id or _remember(self, self._content())

    def _content(self) -> tuple[object, ...]:
        return ("write", self.name, self.dtype, self.shape, self.source)

    @property
    def element_count(self) -> int:
        return prod(self.shape)


Node = Read | Reduce | Apply | Write
BlockNode = Read | Apply
"""The kinds that yield blocks of elements."""


def as_parameters(
    values: Mapping[str, ParameterValue],
) -> tuple[tuple[str, ParameterValue], ...]:
    """A node's parameters in canonical (sorted) form."""
    return tuple(sorted(values.items()))
