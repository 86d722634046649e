"""Statistics gathered in the merge pass, against sums of whole tensors in float64."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lazymerge
import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.statistics import (
    Statistics,
    TensorStatistics,
    change_of,
    load_statistics,
    tensor_document,
)
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.errors import InputError
from lazymerge.graph.operations.combination import LinearCombination
from lazymerge.graph.operations.statistics import (
    added,
    gathered,
    moments_of,
    number_count,
)
from lazymerge.output.journal import JOURNAL_PATH
from lazymerge.output.manifest import MANIFEST_NAME, STATISTICS_NAME
from merge_cases import RECIPES, write_models
from numpy.typing import NDArray
from safetensors.torch import load_file

from conftest import needs_kernels, write_adapter, write_checkpoint

Array = NDArray[np.float64]
BFLOAT = torch.bfloat16


def flat(tensor: torch.Tensor) -> Array:
    values: Array = tensor.double().numpy().ravel()
    return values


def check(found: TensorStatistics, models: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
    """Compares a tensor's moments with those of whole tensors.

    models: the tensor of each, by the names that statistics have.
    """
    assert found.moments is not None, found.reason
    reference, *others = [flat(models[name]) for name in found.models]
    changes = [values - reference for values in (*others, flat(out))]
    moments = found.moments
    size = math.sqrt(max(change @ change for change in changes)) + 1e-300
    assert moments.reference_square == pytest.approx(reference @ reference, rel=1e-12)
    for row, one in enumerate(changes):
        in_place = moments.reference_products[row]
        bound = 1e-6 * math.sqrt(reference @ reference) * size
        assert in_place == pytest.approx(one @ reference, rel=1e-6, abs=bound)
        assert moments.largest[row] == pytest.approx(np.abs(one).max(), rel=1e-6)
        for column, other in enumerate(changes):
            product = moments.products[row][column]
            assert product == pytest.approx(one @ other, rel=1e-6, abs=1e-6 * size * size)
            agreeing = (np.sign(one) == np.sign(other)) & (one != 0)
            assert moments.agreements[row][column] == np.count_nonzero(agreeing)
    of_models = np.array(changes[:-1])
    assert moments.changed == np.count_nonzero(of_models.any(axis=0))
    both = (of_models > 0).any(axis=0) & (of_models < 0).any(axis=0)
    assert moments.mixed == np.count_nonzero(both)


def merge(folder: Path, recipe: Mapping[str, Any], name: str, **options: Any) -> Statistics:
    """Merges with statistics; model names of the recipe are folders of `folder`."""
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(dict(recipe)))
    plan = lazymerge.plan(path, **options)
    lazymerge.run(plan, folder / name, statistics=True, fsync=False)
    return load_statistics(folder / name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_models(folder)
    return folder


@pytest.fixture
def models(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models base, a and b in it; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    for model in ("base", "a", "b"):
        (tmp_path / model).symlink_to(written / model)
    return tmp_path


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_they_are_those_of_whole_tensors(models: Path, method: str) -> None:
    found = merge(models, RECIPES[method], method)
    out = weights(models / method)
    inputs = {name: weights(models / name) for name in ("base", "a", "b")}
    assert set(found.tensors) == set(out)
    for name, tensor in found.tensors.items():
        if name == "steps":
            assert tensor.moments is None
            assert "equal in all models" in tensor.reason
            continue
        assert tensor.models[0] == "base"
        check(tensor, {model: held[name] for model, held in inputs.items()}, out[name])


@needs_kernels
@pytest.mark.parametrize("method", sorted(RECIPES))
def test_output_and_numbers_depend_on_nothing_else(
    models: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are those of a run without statistics; numbers are the same to the bit whatever
    workers, memory, way of reading and kernels there are."""
    path = models / "recipe.yml"
    path.write_text(yaml.safe_dump(RECIPES[method]))
    plan = lazymerge.plan(path)
    lazymerge.run(plan, models / "plain", fsync=False)
    ways = [
        Resources(workers=1),
        Resources(workers=3),
        Resources(workers=2, read_mode="mmap"),
        Resources(workers=2, kernels="torch", limit_bytes=2 << 30),
    ]
    texts = set()
    for number, resources in enumerate(ways):
        out = models / f"out-{number}"
        run_plan(plan.with_resources(resources).with_statistics(), out, fsync=False)
        texts.add((out / STATISTICS_NAME).read_text())
        for name in ("tensors", "fingerprint", "shards"):
            documents = [
                json.loads((each / MANIFEST_NAME).read_text()) for each in (out, plain(out))
            ]
            assert documents[0][name] == documents[1][name]
        file = "model.safetensors"
        assert (out / file).read_bytes() == (models / "plain" / file).read_bytes()
    assert len(texts) == 1
    assert not (models / "plain" / STATISTICS_NAME).exists()


