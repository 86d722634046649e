"""Merges of models with adapters: every method, every executor, and everything around a run.

Where whole numbers are small, W + scaling · B @ A is exact in float32, and a merge must give the
bytes that it gives of models whose adapters were folded in before.
"""

from __future__ import annotations

import json
import os
import random as random_module
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lazymerge
import numpy as np
import pytest
import torch
import yaml
from lazymerge.engine.execution import Kernels
from lazymerge.engine.native import library
from lazymerge.engine.null import walk_plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.reference import run_reference
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError
from lazymerge.methods import METHODS
from lazymerge.recipe import parse_recipe
from safetensors.torch import load_file

from conftest import write_adapter, write_checkpoint
from merging import bits, plan_of, run
from method_recipes import SETTINGS, model_counts, recipe_for

Tensors = dict[str, torch.Tensor]

ALL_KERNELS: list[Kernels] = ["native", "torch"] if library.is_available() else ["torch"]

SHAPES = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.mlp.up_proj.weight": (37, 24),
    "model.layers.1.mlp.up_proj.weight": (37, 24),
    "model.norm.weight": (24,),
}
PREFIX = "base_model.model."


def whole_numbers(generator: torch.Generator, shape: tuple[int, ...], most: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def factors(
    name: str, shape: tuple[int, ...], rank: int, generator: torch.Generator, most: int = 2
) -> Tensors:
    """Of a straight change of a matrix of this shape."""
    module = PREFIX + name.removesuffix(".weight")
    return {
        f"{module}.lora_A.weight": whole_numbers(generator, (rank, shape[1]), most),
        f"{module}.lora_B.weight": whole_numbers(generator, (shape[0], rank), most),
    }


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models m0 … m4 of whole numbers, their adapters a0 …, and both folded together, f0 …"""
    folder = tmp_path_factory.mktemp("exact")
    generator = torch.Generator().manual_seed(5)
    base = {name: whole_numbers(generator, shape, 9) for name, shape in SHAPES.items()}
    for number in range(5):
        tensors = {n: t + whole_numbers(generator, SHAPES[n], 2) for n, t in base.items()}
        adapter: Tensors = {}
        folded = dict(tensors)
        for name, shape in SHAPES.items():
            if "proj" not in name or (number == 3 and "up" in name):
                continue
            own = factors(name, shape, 4, generator)
            adapter |= own
            first, second = own.values()
            folded[name] = tensors[name] + 2 * (second @ first)
        write_checkpoint(folder / f"m{number}", tensors)
        write_adapter(folder / f"a{number}", adapter, r=4, lora_alpha=8)
        write_checkpoint(folder / f"f{number}", folded)
    return folder


def plan_document(document: Mapping[str, Any], **resources: Any) -> Any:
    recipe = parse_recipe(yaml.safe_dump(dict(document)), "recipe.yml", signatures())
    return make_plan(recipe, Resources(4 << 30, **{"workers": 2, **resources}))


def outputs(plan: Any, folder: Path) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in run(plan, folder).items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_adapters_on_all_its_models(
    method: str, exact: Path, tmp_path: Path
) -> None:
    signature = METHODS[method].signature
    for setting in SETTINGS:
        count = model_counts(signature, 4)[-1]
        folded, adapted = (
            recipe_for(
                signature,
                folders,
                count,
                setting=setting,
                random=random_module.Random(count),
            )
            for folders in (
                [exact / f"f{n}" for n in range(5)],
                [Path(f"{exact}/m{n}+{exact}/a{n}") for n in range(5)],
            )
        )
        expected = outputs(plan_document(folded), tmp_path / "folded")
        for kernels in ALL_KERNELS:
            plan = plan_document(adapted, kernels=kernels)
            assert outputs(plan, tmp_path / kernels) == expected, setting
        native = plan_document(folded).memory.libraries
        assert plan_document(adapted).memory.libraries == native


# ------------------------------------------------------------------- against float64


def norms(matrix: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((matrix**2).sum(axis=axis, keepdims=True))


def real(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.double().numpy())


CASES = ("plain", "transposed", "embedding", "dora", "dora transposed", "dora embedding", "conv")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Folded into a tensor of several blocks; by every executor."""
    generator = torch.Generator().manual_seed(2)
    rows, columns, rank, scaling = 700, 1100, 5, 3 / 5**0.5
    is_embedding, is_transposed = "embedding" in case, "transposed" in case
    if case == "conv":
        shape: tuple[int, ...] = (rows, 11, 10, 10)
    else:
        shape = (rows, columns)
    inputs, out = shape[1:], rows
    if is_embedding or is_transposed:
        inputs, out = (rows,), columns
    name = "model.embed_tokens" if is_embedding else "model.layers.0.proj"
    kind = "lora_embedding" if is_embedding else "lora"
    end = "" if is_embedding else ".weight"
    weight = torch.randn(shape, generator=generator).to(dtype)
    first = torch.randn((rank, *inputs), generator=generator).to(torch.bfloat16)
    second = torch.randn((out, rank, *[1] * (len(shape) - 2)), generator=generator) * 0.1
    tensors = {
        f"{PREFIX}{name}.{kind}_A{end}": first,
        f"{PREFIX}{name}.{kind}_B{end}": second,
    }
    product = real(second).reshape(out, rank) @ real(first).reshape(rank, -1)
    if is_embedding or is_transposed:
        product = product.T
    expected = real(weight) + scaling * product.reshape(shape)
    if "dora" in case:
        magnitude = torch.rand(out, generator=generator) * 30
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
        lengths = real(magnitude)
        if is_embedding or is_transposed:
            expected = expected / norms(expected, 0) * lengths[None]
        else:
            expected = expected / norms(expected, 1) * lengths[:, None]
    settings = {"r": rank, "lora_alpha": 3, "use_rslora": True, "use_dora": "dora" in case}
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"base+{adapter}"}],
        "dtype": "float64" if dtype is torch.float64 else "float32",
    }
    plan = plan_of(tmp_path, recipe, {"base": {f"{name}.weight": weight}})
    found = [
        run(plan.with_resources(Resources(4 << 30, 2, kernels=kernels)), tmp_path / kernels)
        for kernels in ALL_KERNELS
    ]
    (merged,) = found[0].values()
    assert all(bits(other[f"{name}.weight"]) == bits(merged) for other in found)
    precision = float(torch.finfo(merged.dtype).eps)
    bound = 4 * precision * (1 + np.abs(expected).max())
    assert np.abs(real(merged) - expected).max() <= bound
    (unrounded,) = run_reference(plan.graph).values()
    assert np.abs(real(unrounded) - expected).max() <= 1e-12 * (1 + np.abs(expected).max())


