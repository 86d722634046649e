"""Merges that use other merges as models: one graph, and the bytes of one merge after the other."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.planning import signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError, RecipeError
from lazymerge.graph.compile import seed_of_part
from lazymerge.recipe import parse_recipe
from safetensors.torch import load_file

from conftest import write_checkpoint
from method_recipes import recipe_for

METHODS = sorted(set(signatures()) - {"passthrough"})
SHAPES = {"model.layers.0.w": (70, 60), "model.layers.1.w": (33, 41), "model.norm.weight": (50,)}


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Four models of bfloat16 tensors; the first is the base of the others."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    names = []
    for number in range(4):
        tensors = {
            name: (values + 0.1 * number * torch.randn(values.shape, generator=generator)).to(
                torch.bfloat16
            )
            for name, values in base.items()
        }
        write_checkpoint(
            tmp_path / f"m{number}", tensors, {"model_type": "llama", "num_hidden_layers": 2}
        )
        names.append(str(tmp_path / f"m{number}"))
    return names


def merged(documents: list[dict[str, Any]], out: Path, **resources: Any) -> dict[str, torch.Tensor]:
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    plan = lazymerge.plan(path).with_resources(Resources(4 << 30, workers=2, **resources))
    run_plan(plan, out, fsync=False)
    return load_file(out / "model.safetensors")


def document(method: str, models: list[str], **more: Any) -> dict[str, Any]:
    """A recipe of as many of the models as the method takes, the base first."""
    signature = signatures()[method]
    count = max(2, signature.min_models)
    folders = [Path(model) for model in models]
    made = recipe_for(signature, folders * 2, count, random=Random(3))
    return {**made, "seed": 3, **more}


def in_two_steps(
    first: dict[str, Any], second: dict[str, Any], folder: Path
) -> dict[str, torch.Tensor]:
    """The merges one after the other, with a model between them of the dtype that the first one
    computes in."""
    named = parse_recipe(yaml.safe_dump(first), "recipe.yml", signatures())
    alone = {key: value for key, value in first.items() if key != "name"}
    (folder / "first.yml").write_text(yaml.safe_dump(alone))
    graph = lazymerge.plan(folder / "first.yml").graph
    computed = {graph.block_node(write.source).dtype for write in graph.writes}
    dtype = "float64" if computed == {"F64"} else "float32"
    merged([{**alone, "out_dtype": dtype, "seed": seed_of_part(named)}], folder / "between")
    text = json.dumps(second).replace(
        json.dumps(first["name"]), json.dumps(str(folder / "between"))
    )
    return merged([json.loads(text)], folder / "second")


def check(first: dict[str, Any], second: dict[str, Any], folder: Path) -> None:
    expected = in_two_steps(first, second, folder)
    for kernels in (None, "torch"):
        found = merged([first, second], folder / f"at once {kernels}", kernels=kernels)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (name, kernels)


@pytest.mark.parametrize("method", METHODS)
def test_any_merge_may_be_a_model(models: list[str], tmp_path: Path, method: str) -> None:
    first = document(method, models, name="inner merge")
    second = document("slerp", [models[3], "inner merge"], out_dtype="float32")
    check(first, second, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_any_merge_may_have_one(models: list[str], tmp_path: Path, method: str) -> None:
    first = document("slerp", models[:2], name="inner merge")
    second = document(method, [models[2], "inner merge", models[3]], out_dtype="float32")
    check(first, second, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranking", ["della", "della_linear"])
def test_any_merge_may_have_one_that_ranks_rows(
    models: list[str], tmp_path: Path, method: str, ranking: str
) -> None:
    """It waits until a block is whole, in the middle of another method's work on that block."""
    first = document(ranking, models, name="inner merge")
    second = document(method, [models[2], "inner merge", models[3]], out_dtype="float32")
    check(first, second, tmp_path)


@pytest.mark.parametrize("method", ["ties", "della", "dare_linear", "karcher"])
def test_merges_that_rank_rows_within_each_other(
    models: list[str], tmp_path: Path, method: str
) -> None:
    """Three of them in one block, one within another, and one used twice."""
    documents = [
        {"name": "x", **document("della", models)},
        {"name": "y", **document("della_linear", [models[1], models[2], models[3]])},
        {"name": "z", **document("della", ["x", models[3], "y"])},
        document(method, ["y", "z", "x", models[0]], out_dtype="float32"),
    ]
    native = merged(documents, tmp_path / "native")
    found = merged(documents, tmp_path / "torch", kernels="torch")
    assert all(torch.equal(native[name], tensor) for name, tensor in found.items())


