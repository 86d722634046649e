"""Writing down what was gathered of a merge, with the models' names, when all tensors are there."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from ..errors import brief
from ..graph.graph import Graph, node_inputs
from ..graph.node import Read, Write
from ..graph.operations.statistics import moments_of
from ..output.manifest import STATISTICS_NAME
from ..version import __version__
from .gathering import Gathering, NotGathered, gathering_of
from .plan import Plan
from .stages import NativeLayout, TorchLayout, stage_layout
from .statistics import STATISTICS_FORMAT, TensorStatistics, load_statistics, tensor_document


class Labels:
    """Which model a node's values are of."""

    def __init__(self, plan: Plan) -> None:
        self._graph = plan.graph
        self._models: dict[str, list[str]] = defaultdict(list)
        self._adapted = {
            reference: checkpoint.adapter is not None
            for reference, checkpoint in plan.checkpoints.items()
        }
        for reference, checkpoint in plan.checkpoints.items():
            for folder, files in checkpoint.files_by_folder:
                for file in files:
                    self._models[f"{folder}/{file.path}"].append(reference)

    def of(self, node_id: str) -> str:
        """The model's reference, as the recipe writes it: of the models that have all files that
        the node is read from, one without an adapter before one with."""
        paths = _paths(self._graph, node_id)
        common = set.intersection(*(set(self._models[path]) for path in paths))
        having = [model for model in self._models[next(iter(paths))] if model in common]
        return min(having, key=self._adapted.__getitem__, default="?")

    def all_of(self, node_ids: Sequence[str]) -> tuple[str, ...]:
        """The same of several; two tensors of one model are told apart by their names."""
        labels = [self.of(node_id) for node_id in node_ids]
        return tuple(
            label if labels.count(label) == 1 else f"{label} ({self._tensor(node_id)})"
            for label, node_id in zip(labels, node_ids, strict=True)
        )

    def _tensor(self, node_id: str) -> str:
        return self._graph.reads_of(node_id)[0].tensor.name


def _paths(graph: Graph, node_id: str) -> set[str]:
    """The files that a node's values come from, those of its statistics among them."""
    paths, waiting = set(), [node_id]
    while waiting:
        node = graph[waiting.pop()]
        if isinstance(node, Read):
            paths.add(f"{node.folder}/{node.tensor.file}")
        waiting += node_inputs(node)
    return paths


def tensor_statistics(
    plan: Plan, gathered: Mapping[str, Sequence[float] | None]
) -> Iterator[TensorStatistics]:
    """Every output tensor, in the order of the output.

    gathered: numbers by name, as far as there are any.
    """
    labels = Labels(plan)
    files = plan.execution.reference_files or frozenset()
    for write in plan.graph.writes:
        found = gathering_of(plan.graph, write, files)
        if isinstance(found, NotGathered):
            yield _left_out(write, found, labels)
            continue
        yield _tensor(plan, write, found, labels, gathered.get(write.name))


def _left_out(write: Write, found: NotGathered, labels: Labels) -> TensorStatistics:
    reason = found.reason
    if found.source is not None:
        model = labels.of(found.source)
        reason = f"copied from {model}" if reason == "copied" else reason
    return TensorStatistics(write.name, write.element_count, reason=reason)


def _tensor(
    plan: Plan,
    write: Write,
    gathering: Gathering,
    labels: Labels,
    numbers: Sequence[float] | None,
) -> TensorStatistics:
    reason = ""
    if numbers is not None:
        models = labels.all_of(gathering.inputs)
        try:
            moments = moments_of(numbers)
            if len(moments.products) != len(models):
                raise ValueError("of other models")
            counts = [*chain.from_iterable(moments.agreements), moments.changed, moments.mixed]
            if not all(0 <= count <= write.element_count for count in counts):
                raise ValueError("counts beyond all elements")
        except ValueError as error:  # a journal that somebody has edited
            reason = f"what the journal says of it is damaged ({brief(error)})"
        else:
            return TensorStatistics(write.name, write.element_count, models, moments)
    reason = reason or _reason(plan, write) or "written before statistics were asked for"
    return TensorStatistics(write.name, write.element_count, reason=reason)


def _reason(plan: Plan, write: Write) -> str:
    """Why a tensor is not looked at though it could be; empty where it is."""
    layout = stage_layout(plan.graph, write, plan.execution)
    if isinstance(layout, NativeLayout | TorchLayout):
        return "" if layout.statistics is not None else "its method takes it whole"
    return f"computed with --device {plan.execution.device}"


def write_statistics(
    plan: Plan, folder: Path, gathered: Mapping[str, Sequence[float] | None], *, fsync: bool
) -> None:
    """Writes the statistics of a complete output, tensor by tensor.

    gathered: numbers by name, as far as there are any.

    Raises:
        OSError: it cannot be written.
    """
    _write(folder, plan.fingerprint, tensor_statistics(plan, gathered), fsync=fsync)


def join_statistics(plan: Plan, folder: Path, parts: Iterable[Path], *, fsync: bool) -> None:
    """Writes the statistics of an output that is put together from parts, if they have some.

    plan: of the whole. parts: their folders.

    Raises:
        InputError: what a part has left is damaged.
        OSError: they cannot be written.
    """
    found: dict[str, TensorStatistics] = {}
    for part in parts:
        if (part / STATISTICS_NAME).is_file():
            found |= load_statistics(part).tensors
    if not found:
        return
    tensors = (
        found.get(write.name)
        or TensorStatistics(write.name, write.element_count, reason="its part has no statistics")
        for write in plan.graph.writes
    )
    _write(folder, plan.fingerprint, tensors, fsync=fsync)


def _write(
    folder: Path, fingerprint: str, tensors: Iterable[TensorStatistics], *, fsync: bool
) -> None:
    path = folder / STATISTICS_NAME
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    models: list[str] = []
    with partial.open("x", encoding="utf-8") as stream:
        head = {
            "format": STATISTICS_FORMAT,
            "lazymerge": __version__,
            "fingerprint": fingerprint,
        }
        stream.write(json.dumps(head)[:-1] + ', "tensors": {')
        for number, tensor in enumerate(tensors):
            models += [name for name in tensor.models if name not in models]
            document = json.dumps(
                tensor_document(tensor, models), ensure_ascii=False, allow_nan=False
            )
            name = json.dumps(tensor.name, ensure_ascii=False)
            stream.write(f"{',' if number else ''}\n{name}: {document}")
        stream.write(f'\n}}, "models": {json.dumps(models, ensure_ascii=False)}}}\n')
        if fsync:
            stream.flush()
            os.fsync(stream.fileno())
    partial.rename(path)
