"""Tensors of one kind occupy, read and write the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.checkpoint.tensor import TensorInfo
from lazymerge.engine.execution import Execution
from lazymerge.engine.likeness import kinds_of
from lazymerge.engine.plan import Plan
from lazymerge.engine.stages import (
    bytes_read,
    expected_passes,
    joined_statistics_bytes,
    mapped_bytes,
    stage_layout,
    statistics_bytes,
    temporary_bytes,
    tensor_tasks,
)
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Read, Write, as_parameters
from merge_cases import RECIPES

from merging import plan_of

LAYERS = 6


def models(layers: int = LAYERS) -> dict[str, dict[str, torch.Tensor]]:
    """Three models with layers of four tensors, of two shapes and two dtypes."""
    tensors = {"model.norm.weight": torch.zeros(8), "steps": torch.zeros(1, dtype=torch.int64)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.q.weight"] = torch.zeros(8, 8)
        tensors[f"{prefix}.k.weight"] = torch.zeros(8, 8, dtype=torch.float64)
        tensors[f"{prefix}.up.weight"] = torch.zeros(16, 8)
        tensors[f"{prefix}.norm.weight"] = torch.zeros(8)
    return {name: dict(tensors) for name in ("base", "a", "b")}


def described(plan: Plan) -> list[tuple[object, ...]]:
    """All that a plan works out for each kind, worked out for every tensor."""
    graph = plan.graph
    return [
        (
            bytes_read(graph, task),
            expected_passes(task),
            statistics_bytes(graph, task),
            *(
                (
                    stage_layout(graph, stage, Execution("pread", "native")).size_bytes,
                    mapped_bytes(graph, stage),
                    joined_statistics_bytes(graph, stage),
                    temporary_bytes(graph, stage),
                )
                for stage in task.stages
                if stage.element_count
            ),
        )
        for task in plan.tasks
    ]


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_tensors_of_a_kind_are_alike(tmp_path: Path, method: str) -> None:
    recipe = {"merge_method": method, **RECIPES[method]}
    plan = plan_of(tmp_path, recipe, models())
    every = described(plan)
    places = {task.write.name: place for place, task in enumerate(plan.tasks)}
    of_kinds = Counter[tuple[object, ...]]()
    for kind in plan.kinds:
        of_kinds[every[places[kind.first.write.name]]] += kind.count
    assert of_kinds == Counter(every)
    assert plan.bytes_read == sum(bytes_read(plan.graph, task) for task in plan.tasks)
    firsts = [places[kind.first.write.name] for kind in plan.kinds]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_layers_are_of_one_kind(tmp_path: Path, method: str) -> None:
    """Random numbers are drawn by name, which makes no other kind."""
    values = {"weight": 0.5, "density": 0.6}
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name, "parameters": values} for name in ("a", "b")],
    }
    counts = [
        [kind.count for kind in plan_of(tmp_path / str(layers), recipe, models(layers)).kinds]
        for layers in (2, 7)
    ]
    assert len(counts[0]) == len(counts[1])
    assert sum(counts[1]) - sum(counts[0]) == 5 * 4


def test_a_gradient_makes_kinds(tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": [0.0, 1.0]}
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": n, "parameters": {"weight": w}} for n, w in weights.items()],
    }
    plan = plan_of(tmp_path, recipe, models())
    in_layers = [kind for kind in plan.kinds if ".layers." in kind.first.write.name]
    assert len(in_layers) == LAYERS * 4


def test_sharing_makes_a_kind() -> None:
    """One tensor that is used twice is read once."""
    graph = Graph()
    first, second = (
        graph.add(Read("/m", TensorInfo("w", "F32", (4,), "f", start, start + 16)))
        for start in (0, 16)
    )
    for name, inputs in (("once", (first, first)), ("both", (first, second))):
        factors = as_parameters({"coefficients": (0.5, 0.5)})
        node = graph.add(Apply("linear_combination", factors, inputs, (), (4,), "F32"))
        graph.add(Write(name, "F32", (4,), node))
    tasks = tensor_tasks(graph)
    assert [kind.count for kind in kinds_of(graph, tasks)] == [1, 1]
    assert [bytes_read(graph, task) for task in tasks] == [16, 32]
