"""Inf and nan in what is written: found in every dtype, named, and an error if asked for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint.tensor import TensorInfo
from lazymerge.engine.finite import MASKS, has_nonfinite
from lazymerge.engine.inputs import InputFiles
from lazymerge.engine.native import library
from lazymerge.engine.nonfinite import NonfiniteTensor, count_nonfinite
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.errors import LazymergeError

from conftest import write_checkpoint
from merging import plan_of

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LENGTHS = [1, 2, 15, 1023, 1024, 1025, 40_000]


@pytest.fixture(params=["native", "numpy"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(library, "is_available", lambda: False)
    elif not library.is_available():
        pytest.skip("the native kernels are not built, or not wanted")


def data_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", MASKS)
def test_every_place_and_value(dtype: str, length: int, random: np.random.Generator) -> None:
    largest = torch.finfo(TORCH[dtype]).max
    values = torch.from_numpy(random.standard_normal(length)).to(TORCH[dtype])
    values[random.integers(length)] = largest
    values[random.integers(length)] = -largest
    assert not has_nonfinite(data_of(values), dtype)
    wrong = [torch.nan] if dtype == "F8_E4M3" else [torch.nan, torch.inf, -torch.inf]
    for value in wrong:
        for place in {0, length - 1, int(random.integers(length))}:
            spoilt = values.clone()
            spoilt[place] = value
            assert has_nonfinite(data_of(spoilt), dtype), (value, place)


@pytest.mark.usefixtures("either")
def test_integers_and_nothing_are_finite() -> None:
    assert not has_nonfinite(memoryview(bytearray(b"\xff" * 64)), "I64")
    assert not has_nonfinite(memoryview(bytearray()), "BF16")


def spoilt_models() -> dict[str, dict[str, torch.Tensor]]:
    models = {
        name: {
            "a": torch.ones(70),
            "b": torch.ones(3, 50),
            "c": torch.ones(9),
            "n": torch.arange(5),
        }
        for name in ("one", "two")
    }
    models["one"]["a"][69] = torch.inf
    models["two"]["c"][0] = torch.nan
    return models


RECIPE = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "two")],
}


def test_a_run_names_the_tensors(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE, spoilt_models())
    report = run_plan(plan, tmp_path / "out", fsync=False)
    first, second = report.nonfinite
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    assert first == NonfiniteTensor("a", "F32", 70, 1, 0, {one: 1, two: 0})
    assert second == NonfiniteTensor("c", "F32", 9, 0, 1, {one: 0, two: 1})
    assert str(first) == f"a holds 1 inf among 70 elements; in the inputs: 1 in {one}"
    manifest = json.loads((tmp_path / "out" / "lazymerge.json").read_text())
    assert manifest["nonfinite"] == [asdict(first), asdict(second)]


def test_leaving_the_range_of_the_output(tmp_path: Path) -> None:
    models = {name: {"a": torch.full((300, 300), 60000.0)} for name in ("one", "two")}
    models["two"]["a"][0, 0] = 1.0
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in models],
        "parameters": {"normalize": False},
        "out_dtype": "float16",
    }
    plan = plan_of(tmp_path, recipe, models)
    (found,) = run_plan(plan, tmp_path / "out", fsync=False).nonfinite
    assert (found.elements, found.inf, found.nan) == (90_000, 89_999, 0)
    assert [*found.inputs.values()] == [0, 0]
    assert str(found).endswith(
        "none in the inputs, so it is the merge that leaves the range of F16"
    )


@pytest.mark.parametrize("dtype", list(MASKS))
@given(data=st.data())
def test_they_are_counted(dtype: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    codes = data.draw(st.binary(min_size=8, max_size=400).map(lambda b: b[: len(b) // 8 * 8]))
    values = torch.frombuffer(bytearray(codes), dtype=TORCH[dtype]).double()
    path = tmp_path_factory.mktemp("counted") / "tensor"
    path.write_bytes(b"xx" + codes)
    tensor = TensorInfo("t", dtype, (len(values),), path.name, 2, 2 + len(codes))
    files = InputFiles()
    try:
        found = count_nonfinite(files, str(path), tensor)
    finally:
        files.close()
    assert found == (int(values.isinf().sum()), int(values.isnan().sum()))


def test_copies_are_looked_at_too(tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "one"}]}
    plan = plan_of(tmp_path, recipe, spoilt_models())
    (found,) = run_plan(plan, tmp_path / "out", fsync=False).nonfinite
    assert (found.name, [*found.inputs.values()]) == ("a", [1])


def test_strict_runs_stop_and_leave_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, RECIPE, spoilt_models(), Resources(4 << 30, workers=1))
    with pytest.raises(LazymergeError, match="tensor a of the merge holds inf or nan"):
        run_plan(plan, tmp_path / "out", fsync=False, strict=True)
    assert not (tmp_path / "out").exists()
    for tensors in (models := spoilt_models()).values():
        tensors["a"].fill_(1)
        tensors["c"].fill_(1)
    for name, tensors in models.items():
        write_checkpoint(tmp_path / "sound" / name, tensors)
    sound = plan_of(tmp_path / "sound", RECIPE, models)
    assert run_plan(sound, tmp_path / "sound" / "out", fsync=False, strict=True).nonfinite == ()
