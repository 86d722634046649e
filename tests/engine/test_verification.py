"""Verifying outputs: whole ones are, and every kind of damage is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError, LazymergeError
from safetensors.torch import load_file, save_file

from conftest import write_checkpoint

NAMES = [f"model.layers.{number}.w" for number in range(5)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    for model in ("base", "a", "b"):
        tensors = {name: torch.randn(30, 20, generator=generator) for name in NAMES}
        write_checkpoint(tmp_path / model, tensors)
    recipe = {
        "merge_method": "della",
        "base_model": str(tmp_path / "base"),
        "seed": 7,
        "models": [
            {"model": str(tmp_path / m), "parameters": {"weight": 0.5, "density": 0.5}}
            for m in ("a", "b")
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    plan = lazymerge.plan(tmp_path / "recipe.yml", max_shard_size=5000)
    lazymerge.run(plan, tmp_path / "out")
    return tmp_path / "out"


def test_what_is_whole(out: Path) -> None:
    seen: list[str] = []
    found = verify_output(out, checked=lambda _, name: seen.append(name))
    assert found.problems == ()
    assert (found.tensors, found.bytes) == (5, 5 * 30 * 20 * 4)
    assert sorted(seen) == NAMES


@pytest.mark.parametrize("count", [1, 3, 5, 99])
def test_tensors_are_merged_again(out: Path, count: int) -> None:
    found = verify_output(out, recompute=count, seed=4)
    assert found.problems == ()
    assert len(found.recomputed) == min(count, 5)
    assert found == verify_output(out, recompute=count, seed=4)


def shard_of(out: Path, name: str) -> Path:
    return out / json.loads((out / "lazymerge.json").read_text())["tensors"][name]["file"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def other_shape(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor.reshape(-1) for name, tensor in tensors.items()}, path)


def other_names(path: Path) -> None:
    save_file({f"x{name}": tensor for name, tensor in load_file(path).items()}, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (flip_a_bit, ["has other bytes than were written"]),
        (other_shape, [r"is F32 of shape \[600\], the manifest says F32 of shape \[30, 20\]"]),
        (other_names, ["is not in the manifest", "is missing"]),
        (cut, [r"model-.*\.safetensors"]),
        (Path.unlink, [r"model-.*\.safetensors"]),
    ],
)
def test_damage_is_named(out: Path, damage: Callable[[Path], Any], messages: list[str]) -> None:
    damage(shard_of(out, NAMES[2]))
    problems = "\n".join(verify_output(out).problems)
    for message in messages:
        assert re.search(message, problems), problems


def test_a_shard_that_is_missing_from_the_manifest_too(out: Path) -> None:
    path = out / "lazymerge.json"
    document = json.loads(path.read_text())
    lost = document["tensors"].pop(NAMES[2])["file"]
    document["tensors"] = {n: t for n, t in document["tensors"].items() if t["file"] != lost}
    path.write_text(json.dumps(document))
    (out / lost).unlink()
    problems = "\n".join(verify_output(out).problems)
    assert "does not list all tensors and shards" in problems
    assert f"{lost} is missing" in problems
    with pytest.raises(InputError, match="its tensors are not those of its recipe"):
        verify_output(out, recompute=1)


def test_small_files(out: Path) -> None:
    """May be edited, and not go missing."""
    names = ["model.safetensors.index.json", "README.md"]
    assert sorted(json.loads((out / "lazymerge.json").read_text())["files"]) == sorted(names)
    (out / "README.md").write_text("# My model")
    found = verify_output(out)
    assert (found.problems, found.edited) == ((), ("README.md",))
    (out / names[0]).unlink()
    found = verify_output(out)
    assert found.problems == (f"{out / names[0]} is missing",)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("shards"),
        lambda m: m.update(shards=[]),
        lambda m: m.update(shards={"../evil": 5}),
        lambda m: m.update(files={"../../etc/passwd": "x"}),
        lambda m: m.update(files=None),
        lambda m: m.update(files=["README.md"]),
        lambda m: m.update(output={"tensors": "many"}),
        lambda m: m["output"].update(bytes=10**400),
        lambda m: m["tensors"].update(extra=m["tensors"][NAMES[0]]),
        lambda m: m["tensors"][NAMES[0]].update(span_elements=10**400),
        lambda m: m["tensors"][NAMES[0]].update(file=["x"]),
        lambda m: m["tensors"][NAMES[0]].update(shape=[True]),
        lambda m: m["tensors"][NAMES[0]].update(shape=[[2**63] * 50_000]),
        lambda m: m.update(torch="0.1"),
        lambda m: m["output"].update(max_shard_bytes="x"),
        lambda m: m["recipe"].update(seed=1.5),
    ],
)
def test_manifests_that_somebody_has_altered(out: Path, change: Callable[[Any], Any]) -> None:
    """They are refused, or what is wrong is said; no other error comes of them."""
    path = out / "lazymerge.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    try:
        said = "\n".join(verify_output(out, recompute=2).problems)
    except LazymergeError as error:
        said = str(error)
    assert "lazymerge.json" in said
    assert len(said) < 2000
    with suppress(InputError):
        lazymerge.status(out)


def test_a_manifest_that_agrees_with_wrong_bytes(out: Path) -> None:
    """Only merging again shows it."""
    path = out / "lazymerge.json"
    document = json.loads(path.read_text())
    for name in NAMES:
        document["tensors"][name]["checksum"] = "0" * 32
    path.write_text(json.dumps(document))
    problems = verify_output(out, recompute=2, seed=1).problems
    assert sum("comes out otherwise" in problem for problem in problems) == 2


def test_inputs_that_have_changed_cannot_be_merged_again(out: Path) -> None:
    tensors = {name: torch.zeros(30, 20) for name in NAMES}
    write_checkpoint(out.parent / "a", tensors)
    assert verify_output(out).problems == ()
    with pytest.raises(InputError, match=r"a/model\.safetensors has changed"):
        verify_output(out, recompute=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("tensors"),
        lambda d: d.update(checksum="crc32"),
        lambda d: d["tensors"].update(w=3),
        lambda d: d["tensors"][NAMES[0]].update(file="../other/model.safetensors"),
        lambda d: d["tensors"][NAMES[0]].update(file=""),
        lambda d: d["tensors"][NAMES[0]].update(file="model\0.safetensors"),
        lambda d: d["tensors"][NAMES[0]].update(dtype="F7"),
        lambda d: d["tensors"][NAMES[0]].update(shape=["x"]),
        lambda d: d["tensors"][NAMES[0]].update(span_elements=0),
        lambda d: d.update(format=2),
    ],
)
def test_a_damaged_manifest(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = out / "lazymerge.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"lazymerge\.json"):
        verify_output(out)


def test_what_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no lazymerge\.json"):
        verify_output(tmp_path)
