"""Two models compared in one pass, against whole tensors in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import lazymerge as lm
import numpy as np
import pytest
import torch
from lazymerge.engine import comparing
from lazymerge.engine.comparing import run_comparison
from lazymerge.engine.comparison import plan_comparison
from lazymerge.engine.resources import Resources
from lazymerge.engine.statistics import change_of
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError

from conftest import needs_kernels, write_adapter, write_checkpoint

GENERATOR_SEED = 17
LARGE = (600, 1000)  # three blocks, the last of them ragged

CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "transformers_version": "1"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return {
        "model.embed_tokens.weight": torch.randn(LARGE, generator=generator),
        **{
            f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(40, 50, generator=generator)
            for layer in range(3)
        },
        "model.norm.weight": torch.randn(50, generator=generator),
        "steps": torch.arange(7),
    }


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the models one and two in it."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(GENERATOR_SEED + 1)
    one = tensors()
    two = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and "layers.1" not in name
        else tensor
        for name, tensor in one.items()
    }
    write_checkpoint(tmp_path / "one", one, CONFIG)
    write_checkpoint(tmp_path / "two", {n: in_half(t) for n, t in two.items()}, CONFIG, shards=2)
    return tmp_path


def in_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def test_changes_are_those_of_whole_tensors(pair: Path) -> None:
    found = lm.diff("one", pair / "two", memory="1GiB")
    one = tensors()
    assert list(found.tensors) == [name for name in one if name != "steps"]
    two = whole("two")
    for name, tensor in found.tensors.items():
        before, after = (values[name].double().numpy().ravel() for values in (one, two))
        change = change_of([tensor])
        assert change is not None
        assert change.elements == before.size
        assert change.norm == pytest.approx(np.linalg.norm(after - before), rel=1e-6)
        assert change.relative == pytest.approx(change.norm / np.linalg.norm(before), rel=1e-6)
        assert change.fraction == np.count_nonzero(after != before) / before.size
        assert change.largest == pytest.approx(np.abs(after - before).max(), rel=1e-6)
        cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
        assert change.cosines == pytest.approx({"one": cosine}, rel=1e-9)
    assert found.bytes_read == found.plan.bytes_read
    assert found.equal == ("steps",)
    first = found.plan.dtypes[0]
    assert (first.name, first.first, first.second) == ("model.embed_tokens.weight", "F32", "F16")


def whole(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    held: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        held |= load_file(file)
    return held


@needs_kernels
def test_workers_and_kernels_change_nothing(pair: Path) -> None:
    ways = [
        Resources(workers=1),
        Resources(workers=3),
        Resources(workers=2, kernels="torch", limit_bytes=4 << 30),
    ]
    found = [run_comparison(plan_comparison("one", "two", way)).tensors for way in ways]
    assert found[0] == found[1] == found[2]


def test_a_model_equals_itself(pair: Path) -> None:
    found = lm.diff("one", "one")
    assert found.is_same
    assert len(found.equal) == 6
    change = change_of(found.tensors.values())
    assert change is not None
    assert (change.norm, change.fraction, change.largest) == (0, 0, 0)


def test_what_is_not_in_both(pair: Path) -> None:
    two = tensors()
    del two["model.norm.weight"]
    two["extra"] = torch.zeros(3)
    two["steps"] = torch.arange(7) + 1
    two["model.layers.0.mlp.up_proj.weight"] = torch.zeros(41, 50)
    config = {**CONFIG, "rope_theta": 5e5, "transformers_version": "2", "vocab_size": 7}
    write_checkpoint(pair / "other", two, config)
    (pair / "one" / "tokenizer.json").write_text("{}")
    (pair / "other" / "tokenizer.json").write_text("{ }")
    (pair / "other" / "merges.txt").write_text("")
    found = lm.diff("one", "other")
    plan = found.plan
    assert (plan.only_first, plan.only_second) == (("model.norm.weight",), ("extra",))
    assert [(d.name, d.first, d.second) for d in plan.shapes] == [
        ("model.layers.0.mlp.up_proj.weight", "[40, 50]", "[41, 50]")
    ]
    assert found.unequal_integers == ("steps",)
    assert [(d.name, d.first, d.second) for d in plan.config] == [
        ("rope_theta", "10000.0", "500000.0"),
        ("vocab_size", None, "7"),
    ]
    assert [d.name for d in plan.files] == ["merges.txt", "tokenizer.json"]
    assert not found.is_same


def test_tensors_of_some_names(pair: Path) -> None:
    found = lm.diff("one", "two", tensors=r"layers\.[01]")
    assert [name.split(".")[2] for name in found.tensors] == ["0", "1"]
    assert found.plan.only_first == ()


def test_other_names_for_the_same(pair: Path) -> None:
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors().items()}
    write_checkpoint(pair / "bare", renamed, CONFIG)
    found = lm.diff("one", "bare")
    assert len(found.equal) == 6
    assert any("other names" in notice for notice in found.plan.notices)


def test_an_adapter(pair: Path) -> None:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    left, right = torch.randn(40, 2, generator=generator), torch.randn(2, 50, generator=generator)
    module = "base_model.model.model.layers.2.mlp.up_proj"
    write_adapter(
        pair / "lora",
        {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left},
        r=2,
        lora_alpha=4,
        target_modules=["up_proj"],
    )
    found = lm.diff("one", "one+lora")
    changed = {name for name in found.tensors if name not in found.equal}
    assert changed == {"model.layers.2.mlp.up_proj.weight"}
    change = change_of(found.tensors.values())
    assert change is not None
    expected = np.linalg.norm(2.0 * (left.double() @ right.double()).numpy())
    assert change.norm == pytest.approx(expected, rel=1e-5)


def test_a_limit_that_is_too_small(pair: Path) -> None:
    with pytest.raises(DoesNotFitError, match="smallest limit"):
        plan_comparison("one", "two", Resources(limit_bytes=1 << 20))


def test_a_model_that_is_not_there(pair: Path) -> None:
    with pytest.raises(InputError):
        lm.diff("one", "three")


def test_a_file_that_changes_meanwhile(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_comparison("one", "two")
    stream = comparing._stream

    def changing(*arguments: object) -> int:
        held = stream(*arguments)  # type: ignore[arg-type]
        (pair / "one" / "model.safetensors").touch()
        return held

    monkeypatch.setattr(comparing, "_stream", changing)
    with pytest.raises(LazymergeError, match="was changed"):
        run_comparison(plan)


def test_nan_equals_nothing(pair: Path) -> None:
    one = tensors()
    one["model.norm.weight"][2] = float("nan")
    write_checkpoint(pair / "with-nan", one, CONFIG)
    found = lm.diff("with-nan", "with-nan")
    assert "model.norm.weight" not in found.equal
    assert not replace(found).is_same


def test_the_document_is_json_of_numbers(pair: Path) -> None:
    from lazymerge.cli.diff import diff_document

    document = diff_document(lm.diff("one", "two"))
    json.dumps(document, allow_nan=False)
    assert document["statistics"]["layers"][0]["name"] == "model.layers.0"
