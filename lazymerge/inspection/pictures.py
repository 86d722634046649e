"""A plan as a picture: folded by layer, or the operations of some tensors as they are.

model ──► Reduce ─ ─► Apply ──► Write            one row of these for each run of layers that
  └───────────────────► ▲                        are merged alike
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..engine.plan import Plan
from ..graph.drawing import Picture, PictureEdge, PictureNode, Role
from ..graph.graph import Graph
from ..graph.node import Apply, Node, Read, Reduce, Write
from ..sizes import format_bytes, format_count
from .layers import folded_names
from .operations import ancestors, models_by_folder

MOST_GROUPS = 60
"""Ways of making a tensor that a picture shows before the rest is one box."""

MOST_PLACES = 5
"""Runs of layers and single tensors that one box names."""


def folded_picture(plan: Plan) -> Picture:
    """The whole plan; all tensors that the same operations make of the same models are one row of
    boxes."""
    drawn = _Drawn()
    models = {ref: drawn.add("model", *_model(plan, ref)) for ref in plan.checkpoints}
    folders = {folder: models[ref] for folder, ref in models_by_folder(plan).items()}
    groups: dict[object, list[Write]] = {}
    for write in plan.graph.writes:
        groups.setdefault(_structure(plan.graph, write, folders), []).append(write)
    for writes in list(groups.values())[:MOST_GROUPS]:
        _draw_group(plan, writes, drawn, folders)
    left = sum(len(writes) for writes in list(groups.values())[MOST_GROUPS:])
    if left:
        drawn.add("write", f"and {left} more tensors", "see them with --tensor")
    return drawn.picture(_title(plan))


def _structure(graph: Graph, node: Node, folders: Mapping[str, int]) -> object:
    """What an output tensor is made of but for names, shapes and parameters."""
    if isinstance(node, Read):
        return folders[node.folder]
    own = node.dtype if isinstance(node, Write) else node.operation
    parts = ((_structure(graph, graph[source], folders), s) for source, s in _sources(node))
    return (own, *parts)


def _title(plan: Plan) -> str:
    return f"{plan.recipe.merge_method}  {plan.recipe.path}"


def _model(plan: Plan, reference: str) -> tuple[str, ...]:
    checkpoint = plan.checkpoints[reference]
    base = " (base)" if reference == plan.recipe.base_model else ""
    sizes = f"{format_count(checkpoint.parameter_count)}, {format_bytes(checkpoint.size_bytes)}"
    return (f"{reference}{base}", sizes)


def _draw_group(
    plan: Plan, writes: Sequence[Write], drawn: _Drawn, folders: Mapping[str, int]
) -> None:
    """The operations of the first tensor stand for all; bytes are of all of them."""
    sizes: dict[int, int] = {}
    for write in writes:
        for node_id in ancestors(plan.graph, write.id):
            node = plan.graph[node_id]
            if isinstance(node, Read):
                place = folders[node.folder]
                sizes[place] = sizes.get(place, 0) + node.size_bytes
    places: dict[str, int] = {}
    for node in _nodes_of(plan, writes[0]):
        if isinstance(node, Read):
            places[node.id] = folders[node.folder]
            continue
        role, lines = _folded_box(plan, node, writes)
        places[node.id] = drawn.add(role, *lines)
        for source, is_statistic in _sources(node):
            place = places[source]
            is_read = isinstance(plan.graph[source], Read)
            label = format_bytes(sizes[place]) if is_read else ""
            drawn.connect(place, places[node.id], label, is_statistic)


def _folded_box(plan: Plan, node: Node, writes: Sequence[Write]) -> tuple[Role, tuple[str, ...]]:
    count = f"{len(writes)} × " if len(writes) > 1 else ""
    if isinstance(node, Write):
        names = folded_names((write.name for write in writes), plan.stacks)
        more = len(names) - MOST_PLACES
        lines = names if more <= 0 else (*names[:MOST_PLACES], f"and {more} more")
        elements = sum(write.element_count for write in writes)
        return "write", (*lines, f"{count}{node.dtype}, {format_count(elements)} elements")
    assert isinstance(node, Apply | Reduce)
    role: Role = "reduce" if isinstance(node, Reduce) else "apply"
    return role, (node.operation, f"{count}{node.working_dtype}")


def unfolded_picture(plan: Plan, names: Sequence[str]) -> Picture:
    """All operations of some output tensors; what they share is drawn once."""
    drawn = _Drawn()
    models = models_by_folder(plan)
    wanted = set(names)
    places: dict[str, int] = {}
    for write in plan.graph.writes:
        if write.name not in wanted:
            continue
        for node in _nodes_of(plan, write):
            if node.id in places:
                continue
            places[node.id] = drawn.add(*_box(node, models))
            for source, is_statistic in _sources(node):
                of_read = plan.graph[source]
                label = format_bytes(of_read.size_bytes) if isinstance(of_read, Read) else ""
                drawn.connect(places[source], places[node.id], label, is_statistic)
    return drawn.picture(_title(plan))


def _box(node: Node, models: Mapping[str, str]) -> tuple[Role, str, str, str]:
    shape = f"{' × '.join(map(str, node.shape)) or 'scalar'}"
    if isinstance(node, Read):
        model = models.get(node.folder, node.folder)
        return "read", model, node.tensor.name, f"{node.dtype} {shape}"
    if isinstance(node, Write):
        return "write", "Write", node.name, f"{node.dtype} {shape}"
    role: Role = "reduce" if isinstance(node, Reduce) else "apply"
    return role, node.operation, type(node).__name__, f"{node.working_dtype} {shape}"


def _nodes_of(plan: Plan, write: Write) -> list[Node]:
    """What an output tensor needs, inputs before users."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.id not in found:
            for source, _ in _sources(node):
                visit(plan.graph[source])
            found[node.id] = node

    visit(write)
    return list(found.values())


def _sources(node: Node) -> list[tuple[str, bool]]:
    """Ids of what a node uses, and whether it is a statistic."""
    if isinstance(node, Write):
        return [(node.source, False)]
    if isinstance(node, Read):
        return []
    return [(source, False) for source in node.inputs] + [(s, True) for s in node.statistics]


class _Drawn:
    """A picture that is being made; edges between the same boxes are drawn once."""

    def __init__(self) -> None:
        self._nodes: list[PictureNode] = []
        self._edges: dict[tuple[int, int, bool], PictureEdge] = {}

    def add(self, role: Role, *lines: str) -> int:
        self._nodes.append(PictureNode(role, lines))
        return len(self._nodes) - 1

    def connect(self, source: int, target: int, label: str, is_statistic: bool) -> None:
        key = (source, target, is_statistic)
        self._edges.setdefault(key, PictureEdge(source, target, label, is_statistic))

    def picture(self, title: str) -> Picture:
        return Picture(title, tuple(self._nodes), tuple(self._edges.values()))
