"""Merges of torch files: the bytes that the same tensors in safetensors files give."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.execution import ReadMode
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError
from lazymerge.output.manifest import MANIFEST_NAME
from safetensors.torch import load_file

from conftest import write_checkpoint
from merging import bits

SHAPES = {
    "model.embed_tokens.weight": (30, 8),
    "model.layers.0.w": (50, 40),
    "model.layers.1.w": (50, 40),
    "model.norm.weight": (7,),
    "model.scale": (),
}
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn]

Tensors = dict[str, torch.Tensor]


def tensors_of(number: int, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(number)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied
    tensors["model.positions"] = torch.arange(9)
    return tensors


def write_torch(folder: Path, tensors: Tensors, shards: int) -> None:
    """As pytorch_model.bin, or as shards with an index."""
    folder.mkdir(parents=True)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[number::shards])
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(params=DTYPES, ids=str)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three models, once in safetensors and once in torch files, and a recipe for each."""
    for number, model in enumerate(("base", "a", "b")):
        tensors = tensors_of(number, request.param)
        write_checkpoint(tmp_path / "safetensors" / model, tensors, {"model_type": "llama"})
        write_torch(tmp_path / "torch" / model, tensors, shards=1 + number % 2)
        (tmp_path / "torch" / model / "config.json").write_text('{"model_type": "llama"}')
    for kind in ("safetensors", "torch"):
        entries = [
            {"model": str(tmp_path / kind / m), "parameters": {"weight": 0.5, "density": 0.6}}
            for m in ("a", "b")
        ]
        document = {
            "merge_method": "ties",
            "base_model": str(tmp_path / kind / "base"),
            "models": entries,
        }
        (tmp_path / f"{kind}.yml").write_text(yaml.safe_dump(document))
    return tmp_path


def merged(plan: Plan, output: Path) -> Tensors:
    run_plan(plan, output, fsync=False)
    tensors: Tensors = {}
    for file in output.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_the_same_bytes(place: Path, read_mode: ReadMode) -> None:
    found = {
        kind: merged(
            lazymerge.plan(place / f"{kind}.yml", workers=2, read_mode=read_mode), place / kind[:2]
        )
        for kind in ("safetensors", "torch")
    }
    assert found["torch"].keys() == found["safetensors"].keys()
    for name, tensor in found["torch"].items():
        assert bits(tensor) == bits(found["safetensors"][name]), name
    assert verify_output(place / "to", recompute=3).problems == ()


class Stop(Exception):
    pass


class Stopper(Silent):
    """Ends a run after three tensors."""

    count = 0

    def finished(self, tensor: str) -> None:
        self.count += 1
        if self.count == 3:
            raise Stop


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    for number, model in enumerate(("a", "b")):
        write_torch(tmp_path / model, tensors_of(number, torch.bfloat16), shards=1)
    models = [{"model": str(tmp_path / m), "parameters": {"weight": 0.5}} for m in ("a", "b")]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    with pytest.raises(Stop):
        run_plan(lazymerge.plan(recipe, workers=1), tmp_path / "out", observer=Stopper())
    return tmp_path


def test_an_interrupted_merge_goes_on(unfinished: Path) -> None:
    out = unfinished / "out"
    report = run_plan(plan_of_unfinished(out, Resources(workers=1)), out)
    assert report.resumed_tensors == 3
    whole = merged(lazymerge.plan(unfinished / "recipe.yml", workers=1), unfinished / "whole")
    assert {n: bits(t) for n, t in load_file(out / "model.safetensors").items()} == {
        n: bits(t) for n, t in whole.items()
    }
    assert json.loads((out / MANIFEST_NAME).read_text())["fingerprint"]


def test_a_changed_file_is_noticed(unfinished: Path) -> None:
    """Size and times as they were: what is left is the digest of the pickle and the directory."""
    path = unfinished / "a" / "pytorch_model.bin"
    before = path.stat()
    content = path.read_bytes()
    assert content.count(b"model.norm.weight") == 1
    path.write_bytes(content.replace(b"model.norm.weight", b"model.form.weight"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    other = (unfinished / "b" / "pytorch_model.bin").read_bytes()
    (unfinished / "b" / "pytorch_model.bin").write_bytes(
        other.replace(b"model.norm.weight", b"model.form.weight")
    )
    status = (unfinished / "b" / "pytorch_model.bin").stat()
    assert status.st_size == len(other)
    with pytest.raises(InputError, match="has changed"):
        plan_of_unfinished(unfinished / "out")
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"b/pytorch_model\.bin has changed"):
        plan_of_unfinished(unfinished / "out")


def test_a_saved_plan(unfinished: Path) -> None:
    plan = lazymerge.plan(unfinished / "recipe.yml", workers=1)
    plan.save(unfinished / "plan.json")
    assert load_plan(unfinished / "plan.json").fingerprint == plan.fingerprint
    os.utime(unfinished / "a" / "pytorch_model.bin", ns=(1, 1))
    with pytest.raises(InputError, match="is not what it was"):
        load_plan(unfinished / "plan.json")


def test_a_file_that_changes_between_plan_and_run(unfinished: Path) -> None:
    plan = lazymerge.plan(unfinished / "recipe.yml", workers=1)
    os.utime(unfinished / "a" / "pytorch_model.bin", ns=(1, 1))
    with pytest.raises(InputError, match="has changed since the merge was planned"):
        run_plan(plan, unfinished / "other")


def test_single_files_of_both_kinds_without_config(tmp_path: Path) -> None:
    """By names alone, as for image models; and the wrapped mapping is said."""
    tensors = [{"first.w": torch.full((3, 2), n), "out.b": torch.ones(2)} for n in (1.0, 3.0)]
    torch.save({"state_dict": tensors[0], "epoch": 2}, tmp_path / "one.ckpt")
    folder = write_checkpoint(tmp_path / "two", tensors[1])
    (folder / "model.safetensors").rename(folder / "sd_xl_base_1.0.safetensors")
    document = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / "one.ckpt"), "parameters": {"weight": 0.5}},
            {"model": str(folder), "parameters": {"weight": 0.5}},
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    plan = lazymerge.plan(tmp_path / "recipe.yml", workers=1)
    assert any("under 'state_dict' is taken for the model" in notice for notice in plan.notices)
    found = merged(plan, tmp_path / "out")
    assert torch.equal(found["first.w"], torch.full((3, 2), 2.0))
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_unaligned_storage(tmp_path: Path) -> None:
    """Other programs may write entries at odd places."""
    import zipfile

    value = torch.arange(500.0).to(torch.bfloat16)
    torch.save({"w": value}, tmp_path / "even.pt")
    with (
        zipfile.ZipFile(tmp_path / "even.pt") as source,
        zipfile.ZipFile(tmp_path / "odd.pt", "w") as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: '{tmp_path}/odd.pt', "
        "parameters: {weight: 1.0}}]\ndtype: float32\n"
    )
    for read_mode in ("mmap", "pread"):
        plan = lazymerge.plan(tmp_path / "recipe.yml", workers=1, read_mode=read_mode)
        found = merged(plan, tmp_path / read_mode)
        assert torch.equal(found["w"], value.float())
