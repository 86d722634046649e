"""Parameters by layer: gradients and filters as a recipe sets them."""

from __future__ import annotations

from pathlib import Path

from lazymerge.architecture import find_layer_stacks
from lazymerge.graph.compile import ResolvedTensor
from lazymerge.inspection.parameter_map import COPIED, DIFFERING, parameter_map

from page_plans import small_plan


def test_gradients_and_filters(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    found = parameter_map(plan.tensors, plan.stacks)
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    rows = {row.part: row for row in found.rows}
    assert {(row.stack, row.parameter, row.model) for row in found.rows} == {
        ("model.layers", "weight", one)
    }
    assert rows["self_attn"].values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert rows["mlp"].values == (0.25,) * 5
    assert rows["input_layernorm"].values == (0.5,) * 5
    assert ("weight", two, 0.75) in found.constant
    assert ("density", two, 0.25) in found.constant
    assert [name for name, _, _ in found.outside] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert all(values == (("weight", one, 0.5),) for _, _, values in found.outside)


def resolved(name: str, weight: float | None) -> ResolvedTensor:
    if weight is None:
        return ResolvedTensor(name, "copy", {}, {})
    return ResolvedTensor(name, "linear", {"int8_mask": False}, {"a": {"weight": weight}})


def test_copies_holes_and_experts_that_differ() -> None:
    tensors = [
        resolved("layers.0.mlp.experts.0.w", 0.5),
        resolved("layers.0.mlp.experts.1.w", 0.75),
        resolved("layers.1.mlp.experts.0.w", 0.5),
        resolved("layers.1.mlp.experts.1.w", 0.5),
        resolved("layers.1.attn.w", 1.0),
        resolved("layers.2.attn.w", None),
    ]
    found = parameter_map(tensors, find_layer_stacks(tensor.name for tensor in tensors))
    rows = {row.part: row.values for row in found.rows}
    assert rows == {"mlp": (DIFFERING, 0.5, None), "attn": (None, 1.0, COPIED)}
    assert found.constant == ()


def test_parts_that_are_alike_are_one_row() -> None:
    tensors = [
        resolved(f"layers.{layer}.{part}.weight", layer / 2)
        for layer in range(3)
        for part in ("self_attn.q", "self_attn.k", "mlp.up")
    ]
    found = parameter_map(tensors, find_layer_stacks(tensor.name for tensor in tensors))
    assert [(row.part, row.values) for row in found.rows] == [("", (0.0, 0.5, 1.0))]
