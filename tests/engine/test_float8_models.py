"""Merges of block-quantised float8 models: the bytes that the same values in float64 give."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.checkpoint.block_scales import SUFFIX
from lazymerge.engine.execution import Kernels
from lazymerge.engine.native import library
from lazymerge.engine.null import walk_plan
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.reference import run_reference
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.verification import verify_output
from lazymerge.graph.operation import Done
from lazymerge.graph.operations.block_scales import BlockScales
from lazymerge.recipe import parse_recipe
from numpy.random import Generator
from safetensors.torch import load_file

from conftest import needs_kernels, write_checkpoint
from merging import bits

Tensors = dict[str, torch.Tensor]

SHAPES = {
    "model.layers.0.mlp.gate_proj.weight": (300, 256),
    "model.layers.0.self_attn.q_proj.weight": (130, 64),
    "model.layers.1.mlp.gate_proj.weight": (1, 384),
    "model.layers.1.mlp.up_proj.weight": (640, 1024),  # enough for ties to sample
    "model.layers.1.mlp.odd_proj.weight": (33, 200),  # 200 is no multiple of 128
}
BLOCK = (128, 128)


def config(block: tuple[int, int] = BLOCK) -> dict[str, Any]:
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    return {
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "quantization_config": quantization,
    }


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def dequantised_by_definition(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Element by element, in float64."""
    rows, columns = np.indices(weight.shape)
    factors = scale.double().numpy()[rows // block[0], columns // block[1]]
    return torch.from_numpy(weight.double().numpy() * factors)


def quantised_and_not(
    shapes: Mapping[str, tuple[int, ...]], random: Generator, block: tuple[int, int] = BLOCK
) -> tuple[Tensors, Tensors]:
    """A quantised model's tensors, and the same with the values of quantised ones in float64."""
    stored: Tensors = {}
    values: Tensors = {}
    for name, shape in shapes.items():
        content = torch.from_numpy(random.standard_normal(shape) * 100)
        weight = content.to(torch.float8_e4m3fn)
        spread = np.exp(random.standard_normal(scale_shape(shape, block)) * 2 - 7)
        scale = torch.from_numpy(spread.astype(np.float32))
        stored[name], stored[name + SUFFIX] = weight, scale
        values[name] = dequantised_by_definition(weight, scale, block)
    norm = torch.from_numpy(random.standard_normal(64))
    stored["model.norm.weight"] = values["model.norm.weight"] = norm.bfloat16()
    return stored, values


PARAMETERS = {"weight": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"models": ["base", "a"]},
    "passthrough": {"models": ["a"]},
    "task_arithmetic": {"base_model": "base", "models": ["a", "b"]},
    "slerp": {"base_model": "base", "models": ["base", "a"], "parameters": {"t": 0.3}},
    "nuslerp": {"models": ["a", "b"]},
    "karcher": {"models": ["a", "b"]},
    "multislerp": {"models": ["a", "b"]},
    "model_stock": {"base_model": "base", "models": ["a", "b"]},
    "ties": {"base_model": "base", "models": ["a", "b"], "parameters": {"density": 0.4}},
    "breadcrumbs": {"base_model": "base", "models": ["a", "b"],
                    "parameters": {"density": 0.8, "gamma": 0.05}},
    "dare_ties": {"base_model": "base", "models": ["a", "b"], "parameters": {"density": 0.4}},
    "della": {"base_model": "base", "models": ["a", "b"],
              "parameters": {"density": 0.4, "epsilon": 0.1}},
    "sce": {"base_model": "base", "models": ["a", "b"], "parameters": {"select_topk": 0.5}},
    "nearswap": {"base_model": "base", "models": ["a"], "parameters": {"t": 0.1}},
    "arcee_fusion": {"base_model": "base", "models": ["a"]},
    "ram": {"base_model": "base", "models": ["a", "b"]},
}  # fmt: skip


