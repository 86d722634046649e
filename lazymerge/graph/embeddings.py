"""Embeddings of models with different vocabularies, as nodes of one shape.

    has every token, in its place    Read                      as without a tokenizer
    has every token, elsewhere       Read, rows rearranged
    lacks some                       Apply: its own rows, rearranged, + rows of others in the gaps
    rows that belong to no token     Reduce: the mean row; Apply: the mean in those rows
    is what another merge gives      the same of its result (operations/placed_rows.py)

What a model lacks is, in this order: what the recipe says; the row of the only model that has the
token; the base model's; the mean of the rows of all that have it; zeros. Only models that the
tensor is merged from count: where a recipe has slices, the embedding is of the first slice's
sources, the head of the last's, and the base model is that slice's. The rows that are added
together are zero wherever another holds something, except in means, which are Σ xᵢ/n.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InputError
from ..vocabulary import Alignment
from .graph import Graph
from .node import Apply, Read, Reduce, as_parameters
from .operation import apply_operation, reduce_operation
from .operations.placed_rows import add_placed_rows
from .rows import ABSENT, RowTable

_Part = tuple[str, float]
"""A model, and the factor of its rows."""


@dataclass(frozen=True, slots=True)
class _Filling:
    """Rows of one model's embedding: the tables of those that are added, by part."""

    tables: Mapping[_Part, RowTable]