def test_adapters_of_float8_models(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(130, 64, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 1, generator=generator)
    name = "model.layers.0.q_proj.weight"
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write_checkpoint(tmp_path / "base", {name: weight, f"{name}_scale_inv": scale}, config)
    own = factors(name, (130, 64), 3, generator)
    adapter = write_adapter(tmp_path / "adapter", own, r=3, lora_alpha=3)
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"base+{adapter}"}],
        "dtype": "float32",
    }
    merged = run(plan_of(tmp_path, recipe, {}), tmp_path / "out")[name]
    first, second = own.values()
    scales = real(scale).repeat(128, axis=0)[:130]
    expected = real(weight) * scales + real(second) @ real(first)
    assert np.abs(real(merged) - expected).max() <= 1e-6 * np.abs(expected).max()


# --------------------------------------------------------------- what does not matter


def big(folder: Path, *, use_dora: bool = True) -> dict[str, Any]:
    """A recipe of models whose tensors have several blocks, and adapters of two kinds."""
    generator = torch.Generator().manual_seed(8)
    shapes = {
        "model.layers.0.up_proj.weight": (900, 1024),
        "model.layers.1.up_proj.weight": (333, 1999),
        "model.norm.weight": (500,),
    }
    for model in ("base", "a"):
        tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
        write_checkpoint(folder / model, tensors, {"model_type": "llama"})
        (folder / model / "tokenizer.json").write_text("{}")
    for adapter, rank in (("one", 4), ("two", 7)):
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 2:
                tensors |= factors(name, shape, rank, generator)
                if adapter == "two" and use_dora:
                    module = PREFIX + name.removesuffix(".weight")
                    tensors[f"{module}.lora_magnitude_vector"] = torch.rand(
                        shape[0], generator=generator
                    )
        is_dora = adapter == "two" and use_dora
        write_adapter(folder / adapter, tensors, r=rank, lora_alpha=1, use_dora=is_dora)
    return {
        "merge_method": "dare_ties",
        "base_model": f"{folder}/base+{folder}/one",
        "models": [
            {
                "model": f"{folder}/{model}+{folder}/two",
                "parameters": {"weight": 0.4, "density": 0.6},
            }
            for model in ("base", "a")
        ],
    }


def test_workers_and_ways_of_reading_do_not_matter(tmp_path: Path) -> None:
    document = big(tmp_path)
    found = [
        outputs(plan_document(document, **resources), tmp_path / str(number))
        for number, resources in enumerate(
            (
                {"workers": 1},
                {"workers": 5},
                {"workers": 2, "read_mode": "mmap"},
                {"workers": 3, "kernels": "torch"},
            )
        )
    ]
    assert all(other == found[0] for other in found)


def test_passes_are_those_over_the_tensors_and_not_over_factors(tmp_path: Path) -> None:
    plan = plan_document(big(tmp_path))
    assert plan.passes == {1: 1, 3: 2}  # the lengths of two models, and the last


def test_saved_plans(tmp_path: Path) -> None:
    plan = plan_document(big(tmp_path))
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json", Resources(4 << 30, 2))
    assert loaded.as_dict() == plan.as_dict()
    assert loaded.summary() == plan.summary()
    assert outputs(loaded, tmp_path / "later") == outputs(plan, tmp_path / "now")
    assert (tmp_path / "now" / "tokenizer.json").exists()


