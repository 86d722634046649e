"""Merges of many families of models load in transformers and compute what the same merge, made in
memory by torch, computes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from families import FAMILIES, Family, outputs, perturbed

WEIGHTS = {"first": 0.7, "second": 0.4}


def merged_in_memory(base: Any, fine_tunes: dict[str, Any]) -> Any:
    """Task arithmetic over float64 copies of the parameters."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    others = {name: dict(other.named_parameters()) for name, other in fine_tunes.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            exact = parameter.double()
            for other, weight in WEIGHTS.items():
                exact = exact + weight * (others[other][name].double() - parameter.double())
            parameter.copy_(exact)
    return model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def write_merge(base: Any, fine_tunes: dict[str, Any], folder: Path) -> Path:
    """Writes the models and the recipe of their merge; returns the recipe's path."""
    for name, model in {"base": base, **fine_tunes}.items():
        model.save_pretrained(folder / name)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": weight}}
            for name, weight in WEIGHTS.items()
        ],
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yml"


def models_of(family: Family) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    base = family.make()
    return base, {
        name: perturbed(copy.deepcopy(base), seed) for seed, name in enumerate(WEIGHTS, 2)
    }


def test_a_merge_of_whole_models(family: Family, tmp_path: Path) -> None:
    base, fine_tunes = models_of(family)
    plan = lazymerge.plan(write_merge(base, fine_tunes, tmp_path))
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not said["missing_keys"], said
    assert not said["unexpected_keys"], said
    assert not said["mismatched_keys"], said
    expected = merged_in_memory(base, fine_tunes)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(
            dict(loaded.named_parameters())[name], parameter, rtol=1e-6, atol=1e-7
        )
    found = outputs(loaded.eval())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, outputs(expected), rtol=1e-3, atol=1e-4)


def other_llava(name: str) -> str:
    """As some versions of transformers name a llava's tensors."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return f"model.{name}"


@pytest.mark.parametrize(
    ("family_name", "rename"),
    [
        ("llava", other_llava),
        ("llama", lambda name: f"_orig_mod.{name}"),
        ("bert", lambda name: name.removeprefix("bert.")),
    ],
)
def test_other_names_for_the_same_tensors(
    family_name: str, rename: Callable[[str], str], tmp_path: Path
) -> None:
    recipe = write_merge(*models_of(FAMILIES[family_name]), tmp_path)
    lazymerge.run(lazymerge.plan(recipe), tmp_path / "out", fsync=False)
    path = tmp_path / "first" / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    plan = lazymerge.plan(recipe)
    (notice,) = plan.notices
    assert f"{tmp_path}/first has other names for the same tensors: " in notice
    plan.save(tmp_path / "plan.json")
    lazymerge.run(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "again", fsync=False)
    assert lazymerge.verify(tmp_path / "again", recompute=3).problems == ()
    for shard in plan.shards:
        assert (tmp_path / "out" / shard.file).read_bytes() == (
            tmp_path / "again" / shard.file
        ).read_bytes()


SLICED = ["llama", "mistral", "qwen2", "qwen3", "gemma 2", "gemma 3", "phi 3", "gpt2", "gpt-neox"]
SLICED += ["falcon", "mixtral", "qwen3-moe", "deepseek-v3", "mamba"]


@pytest.mark.parametrize("family_name", SLICED)
def test_a_frankenmerge(family_name: str, tmp_path: Path) -> None:
    """Layers 0 1 of one, 1 2 of the other, and 2 of the first again."""
    family = FAMILIES[family_name]
    base, fine_tunes = models_of(family)
    write_merge(base, fine_tunes, tmp_path)
    parts = [("base", 0, 2), ("first", 1, 3), ("base", 2, 3)]
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(tmp_path / name), "layer_range": [start, stop]}]}
            for name, start, stop in parts
        ],
    }
    (tmp_path / "slices.yml").write_text(yaml.safe_dump(recipe))
    plan = lazymerge.plan(tmp_path / "slices.yml")
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not said["missing_keys"], said
    assert not said["unexpected_keys"], said
    assert not said["mismatched_keys"], said
    assert torch.isfinite(outputs(loaded.eval())).all()
    origins = [(name, layer) for name, start, stop in parts for layer in range(start, stop)]
    inputs = {n: load_file(tmp_path / n / "model.safetensors") for n in ("base", "first")}
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        place = re.search(r"\.(\d+)\.", name)
        if place is None:
            assert torch.equal(tensor, inputs["base"][name])
            continue
        model, layer = origins[int(place[1])]
        before = name[: place.start()] + f".{layer}." + name[place.end() :]
        assert torch.equal(tensor, inputs[model][before])
    types = getattr(loaded.config, "layer_types", None)
    if types is not None:
        assert types == [base.config.layer_types[layer] for _, layer in origins]


def test_modules_of_a_model_that_hears(tmp_path: Path) -> None:
    """The encoder merged as a whole, the decoder made of slices."""
    family = FAMILIES["whisper"]
    base, fine_tunes = models_of(family)
    write_merge(base, fine_tunes, tmp_path)
    names = [str(tmp_path / name) for name in ("base", "first")]
    recipe = {
        "merge_method": "linear",
        "base_model": names[0],
        "modules": {
            "encoder": {
                "models": [{"model": name} for name in names],
                "parameters": {"weight": 0.5},
            },
            "decoder": {
                "slices": [
                    {"sources": [{"model": name, "layer_range": [0, 2]} for name in names]},
                    {"sources": [{"model": name, "layer_range": [0, 3]} for name in names]},
                ],
                "parameters": {"weight": [0.2, 0.8]},
            },
        },
    }
    (tmp_path / "modules.yml").write_text(yaml.safe_dump(recipe))
    plan = lazymerge.plan(tmp_path / "modules.yml")
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not said["missing_keys"], said
    assert not said["unexpected_keys"], said
    assert (loaded.config.encoder_layers, loaded.config.decoder_layers) == (3, 5)
    assert torch.isfinite(outputs(loaded.eval())).all()
    assert lazymerge.verify(tmp_path / "out", recompute=5).problems == ()
    found, inputs = dict(loaded.named_parameters()), dict(base.named_parameters())
    others = dict(fine_tunes["first"].named_parameters())
    name = "model.encoder.layers.1.fc1.weight"
    torch.testing.assert_close(found[name], (inputs[name] + others[name]) / 2)
    name = "model.decoder.layers.{}.fc1.weight"
    torch.testing.assert_close(
        found[name.format(3)], (inputs[name.format(1)] + others[name.format(1)]) / 2
    )
