"""Bytes by model add up to the plan's, and forms to its tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from lazymerge.engine.planning import make_plan
from lazymerge.engine.resources import Resources
from lazymerge.graph.node import Read
from lazymerge.inspection.bytes_by_model import bytes_by_model
from lazymerge.inspection.forms import forms_of
from lazymerge.page.plan_document import plan_documents

from conftest import write_adapter, write_checkpoint
from merging import recipe_of
from page_plans import LAYERS, small_plan, tensors


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


def test_an_adapter_counts_for_its_model(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    write_adapter(tmp_path / "lora", factors, r=2, lora_alpha=4)
    for folder in ("base", "other"):
        write_checkpoint(tmp_path / folder, tensors())
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": "other", "parameters": {"weight": 1}},
            {"model": f"base+{tmp_path / 'lora'}", "parameters": {"weight": 1}},
        ],
    }
    plan = make_plan(recipe_of(tmp_path, recipe), Resources(4 << 30, workers=2))
    forms = forms_of(plan)
    other, adapted = bytes_by_model(plan, forms)
    assert other.read_bytes == other.size_bytes
    assert adapted.read_bytes + other.read_bytes == plan.bytes_read
    assert adapted.read_bytes > adapted.size_bytes  # the factors, too
    document, packed = plan_documents(plan)
    assert str(tmp_path / "lora") in {folder for _, folder, _ in packed["files"]}
    assert "LoRA" in document["models"][1]["adapter"]
