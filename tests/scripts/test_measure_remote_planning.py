"""Planning three 13B models that lie elsewhere takes few requests of few bytes."""

from __future__ import annotations

from pathlib import Path

import lazymerge
import pytest
import torch
from lazymerge.checkpoint import open_checkpoint

import measure_remote_planning as measuring
from measure_planning import LLAMA, RECIPE, llama_13b, write_checkpoint
from range_server import range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

FILES = {"safetensors": 6, "torch": 3}


@pytest.mark.parametrize("kind", FILES)
def test_three_13b_models(kind: str, tmp_path: Path) -> None:
    tensors = [*llama_13b()]
    for number in range(3):
        folder = tmp_path / f"{kind}-{number}"
        if kind == "torch":
            measuring.write_torch_files(folder, tensors)
        else:
            write_checkpoint(folder, tensors, LLAMA)
    with range_server(tmp_path) as server:
        recipe = tmp_path / "recipe.yml"
        text = RECIPE.format(method="ties", folder=f"{server.address}/{kind}-")
        recipe.write_text(text.replace("-/", "-"))
        plan = lazymerge.plan(recipe)
        assert plan.bytes_to_fetch > 70e9
        assert server.bytes_sent < 5_000_000
        entries = 0 if kind == "safetensors" else len(tensors)
        assert len(server.log) <= 3 * (25 + FILES[kind] * 2 + entries)
        names = {Path(path).name for path, _ in server.log if Path(path).suffix in (".bin", ".pt")}
        spread = [stop - start for name in names for start, stop in server.ranges(name)]
        assert all(size <= 1 << 17 for size in spread)


def test_the_torch_files_are_such(tmp_path: Path) -> None:
    shapes = {"a": (3, 4), "b": (5,)}
    measuring.write_torch_file(
        tmp_path / "m.bin", [(name, "F16", shape) for name, shape in shapes.items()]
    )
    loaded = torch.load(tmp_path / "m.bin", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes
    found = open_checkpoint(str(tmp_path / "m.bin")).tensors
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert all(tensor.start % 64 == 0 for tensor in found.values())
