"""Models in torch files at addresses: planned and merged by byte ranges, as local ones are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lazymerge
import pytest
import torch
import yaml
from lazymerge.checkpoint import open_checkpoint
from lazymerge.checkpoint.tensor import Checkpoint
from lazymerge.errors import InputError

from range_server import RangeServer, range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

SEED = 31


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    found = {
        f"model.layers.{n}.mlp.up_proj.weight": torch.randn(300, 400, generator=generator).half()
        for n in range(3)
    }
    embedding = torch.randn(500, 400, generator=generator)
    return {**found, "model.embed_tokens.weight": embedding, "lm_head.weight": embedding}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """Serves models: single and sharded (the same tensors), old, from before torch 1.6."""
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
    root = tmp_path / "served"
    whole = tensors()
    for name in ("single", "sharded", "old"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text('{"model_type": "llama"}')
    torch.save(whole, root / "single" / "pytorch_model.bin")
    torch.save(whole, root / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    places = {}
    names = list(whole)
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: whole[name] for name in part}, root / "sharded" / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (root / "sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with range_server(root) as serving:
        yield serving


def facts(checkpoint: Checkpoint) -> object:
    files = [replace(file, modified_ns=None, pin=None) for file in checkpoint.files]
    return files, checkpoint.tensors, checkpoint.config


@pytest.mark.parametrize("name", ["single", "sharded", "single/pytorch_model.bin"])
def test_what_they_say_is_what_local_ones_say(server: RangeServer, name: str) -> None:
    found = open_checkpoint(f"{server.address}/{name}")
    expected = open_checkpoint(str(server.root / name))
    assert found.tensors == expected.tensors
    assert facts(replace(found, config=None)) == facts(replace(expected, config=None))
    assert all(file.pin for file in found.files)


def merged(model: str, folder: Path) -> bytes:
    document = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 0.5}}],
    }
    folder.mkdir()
    (folder / "recipe.yml").write_text(yaml.safe_dump(document))
    plan = lazymerge.plan(folder / "recipe.yml", workers=2)
    lazymerge.run(plan, folder / "out", fsync=False)
    return (folder / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_merges(server: RangeServer, tmp_path: Path, name: str) -> None:
    found = merged(f"{server.address}/{name}", tmp_path / "there")
    assert found == merged(str(server.root / name), tmp_path / "here")


def test_adapters(server: RangeServer, tmp_path: Path) -> None:
    folder = server.root / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    factors = {
        f"{prefix}.lora_A.weight": torch.ones(2, 400),
        f"{prefix}.lora_B.weight": torch.ones(300, 2),
    }
    torch.save(factors, folder / "adapter_model.bin")
    found = merged(f"{server.address}/single+{server.address}/adapter", tmp_path / "there")
    root = server.root
    assert found == merged(f"{root}/single+{root}/adapter", tmp_path / "here")
    assert found != merged(f"{root}/single", tmp_path / "without")


def test_files_of_before_torch_1_6(server: RangeServer) -> None:
    with pytest.raises(InputError) as error:
        open_checkpoint(f"{server.address}/old")
    message = str(error.value)
    assert message.startswith(f"model '{server.address}/old': ")
    assert "/old/pytorch_model.bin: is in the format that torch wrote before" in message


def test_safetensors_go_first(server: RangeServer) -> None:
    from conftest import write_checkpoint

    write_checkpoint(server.root / "single", {"other": torch.ones(3)})
    assert list(open_checkpoint(f"{server.address}/single").tensors) == ["other"]


def test_a_server_without_ranges(server: RangeServer) -> None:
    server.has_ranges = False
    with pytest.raises(InputError, match="no ranges of files, and where the tensors of a torch"):
        open_checkpoint(f"{server.address}/single")


def test_broken_connections(server: RangeServer) -> None:
    server.answers["single/pytorch_model.bin"] = [503, 500]
    server.cuts["single/pytorch_model.bin"] = [100, 7]
    found = open_checkpoint(f"{server.address}/single")
    assert found.tensors == open_checkpoint(str(server.root / "single")).tensors