def plain(out: Path) -> Path:
    return out.parent / "plain"


DTYPES = (torch.float64, torch.float32, torch.float16, BFLOAT)


@settings(max_examples=25)
@example(count=5, dtypes=[BFLOAT, torch.float32, BFLOAT], is_sparse=True, seed=0)
@example(count=1, dtypes=[torch.float64, torch.float16], is_sparse=False, seed=0)
@given(
    count=st.integers(1, 5000),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=5),
    is_sparse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_dtype_and_number_of_models(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    dtypes: list[torch.dtype],
    is_sparse: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    inputs = {}
    for number, dtype in enumerate(dtypes):
        change = 0.1 * torch.randn(count, generator=generator)
        if is_sparse:
            change *= torch.rand(count, generator=generator) < 0.3
        inputs[str(folder / f"m{number}")] = (base + change).to(dtype)
    for name, tensor in inputs.items():
        write_checkpoint(Path(name), {"w": tensor}, {"model_type": "llama"})
    entries = [{"model": name, "parameters": {"weight": 0.4}} for name in inputs]
    recipe = {"merge_method": "linear", "parameters": {"normalize": False}, "models": entries}
    found = merge(folder, recipe, "out")
    check(found.tensors["w"], inputs, weights(folder / "out")["w"])


def test_an_adapter_counts_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(5)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = torch.randn(48, 32, generator=generator)
    write_checkpoint(tmp_path / "base", {name: base}, {"model_type": "llama"})
    write_checkpoint(tmp_path / "a", {name: base + 0.1}, {"model_type": "llama"})
    left, right = (torch.randn(*shape, generator=generator) for shape in ((48, 4), (4, 32)))
    write_adapter(
        tmp_path / "lora",
        {
            f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight": right,
            f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight": left,
        },
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
    )
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "base+lora", "parameters": {"weight": 0.5}},
            {"model": "a", "parameters": {"weight": 0.5}},
        ],
    }
    found = merge(tmp_path, recipe, "out").tensors[name]
    assert found.models == ("base", "base+lora", "a")
    with_adapter = base.double() + 2.0 * left.double() @ right.double()
    inputs = {"base": base, "a": base + 0.1, "base+lora": with_adapter}
    check(found, inputs, weights(tmp_path / "out")[name])


def test_merges_of_merges_are_looked_through(models: Path) -> None:
    path = models / "nested.yml"
    inner = {**RECIPES["linear"], "name": "inner"}
    outer = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "inner", "parameters": {"weight": 0.5}}],
    }
    path.write_text(yaml.safe_dump_all([inner, outer]))
    lazymerge.run(lazymerge.plan(path), models / "out", statistics=True, fsync=False)
    found = load_statistics(models / "out")
    inputs = {name: weights(models / name) for name in ("base", "a", "b")}
    out = weights(models / "out")
    for name, tensor in found.tensors.items():
        if name != "steps":
            assert tensor.models == ("base", "a", "b")
            check(tensor, {model: held[name] for model, held in inputs.items()}, out[name])


