"""Output heads of models that tie them, in merges with models that do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.recipe import parse_recipe

from conftest import write_checkpoint
from merging import run

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"
ROWS, WIDTH = 12, 8

Tensors = dict[str, torch.Tensor]


def model(folder: Path, seed: int, *, tied: bool | None, stores_head: bool) -> Tensors:
    """Writes a model of two layers. tied: what its config says; None: nothing."""
    generator = torch.Generator().manual_seed(seed)
    names = [EMBEDDING, *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))]
    tensors = {name: torch.randn(ROWS, WIDTH, generator=generator) for name in names}
    tensors[NORM] = torch.randn(WIDTH, generator=generator)
    if stores_head:
        own = torch.randn(ROWS, WIDTH, generator=generator)
        tensors[HEAD] = tensors[EMBEDDING].clone() if tied else own
    config: dict[str, Any] = {"model_type": "llama", "vocab_size": ROWS, "num_hidden_layers": 2}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    write_checkpoint(folder, tensors, config)
    return tensors


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Tensors]:
    """Of heads of their own, without them, with copies of the embedding, and exported without."""
    monkeypatch.chdir(tmp_path)
    return {
        "a": model(tmp_path / "a", 1, tied=False, stores_head=True),
        "b": model(tmp_path / "b", 2, tied=False, stores_head=True),
        "ta": model(tmp_path / "ta", 3, tied=True, stores_head=False),
        "tb": model(tmp_path / "tb", 4, tied=True, stores_head=False),
        "silent": model(tmp_path / "silent", 5, tied=None, stores_head=False),
        "copied": model(tmp_path / "copied", 6, tied=True, stores_head=True),
        "headless": model(tmp_path / "headless", 7, tied=False, stores_head=False),
    }


def plan_of(*documents: Mapping[str, Any]) -> Plan:
    text = yaml.safe_dump_all(documents)
    return make_plan(parse_recipe(text, "recipe.yml", signatures()), Resources(4 << 30, workers=1))


def merge(*models: str, method: str = "linear", base: str | None = None) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    recipe = {"merge_method": method, "models": entries}
    return recipe if base is None else {**recipe, "base_model": base}


def slices(*parts: tuple[str, ...]) -> dict[str, Any]:
    """The first layer of each part's models, one after the other."""
    pieces = [{"sources": [{"model": m, "layer_range": [0, 1]} for m in part]} for part in parts]
    if all(len(part) == 1 for part in parts):
        return {"merge_method": "passthrough", "slices": pieces}
    return {"merge_method": "linear", "slices": pieces, "parameters": {"weight": 1.0}}


def tying(plan: Plan) -> object:
    assert plan.config is not None
    return plan.config.get("tie_word_embeddings")


def said(plan: Plan, text: str) -> bool:
    return any(text in notice for notice in plan.notices)


@pytest.mark.parametrize(
    ("names", "is_changed"),
    [
        (("a", "ta"), False),
        (("ta", "a"), True),
        (("silent", "b"), True),
        (("copied", "a"), True),
        (("a", "copied", "tb"), False),
    ],
)
def test_the_embedding_of_tied_models_is_merged_as_their_head(
    names: tuple[str, ...], is_changed: bool, models: Mapping[str, Tensors], tmp_path: Path
) -> None:
    plan = plan_of(merge(*names))
    merged = run(plan, tmp_path / "out")
    given = [models[name] for name in names]
    own = [models[name][HEAD if name in ("a", "b") else EMBEDDING] for name in names]
    torch.testing.assert_close(merged[HEAD], sum(own) / len(names))
    torch.testing.assert_close(merged[EMBEDDING], sum(m[EMBEDDING] for m in given) / len(names))
    assert tying(plan) is False
    assert said(plan, "are merged as their output heads, since they are tied: lm_head.weight")
    assert said(plan, "tie_word_embeddings: false, since the output has a head") is is_changed


