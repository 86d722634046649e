"""Rows in another order, and embeddings with gaps, by every executor."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lazymerge.checkpoint import open_checkpoint
from lazymerge.engine import planning
from lazymerge.engine.blocks import BLOCK_ELEMENTS
from lazymerge.engine.inputs import GatheredInput, InputFiles
from lazymerge.engine.memory import table_bytes
from lazymerge.engine.null import walk_plan
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.engine.reference import run_reference
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.tokenizer import TokenizerPlan
from lazymerge.graph.node import Read
from lazymerge.graph.rows import RowTable
from lazymerge.graph.verify import verify_graph
from lazymerge.vocabulary import Alignment
from safetensors.torch import load_file, save_file

from conftest import write_checkpoint
from merging import bits, recipe_of

NAME = "model.embed_tokens.weight"


def test_gathering_of_any_range(tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.integers(1, 7),
        st.integers(1, 5),
        st.lists(st.integers(-1, 6), min_size=1, max_size=30),
        st.sampled_from([torch.bfloat16, torch.float32, torch.int8]),
        st.data(),
    )
    def check(
        rows: int, width: int, numbers: list[int], dtype: torch.dtype, data: st.DataObject
    ) -> None:
        numbers = [min(number, rows - 1) for number in numbers]
        stored = torch.arange(1, rows * width + 1).to(dtype).reshape(rows, width)
        expected = torch.stack(
            [stored[n] if n >= 0 else torch.zeros(width, dtype=dtype) for n in numbers]
        ).reshape(-1)
        save_file({NAME: stored}, tmp_path / "m.safetensors")
        checkpoint = open_checkpoint(str(tmp_path / "m.safetensors"))
        read = Read(checkpoint.folder, checkpoint.tensors[NAME], RowTable.of(numbers))
        files = InputFiles()
        room = memoryview(bytearray(expected.numel() * expected.element_size()))
        source = GatheredInput(read, files, [room])
        cuts = data.draw(st.lists(st.integers(0, expected.numel()), min_size=2, max_size=6))
        cuts = sorted(set(cuts))
        pieces = list(zip(cuts[::2], cuts[1::2], strict=False))
        source.seek(pieces)
        wanted = [expected[start:stop] for start, stop in pieces]
        assert bytes(source.raw()) == b"".join(map(bits, wanted))
        files.close()

    check()


WIDTH = 640
ROWS = {"base": 1000, "a": 1050, "b": 1003}
OUTPUT_ROWS = 1100


def tables() -> dict[str, list[int]]:
    """The base's rows stay, with gaps at the end; a's are rearranged; b lacks every third."""
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(ROWS["a"], generator=generator).tolist()
    return {
        "base": [*range(1000), *[-1] * 100],
        "a": [*order, *[-1] * 50],
        "b": [-1 if row % 3 == 1 or row > 1080 else row % 1003 for row in range(OUTPUT_ROWS)],
    }


def alignment(padded_rows: int = OUTPUT_ROWS) -> Alignment:
    return Alignment(
        rows=OUTPUT_ROWS,
        padded_rows=padded_rows,
        tables={model: array("i", rows) for model, rows in tables().items()},
        sizes=ROWS,
        declared=dict(ROWS),
        chosen={},
    )


def models(dtypes: dict[str, torch.dtype] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    dtypes = dtypes or {"base": torch.bfloat16, "a": torch.float32, "b": torch.bfloat16}
    return {
        model: torch.randn(rows, WIDTH, generator=generator).to(dtypes[model])
        for model, rows in ROWS.items()
    }


def expected(
    stored: dict[str, torch.Tensor], padded_rows: int = OUTPUT_ROWS, base: str | None = None
) -> dict[str, torch.Tensor]:
    """Every model's rows in float64, gaps filled; written without the graph."""
    filled = {model: torch.zeros(padded_rows, WIDTH, dtype=torch.float64) for model in stored}
    all_tables = tables()
    for row in range(OUTPUT_ROWS):
        numbers = {model: all_tables[model][row] for model in stored}
        having = {m: stored[m][number].double() for m, number in numbers.items() if number >= 0}
        if base in having and len(having) > 1:
            other = having[base]
        elif having:
            other = sum(having.values()) / len(having)
        else:
            other = torch.zeros(WIDTH, dtype=torch.float64)
        for model in stored:
            filled[model][row] = having.get(model, other)
    for values in filled.values():
        values[OUTPUT_ROWS:] = values[:OUTPUT_ROWS].mean(0)
    return filled


