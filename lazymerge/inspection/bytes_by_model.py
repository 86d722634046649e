"""Who is read how much, and which file gets how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..engine.plan import Plan
from ..graph.graph import Graph
from ..graph.node import Read
from ..graph.operation import reduce_operation
from .forms import Form, Forms


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """One model's share of what is read.

    size_bytes: of all its tensors. read_bytes: of all passes over it.
    """

    reference: str
    size_bytes: int
    read_bytes: int


def bytes_by_model(plan: Plan, forms: Forms) -> tuple[ModelBytes, ...]:
    """The models in the plan's order; what they are read adds up to plan.bytes_read.

    A folder that several references share (one model with two adapters) counts for the first.
    """
    owners = model_of_folder(plan.checkpoints)
    read: Counter[str] = Counter()
    for form in forms.forms:
        for folder, size in _bytes_by_folder(plan.graph, form).items():
            read[owners[folder]] += form.count * size
    return tuple(
        ModelBytes(reference, checkpoint.size_bytes, read[reference])
        for reference, checkpoint in plan.checkpoints.items()
    )


def model_of_folder(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The reference of the first model that has files in a folder, by folder."""
    owners: dict[str, str] = {}
    for reference, checkpoint in checkpoints.items():
        for folder, _ in checkpoint.files_by_folder:
            owners.setdefault(folder, reference)
    return owners


def bytes_of_form(graph: Graph, form: Form) -> int:
    """Input bytes read for one tensor of a form, over all expected passes."""
    return sum(_bytes_by_folder(graph, form).values())


def _bytes_by_folder(graph: Graph, form: Form) -> Counter[str]:
    found: Counter[str] = Counter()

    def add(reads: tuple[Read, ...], passes: int) -> None:
        for read in reads:
            found[read.folder] += passes * read.size_bytes

    add(graph.reads_of(form.first.write.id), 1)
    for reduce in form.first.reductions:
        operation = reduce_operation(reduce.operation)
        add(graph.reads_of(reduce.id), operation.expected_passes(dict(reduce.parameters)))
    return found
