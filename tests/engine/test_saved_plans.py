"""Saved plans: the same merge when loaded, refused when an input or the plan itself has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.cli.plan_view import plan_view
from lazymerge.engine.plan import PLAN_FORMAT, Plan, torch_version
from lazymerge.engine.planning import make_plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.errors import DoesNotFitError, InputError
from lazymerge.version import __version__
from merge_cases import RECIPES
from rich.console import Console

from conftest import write_checkpoint
from merging import bits, plan_of, recipe_of, run

RESOURCES = Resources(8 << 30, workers=2)


def write_small_models(folder: Path) -> None:
    for name in ("base", "a", "b"):
        generator = torch.Generator().manual_seed(ord(name[0]))
        tensors = {
            f"model.layers.{n}.w": torch.randn(50 + n, generator=generator) for n in range(4)
        }
        tensors["lm_head.weight"] = torch.randn(9 if name == "b" else 10, 3)
        write_checkpoint(folder / name, tensors, {"model_type": "llama"}, shards=2)
        (folder / name / "tokenizer.json").write_text("{}")


def small_plan(folder: Path, method: str = "ties") -> Plan:
    return make_plan(
        recipe_of(folder, RECIPES[method]),
        RESOURCES,
        max_shard_bytes=500,
        truncate_embeddings=True,
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_small_models(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", RECIPES)
def test_round_trip(models: Path, method: str) -> None:
    plan = small_plan(models, method)
    assert len(plan.shards) > 1
    plan.save(models / "plan.json")
    loaded = load_plan(models / "plan.json", RESOURCES)
    assert loaded.as_dict() == plan.as_dict()
    assert loaded.shards == plan.shards
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.summary() == plan.summary()
    direct, later = run(plan, models / "direct"), run(loaded, models / "later")
    assert {n: bits(t) for n, t in direct.items()} == {n: bits(t) for n, t in later.items()}
    files = sorted(path.name for path in (models / "later").iterdir())
    assert files == sorted(path.name for path in (models / "direct").iterdir())
    assert "tokenizer.json" in files


def test_resources_are_those_of_the_run(models: Path) -> None:
    small_plan(models).save(models / "plan.json")
    loaded = load_plan(models / "plan.json", Resources(8 << 30, workers=3, read_mode="mmap"))
    assert (loaded.memory.workers, loaded.read_mode) == (3, "mmap")
    with pytest.raises(DoesNotFitError):
        load_plan(models / "plan.json", Resources(1 << 20))


# ------------------------------------------------------------------------ changed inputs


def touch(folder: Path) -> None:
    os.utime(folder / "model-00001-of-00002.safetensors", ns=(1, 1))


def lengthen(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    write_checkpoint(folder, {f"model.layers.{n}.w": torch.zeros(50 + n) for n in range(4)}, None)
    (folder / "model.safetensors").rename(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (touch, r"file model-00001-of-00002\.safetensors has changed"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "absent from the"),
        (lambda folder: folder.rename(folder.with_name("moved")), r"a': not found"),
    ],
)
def test_a_changed_input_is_named(
    models: Path, change: Callable[[Path], object], message: str
) -> None:
    plan = small_plan(models)
    plan.save(models / "plan.json")
    change(models / "a")
    with pytest.raises(InputError, match=message) as caught:
        load_plan(models / "plan.json", RESOURCES)
    assert str(models / "a") in str(caught.value)


def test_an_input_that_changes_after_loading_is_named_by_the_run(models: Path) -> None:
    plan = small_plan(models)
    touch(models / "b")
    with pytest.raises(InputError, match=r"b/model-00001-of-00002\.safetensors has changed since"):
        run_plan(plan, models / "out")
    assert not (models / "out").exists()


def test_an_input_moved_behind_a_link_is_told(models: Path) -> None:
    plan = small_plan(models)
    plan.save(models / "plan.json")
    (models / "a").rename(models / "moved")
    (models / "a").symlink_to(models / "moved")
    with pytest.raises(InputError, match=r"it was at .*/a, it is at .*/moved"):
        load_plan(models / "plan.json", RESOURCES)


# ------------------------------------------------------------------------ altered plans


def nodes(document: Any, kind: str) -> list[Any]:
    return [node for node in document["graph"] if node["kind"] == kind]


def other_file(document: Any) -> None:
    nodes(document, "read")[0].update(folder="/etc", file="passwd")


def shift(document: Any) -> None:
    node = nodes(document, "read")[0]
    node["bytes"] = [place + 1 for place in node["bytes"]]


def climb(document: Any) -> None:
    document["output"]["sidecars"] = ["../../escaped"]


def other_sidecars(document: Any) -> None:
    document["output"]["sidecar_folder"] = "/etc"
    document["output"]["sidecars"] = ["passwd"]


ALTERATIONS: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight": (
        lambda d: nodes(d, "apply")[0]["parameters"].update(weights=[1.0, 1.0]),
        "was altered after it was made",
    ),
    "density": (
        lambda d: nodes(d, "reduce")[0]["parameters"].update(keep=[1, 1]),
        "was altered after it was made",
    ),
    "output name": (
        lambda d: nodes(d, "write")[0].update(tensor="other"),
        "was altered|is damaged",
    ),
    "output dtype": (lambda d: nodes(d, "write")[0].update(dtype="F16"), "was altered"),
    "tensor left out": (lambda d: d["graph"].pop(), "was altered|is damaged"),
    "fingerprint": (lambda d: d.update(fingerprint="0" * 32), "was altered"),
    "other file": (other_file, "where there is no such tensor"),
    "byte range": (shift, "where there is no such tensor"),
    "sidecar elsewhere": (climb, r"copies '\.\./\.\./escaped', which is not there"),
    "sidecars of others": (other_sidecars, "copies 'passwd'"),
    "operation": (
        lambda d: nodes(d, "apply")[0].update(operation="evil"),
        "is damaged",
    ),
    "illegal graph": (lambda d: nodes(d, "apply")[0].update(shape=[1]), "is damaged"),
    "format": (lambda d: d.update(format=99), "not a plan that this version of lazymerge can"),
    "version": (lambda d: d.update(lazymerge="0.0.1"), "was made by lazymerge 0.0.1, this is"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_plan_is_refused(models: Path, name: str) -> None:
    alter, message = ALTERATIONS[name]
    path = models / "plan.json"
    small_plan(models).save(path)
    document = json.loads(path.read_text())
    alter(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        load_plan(path, RESOURCES)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a saved plan"),
        (b"{", "is not a saved plan"),
        (b"\xff\xfe", "is not a saved plan"),
        (b"[]", "is not a plan that this version"),
        (b"{}", "is not a plan that this version"),
        (b"[" * 200_000, "is not a saved plan"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "is not a saved plan"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_plan(tmp_path / "plan.json")


def test_an_absent_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent\.json: No such file"):
        load_plan(tmp_path / "absent.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_small_models(folder)
    small_plan(folder).save(folder / "plan.json")
    return folder


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=400)
@given(st.data())
def test_whatever_is_altered_it_loads_as_the_same_merge_or_is_refused(
    saved: Path, data: st.DataObject
) -> None:
    text = (saved / "plan.json").read_text()
    document = json.loads(text)
    fingerprint = document["fingerprint"]
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        child = place[key]
        if not isinstance(child, dict | list) or not child or data.draw(st.integers(0, 5)) == 0:
            break
        place = child
    if data.draw(st.booleans()):
        place[key] = data.draw(values)
    elif isinstance(place, dict):
        del place[key]
    else:
        place.insert(key, place[key])
    path = saved / "altered.json"
    path.write_text(json.dumps(document))
    try:
        plan = load_plan(path, RESOURCES)
    except InputError:
        return
    assert plan.fingerprint == fingerprint
    # what is not part of the fingerprint must still be what it claims to be
    plan.summary()
    json.dumps(plan.as_dict())
    Console(file=StringIO(), width=100).print(plan_view(plan, saved, is_given=False))


def test_plans_of_method_and_layout_differ(tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    plan = plan_of(tmp_path, recipe, {"a": {"w": torch.zeros(3)}})
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", RESOURCES).as_dict()["graph"][0]["kind"] == "read"


def test_a_plan_is_not_written_through_links(tmp_path: Path) -> None:
    """Somebody may have put one where it is to be."""
    from lazymerge.output.manifest import write_text

    (tmp_path / "mine").write_text("mine")
    (tmp_path / "plan.json").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "plan.json", "{}", fsync=False)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "plan.json").read_text() == "{}"


@pytest.mark.parametrize("key", ["lazymerge", "torch"])
def test_messages_about_damaged_plans_stay_short(tmp_path: Path, key: str) -> None:
    path = tmp_path / "plan.json"
    versions = {"lazymerge": __version__, "torch": torch_version()}
    path.write_text(json.dumps({"format": PLAN_FORMAT, **versions, key: ["x" * 1000] * 1000}))
    with pytest.raises(InputError) as caught:
        load_plan(path)
    assert len(str(caught.value)) < 1000