CHANGES = ("config", "weights", "time", "folder")


def change(adapter: Path, what: str) -> None:
    if what == "config":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2}))
    elif what == "weights":
        tensors = load_file(adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        del config["peft_type"]
        write_adapter(adapter, {n: t.bfloat16() for n, t in tensors.items()}, **config)
    elif what == "time":
        os.utime(adapter / "adapter_config.json", ns=(1, 1))
    else:
        adapter.rename(adapter.with_name("moved"))
        adapter.symlink_to(adapter.with_name("moved"))


@pytest.mark.parametrize("what", CHANGES)
def test_an_adapter_that_has_changed_is_noticed(what: str, tmp_path: Path) -> None:
    plan = plan_document(big(tmp_path, use_dora=False))
    plan.save(tmp_path / "plan.json")
    change(tmp_path / "one", what)
    if what != "folder":
        with pytest.raises(InputError, match=r"adapter_\w+\.\w+ has changed since the merge"):
            run_plan(plan, tmp_path / "out", fsync=False)
    with pytest.raises(InputError, match="is not what it was when"):
        load_plan(tmp_path / "plan.json", Resources(4 << 30, 2))
    assert plan_document(big_again(plan)).fingerprint != plan.fingerprint


def big_again(plan: Any) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(plan.recipe.text)
    return document


class Stop(Exception):
    """What ends a run early."""


class Stopper(Silent):
    def finished(self, tensor: str) -> None:
        raise Stop


def test_going_on_and_verifying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With relative paths, from another folder."""
    document = big(tmp_path)
    text = yaml.safe_dump(document).replace(f"{tmp_path}/", "")
    (tmp_path / "recipe.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    plan = lazymerge.plan("recipe.yml", workers=1)
    expected = outputs(plan, tmp_path / "whole")
    with pytest.raises(Stop):
        run_plan(plan, tmp_path / "out", fsync=False, observer=Stopper())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    report = run_plan(plan_of_unfinished(tmp_path / "out"), tmp_path / "out", fsync=False)
    assert report.resumed_tensors == 1
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in merged.items()} == expected
    assert verify_output(tmp_path / "out", recompute=3).problems == ()
    manifest = json.loads((tmp_path / "out" / "lazymerge.json").read_text())
    assert [model["adapter"]["ranks"] for model in manifest["models"]] == [[4], [7], [7]]


@pytest.mark.parametrize("what", ["config", "weights"])
def test_an_unfinished_output_whose_adapter_has_changed(what: str, tmp_path: Path) -> None:
    document = big(tmp_path, use_dora=False)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    with pytest.raises(Stop):
        run_plan(
            lazymerge.plan(tmp_path / "recipe.yml", workers=1),
            tmp_path / "out",
            fsync=False,
            observer=Stopper(),
        )
    change(tmp_path / "one", what)
    with pytest.raises(InputError, match=r"adapter_\w+\.\w+ has changed"):
        plan_of_unfinished(tmp_path / "out")
    with pytest.raises(InputError, match=r"adapter_\w+\.\w+ has changed"):
        run_plan(lazymerge.plan(tmp_path / "recipe.yml"), tmp_path / "out", fsync=False)


def test_a_model_within_another_merge(exact: Path, tmp_path: Path) -> None:
    def text(one: str, other: str) -> str:
        return (
            f"name: both\nmerge_method: slerp\nbase_model: {one}\nmodels: [{{model: {other}}}]\n"
            "parameters: {t: 0.5}\n---\nmerge_method: linear\nparameters: {weight: 0.5}\n"
            f"models: [{{model: both}}, {{model: {other}}}]\n"
        )

    def merged(name: str, recipe: str) -> dict[str, bytes]:
        plan = make_plan(parse_recipe(recipe, "recipe.yml", signatures()), Resources(4 << 30, 2))
        return outputs(plan, tmp_path / name)

    expected = merged("folded", text(f"{exact}/f0", f"{exact}/f1"))
    pairs = (f"{exact}/m{n}+{exact}/a{n}" for n in range(2))
    assert merged("adapted", text(*pairs)) == expected


def test_memory_counts_the_factors(tmp_path: Path) -> None:
    """Those of every tensor that may be worked on at a time."""
    generator = torch.Generator().manual_seed(8)
    shape = (64, 4096)
    name = "model.layers.0.up_proj.weight"
    write_checkpoint(tmp_path / "base", {name: torch.zeros(shape)})
    own = factors(name, shape, 500, generator)
    write_adapter(tmp_path / "a", own, r=500)
    document: dict[str, Any] = {"merge_method": "passthrough"}
    document["models"] = [{"model": f"{tmp_path}/base+{tmp_path}/a"}]
    plan = plan_document(document)
    walk_plan(plan)
    elements = 500 * sum(shape)
    assert 4 * elements < plan.memory.statistics_bytes < 16 * elements