@dataclass(slots=True)
class AlignedEmbeddings:
    """Adds the nodes of embeddings and output heads, which share their tables."""

    alignment: Alignment
    graph: Graph
    _fillings: dict[tuple[object, ...], _Fillings] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of the output, with those that belong to no token."""
        return self.alignment.padded_rows

    def nodes(self, name: str, reads: Mapping[str, Read], base: str | None) -> dict[str, str]:
        """Ids of nodes of one shape, by model.

        name: of the tensor. reads: its whole tensor in every model that has it.
        base: the model whose row is taken where several have one; None, or none of these: their
            mean.

        Raises:
            InputError: widths differ, or a row that the recipe names is not there.
        """
        if (
            any(not read.shape for read in reads.values())
            or len({read.shape[1:] for read in reads.values()}) != 1
        ):
            described = ", ".join(f"{list(r.shape)} in {model}" for model, r in reads.items())
            raise InputError(
                f"tensor {name} has different shapes: {described}; "
                "only models of one architecture and size can be merged"
            )
        filled = self._filled_rows(name, reads, base).by_model
        return {
            model: self._padded(self._filled(model, filling, reads))
            for model, filling in filled.items()
        }

    def unknown_rows(self, name: str, reads: Mapping[str, Read], base: str | None) -> int:
        """How many tokens none of these models has, while others of the recipe do: rows of zeros.

        name, reads, base: as of `nodes`.
        """
        return self._filled_rows(name, reads, base).unknown

    def _filled_rows(self, name: str, reads: Mapping[str, Read], base: str | None) -> _Fillings:
        rows = {model: read.shape[0] for model, read in reads.items()}
        key = (base, *rows.items())
        if key not in self._fillings:
            self._fillings[key] = _Fillings(self.alignment, name, rows, base)
        return self._fillings[key]

    def _filled(self, model: str, filling: _Filling, reads: Mapping[str, Read]) -> str:
        nodes = {part: self._rows(reads[part[0]], table) for part, table in filling.tables.items()}
        own = (model, 1.0)
        if list(nodes) == [own]:
            return nodes[own]
        inputs = list(nodes.values())
        node = self.graph.block_node(inputs[0])
        return self.graph.add(
            Apply(
                operation="linear_combination",
                parameters=as_parameters({"coefficients": tuple(factor for _, factor in nodes)}),
                inputs=tuple(inputs),
                statistics=(),
                shape=node.shape,
                working_dtype=apply_operation("linear_combination").working_dtype([]),
            )
        )

    def _rows(self, read: Read, table: RowTable) -> str:
        node = read.tensor.node
        if node is not None:
            return add_placed_rows(self.graph, node, table)
        return self.graph.add(_rearranged(read, table))

    def _padded(self, node_id: str) -> str:
        node = self.graph.block_node(node_id)
        if self.alignment.padded_rows == self.alignment.rows:
            return node_id
        row_elements = node.element_count // node.shape[0]
        sizes = {"row_elements": row_elements, "rows": self.alignment.rows}
        mean = self.graph.add(
            Reduce(
                operation="column_mean",
                parameters=as_parameters(sizes),
                inputs=(node_id,),
                statistics=(),
                shape=node.shape,
                working_dtype=reduce_operation("column_mean").working_dtype([]),
            )
        )
        return self.graph.add(
            Apply(
                operation="padded_rows",
                parameters=as_parameters({**sizes, "padded_rows": node.shape[0]}),
                inputs=(node_id,),
                statistics=(mean,),
                shape=node.shape,
                working_dtype=apply_operation("padded_rows").working_dtype([]),
            )
        )


def _rearranged(read: Read, table: RowTable) -> Read:
    """A read of these rows; as of an ordinary tensor, where they are its first rows."""
    if not table.is_leading or len(table) > read.shape[0]:
        return Read(read.folder, read.tensor, table)
    return Read(read.folder, read.tensor.leading_rows(len(table)))


class _Fillings:
    """Works out which rows of which models stand where.

    by_model: what each model's embedding is put together from.
    unknown: tokens that other models of the recipe have, and none of these.
    """

    def __init__(
        self, alignment: Alignment, name: str, rows: Mapping[str, int], base: str | None
    ) -> None:
        """name: of the tensor, for messages. rows: that it has, by model. base: as of
        AlignedEmbeddings.nodes."""
        self.alignment = alignment
        self.name = name
        self.rows = rows
        self.base = base
        self.unknown = 0
        self.models = list(rows)
        self.own = {
            model: array(
                "i", [row if row < rows[model] else ABSENT for row in alignment.tables[model]]
            )
            for model in self.models
        }
        self.others: dict[str, dict[_Part, dict[int, int]]] = {
            model: defaultdict(dict) for model in self.models
        }
        self.by_model = self._all()

    def _all(self) -> dict[str, _Filling]:
        given = list(zip(*self.own.values(), strict=True))
        for row, present in enumerate(given):
            chosen = self.alignment.chosen.get(row)
            if min(present) >= 0 and not (chosen and chosen.force):
                continue
            parts = self._parts(row, present)
            if not parts and not (chosen and chosen.is_chosen):
                self.unknown += any(table[row] >= 0 for table in self.alignment.tables.values())
            for model, own_row in zip(self.models, present, strict=True):
                if own_row >= 0 and not (chosen and chosen.force):
                    continue
                self._fill(model, row, parts)
        return {model: self._filling(model) for model in self.models}

    def _parts(self, row: int, present: Sequence[int]) -> list[tuple[_Part, int]]:
        """What stands in a row where a model lacks it: parts, each with the model's row."""
        chosen = self.alignment.chosen.get(row)
        if chosen is not None and chosen.is_chosen:
            if chosen.model is None:
                return []
            have = self.rows.get(chosen.model)
            if have is None:
                raise InputError(
                    f"tensor {self.name}: token {chosen.token!r} is to get its row from "
                    f"{chosen.model}, and the tensor is merged from {', '.join(self.models)} "
                    "alone. Name one of these in `tokens`, or {kind: zero}."
                )
            if not 0 <= chosen.row < have:
                raise InputError(
                    f"tensor {self.name}: token {chosen.token!r} is to get row {chosen.row} of "
                    f"{chosen.model}, which has {have} rows"
                )
            return [((chosen.model, 1.0), chosen.row)]
        having = [(m, r) for m, r in zip(self.models, present, strict=True) if r >= 0]
        if len(having) > 1 and self.base in dict(having):
            having = [(m, r) for m, r in having if m == self.base]
        return [((model, 1.0 / len(having)), own) for model, own in having]

    def _fill(self, model: str, row: int, parts: Sequence[tuple[_Part, int]]) -> None:
        self.own[model][row] = ABSENT
        for part, source_row in parts:
            if part == (model, 1.0):
                self.own[model][row] = source_row
            else:
                self.others[model][part][row] = source_row

    def _filling(self, model: str) -> _Filling:
        padding = array("i", [ABSENT]) * (self.alignment.padded_rows - self.alignment.rows)
        tables = {(model, 1.0): RowTable.of(self.own[model] + padding)}
        parts = self.others[model]
        for part in sorted(parts, key=lambda part: (self.models.index(part[0]), -part[1])):
            table = array("i", [ABSENT]) * self.alignment.padded_rows
            for row, source_row in parts[part].items():
                table[row] = source_row
            tables[part] = RowTable.of(table)
        return _Filling(tables)