def test_what_is_copied_says_so(models: Path) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
    }
    found = merge(models, recipe, "out")
    assert {tensor.moments for tensor in found.tensors.values()} == {None}
    assert found.tensors["model.norm.weight"].reason == "copied from a"


class Stop(Exception):
    pass


class Stopper(Silent):
    def __init__(self, after: int) -> None:
        self._left = after

    def finished(self, tensor: str) -> None:
        self._left -= 1
        if not self._left:
            raise Stop


def begun(models: Path, out: Path, after: int, *, statistics: bool) -> Plan:
    (models / "recipe.yml").write_text(yaml.safe_dump(RECIPES["ties"]))
    plan = lazymerge.plan(models / "recipe.yml", workers=1)
    with pytest.raises(Stop):
        run_plan(
            plan.with_statistics() if statistics else plan,
            out,
            observer=Stopper(after),
            fsync=False,
        )
    return plan


@pytest.mark.parametrize("after", [1, 3])
def test_going_on_keeps_what_was_gathered(models: Path, after: int) -> None:
    out = models / "out"
    plan = begun(models, out, after, statistics=True)
    run_plan(plan_of_unfinished(out), out, fsync=False)
    run_plan(plan.with_statistics(), models / "whole", fsync=False)
    texts = [(each / STATISTICS_NAME).read_text() for each in (out, models / "whole")]
    assert texts[0] == texts[1]


def test_the_same_command_without_the_option_goes_on_with_it(models: Path) -> None:
    plan = begun(models, models / "out", 2, statistics=True)
    run_plan(plan, models / "out", fsync=False)
    assert all(
        tensor.moments is not None
        for name, tensor in load_statistics(models / "out").tensors.items()
        if name != "steps"
    )


def test_tensors_written_before_it_was_asked_for_are_named(models: Path) -> None:
    plan = begun(models, models / "out", 2, statistics=False)
    run_plan(plan.with_statistics(), models / "out", fsync=False)
    tensors = load_statistics(models / "out").tensors
    reasons = [tensor.reason for tensor in tensors.values()]
    assert reasons.count("written before statistics were asked for") == 2


def altered_journal(out: Path, statistics: object) -> None:
    """Another list of numbers in every line, with its checksum."""
    from xxhash import xxh3_64_hexdigest

    path = out / JOURNAL_PATH
    lines = []
    for line in path.read_bytes().splitlines():
        record = json.loads(line.partition(b" ")[2])
        if "statistics" in record:
            record["statistics"] = statistics
        text = json.dumps(record).encode()
        lines.append(xxh3_64_hexdigest(text).encode() + b" " + text + b"\n")
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    "statistics",
    [
        [],
        "x",
        [1.0],
        [1.0] * 999,
        [True] * 21,
        [float("nan")] * 21,
        [-1.0] * 21,
        [1e300] * 21,
        [1.0] * number_count(2),
        [[1.0]] * 21,
    ],
)
def test_a_journal_that_lies_spoils_nothing(models: Path, statistics: object) -> None:
    out = models / "out"
    plan = begun(models, out, 2, statistics=True)
    altered_journal(out, statistics)
    run_plan(plan.with_statistics(), out, fsync=False)
    tensors = load_statistics(out).tensors
    reasons = [tensor.reason for tensor in tensors.values() if tensor.name != "steps"]
    assert sum(bool(reason) for reason in reasons) == 2


