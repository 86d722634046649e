"""Operations, memory, layers and differences of a plan add up to what the plan says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.stages import bytes_read, expected_passes
from lazymerge.inspection.differences import ALL, differences
from lazymerge.inspection.layers import folded_names, layer_rows
from lazymerge.inspection.memory_parts import memory_parts
from lazymerge.inspection.operations import Step, operation_kinds, steps_of
from plan_cases import LAYERS, RECIPES, TASK_ARITHMETIC, TIES, write_models

from merging import recipe_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def planned(models: Path, recipe: dict[str, Any], **options: Any) -> Plan:
    return make_plan(recipe_of(models, recipe), Resources(4 << 30, workers=2), **options)


def with_slices(models: Path) -> Plan:
    """Layers 0 to 2, and 1 to 3: two of them twice."""
    from lazymerge.engine.planning import signatures
    from lazymerge.recipe import parse_recipe

    slices = [(0, 3), (1, 4)]
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: {models / 'one'}, layer_range: [{a}, {b}]}}]\n" for a, b in slices
    )
    return make_plan(parse_recipe(text, "recipe.yml", signatures()), Resources(4 << 30, workers=2))


@pytest.mark.parametrize("name", RECIPES)
def test_memory_parts_add_up(models: Path, name: str) -> None:
    plan = planned(models, RECIPES[name])
    found = memory_parts(plan)
    assert sum(part.size_bytes for part in found.parts) == plan.memory.projected_bytes
    arena = sum(part.size_bytes for part in found.arena)
    assert 0 < arena <= plan.memory.arena_bytes
    chosen = [need for need in found.needs if need.is_chosen]
    assert [need.projected_bytes for need in chosen] == [plan.memory.projected_bytes]
    assert [need.workers for need in chosen] == [plan.memory.workers]
    needed = [need.projected_bytes for need in found.needs]
    assert needed == sorted(needed)


@pytest.mark.parametrize("name", RECIPES)
def test_operations_add_up(models: Path, name: str) -> None:
    plan = planned(models, RECIPES[name])
    kinds = operation_kinds(plan)
    counts = {f"{kind.kind} {kind.operation}".strip(): kind.count for kind in kinds}
    assert counts == plan.graph.count_by_kind()
    stages = [kind for kind in kinds if kind.kind != "Read"]
    assert sum(kind.bytes_read for kind in stages) == plan.bytes_read
    assert sum(kind.share_of_reads for kind in stages) == pytest.approx(1.0)


def all_steps(step: Step) -> list[Step]:
    return [step, *(each for source in step.inputs for each in all_steps(source))]


@pytest.mark.parametrize("name", RECIPES)
def test_trees_hold_every_operation_of_a_tensor(models: Path, name: str) -> None:
    plan = planned(models, RECIPES[name])
    names = [tensor.name for tensor in plan.tensors][:5]
    for tree, task in zip(steps_of(plan, names), plan.tasks, strict=False):
        steps = all_steps(tree.root)
        assert tree.passes == expected_passes(task)
        assert tree.bytes_read == bytes_read(plan.graph, task)
        own = plan.graph.only([task.write.id])
        assert {step.node_id for step in steps} == {node.id for node in own}
        first = [step.node_id for step in steps if not step.is_repeated]
        assert len(first) == len(set(first))


def test_what_outputs_share_is_marked(models: Path) -> None:
    plan = with_slices(models)
    name = "model.layers.1.mlp.up_proj.weight"
    (tree,) = steps_of(plan, [name])
    (read,) = tree.root.inputs
    assert (read.kind, read.outputs) == ("Read", 2)
    assert tree.root.outputs == 1


def test_rows_count_every_tensor_once(models: Path) -> None:
    for recipe in (TASK_ARITHMETIC, TIES):
        plan = planned(models, recipe)
        rows = layer_rows(plan)
        assert sum(row.tensors for row in rows) == len(plan.tensors)
        elements = sum(write.element_count for write in plan.graph.writes)
        assert sum(row.elements for row in rows) == elements


def test_names_are_folded_over_layers(models: Path) -> None:
    plan = planned(models, TASK_ARITHMETIC)
    names = [tensor.name for tensor in plan.tensors]
    assert f"model.layers.0–{LAYERS - 1} ({7 * LAYERS})" in folded_names(names, plan.stacks)
    some = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1, 3)]
    assert folded_names([*some, "lm_head.weight"], plan.stacks) == (
        "model.layers.0–1,3 (3)",
        "lm_head.weight",
    )


# differences


def test_nothing_would_change(models: Path) -> None:
    plan = planned(models, TASK_ARITHMETIC)
    found = differences(plan, planned(models, TASK_ARITHMETIC))
    assert found.is_equal
    assert (found.unchanged, found.changed, found.values) == (len(plan.tensors), (0, ""), ())


def test_a_weight_by_layer_changes_some_tensors(models: Path) -> None:
    other = copy.deepcopy(TASK_ARITHMETIC)
    weight = [{"filter": "mlp", "value": 0.75}, {"value": 0.3}]
    other["models"][1]["parameters"]["weight"] = weight
    found = differences(planned(models, TASK_ARITHMETIC), planned(models, other))
    assert not found.is_equal
    assert found.changed == (2 * LAYERS, f"model.layers.0–{LAYERS - 1} ({2 * LAYERS})")
    (change,) = found.values
    assert (change.parameter, change.where) == (f"weight of {models / 'two'}", ALL)
    assert (change.before, change.after) == ("0.3", "0.75")
    assert found.unchanged == 31 - 2 * LAYERS


def test_what_is_given_to_which_model(models: Path) -> None:
    """Places and rounded numbers say nothing of it."""

    def changes(weights: dict[str, float]) -> tuple[set[tuple[str, str, str]], set[str]]:
        other = copy.deepcopy(TASK_ARITHMETIC)
        other["models"] = [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]
        found = differences(planned(models, TASK_ARITHMETIC), planned(models, other))
        values = {(Path(c.parameter).name, c.before, c.after) for c in found.values}
        return values, {fact.what for fact in found.facts}

    assert changes({"two": 1.0, "one": 0.3}) == (
        {("one", "1", "0.3"), ("two", "0.3", "1")},
        {"order of models"},
    )
    assert changes({"two": 0.3, "one": 1.0}) == (set(), {"order of models"})
    assert changes({"one": 1.0, "two": 0.3 + 5e-17}) == (
        {("two", "0.3", "0.30000000000000004")},
        set(),
    )


def test_models_dtype_and_method(models: Path) -> None:
    other = {**copy.deepcopy(TASK_ARITHMETIC), "dtype": "float32"}
    del other["models"][1]
    found = differences(planned(models, TASK_ARITHMETIC), planned(models, other))
    assert found.models_removed == (str(models / "two"),)
    assert {fact.what for fact in found.facts} >= {"dtype", "config keys"}
    assert [(c.parameter, c.before, c.after) for c in found.reshaped] == [("dtype", "BF16", "F32")]
    assert found.after["bytes_written"] > found.before["bytes_written"]


def test_tensors_come_and_go(models: Path) -> None:
    whole = planned(models, {"merge_method": "passthrough", "models": [{"model": "one"}]})
    found = differences(whole, with_slices(models))
    assert found.added == (14, "model.layers.4–5 (14)")
    assert found.removed == (0, "")
    back = differences(with_slices(models), whole)
    assert back.removed[0] == 14
