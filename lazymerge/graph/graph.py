"""The DAG of operations that a recipe compiles into.

The nodes carry the ids of their inputs, so they are the graph; nothing else needs to be stored to
run it. For whoever wants to analyse or draw it, `digraph` gives it as a networkx graph. networkx
is imported only then: that takes 0.2 s, and neither planning nor running needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from .node import Apply, BlockNode, Node, Read, Reduce, Write

if TYPE_CHECKING:
    import networkx as nx


class Graph:
    """Nodes by id; a node can be added once its inputs are there, so there are no cycles.

    Adding a node that is already there is a no-op: identical work is shared.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._writes: list[Write] = []

    def add(self, node: Node) -> str:
        """Adds a node whose inputs are already in the graph, and returns its id.

        Raises:
            KeyError: an input is not in the graph.
        """
        node_id = node.id
        if node_id in self._nodes:
            return node_id
        for source in node_inputs(node):
            if source not in self._nodes:
                raise KeyError(f"{type(node).__name__} {node_id} uses unknown node {source}")
        self._nodes[node_id] = node
        if isinstance(node, Write):
            self._writes.append(node)
        return node_id

    def __getitem__(self, node_id: str) -> Node:
        return self._nodes[node_id]

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        """Nodes in the order they were added, which is a topological order."""
        return iter(self._nodes.values())

    @property
    def digraph(self) -> nx.DiGraph[str]:
        """The graph for networkx: ids, each with its node as attribute `node`, and an edge from
        every node to each that uses its result. Made anew at every call."""
        import networkx as nx

        digraph: nx.DiGraph[str] = nx.DiGraph()
        for node in self:
            digraph.add_node(node.id, node=node)
            digraph.add_edges_from((source, node.id) for source in node_inputs(node))
        return digraph

    @property
    def writes(self) -> tuple[Write, ...]:
        """The output tensors, in the order they were added."""
        return tuple(self._writes)

    def block_node(self, node_id: str) -> BlockNode:
        """The node, which must yield blocks."""
        node = self[node_id]
        if not isinstance(node, Read | Apply):
            raise TypeError(f"{type(node).__name__} {node_id} does not yield blocks")
        return node

    def reduce(self, node_id: str) -> Reduce:
        """The node, which must be a Reduce."""
        node = self[node_id]
        if not isinstance(node, Reduce):
            raise TypeError(f"{type(node).__name__} {node_id} is not a Reduce")
        return node

    def reductions_of(self, node_id: str) -> tuple[Reduce, ...]:
        """All Reduce nodes that a node's value needs, inputs before users, each once."""
        found: dict[str, Reduce] = {}

        def visit(current: str) -> None:
            node = self[current]
            for source in node_inputs(node):
                visit(source)
            if isinstance(node, Reduce):
                found.setdefault(node.id, node)

        visit(node_id)
        return tuple(found.values())

    def reads_of(self, node_id: str) -> tuple[Read, ...]:
        """All Read nodes reached from a node through block inputs alone (one pass over it)."""
        found: dict[str, Read] = {}

        def visit(current: str) -> None:
            node = self[current]
            if isinstance(node, Read):
                found.setdefault(node.id, node)
            elif isinstance(node, Write):
                visit(node.source)
            else:
                for source in node.inputs:
                    visit(source)

        visit(node_id)
        return tuple(found.values())

    def without_unused(self) -> Graph:
        """The graph without the nodes that lead to no output, in the same order."""
        return self.only([write.id for write in self._writes])

    def only(self, writes: Collection[str]) -> Graph:
        """What some of the outputs need, in the same order. writes: ids of Write nodes."""
        used = set(writes)
        for node in reversed(self._nodes.values()):
            if node.id in used:
                used.update(node_inputs(node))
        if len(used) == len(self):
            return self
        kept = Graph()
        for node in self:
            if node.id in used:
                kept.add(node)
        return kept

    def reached_from(self, writes: Collection[str]) -> Graph:
        """As `only`, in another order and without a look at the rest: for a few of many."""
        kept = Graph()

        def visit(node_id: str) -> None:
            if node_id not in kept:
                for source in node_inputs(self[node_id]):
                    visit(source)
                kept.add(self[node_id])

        for write in writes:
            visit(write)
        return kept

    def count_by_kind(self) -> dict[str, int]:
        """Number of nodes by kind, with the operation's name for Reduce and Apply."""
        counts = Counter(
            type(node).__name__
            if isinstance(node, Read | Write)
            else f"{type(node).__name__} {node.operation}"
            for node in self
        )
        return dict(counts)


def node_inputs(node: Node) -> tuple[str, ...]:
    """Ids of everything a node needs before it can run."""
    if isinstance(node, Read):  # half of all nodes, and asked for a million times
        return ()
    if isinstance(node, Write):
        return (node.source,)
    return node.inputs + node.statistics
