"""Bytes by model add up to the plan's, and forms to its tensors."""

from __future__ import annotations

from pathlib import Path

from lazymerge.graph.node import Read
from lazymerge.inspection.bytes_by_model import bytes_by_model
from lazymerge.inspection.forms import forms_of

from page_plans import LAYERS, small_plan


def test_they_add_up(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    shares = bytes_by_model(plan, forms_of(plan))
    assert [share.reference for share in shares] == list(plan.checkpoints)
    assert sum(share.read_bytes for share in shares) == plan.bytes_read
    for share in shares:
        assert share.size_bytes == plan.checkpoints[share.reference].size_bytes
        assert share.read_bytes == 2 * share.size_bytes  # ties reads everything twice


def test_references_that_share_a_folder_count_once(tmp_path: Path) -> None:
    names = ("one", "two/../one", "two")
    models = [{"model": name, "parameters": {"weight": 1}} for name in names]
    plan = small_plan(tmp_path, {"merge_method": "linear", "base_model": "two", "models": models})
    shares = bytes_by_model(plan, forms_of(plan))
    assert sum(share.read_bytes for share in shares) == plan.bytes_read


def test_forms(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    found = forms_of(plan)
    assert len(found.numbers) == len(found.reads) == len(plan.tensors)
    assert sum(form.count for form in found.forms) == len(plan.tensors)
    # experts of all layers are alike; attention is another in every layer, by the gradient
    experts = {found.numbers[n] for n, t in enumerate(plan.tensors) if "experts" in t.name}
    attention = {found.numbers[n] for n, t in enumerate(plan.tensors) if "self_attn" in t.name}
    assert (len(experts), len(attention)) == (1, LAYERS)
    for task, number, reads in zip(plan.tasks, found.numbers, found.reads, strict=True):
        form = found.forms[number]
        assert form.nodes[-1].shape == task.write.shape  # type: ignore[union-attr]
        assert sum(isinstance(node, Read) for node in form.nodes) == len(reads)
        assert {read.tensor.name for read in reads} == {task.write.name}
