"""Whole merges by every method: native kernels, torch, mapped or read, one byte is like the other.

Recipes are made from the methods' signatures, so those of tomorrow are included. What a nan carries
is nobody's promise; everything else is compared bit for bit.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from kernel_driver import AWKWARD, assert_same
from lazymerge.engine import blocks
from lazymerge.engine.execution import Kernels, ReadMode
from lazymerge.engine.plan import Plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.stages import NativeLayout, TorchLayout, stage_layout
from lazymerge.errors import InputError
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Read, Write, as_parameters
from lazymerge.graph.operations import selection
from lazymerge.methods import METHODS

from conftest import needs_kernels
from merging import plan_of, run
from method_recipes import SETTINGS, model_counts, recipe_for

pytestmark = needs_kernels

BLOCK = 64
MOST_MODELS = 4
SHAPES = [
    *((), (1,), (0,), (BLOCK,), (BLOCK + 1,)),
    *((3, BLOCK), (5, 13), (2, 3, 37), (17, 31), (90, 1), (1, 90)),
    (3, 2 * BLOCK + 9),  # rows that are longer than a block
]
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
NATIVE_OUTPUTS = ["bfloat16", "float16", "float32", "float64"]
WEIGHTS = [0.0, 1.0, -1.0, 0.3, -0.25, 2.5, 1e-3, 0.7]
DENSITIES = [0.0, 1e-9, 0.2, 0.5, 0.999, 1.0]
PROBABILITIES = [0.0, 0.2, 0.5, 0.8, 1.0]
"""Densities that keep their distance from 0 and 1, for methods with an epsilon."""
KINDS = ["normal", "near", "identical", "grid", "zero", "tiny", "huge", "awkward", "one bad"]
EXECUTIONS: list[tuple[Kernels, ReadMode, int]] = [
    ("torch", "pread", 1),
    ("native", "pread", 2),
    ("native", "mmap", 1),
    ("torch", "mmap", 2),
]


@contextmanager
def small() -> Iterator[Path]:
    """A fresh folder; blocks, samples and candidates for tensors of some hundred elements."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
        patch.setattr(selection, "CANDIDATES", 2 * BLOCK)
        patch.setattr(selection, "ALL_CANDIDATES", 4 * BLOCK)
        patch.setattr(selection, "MIN_BLOCK_CANDIDATES", 4)
        patch.setattr(selection, "SAMPLE_RUNS", 8)
        patch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)
        yield Path(folder)


