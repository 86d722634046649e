"""Embeddings of models with different vocabularies, as nodes of one shape.

    has every token, in its place    Read                      as without a tokenizer
    has every token, elsewhere       Read, rows rearranged
    lacks some                       Apply: its own rows, rearranged, + rows of others in the gaps
    rows that belong to no token     Reduce: the mean row; Apply: the mean in those rows

What a model lacks is, in this order: what the recipe says; the row of the only model that has the
token; the base model's; the mean of the rows of all that have it; zeros. The rows that are added
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
from .rows import ABSENT, RowTable

_Part = tuple[str, float]
"""A model, and the factor of its rows."""


@dataclass(frozen=True, slots=True)
class _Filling:
    """Rows of one model's embedding: the tables of those that are added, by part."""

    tables: Mapping[_Part, RowTable]


@dataclass(frozen=True, slots=True)
class _Filled:
    """All models' embeddings, and how many tokens have a row in others alone."""

    fillings: Mapping[str, _Filling]
    tokens_without_row: int


@dataclass(slots=True)
class AlignedEmbeddings:
    """Adds the nodes of embeddings and output heads, which share their tables."""

    alignment: Alignment
    graph: Graph
    _known: dict[tuple[tuple[str, int], ...], _Filled] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of the output, with those that belong to no token."""
        return self.alignment.padded_rows

    def nodes(self, name: str, reads: Mapping[str, Read]) -> dict[str, str]:
        """Ids of nodes of one shape, by model.

        name: of the tensor. reads: its whole tensor in every model that has it.

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
        return {
            model: self._padded(self._filled(model, filling, reads))
            for model, filling in self._all(name, reads).fillings.items()
        }

    def tokens_without_row(self, name: str, reads: Mapping[str, Read]) -> int:
        """How many tokens of the output have rows of zeros because only models have them that are
        not merged here: those of other slices."""
        return self._all(name, reads).tokens_without_row

    def _all(self, name: str, reads: Mapping[str, Read]) -> _Filled:
        key = tuple((model, read.shape[0]) for model, read in reads.items())
        if key not in self._known:
            self._known[key] = _Fillings(self.alignment, name, dict(key)).all()
        return self._known[key]

    def _filled(self, model: str, filling: _Filling, reads: Mapping[str, Read]) -> str:
        nodes = {
            part: self.graph.add(_rearranged(reads[part[0]], table))
            for part, table in filling.tables.items()
        }
        own = (model, 1.0)
        if list(nodes) == [own]:
            return nodes[own]
        inputs = list(nodes.values())
        node = self.graph[inputs[0]]
        assert isinstance(node, Read)
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
    """Works out which rows of which models stand where."""

    def __init__(self, alignment: Alignment, name: str, rows: Mapping[str, int]) -> None:
        """name: of the tensor, for messages. rows: that it has, by model."""
        self.alignment = alignment
        self.name = name
        self.rows = rows
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

    def all(self) -> _Filled:
        without_row = 0
        given = list(zip(*self.own.values(), strict=True))
        for row, present in enumerate(given):
            chosen = self.alignment.chosen.get(row)
            if min(present) >= 0 and not (chosen and chosen.force):
                continue
            parts = self._parts(row, present)
            if not parts and not (chosen and chosen.is_chosen):
                without_row += any(table[row] >= 0 for table in self.alignment.tables.values())
            for model, own_row in zip(self.models, present, strict=True):
                if own_row >= 0 and not (chosen and chosen.force):
                    continue
                self._fill(model, row, parts)
        return _Filled({model: self._filling(model) for model in self.models}, without_row)

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
        base = self.alignment.base
        if len(having) > 1 and base in dict(having):
            having = [(m, r) for m, r in having if m == base]
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
