"""What the page of a plan is told: a small document that is shown at once, and the tensors, packed.

    document   facts, models, notices, memory over time, bytes by model, parameters by layer
    packed     names, forms (operations of tensors that come about alike), and columns that say of
               every tensor which form it has, where its data lie, and which settings it was given

The columns are differences of neighbours, as page/columns.py says.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..engine.likeness import NAMES_A_TENSOR
from ..engine.models import adapter_text, dtype_shares, dtype_text
from ..engine.plan import Plan
from ..graph.node import Apply, Node, Read, Reduce, Write
from ..graph.operation import reduce_operation
from ..inspection.bytes_by_model import bytes_by_model, model_of_folder
from ..inspection.forms import Forms, forms_of
from ..inspection.parameter_map import SILENT, parameter_map
from ..inspection.timeline import Timeline, memory_timeline
from ..sizes import format_count
from ..version import __version__
from .columns import differences, pack_names
from .measured import measured_timeline

PAGE_FORMAT = 1

MOST_LETTERS = 26
"""Models that have a letter; of more, each has a number."""


def plan_documents(
    plan: Plan,
    *,
    suspicions: Sequence[tuple[str, str]] = (),
    facts: Iterable[tuple[str, str]] = (),
    manifest: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document that is shown at once, and what is packed.

    suspicions: (severity, message) pairs. facts: (label, sentence) pairs after the plan's own.
    manifest: of the finished run, for what was measured.
    """
    forms = forms_of(plan)
    labels = model_labels(plan)
    timeline = memory_timeline(plan, forms)
    document = {
        "format": PAGE_FORMAT,
        "kind": "plan",
        "version": __version__,
        "method": plan.recipe.merge_method,
        "path": plan.recipe.path,
        "recipe": plan.recipe.text,
        "facts": [list(fact) for fact in (*plan.facts(), *facts)],
        "models": _models(plan, forms, labels),
        "notices": list(plan.notices),
        "suspicions": [list(suspicion) for suspicion in suspicions],
        "tensors": len(plan.tensors),
        "operations": len(plan.graph),
        "timeline": _timeline(timeline, plan),
        "measured": measured_timeline(manifest),
        "shards": [
            {"file": shard.file, "bytes": shard.size_bytes, "tensors": len(shard.tensors)}
            for shard in plan.shards
        ],
        "map": _map(plan, labels),
    }
    return document, _packed(plan, forms, labels)


def model_labels(plan: Plan) -> dict[str, str]:
    """A, B, C … for the models and the merges that are used as models, in the plan's order."""
    names = [*plan.checkpoints, *(str(merge.name) for merge in plan.recipe.merges)]
    few = len(names) <= MOST_LETTERS
    return {name: chr(ord("A") + n) if few else f"#{n + 1}" for n, name in enumerate(names)}