def test_killed_in_the_middle(models: Path) -> None:
    """A process that ends by SIGKILL when two tensors are in the journal."""
    (models / "recipe.yml").write_text(yaml.safe_dump(RECIPES["ties"]))
    script = """
import os, signal, sys
import lazymerge
from lazymerge.engine.report import Silent
class Killer(Silent):
    left = 2
    def finished(self, tensor):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
plan = lazymerge.plan("recipe.yml", workers=1)
lazymerge.run(plan, "out", statistics=True, observer=Killer(), fsync=False)
"""
    root = Path(lazymerge.__file__).parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    lazymerge.resume("out")
    lazymerge.run(lazymerge.plan("recipe.yml"), "whole", statistics=True, fsync=False)
    texts = [(models / each / STATISTICS_NAME).read_text() for each in ("out", "whole")]
    assert texts[0] == texts[1]


def test_a_complete_output_says_how_to_have_them(models: Path) -> None:
    class Notes(Silent):
        said: list[str] = []  # noqa: RUF012

        def noted(self, message: str) -> None:
            self.said.append(message)

    (models / "recipe.yml").write_text(yaml.safe_dump(RECIPES["linear"]))
    plan = lazymerge.plan(models / "recipe.yml")
    lazymerge.run(plan, models / "out", fsync=False)
    lazymerge.run(plan, models / "out", statistics=True, observer=Notes(), fsync=False)
    assert any("--overwrite makes it again with statistics" in note for note in Notes.said)
    with pytest.raises(InputError, match="run --stats"):
        load_statistics(models / "out")
    lazymerge.run(plan, models / "out", statistics=True, overwrite=True, fsync=False)
    assert load_statistics(models / "out").models == ("base", "a", "b")
    lazymerge.run(plan, models / "out", overwrite=True, fsync=False)
    assert not (models / "out" / STATISTICS_NAME).exists()


def test_numbers_that_are_none_are_written_as_null(models: Path) -> None:
    tensors = weights(models / "a")
    tensors["model.norm.weight"][3] = float("inf")
    (models / "a").unlink()
    write_checkpoint(models / "a", tensors, {"model_type": "llama"})
    found = merge(models, RECIPES["task_arithmetic"], "out")
    document = json.loads((models / "out" / STATISTICS_NAME).read_text(), parse_constant=refuse)
    assert document["tensors"]["model.norm.weight"]["products"][0][0] is None
    change = change_of([found.tensors["model.norm.weight"]])
    assert change is not None
    assert math.isnan(change.models["a"].cosine)
    assert change.as_dict()["models"]["a"]["norm"] is None
    json.dumps(change.as_dict(), allow_nan=False)


def refuse(constant: str) -> float:
    raise ValueError(constant)


def test_a_larger_limit_is_asked_for(models: Path) -> None:
    """What statistics take is part of the plan."""
    (models / "recipe.yml").write_text(yaml.safe_dump(RECIPES["ties"]))
    plan = lazymerge.plan(models / "recipe.yml", workers=2)
    more = plan.with_statistics()
    assert more.memory.projected_bytes > plan.memory.projected_bytes
    assert more.with_statistics() is more
    assert more.with_resources(Resources(workers=1)).execution.gathers
    assert more.fingerprint == plan.fingerprint


def test_sums_of_parts_are_sums_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(11)
    tensors = [torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(4)]
    parts = [[t[:300] for t in tensors], [t[300:] for t in tensors]]
    whole = moments_of(gathered(tensors[0], tensors[1:], is_merge=True))
    joined = moments_of(added([gathered(p[0], p[1:], is_merge=True) for p in parts]))
    assert joined.largest == whole.largest
    assert joined.agreements == whole.agreements
    assert np.allclose(joined.products, whole.products, rtol=1e-14)