def test_a_tied_base_has_its_embedding_as_head(
    models: Mapping[str, Tensors], tmp_path: Path
) -> None:
    plan = plan_of(merge("a", "b", method="task_arithmetic", base="ta"))
    base = models["ta"][EMBEDDING]
    expected = base + 0.5 * (models["a"][HEAD] - base) + 0.5 * (models["b"][HEAD] - base)
    torch.testing.assert_close(run(plan, tmp_path / "out")[HEAD], expected)
    assert tying(plan) is False


def test_a_base_that_has_no_part_in_the_merge_only_gives_its_config(
    models: Mapping[str, Tensors], tmp_path: Path
) -> None:
    plan = plan_of(merge("a", "b", base="ta"))
    assert tying(plan) is False
    assert not said(plan, "are merged as their output heads")
    plan = plan_of(merge("ta", "tb", base="a"))
    assert tying(plan) is False
    mean = (models["ta"][EMBEDDING] + models["tb"][EMBEDDING]) / 2
    torch.testing.assert_close(run(plan, tmp_path / "out")[HEAD], mean)


def test_tied_models_give_a_tied_model(models: Mapping[str, Tensors]) -> None:
    for names in (("ta", "tb"), ("copied", "ta"), ("copied",), ("copied", "silent")):
        plan = plan_of(merge(*names))
        assert HEAD not in {write.name for write in plan.graph.writes}
        assert tying(plan) is True
    plan = plan_of(merge("copied", "ta"))
    assert said(plan, "copied uses its input embedding as output head, as its config.json says")


def test_an_export_without_its_head_has_none(models: Mapping[str, Tensors]) -> None:
    plan = plan_of(merge("a", "headless"))
    assert said(plan, "merged without headless, which lack the tensor: lm_head.weight")


@pytest.mark.parametrize(
    ("parts", "head"),
    [
        ((("a",), ("ta",)), "ta"),
        ((("ta",), ("a",)), "a"),
        ((("a",), ("copied",)), "copied"),
        ((("ta",), ("a",), ("tb",)), None),
        ((("ta",), ("tb",)), None),
        ((("ta",), ("a", "b")), "a"),
    ],
)
def test_the_head_of_slices_is_the_last_models(
    parts: tuple[tuple[str, ...], ...],
    head: str | None,
    models: Mapping[str, Tensors],
    tmp_path: Path,
) -> None:
    plan = plan_of(slices(*parts))
    merged = run(plan, tmp_path / "out")
    if head is None:
        assert HEAD not in merged
        assert tying(plan) is True
        return
    given = [models[name].get(HEAD) for name in parts[-1]]
    if head in ("ta", "copied"):
        given = [models[head][EMBEDDING]]
    torch.testing.assert_close(merged[HEAD], sum(x for x in given if x is not None) / len(given))
    assert torch.equal(merged[EMBEDDING], models[parts[0][0]][EMBEDDING])
    assert tying(plan) is False


def test_documents_and_modules(models: Mapping[str, Tensors], tmp_path: Path) -> None:
    """What one merge gives is tied, or has a head, for the next."""
    whole = merge("tied", "untied")
    tied, untied = {"name": "tied", **merge("ta", "tb")}, {"name": "untied", **merge("tb", "a")}
    plan = plan_of(tied, untied, whole)
    both = (models["ta"][EMBEDDING] + models["tb"][EMBEDDING]) / 2
    other = (models["tb"][EMBEDDING] + models["a"][HEAD]) / 2
    torch.testing.assert_close(run(plan, tmp_path / "out")[HEAD], (both + other) / 2)
    assert tying(plan) is False

    entries = merge("ta", "a")["models"]
    plan = plan_of({"merge_method": "linear", "modules": {"default": {"models": entries}}})
    mean = (models["ta"][EMBEDDING] + models["a"][HEAD]) / 2
    torch.testing.assert_close(run(plan, tmp_path / "modules")[HEAD], mean)
    assert tying(plan) is False


def test_random_methods_do_not_part_head_and_embedding(
    models: Mapping[str, Tensors], tmp_path: Path
) -> None:
    recipe = merge("ta", method="dare_linear", base="copied")
    recipe["parameters"] = {"density": 0.5}
    plan = plan_of(recipe)
    assert HEAD not in run(plan, tmp_path / "out")
    assert tying(plan) is True