METHODS: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "base", "parameters": {"weight": 0.5}},
            {"model": "a", "parameters": {"weight": 0.25}},
            {"model": "b", "parameters": {"weight": 0.25}},
        ],
        "dtype": "float32",
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": -0.25}},
        ],
        "dtype": "float32",
    },
}


def result(method: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    base, a, b = values["base"], values["a"], values["b"]
    if method == "linear":
        return 0.5 * base + 0.25 * a + 0.25 * b
    return base + 0.5 * (a - base) - 0.25 * (b - base)


def plan_of(
    folder: Path, recipe: dict[str, Any], aligned: Alignment, resources: Resources, monkeypatch: Any
) -> Plan:
    """A plan of models whose vocabularies are said and not read."""
    prefix = f"{folder}/"
    aligned = replace(
        aligned,
        tables={prefix + model: table for model, table in aligned.tables.items()},
        sizes={prefix + model: size for model, size in aligned.sizes.items()},
        declared={prefix + model: size for model, size in aligned.declared.items()},
    )
    said = TokenizerPlan(str(folder), {}, aligned, (), 0)
    monkeypatch.setattr(planning, "plan_tokenizer", lambda *_: said)
    return make_plan(recipe_of(folder, recipe), resources)


@pytest.mark.parametrize(
    ("method", "base"), [("linear", None), ("linear", "base"), ("task_arithmetic", "base")]
)
@pytest.mark.parametrize("padded_rows", [OUTPUT_ROWS, 1152])
def test_every_executor_agrees_with_the_definition(
    method: str,
    padded_rows: int,
    base: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = models()
    for model, tensor in stored.items():
        write_checkpoint(tmp_path / model, {NAME: tensor})
    wanted = result(method, expected(stored, padded_rows, base))
    outputs = set()
    for kernels in ("native", "torch"):
        for read_mode in ("pread", "mmap"):
            resources = Resources(1 << 30, workers=2, kernels=kernels, read_mode=read_mode)
            recipe = METHODS[method] if base is None else {**METHODS[method], "base_model": base}
            plan = plan_of(tmp_path, recipe, alignment(padded_rows), resources, monkeypatch)
            verify_graph(plan.graph)
            walk = walk_plan(plan)
            assert sum(walk.bytes_read.values()) == plan.bytes_read
            out = tmp_path / f"{kernels}-{read_mode}"
            report = run_plan(plan, out, fsync=False)
            assert report.bytes_read == plan.bytes_read
            assert report.measured_bytes > 0
            merged = load_file(out / "model.safetensors")[NAME]
            assert merged.shape == (padded_rows, WIDTH)
            outputs.add(bits(merged))
            torch.testing.assert_close(merged.double(), wanted, rtol=2e-7, atol=2e-7)
    assert len(outputs) == 1
    reference = run_reference(plan.graph)[NAME]
    torch.testing.assert_close(reference, wanted, rtol=1e-13, atol=1e-13)
    assert plan.tasks[0].write.element_count > 2 * BLOCK_ELEMENTS


@pytest.mark.parametrize(
    "recipe",
    [
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "a", "parameters": {"weight": 0.5, "density": 0.4}},
                {"model": "b", "parameters": {"weight": 0.5, "density": 0.6}},
            ],
        },
        {
            "merge_method": "slerp",
            "base_model": "base",
            "models": [{"model": "base"}, {"model": "a"}],
            "parameters": {"t": 0.4},
        },
        {
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": [
                {"model": "a", "parameters": {"weight": 0.5, "density": 0.4}},
                {"model": "b", "parameters": {"weight": 0.5, "density": 0.6}},
            ],
        },
    ],
    ids=lambda recipe: recipe["merge_method"],
)
def test_methods_of_several_passes(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the rows lay in files in their new order."""
    stored = models(dict.fromkeys(ROWS, torch.float32))
    named = {recipe["base_model"], *(entry["model"] for entry in recipe["models"])}
    stored = {model: stored[model] for model in ROWS if model in named}
    filled = expected(stored, 1152, "base")
    rounded = {model: values.float() for model, values in filled.items()}
    for model in stored:
        write_checkpoint(tmp_path / model, {NAME: stored[model]})
        write_checkpoint(tmp_path / "whole" / model, {NAME: rounded[model]})
    plain = make_plan(recipe_of(tmp_path / "whole", recipe), Resources(1 << 30, workers=2))
    run_plan(plain, tmp_path / "plain", fsync=False)
    outputs = set()
    for kernels in ("native", "torch"):
        resources = Resources(1 << 30, workers=2, kernels=kernels)
        plan = plan_of(tmp_path, recipe, alignment(1152), resources, monkeypatch)
        run_plan(plan, tmp_path / kernels, fsync=False)
        outputs.add((tmp_path / kernels / "model.safetensors").read_bytes())
    assert len(outputs) == 1
    merged = load_file(tmp_path / "native" / "model.safetensors")[NAME]
    wanted = load_file(tmp_path / "plain" / "model.safetensors")[NAME]
    # where the base's row is the mean of two, their changes are opposite and ties' vote is a draw
    rows = 1000 if recipe["merge_method"] == "ties" else 1152
    torch.testing.assert_close(merged[:rows], wanted[:rows], rtol=1e-5, atol=1e-5)


def test_rows_are_copied_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    stored = torch.randint(-(1 << 15), 1 << 15, (1050, WIDTH), generator=generator)
    codes = stored.to(torch.int16).view(torch.bfloat16)  # nans of every kind among them
    write_checkpoint(tmp_path / "a", {NAME: codes})
    aligned = alignment()
    aligned = replace(aligned, tables={"a": aligned.tables["a"]}, sizes={"a": 1050})
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    for read_mode in ("pread", "mmap"):
        resources = Resources(1 << 30, workers=2, read_mode=read_mode)
        plan = plan_of(tmp_path, recipe, aligned, resources, monkeypatch)
        run_plan(plan, tmp_path / read_mode, fsync=False)
        merged = load_file(tmp_path / read_mode / "model.safetensors")[NAME]
        for row, number in enumerate(tables()["a"]):
            assert bits(merged[row]) == (bits(codes[number]) if number >= 0 else bytes(2 * WIDTH))


def test_a_mean_that_is_inf_stays_in_the_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = models(dict.fromkeys(ROWS, torch.float32))
    stored["base"][3, 4] = torch.inf
    stored["base"][7, 9] = torch.nan
    for model, tensor in stored.items():
        write_checkpoint(tmp_path / model, {NAME: tensor})
    recipe = {**METHODS["linear"], "dtype": "float32"}
    plan = plan_of(tmp_path, recipe, alignment(1152), Resources(1 << 30, workers=1), monkeypatch)
    report = run_plan(plan, tmp_path / "out", fsync=False)
    merged = load_file(tmp_path / "out" / "model.safetensors")[NAME]
    assert (~merged[:OUTPUT_ROWS].isfinite()).sum() == 2
    assert (~merged[OUTPUT_ROWS:].isfinite()).sum() == 2 * 52
    assert report.nonfinite[0].name == NAME


def test_tables_are_part_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, tensor in models().items():
        write_checkpoint(tmp_path / model, {NAME: tensor, "lm_head.weight": tensor})
    resources = Resources(1 << 30, workers=2)
    plan = plan_of(tmp_path, METHODS["linear"], alignment(), resources, monkeypatch)
    made = {node.rows.digest for node in plan.graph if isinstance(node, Read) and node.rows}
    assert table_bytes(plan.graph) == 4 * OUTPUT_ROWS * len(made)
