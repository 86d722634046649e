"""Merges of many families of models load in transformers and compute what the same merge, made in
memory by torch, computes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.errors import InputError
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
    inspected = lazymerge.inspect(str(tmp_path / "base"), scan=True)
    for each in (*lazymerge.suspicions(plan), *inspected.suspicions):
        assert each.severity == "note", each
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
SLICED += ["falcon", "mixtral", "qwen3-moe", "deepseek-v3", "mamba", "qwen2-moe", "mllama, text"]
SLICED += ["lfm2", "gpt-neo", "nemotron-h"]


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
    assert plan.notices == ()
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


def passthrough_of(folder: Path, model: Path, *ranges: list[int]) -> Path:
    """Writes a recipe that puts layers of one model together anew; returns its path."""
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(model), "layer_range": layers}]} for layers in ranges
        ],
    }
    (folder / "slices.yml").write_text(yaml.safe_dump(recipe))
    return folder / "slices.yml"


def test_a_period_of_layers(tmp_path: Path) -> None:
    """Jamba's config can say no more of its layers than a period and where it begins."""
    torch.manual_seed(1)
    family = FAMILIES["jamba"]
    family.make().save_pretrained(tmp_path / "model")
    # mamba, attention, mamba: another period says it
    plan = lazymerge.plan(passthrough_of(tmp_path, tmp_path / "model", [0, 3], [0, 3]))
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not said["missing_keys"], said
    assert not said["unexpected_keys"], said
    assert [layer % 3 == 1 for layer in range(6)] == [
        hasattr(layer, "self_attn") for layer in loaded.model.layers
    ]
    # none does
    plan = lazymerge.plan(passthrough_of(tmp_path, tmp_path / "model", [0, 2], [1, 3], [0, 3]))
    assert [notice.split(" in config.json")[0] for notice in plan.notices] == [
        f"layers 2 and 3 of model.layers are of another kind than {key}"
        for key in ("attn_layer_period", "expert_layer_period")
    ]


def test_kinds_of_layers_by_a_key_that_is_not_known(tmp_path: Path) -> None:
    """Their tensors show it."""
    FAMILIES["jamba"].make().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({k.replace("_period", "_every"): value for k, value in config.items()})
    )
    plan = lazymerge.plan(passthrough_of(tmp_path, tmp_path / "model", [0, 3]))
    assert plan.notices == ()
    # mamba, attention, attention, mamba
    plan = lazymerge.plan(passthrough_of(tmp_path, tmp_path / "model", [0, 2], [1, 3]))
    (notice,) = plan.notices
    assert notice.startswith("layers 2 and 3 of model.layers may have other tensors than")


def test_layers_beyond_those_that_the_config_counts(tmp_path: Path) -> None:
    """A layer that predicts a further token stays one at the end, and is none elsewhere."""
    torch.manual_seed(1)
    family = FAMILIES["deepseek-v3"]
    longer = replace(family, settings={**family.settings, "num_hidden_layers": 4})
    longer.make().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    counts = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    lists = {key: config[key][:3] for key in ("layer_types", "mlp_layer_types") if key in config}
    path.write_text(json.dumps({**config, **counts, **lists}))
    plan = lazymerge.plan(passthrough_of(tmp_path, tmp_path / "model", [0, 3], [1, 4]))
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not said["missing_keys"], said
    assert all(name.startswith("model.layers.5.") for name in said["unexpected_keys"]), said
    assert (loaded.config.num_hidden_layers, loaded.config.num_nextn_predict_layers) == (5, 1)
    plan = lazymerge.plan(passthrough_of(tmp_path, tmp_path / "model", [0, 3], [1, 3]))
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "without", fsync=False)
    loaded, said = family.load(tmp_path / "without")
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys")), said
    assert (loaded.config.num_hidden_layers, loaded.config.num_nextn_predict_layers) == (5, 0)


def test_layers_put_together_twice(tmp_path: Path) -> None:
    """Slices of a merge of the same file, whose own layers are put together."""
    family = FAMILIES["qwen2-moe"]
    family.make().save_pretrained(tmp_path / "model")

    def slices(model: str, *ranges: list[int]) -> dict[str, Any]:
        pieces = [{"sources": [{"model": model, "layer_range": layers}]} for layers in ranges]
        return {"merge_method": "passthrough", "slices": pieces}

    # dense 0 2, sparse 1: layers 0 1 0 1 2, then 0 1 0 1 2 1 2
    documents = [
        {"name": "longer", **slices(str(tmp_path / "model"), [0, 2], [0, 3])},
        slices("longer", [0, 5], [3, 5]),
    ]
    (tmp_path / "twice.yml").write_text(yaml.safe_dump_all(documents))
    plan = lazymerge.plan(tmp_path / "twice.yml")
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys")), said
    assert loaded.config.num_hidden_layers == 7
    assert torch.isfinite(outputs(loaded.eval())).all()


def test_a_config_that_does_not_say_how_many_layers_there_are(tmp_path: Path) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    recipe = passthrough_of(tmp_path, tmp_path / "model", [0, 3], [1, 3])
    path.write_text(json.dumps({**config, "num_hidden_layers": 8}))
    with pytest.raises(InputError, match=r"config.json does not say that model\.layers has 3"):
        lazymerge.plan(recipe)
    path.unlink()
    assert lazymerge.plan(recipe).config is None
    del config["num_hidden_layers"]
    path.write_text(json.dumps(config))
    plan = lazymerge.plan(recipe)
    assert plan.notices[0].startswith("num_hidden_layers, 5, was added to config.json")
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, _ = FAMILIES["llama"].load(tmp_path / "out")
    assert len(loaded.model.layers) == 5


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