def test_norms_and_cosines_of_two_tensors_together() -> None:
    """change_of, over tensors of two sizes, against their elements beside each other."""
    generator = np.random.default_rng(3)
    columns = [[generator.normal(size=size) for size in (100, 250)] for _ in range(4)]
    tensors = []
    for number, size in enumerate((100, 250)):
        reference, *others = [torch.from_numpy(column[number]) for column in columns]
        numbers = gathered(reference, [other - reference for other in others], is_merge=True)
        tensors.append(TensorStatistics(str(number), size, ("r", "a", "b"), moments_of(numbers)))
    found = change_of(tensors)
    assert found is not None
    r, a, b, y = (np.concatenate(column) for column in columns)
    cosine = lambda one, other: one @ other / np.linalg.norm(one) / np.linalg.norm(other)  # noqa: E731
    assert found.elements == 350
    assert found.norm == pytest.approx(np.linalg.norm(y - r))
    assert found.relative == pytest.approx(np.linalg.norm(y - r) / np.linalg.norm(r))
    assert found.models["a"].cosine == pytest.approx(cosine(a - r, y - r))
    assert found.models["b"].kept == pytest.approx((b - r) @ (y - r) / ((b - r) @ (b - r)))
    agreeing = np.sign(a - r) == np.sign(y - r)
    assert found.models["a"].agreement == pytest.approx(agreeing.mean())
    assert found.cosines == pytest.approx({"r": cosine(r, y), "a": cosine(a, y), "b": cosine(b, y)})
    assert found.between[("a", "b")] == pytest.approx(cosine(a - r, b - r))
    opposite = np.sign(a - r) != np.sign(b - r)
    assert found.conflict == pytest.approx(opposite.mean())


DAMAGES: list[tuple[str, Any]] = [
    ("models", None),
    ("models", ["a"] * 300),
    ("models", [1, 2]),
    ("fingerprint", 3),
    ("tensors", []),
    ("tensors", {"w": 1}),
    ("tensors", {"w": {"elements": -1, "left_out": "x"}}),
    ("tensors", {"w": {"elements": 1, "left_out": 7}}),
    ("tensors", {"w": {"elements": 1, "models": [0, 99]}}),
    ("tensors", {"w": {"elements": 1, "models": [0]}}),
    ("format", 99),
]


@pytest.mark.parametrize(("key", "value"), DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / STATISTICS_NAME).write_text(json.dumps({**whole_document(), key: value}))
    with pytest.raises(InputError, match=STATISTICS_NAME):
        load_statistics(tmp_path)


def whole_document() -> dict[str, Any]:
    """What a run may write, of one tensor."""
    generator = torch.Generator().manual_seed(11)
    tensors = [torch.randn(10, generator=generator) for _ in range(4)]
    moments = moments_of(gathered(tensors[0], tensors[1:], is_merge=True))
    models = ["base", "a", "b"]
    tensor = tensor_document(TensorStatistics("w", 10, tuple(models), moments), models)
    return {"format": 1, "fingerprint": "f", "models": models, "tensors": {"w": tensor}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    document = whole_document()
    (tmp_path / STATISTICS_NAME).write_text(json.dumps(document))
    (tensor,) = load_statistics(tmp_path).tensors.values()
    assert tensor_document(tensor, document["models"]) == document["tensors"]["w"]


@pytest.mark.parametrize("field", ["products", "agreements", "largest", "reference_products"])
@pytest.mark.parametrize("value", [None, [], [[1]], [1], ["x"] * 3, [[1], [1, 2], [1, "x", 3]]])
def test_a_damaged_tensor_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    document = whole_document()
    document["tensors"]["w"][field] = value
    (tmp_path / STATISTICS_NAME).write_text(json.dumps(document))
    with pytest.raises(InputError, match="damaged"):
        load_statistics(tmp_path)


def test_the_reference_comes_first_whatever_the_order(models: Path) -> None:
    recipe = {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "base"}],
        "parameters": {"t": 0.3},
    }
    found = merge(models, recipe, "out")
    assert found.tensors["model.norm.weight"].models == ("base", "a")


def test_whole_tensor_methods_say_why_there_are_none(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearCombination, "is_whole", True)
    monkeypatch.setattr(LinearCombination, "is_recordable", False)
    found = merge(models, RECIPES["linear"], "out")
    assert found.tensors["model.norm.weight"].reason == "its method takes it whole"
