"""Projections as one tensor and apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lazymerge
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint.fused import is_rows_of, rows_of, taken_apart
from lazymerge.checkpoint.tensor import TensorInfo

from conftest import write_checkpoint

Q, K, V = (f"model.layers.0.self_attn.{word}_proj.weight" for word in "qkv")
QKV = "model.layers.0.self_attn.qkv_proj.weight"


def info(name: str, *shape: int, start: int = 10) -> TensorInfo:
    size = 2
    for length in shape:
        size *= length
    return TensorInfo(name, "BF16", shape, "f", start, start + size)


def test_rows_follow_one_another() -> None:
    apart = {Q: info(Q, 8, 3), K: info(K, 4, 3), V: info(V, 4, 3)}
    found = taken_apart({QKV: info(QKV, 16, 3), "x": info("x", 2)}, apart)
    assert [*found] == [Q, K, V, "x"]
    assert [(t.shape, t.start, t.stop_exclusive) for t in found.values()] == [
        ((8, 3), 10, 58),
        ((4, 3), 58, 82),
        ((4, 3), 82, 106),
        ((2,), 10, 14),
    ]


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {QKV: info(QKV, 16, 3)},
        {Q: info(Q, 8, 3), K: info(K, 4, 3)},
        {Q: info(Q, 8, 3), K: info(K, 4, 3), V: info(V, 5, 3)},
    ],
)
def test_what_does_not_add_up_stays(reference: dict[str, TensorInfo]) -> None:
    tensors = {QKV: info(QKV, 16, 3)}
    assert taken_apart(tensors, reference) == tensors


@given(st.integers(1, 20), st.integers(0, 5), st.data())
def test_rows_are_recognised(rows: int, columns: int, data: st.DataObject) -> None:
    whole = info("w", rows, columns)
    start = data.draw(st.integers(0, rows))
    part = rows_of(whole, start, data.draw(st.integers(start, rows)))
    assert is_rows_of(part, whole) == (columns > 0 or part == whole)
    if columns:
        assert not is_rows_of(replace(part, start=part.start + 1), whole)
        assert not is_rows_of(replace(part, stop_exclusive=part.stop_exclusive + 1), whole)
        assert not is_rows_of(replace(part, dtype="F16"), whole)
        assert not is_rows_of(rows_of(whole, start, rows + 1), whole)


def test_a_merge(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    models = {
        name: {
            key: torch.randn(rows, 6, generator=generator)
            for key, rows in zip((Q, K, V), (8, 4, 4), strict=True)
        }
        for name in ("base", "a")
    }
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, tensors)
    write_checkpoint(tmp_path / "fused", {QKV: torch.cat([*models["a"].values()])})
    outputs = []
    for name in ("a", "fused"):
        recipe = {
            "merge_method": "slerp",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / name)}],
            "parameters": {"t": 0.3},
        }
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
        plan = lazymerge.plan(tmp_path / "recipe.yml")
        assert len(plan.notices) == (name == "fused")
        plan.save(tmp_path / "plan.json")
        lazymerge.run(lazymerge.plan(tmp_path / "plan.json"), tmp_path / f"out {name}")
        outputs.append((tmp_path / f"out {name}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