def values(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    size = prod(shape)
    if kind == "grid":
        flat = random.integers(-7, 8, size) / 4
    elif kind == "zero":
        flat = random.choice([0.0, -0.0], size)
    elif kind == "awkward":
        flat = random.choice(AWKWARD, size)
    else:
        flat = random.standard_normal(size) * {"tiny": 1e-41, "huge": 1e38}.get(kind, 1.0)
        if kind == "one bad" and size:
            flat[random.integers(size)] = random.choice([np.nan, np.inf, -np.inf])
    return np.array(flat, dtype=np.float64).reshape(shape)


def tensors_of(
    models: int, dtypes: list[str], shape: tuple[int, ...], kind: str, random: np.random.Generator
) -> list[torch.Tensor]:
    origin = values("normal", shape, random)
    made = []
    for number in range(models):
        if kind == "identical":
            own = origin
        elif kind == "near":
            own = np.asarray(origin + 0.01 * values("normal", shape, random))
        else:
            own = values(kind, shape, random)
        made.append(torch.from_numpy(own).to(DTYPES[dtypes[number % len(dtypes)]]))
    return made


@st.composite
def merges(draw: st.DrawFn, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe (models named m0, m1 …) and the models' tensors."""
    signature = METHODS[method].signature
    count = draw(st.sampled_from(model_counts(signature, MOST_MODELS)))
    document = recipe_for(
        signature,
        [Path(f"m{number}") for number in range(MOST_MODELS + 1)],
        count,
        setting=draw(st.sampled_from(SETTINGS)),
        out_dtype=draw(st.sampled_from([None, None, *DTYPES])),
        random=Random(draw(st.integers(0, 99))),
    )
    for model in document["models"]:
        parameters = model.get("parameters", {})
        if "weight" in parameters:
            parameters["weight"] = draw(st.sampled_from(WEIGHTS))
        if "scale" in parameters:
            parameters["scale"] = draw(st.sampled_from(WEIGHTS))
        names = {parameter.name for parameter in signature.parameters}
        if "density" in names and draw(st.integers(0, 6)):
            densities = PROBABILITIES if "epsilon" in names else DENSITIES
            parameters["density"] = draw(st.sampled_from(densities))
        if "gamma" in names and draw(st.booleans()):
            parameters["gamma"] = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    for parameter in signature.parameters:
        if parameter.type is bool and draw(st.booleans()):
            document.setdefault("parameters", {})[parameter.name] = draw(st.booleans())
    document["seed"] = draw(st.sampled_from([0, 0, 1, -5, 2**70]))
    if method == "slerp":
        document["parameters"]["t"] = draw(st.sampled_from([0.0, 1.0, 0.5, 1e-6, -0.5]))
    names = list(dict.fromkeys([m["model"] for m in document["models"]]))
    if document.get("base_model", names[0]) not in names:
        names.insert(0, document["base_model"])
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    models: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for number in range(draw(st.integers(2, 5))):
        made = tensors_of(
            len(names),
            draw(st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=3)),
            draw(st.sampled_from(SHAPES)),
            draw(st.sampled_from(KINDS)),
            random,
        )
        for name, tensor in zip(names, made, strict=True):
            models[name][f"t{number}"] = tensor
    for name in names:
        models[name]["ids"] = torch.arange(150)
    return document, models


def check(document: dict[str, Any], models: dict[str, Any], folder: Path) -> Plan:
    """Runs a merge in every way, and compares; returns its plan with native kernels."""
    try:
        plan = plan_of(folder, document, models)
    except InputError as error:  # such as weights that cancel
        assume("weights" not in str(error))
        raise
    outputs = []
    for kernels, mode, workers in EXECUTIONS:
        chosen = plan.with_resources(Resources(8 << 30, workers, mode, kernels))
        outputs.append(merged_or_refused(chosen, folder / f"{kernels} {mode}"))
    first, *others = outputs
    for (kernels, mode, _), other in zip(EXECUTIONS[1:], others, strict=True):
        if isinstance(first, str) or isinstance(other, str):
            assert first == other
            continue
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            assert_same(other[name].flatten(), tensor.flatten(), f"{kernels} {mode} {name}")
    return plan.with_resources(Resources(8 << 30, 1, kernels="native"))


def merged_or_refused(plan: Plan, output: Path) -> dict[str, torch.Tensor] | str:
    """The merge, or why there is none: some weights can only be refused once norms are known."""
    try:
        return run(plan, output)
    except InputError as error:
        if "weights" not in str(error):
            raise
        return re.sub(r"^tensor \w+: ", "", str(error))  # of several, any may be the first


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12)
@given(st.data())
def test_any_merge_gives_the_same_bytes_by_kernels_and_by_torch(
    method: str, data: st.DataObject
) -> None:
    document, models = data.draw(merges(method))
    with small() as folder:
        plan = check(document, models, folder)
        kinds = {
            type(stage_layout(plan.graph, stage, plan.execution))
            for task in plan.tasks
            for stage in task.stages
            if stage.element_count
        }
    event(f"{method}: {sorted(kind.__name__ for kind in kinds)}")


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_of_floats_is_native_where_the_output_is_written_natively(
    tmp_path: Path, method: str
) -> None:
    signature = METHODS[method].signature
    folders = [Path(f"m{number}") for number in range(MOST_MODELS + 1)]
    models = {
        folder.name: {name: torch.ones(9).to(dtype) for name, dtype in DTYPES.items()}
        for folder in folders
    }
    for out, setting in product([*NATIVE_OUTPUTS, "float8_e5m2"], SETTINGS):
        document = recipe_for(
            signature,
            folders,
            model_counts(signature, 3)[-1],
            setting=setting,
            out_dtype=out,
            random=Random(1),
        )
        plan = plan_of(tmp_path, document, models, Resources(8 << 30, 1, kernels="native"))
        models = {}
        for task in plan.tasks:
            for stage in task.stages:
                layout = stage_layout(plan.graph, stage, plan.execution)
                if task.write.name == out and method == "passthrough" and setting == "defaults":
                    continue  # copied
                is_native = out in NATIVE_OUTPUTS or stage is not task.write
                assert isinstance(layout, NativeLayout if is_native else TorchLayout)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_real_size(tmp_path: Path, method: str, random: np.random.Generator) -> None:
    """Nothing made small: two blocks and a ragged third, or two of whole rows and a ragged third;
    enough elements for a sample, awkward values strewn in."""
    size = 301 * 2000
    assert size > max(selection.CANDIDATES, 2 * blocks.BLOCK_ELEMENTS)
    signature = METHODS[method].signature
    document = recipe_for(
        signature,
        [Path(f"m{number}") for number in range(3)],
        model_counts(signature, 2)[-1],
        setting="flags",
        random=Random(4),
    )
    models = {}
    for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        flat = random.standard_normal(size)
        flat[::1001] = random.choice(AWKWARD[:6], len(flat[::1001]))
        models[f"m{number}"] = {
            "w": torch.from_numpy(flat).to(dtype).reshape(301, 2000),
            "v": torch.from_numpy(np.round(flat[::3] * 8) / 8).to(dtype),
        }
    check(document, models, tmp_path)


@pytest.mark.parametrize("mode", ["pread", "mmap"])
def test_the_same_tensor_twice_is_read_once(tmp_path: Path, mode: ReadMode) -> None:
    """One Read node, three operands."""
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    plan = plan_of(tmp_path, recipe, {"a": {"w": torch.arange(100.0)}})
    graph = Graph()
    (read,) = (graph.add(node) for node in plan.graph if isinstance(node, Read))
    coefficients = as_parameters({"coefficients": (0.25, 0.5, 1.0)})
    apply = Apply("linear_combination", coefficients, (read,) * 3, (), (100,), "F64")
    graph.add(Write("w", "F32", (100,), graph.add(apply)))
    changed = replace(plan, graph=graph).with_resources(Resources(8 << 30, 1, mode, "native"))
    (stage,) = changed.tasks[0].stages
    layout = stage_layout(graph, stage, changed.execution)
    assert isinstance(layout, NativeLayout)
    assert len(graph.reads_of(stage.id)) == 1
    assert run(changed, tmp_path / "out")["w"].tolist() == [1.75 * n for n in range(100)]


def test_differences_of_integers_are_found_whoever_computes(tmp_path: Path) -> None:
    models = {m: {"ids": torch.arange(700_000), "w": torch.ones(3)} for m in ("a", "b")}
    models["b"]["ids"] = models["b"]["ids"].clone()
    models["b"]["ids"][650_000] += 1
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")],
    }
    plan = plan_of(tmp_path, recipe, models)
    for kernels, mode, workers in EXECUTIONS:
        chosen = plan.with_resources(Resources(8 << 30, workers, mode, kernels))
        with pytest.raises(InputError, match=r"tensor ids .* differs between"):
            run(chosen, tmp_path / "out")
