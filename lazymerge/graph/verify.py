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
        if isinstance(node, Read):
            size = node.tensor.element_count * DTYPES[node.dtype].item_bytes
            if node.tensor.size_bytes != size:
                raise _illegal("R6", node, "byte range and shape differ")
            _verify_rows(node)
        elif isinstance(node, Write):
            _verify_write(graph, node)
        else:
            _verify_operation(graph, node)
    names = [write.name for write in graph.writes]
    if len(set(names)) != len(names):
        raise IllegalGraphError("R4: two outputs have one name")
    used = {write.id for write in graph.writes}
    for node in graph:
        used.update(node_inputs(node))
    # there are no cycles, so what some node uses leads to an output
    if len(used) != len(graph):
        raise IllegalGraphError("R7: some nodes lead to no output")


def _verify_write(graph: Graph, node: Write) -> None:
    source = graph.block_node(node.source)
    if source.shape != node.shape:
        raise _illegal("R4", node, "shape differs from its source")
    raw = isinstance(source, Apply) and apply_operation(source.operation).is_raw
    is_float = DTYPES[source.dtype].is_float and DTYPES[node.dtype].is_float
    if source.dtype != node.dtype and (raw or not is_float):
        raise _illegal("R5", node, f"{source.dtype} cannot become {node.dtype}")


def _verify_rows(node: Read) -> None:
    if node.rows is None:
        return
    rows = node.tensor.shape[0] if node.tensor.shape else 0
    if node.rows.lowest < ABSENT or node.rows.highest >= rows:
        raise _illegal("R8", node, f"rows {node.rows.lowest} to {node.rows.highest} of {rows}")


def _verify_operation(graph: Graph, node: Reduce | Apply) -> None:
    table = reduce_operation if isinstance(node, Reduce) else apply_operation
    try:
        operation = table(node.operation)
    except KeyError:
        raise IllegalGraphError(f"R2: {node.operation} is not a registered operation") from None
    dtypes = set()
    for source_id in node.inputs:
        source = graph[source_id]
        if not isinstance(source, Read | Apply):
            raise _illegal("R3", node, "an input yields no blocks")
        if source.shape != node.shape:
            raise _illegal("R1", node, f"input of shape {source.shape}")
        dtypes.add(source.dtype)
    for statistic in node.statistics:
        if not isinstance(graph[statistic], Reduce):
            raise _illegal("R3", node, "a statistic is no Reduce")
    if getattr(operation, "is_raw", False):
        if dtypes != {node.working_dtype}:
            raise _illegal("R5", node, "raw inputs of mixed dtypes")
        return
    if node.working_dtype not in WORKING_DTYPES:
        raise _illegal("R2", node, f"computes in {node.working_dtype}")
    if not all(DTYPES[dtype].is_float for dtype in dtypes):
        raise _illegal("R2", node, "computes with integers")
    if "F64" in dtypes and node.working_dtype != "F64":
        raise _illegal("R2", node, "would narrow a float64 input")


def _illegal(rule: str, node: Node, problem: str) -> IllegalGraphError:
    return IllegalGraphError(f"{rule} in {type(node).__name__} {node.id}: {problem}")