def planned(folder: Path, method: str, kernels: Kernels | None = None, **options: Any) -> Plan:
    document = {"merge_method": method, **RECIPES[method], **options}
    weighted = method not in ("slerp", "karcher", "model_stock", "nearswap", "arcee_fusion", "ram",
                              "passthrough", "sce")  # fmt: skip
    document["models"] = [
        {"model": str(folder / m), **({"parameters": PARAMETERS} if weighted else {})}
        for m in document["models"]
    ]
    if "base_model" in document:
        document["base_model"] = str(folder / document["base_model"])
    recipe = parse_recipe(yaml.safe_dump(document), "recipe.yml", signatures())
    return make_plan(recipe, Resources(4 << 30, workers=2, kernels=kernels))


def merged(plan: Plan, output: Path) -> Tensors:
    run_plan(plan, output, fsync=False, overwrite=True)
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b quantised; and in exact/ the same values in float64."""
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("base", "a", "b")):
        stored, values = quantised_and_not(SHAPES, np.random.default_rng(number))
        write_checkpoint(folder / name, stored, config(), shards=3)
        write_checkpoint(folder / "exact" / name, values, {"model_type": "deepseek_v3"})
    return folder


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
@pytest.mark.parametrize("method", RECIPES)
def test_every_method_gives_what_exact_values_give(
    models: Path, method: str, kernels: Kernels, tmp_path: Path
) -> None:
    found = merged(planned(models, method, kernels, out_dtype="float32"), tmp_path / "found")
    exact = planned(models / "exact", method, kernels, out_dtype="float32")
    expected = merged(exact, tmp_path / "exact")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert bits(tensor) == bits(expected[name]), name


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
def test_a_model_alone_becomes_bfloat16(models: Path, kernels: Kernels, tmp_path: Path) -> None:
    """Rounded as DeepSeek's own script does: the product to float32, that to bfloat16."""
    plan = planned(models, "passthrough", kernels)
    assert plan.config == {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    notice = "dequantises 5 float8 tensors while reading, to be taken as bfloat16"
    assert plan.notices == (f"{models / 'a'}: {notice}",)
    found = merged(plan, tmp_path / "out")
    assert found.keys() == {*SHAPES, "model.norm.weight"}
    stored: Tensors = {}
    for file in (models / "a").glob("*.safetensors"):
        stored.update(load_file(file))
    for name, tensor in found.items():
        expected = stored[name]
        if name in SHAPES:
            scale = stored[name + SUFFIX]
            expected = dequantised_by_definition(expected, scale, BLOCK).float().bfloat16()
        assert bits(tensor) == bits(expected), name
    config_of_output = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config_of_output
    assert verify_output(tmp_path / "out", recompute=9).problems == ()
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").fingerprint == plan.fingerprint


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 17), st.integers(1, 17)),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: str,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    stored, values = quantised_and_not({"w": shape}, np.random.default_rng(seed), block)
    write_checkpoint(folder / "a", stored, config(block))
    expected = values["w"].float().to(getattr(torch, dtype))
    plan = planned(folder, "passthrough", out_dtype=dtype)
    for kernels in ("native", "torch") if library.is_available() else ("torch",):
        resources = Resources(4 << 30, workers=1, kernels=kernels)
        found = merged(plan.with_resources(resources), folder / kernels)
        assert bits(found["w"]) == bits(expected)
    walk_plan(plan)
    assert torch.equal(run_reference(plan.graph)["w"], values["w"])


def test_only_some_models_are_quantised(models: Path, tmp_path: Path) -> None:
    plain = {name: torch.ones(shape).bfloat16() for name, shape in SHAPES.items()}
    plain["model.norm.weight"] = torch.ones(64).bfloat16()
    write_checkpoint(tmp_path / "base", plain, {"model_type": "deepseek_v3", "x": 1})
    (tmp_path / "a").symlink_to(models / "a")
    (tmp_path / "exact").mkdir()
    write_checkpoint(tmp_path / "exact" / "base", plain)
    (tmp_path / "exact" / "a").symlink_to(models / "exact" / "a")
    found = merged(planned(tmp_path, "linear", out_dtype="float32"), tmp_path / "found")
    exact = planned(tmp_path / "exact", "linear", out_dtype="float32")
    expected = merged(exact, tmp_path / "expected")
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in expected.items()}
    plan = planned(tmp_path, "linear")
    assert {write.dtype for write in plan.graph.writes} == {"BF16"}
    assert plan.config == {"model_type": "deepseek_v3", "x": 1, "torch_dtype": "bfloat16"}


