"""The graph as JSON and back, node for node.

Nodes stand in topological order and refer to their inputs by position; ids are recomputed on
loading, so a file that was tampered with gives another graph, never a graph under a false id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.tensor import TensorInfo
from .graph import Graph
from .node import Apply, Node, ParameterValue, Read, Reduce, Write
from .rows import MOST_ROWS, RowTable


def graph_to_json(graph: Graph) -> list[dict[str, Any]]:
    """The nodes as plain values, in topological order."""
    places = {node.id: place for place, node in enumerate(graph)}

    def at(ids: Sequence[str]) -> list[int]:
        return [places[node_id] for node_id in ids]

    exported: list[dict[str, Any]] = []
    for node in graph:
        match node:
            case Read():
                t = node.tensor
                entry: dict[str, Any] = {
                    "kind": "read",
                    "folder": node.folder,
                    "file": t.file,
                    "tensor": t.name,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "bytes": [t.start, t.stop_exclusive],
                }
                if node.rows is not None:
                    entry |= {"row_count": len(node.rows), "rows": node.rows.to_text()}
                exported.append(entry)
            case Reduce() | Apply():
                exported.append(
                    {
                        "kind": "reduce" if isinstance(node, Reduce) else "apply",
                        "operation": node.operation,
                        "parameters": dict(node.parameters),
                        "inputs": at(node.inputs),
                        "statistics": at(node.statistics),
                        "shape": list(node.shape),
                        "working_dtype": node.working_dtype,
                    }
                )
            case Write():
                exported.append(
                    {
                        "kind": "write",
                        "tensor": node.name,
                        "dtype": node.dtype,
                        "shape": list(node.shape),
                        "source": places[node.source],
                    }
                )
    return exported


def graph_from_json(nodes: Sequence[dict[str, Any]]) -> Graph:
    """The graph that `graph_to_json` exported.

    Raises:
        KeyError, TypeError, IndexError, ValueError: it is not such an export.
    """
    graph = Graph()
    ids: list[str] = []
    tables: dict[str, RowTable] = {}
    for entry in nodes:
        ids.append(graph.add(_node(entry, ids, tables)))
    return graph


def _node(entry: dict[str, Any], ids: Sequence[str], tables: dict[str, RowTable]) -> Node:
    """tables: those of earlier nodes, by their text; an embedding and its head share one."""
    shape = tuple(entry["shape"])
    kind = entry["kind"]
    if kind == "read":
        start, stop = entry["bytes"]
        return Read(
            entry["folder"],
            TensorInfo(entry["tensor"], entry["dtype"], shape, entry["file"], start, stop),
            _rows(entry, tables),
        )
    if kind == "write":
        return Write(entry["tensor"], entry["dtype"], shape, ids[entry["source"]])
    kinds: dict[str, type[Reduce] | type[Apply]] = {"reduce": Reduce, "apply": Apply}
    return kinds[kind](
        operation=entry["operation"],
        parameters=tuple(sorted((k, _tuples(v)) for k, v in entry["parameters"].items())),
        inputs=tuple(ids[place] for place in entry["inputs"]),
        statistics=tuple(ids[place] for place in entry["statistics"]),
        shape=shape,
        working_dtype=entry["working_dtype"],
    )


def _rows(entry: dict[str, Any], tables: dict[str, RowTable]) -> RowTable | None:
    if "rows" not in entry:
        return None
    text, count = entry["rows"], entry["row_count"]
    if type(count) is not int or not 0 <= count <= MOST_ROWS:
        raise ValueError(f"{count!r} rows")
    if text not in tables or len(tables[text]) != count:
        tables[text] = RowTable.from_text(text, count)
    return tables[text]


def _tuples(value: Any) -> ParameterValue:
    """JSON's lists as the tuples they were."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    checked: ParameterValue = value
    return checked