def _models(plan: Plan, forms: Forms, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    read = {share.reference: share for share in bytes_by_model(plan, forms)}
    models: list[dict[str, Any]] = [
        {
            "label": labels[reference],
            "name": reference,
            "is_base": reference == plan.recipe.base_model,
            "parameters": format_count(checkpoint.parameter_count),
            "bytes": checkpoint.size_bytes,
            "read": read[reference].read_bytes,
            "dtype": dtype_text(dtype_shares(checkpoint)),
            "files": len(checkpoint.files),
            "folder": checkpoint.folder,
            "adapter": None if checkpoint.adapter is None else adapter_text(checkpoint.adapter),
        }
        for reference, checkpoint in plan.checkpoints.items()
    ]
    merges = [
        {
            "label": labels[str(merge.name)],
            "name": str(merge.name),
            "merge": f"{merge.merge_method} of "
            + ", ".join(labels.get(reference, reference) for reference in merge.references),
        }
        for merge in plan.recipe.merges
    ]
    return [*models, *merges]


def _timeline(timeline: Timeline, plan: Plan) -> dict[str, Any]:
    moments = timeline.moments
    return {
        "reserved": timeline.reserved_bytes,
        "arenas": timeline.arenas_bytes,
        "limit": timeline.limit_bytes,
        "projected": timeline.projected_bytes,
        "moved": timeline.moved_bytes,
        "workers": plan.memory.workers,
        "hungriest": plan.memory.hungriest,
        "vram": None if plan.memory.vram is None else asdict(plan.memory.vram),
        "at": [moment.moved_bytes for moment in moments],
        "tensor": [moment.tensor for moment in moments],
        "name": [plan.tensors[moment.tensor].name for moment in moments],
        "statistics": [moment.statistics_bytes for moment in moments],
        "mapped": [moment.mapped_bytes for moment in moments],
    }


def _map(plan: Plan, labels: Mapping[str, str]) -> dict[str, Any]:
    found = parameter_map(plan.tensors, plan.stacks)

    def labelled(values: Iterable[tuple[str, str | None, object]]) -> list[list[object]]:
        return [
            [parameter, None if model is None else labels[model], finite(value)]
            for parameter, model, value in values
        ]

    return {
        "constant": labelled(found.constant),
        "rows": [
            {
                "stack": row.stack,
                "parameter": row.parameter,
                "model": None if row.model is None else labels[row.model],
                "part": row.part,
                "values": [finite(value) for value in row.values],
            }
            for row in found.rows
        ],
        "outside": [[name, method, labelled(own)] for name, method, own in found.outside],
    }


def _packed(plan: Plan, forms: Forms, labels: Mapping[str, str]) -> dict[str, Any]:
    owners = model_of_folder(plan.checkpoints)
    names = {tensor.name: place for place, tensor in enumerate(plan.tensors)}
    files: dict[tuple[str, str], int] = {}
    read_file, read_start, read_name = [], [], []
    for place, reads in enumerate(forms.reads):
        for read in reads:
            file = (read.folder, read.tensor.file)
            read_file.append(files.setdefault(file, len(files)))
            read_start.append(read.tensor.start)
            read_name.append(names.setdefault(read.tensor.name, len(names)) - place)
    settings, setting = _settings(plan, labels)
    places = {
        tensor.name: (number, tensor.start)
        for number, shard in enumerate(plan.shards)
        for tensor in shard.tensors
    }
    stacks = {stack.prefix: number for number, stack in enumerate(plan.stacks)}
    located = [plan.stacks.locate(tensor.name) for tensor in plan.tensors]
    return {
        "names": pack_names(names),
        "forms": [
            [_operation(node, labels, owners) for node in _with_places(form.nodes)]
            for form in forms.forms
        ],
        "files": [[labels[owners[folder]], folder, file] for folder, file in files],
        "stacks": [[stack.prefix, stack.layer_count] for stack in plan.stacks],
        "settings": settings,
        "form": differences(forms.numbers),
        "setting": differences(setting),
        "shard": differences(places[tensor.name][0] for tensor in plan.tensors),
        "start": differences(places[tensor.name][1] for tensor in plan.tensors),
        "stack": differences(-1 if p is None else stacks[p.stack.prefix] for p in located),
        "layer": differences(-1 if p is None else p.index for p in located),
        "read_file": differences(read_file),
        "read_start": differences(read_start),
        "read_name": differences(read_name),
    }


def _settings(plan: Plan, labels: Mapping[str, str]) -> tuple[list[list[object]], list[int]]:
    """The different settings of tensors, and which of them each tensor has."""
    known: dict[Hashable, int] = {}
    settings: list[list[object]] = []
    of_tensor = []
    for tensor in plan.tensors:
        by_model = [(model, tuple(values.items())) for model, values in tensor.by_model.items()]
        key = (tensor.method, tuple(tensor.parameters.items()), tuple(by_model))
        number = known.setdefault(key, len(known))
        if number == len(settings):
            settings.append(
                [
                    tensor.method,
                    {
                        name: finite(value)
                        for name, value in tensor.parameters.items()
                        if name not in SILENT
                    },
                    [[labels[m], {n: finite(v) for n, v in own}] for m, own in by_model],
                ]
            )
        of_tensor.append(number)
    return settings, of_tensor


def _with_places(nodes: Sequence[Node]) -> list[tuple[Node, list[int], list[int]]]:
    """Nodes, each with the places of its inputs and of its statistics among them."""
    places = {node.id: place for place, node in enumerate(nodes)}
    found: list[tuple[Node, list[int], list[int]]] = []
    for node in nodes:
        match node:
            case Apply() | Reduce():
                inputs = [places[source] for source in node.inputs]
                found.append((node, inputs, [places[source] for source in node.statistics]))
            case Write():
                found.append((node, [places[node.source]], []))
            case Read():
                found.append((node, [], []))
    return found


def _operation(
    placed: tuple[Node, list[int], list[int]], labels: Mapping[str, str], owners: Mapping[str, str]
) -> dict[str, Any]:
    """One operation of a form."""
    node, inputs, statistics = placed
    match node:
        case Read():
            rows = {} if node.rows is None else {"rows": len(node.rows)}
            return {
                "kind": "Read",
                "model": labels[owners[node.folder]],
                "dtype": node.dtype,
                "shape": list(node.tensor.shape),
                "bytes": node.tensor.size_bytes,
                **rows,
            }
        case Write():
            return {"kind": "Write", "dtype": node.dtype, "shape": list(node.shape), "in": inputs}
        case Apply() | Reduce():
            passes = {}
            if isinstance(node, Reduce):
                operation = reduce_operation(node.operation)
                passes = {"passes": operation.expected_passes(dict(node.parameters))}
            return {
                "kind": type(node).__name__,
                "operation": node.operation,
                "parameters": {
                    name: finite(value) for name, value in node.parameters if name != NAMES_A_TENSOR
                },
                "in": inputs,
                "statistics": statistics,
                "shape": list(node.shape),
                "dtype": node.working_dtype,
                **passes,
            }


def finite(value: Any) -> Any:
    """A value for JSON, which knows no infinity and no not-a-number."""
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, tuple | list):
        return [finite(item) for item in value]
    return value