def test_embeddings_that_are_cut(tmp_path: Path) -> None:
    """Leading rows take the leading scales, whether or not they fill their blocks."""
    name = "model.embed_tokens.weight"
    random = np.random.default_rng(5)
    values: Tensors = {}
    for model, rows in (("base", 150), ("a", 300)):
        stored, exact = quantised_and_not({name: (rows, 128)}, random)
        write_checkpoint(tmp_path / model, stored, config())
        values[model] = exact[name][:150]
    document = yaml.safe_dump(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(tmp_path / m), "parameters": {"weight": 0.5}} for m in ("base", "a")
            ],
        }
    )
    recipe = parse_recipe(document, "recipe.yml", signatures())
    plan = make_plan(recipe, Resources(4 << 30, workers=1), truncate_embeddings=True)
    found = merged(plan, tmp_path / "out")[name]
    expected = 0.5 * values["base"] + 0.5 * values["a"]
    assert bits(found) == bits(expected.float().bfloat16())


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
def test_scales_of_finished_tensors_are_let_go(
    models: Path, method: str, kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of large models take megabytes: they must not wait for the garbage collector."""
    most = 0
    tables: list[weakref.ref[Any]] = []
    finish = BlockScales.finish

    def counting(self: BlockScales, *arguments: Any) -> Done[Any]:
        nonlocal most
        done = finish(self, *arguments)
        tables.append(weakref.ref(done.result))
        most = max(most, sum(table() is not None for table in tables))
        return done

    monkeypatch.setattr(BlockScales, "finish", counting)
    plan = planned(models, method, kernels)
    one = Resources(4 << 30, workers=1, kernels=kernels)
    run_plan(plan.with_resources(one), tmp_path / "out", fsync=False)
    assert len(tables) == len(SHAPES) * len(plan.checkpoints)
    assert most == len(plan.checkpoints)


def test_projections_that_are_taken_apart(tmp_path: Path) -> None:
    """Their rows begin and end anywhere in the blocks of the one that holds them."""
    prefix = "model.layers.0.self_attn."
    parts = {
        f"{prefix}{word}_proj.weight": rows for word, rows in (("q", 200), ("k", 70), ("v", 70))
    }
    plain = {name: torch.zeros((rows, 64)).bfloat16() for name, rows in parts.items()}
    write_checkpoint(tmp_path / "base", plain)
    fused = f"{prefix}qkv_proj.weight"
    stored, values = quantised_and_not({fused: (340, 64)}, np.random.default_rng(9), (128, 32))
    del stored["model.norm.weight"]
    write_checkpoint(tmp_path / "a", stored, config((128, 32)))
    found = merged(planned(tmp_path, "linear", out_dtype="float32"), tmp_path / "out")
    start = 0
    for name, rows in parts.items():
        expected = 0.5 * values[fused][start : start + rows]
        assert bits(found[name]) == bits(expected.float()), name
        start += rows
    saved = tmp_path / "plan.json"
    plan = planned(tmp_path, "linear")
    plan.save(saved)
    assert load_plan(saved).fingerprint == plan.fingerprint


def test_layers_of_a_quantised_model_put_together_anew(models: Path, tmp_path: Path) -> None:
    document = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(models / "a"), "layer_range": [number, number + 1]}]}
            for number in (1, 1, 0)
        ],
        "out_dtype": "float32",
    }
    recipe = parse_recipe(yaml.safe_dump(document), "recipe.yml", signatures())
    plan = make_plan(recipe, Resources(4 << 30, workers=2))
    assert plan.config is not None
    assert "quantization_config" not in plan.config
    found = merged(plan, tmp_path / "out")
    exact = load_file(models / "exact" / "a" / "model.safetensors")
    for name, tensor in found.items():
        for number, origin in ((0, 1), (1, 1), (2, 0)):
            if name.startswith(f"model.layers.{number}."):
                inner = name.replace(f".{number}.", f".{origin}.")
                assert bits(tensor) == bits(exact[inner].float()), name
    assert len(found) == 3 + 3 + 2 + 1