def test_as_base_and_several_deep(models: list[str], tmp_path: Path) -> None:
    weight = {"parameters": {"weight": 0.5}}
    documents = [
        {
            "merge_method": "dare_ties",
            "base_model": "b",
            "models": [{"model": "a", "parameters": {"weight": 0.5, "density": 0.6}}],
            "out_dtype": "bfloat16",
        },
        {"name": "b", **document("linear", models[:2])},
        {
            "name": "a",
            "merge_method": "linear",
            "models": [{"model": "b", **weight}, {"model": models[3], **weight}],
        },
    ]
    out = tmp_path / "out"
    merged(documents, out)
    assert lazymerge.verify(out, recompute=9).problems == ()
    plan = lazymerge.plan(tmp_path / "out.yml")
    assert [*plan.checkpoints] == [models[0], models[1], models[3]]
    assert plan.config == {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "torch_dtype": "bfloat16",
    }
    plan.save(tmp_path / "plan.json")
    run_plan(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "again", fsync=False)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()
    other = lazymerge.plan(tmp_path / "out.yml", seed=4)
    assert other.fingerprint != plan.fingerprint
    other.save(tmp_path / "other.json")
    assert lazymerge.plan(tmp_path / "other.json").fingerprint == other.fingerprint


def test_slices_of_a_merge(models: list[str], tmp_path: Path) -> None:
    documents = [
        {"name": "both", **document("slerp", models[:2])},
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "both", "layer_range": [0, 1]}]},
                {"sources": [{"model": models[2], "layer_range": [1, 2]}]},
                {"sources": [{"model": "both", "layer_range": [0, 1]}]},
            ],
        },
    ]
    found = merged(documents, tmp_path / "out")
    assert torch.equal(found["model.layers.0.w"], found["model.layers.2.w"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"name": "x"}, {"name": "x"}], "two merges are named 'x', first in line 1"),
        ([{}, {}], "two merges have no name"),
        ([{"name": "x"}, {"name": "y"}], "one merge must be the last"),
        (
            [
                {"name": "x", "tokenizer_source": "y"},
                {"name": "y", "models": [{"model": "x"}]},
                {"models": [{"model": "x"}]},
            ],
            "merges use each other in a circle: x uses y uses x",
        ),
        (
            [
                {"name": "x", "models": [{"model": "y"}]},
                {"name": "y", "models": [{"model": "x"}]},
                {"models": [{"model": "x"}]},
            ],
            "merges use each other in a circle: x uses y uses x",
        ),
    ],
)
def test_documents_that_do_not_lead_to_one(documents: list[dict[str, Any]], message: str) -> None:
    whole = [{"models": [{"model": "m"}], "merge_method": "passthrough", **d} for d in documents]
    text = yaml.safe_dump_all(
        [{k: d[k] for k in sorted(d, key="name".__ne__)} for d in whole], sort_keys=False
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yml", signatures())
    assert message in str(caught.value)


def test_what_is_not_used_is_said() -> None:
    text = "\n---\n".join(
        f"{name}merge_method: passthrough\nmodels: [{{model: m}}]" for name in ("name: x\n", "")
    )
    recipe = parse_recipe(text, "recipe.yml", signatures())
    assert recipe.merges == ()
    assert [warning.message for warning in recipe.warnings] == ["the merge 'x' is not used"]


def test_results_cannot_be_cut(models: list[str], tmp_path: Path) -> None:
    for number, rows in enumerate((7, 7, 9)):
        write_checkpoint(Path(models[number]), {"lm_head.weight": torch.ones(rows, 4)})
    documents = [
        {"name": "x", **document("slerp", models[:2])},
        document("slerp", ["x", models[2]]),
    ]
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump_all(documents))
    with pytest.raises(InputError, match="what another merge gives cannot be cut"):
        lazymerge.plan(path, truncate_embeddings=True)


def test_an_adapter_on_a_merge_of_the_file(models: list[str], tmp_path: Path) -> None:
    documents = [
        {**document("linear", models), "name": "both"},
        {
            "merge_method": "linear",
            "models": [
                {"model": f"both+{models[2]}", "parameters": {"weight": 1}},
                {"model": "both", "parameters": {"weight": 1}},
            ],
        },
    ]
    with pytest.raises(InputError, match="An adapter cannot be put on the merge 'both' of this"):
        merged(documents, tmp_path / "out")
