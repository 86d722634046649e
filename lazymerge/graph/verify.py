"""What is legal in a graph. Checked after every compile and every load; each rule names the node.

R1  inputs of one node have one shape, which is the node's
R2  operations are registered; working dtypes are F32 or F64, and never narrower than an input
R3  a statistic comes from a Reduce, a block from a Read or an Apply
R4  output names are unique, and every output's source has its shape
R5  bytes are copied undecoded only between equal dtypes
R6  a Read's byte range is exactly its elements
R7  every node is used by some output
R8  rows that are rearranged are rows of the tensor
"""

from __future__ import annotations

from ..checkpoint.tensor import DTYPES
from .graph import Graph, node_inputs
from .node import Apply, Node, Read, Reduce, Write
from .operation import WORKING_DTYPES, apply_operation, reduce_operation
from .rows import ABSENT


class IllegalGraphError(AssertionError):
    """A graph that breaks a rule: a defect of lazymerge or of a method, not of the input."""


def verify_graph(graph: Graph) -> None:
    """Checks every rule on every node.

    Raises:
        IllegalGraphError: naming the rule and the node.
    """
    for node in graph:
        match node:
            case Read():
                size = node.tensor.element_count * DTYPES[node.dtype].item_bytes
                _require(node.tensor.size_bytes == size, "R6", node, "byte range and shape differ")
                _verify_rows(node)
            case Reduce() | Apply():
                _verify_operation(graph, node)
            case Write():
                source = graph.block_node(node.source)
                _require(source.shape == node.shape, "R4", node, "shape differs from its source")
                raw = isinstance(source, Apply) and apply_operation(source.operation).is_raw
                is_float = DTYPES[source.dtype].is_float and DTYPES[node.dtype].is_float
                _require(
                    source.dtype == node.dtype or (is_float and not raw),
                    "R5",
                    node,
                    f"{source.dtype} cannot become {node.dtype}",
                )
    names = [write.name for write in graph.writes]
    _require(len(set(names)) == len(names), "R4", None, "two outputs have one name")
    used = {write.id for write in graph.writes}
    for node in graph:
        used.update(node_inputs(node))
    # there are no cycles, so what some node uses leads to an output
    _require(len(used) == len(graph), "R7", None, "some nodes lead to no output")


def _verify_rows(node: Read) -> None:
    if node.rows is None:
        return
    rows = node.tensor.shape[0] if node.tensor.shape else 0
    _require(
        node.rows.lowest >= ABSENT and node.rows.highest < rows,
        "R8",
        node,
        f"rows {node.rows.lowest} to {node.rows.highest} of {rows}",
    )


def _verify_operation(graph: Graph, node: Reduce | Apply) -> None:
    table = reduce_operation if isinstance(node, Reduce) else apply_operation
    try:
        operation = table(node.operation)
    except KeyError:
        raise IllegalGraphError(f"R2: {node.operation} is not a registered operation") from None
    dtypes = []
    for source_id in node.inputs:
        source = graph[source_id]
        _require(isinstance(source, Read | Apply), "R3", node, "an input yields no blocks")
        _require(source.shape == node.shape, "R1", node, f"input of shape {source.shape}")
        dtypes.append(graph.block_node(source_id).dtype)
    for statistic in node.statistics:
        _require(isinstance(graph[statistic], Reduce), "R3", node, "a statistic is no Reduce")
    if getattr(operation, "is_raw", False):
        _require(set(dtypes) == {node.working_dtype}, "R5", node, "raw inputs of mixed dtypes")
        return
    _require(node.working_dtype in WORKING_DTYPES, "R2", node, f"computes in {node.working_dtype}")
    _require(all(DTYPES[d].is_float for d in dtypes), "R2", node, "computes with integers")
    if "F64" in dtypes:
        _require(node.working_dtype == "F64", "R2", node, "would narrow a float64 input")


def _require(holds: bool, rule: str, node: Node | None, problem: str) -> None:
    if not holds:
        where = "" if node is None else f" in {type(node).__name__} {node.id}"
        raise IllegalGraphError(f"{rule}{where}: {problem}")
