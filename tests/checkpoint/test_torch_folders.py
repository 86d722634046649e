"""Folders with torch files, folders of oddly named files, and what goes before what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lazymerge.checkpoint import open_checkpoint
from lazymerge.errors import InputError
from safetensors.torch import save_file

A, B = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def put(folder: Path, file: str, *names: str) -> None:
    """A file with tensors of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.ones(2) for name in names or (file,)}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)


def index(folder: Path, file: str, weight_map: dict[str, str]) -> None:
    (folder / file).write_text(json.dumps({"weight_map": weight_map}))


def files_of(reference: Path) -> list[str]:
    checkpoint = open_checkpoint(str(reference))
    assert {t.file for t in checkpoint.tensors.values()} == {f.path for f in checkpoint.files}
    return [file.path for file in checkpoint.files]


def test_shards_with_an_index(tmp_path: Path) -> None:
    put(tmp_path, A, "a", "b")
    put(tmp_path, B, "c")
    put(tmp_path, "other.bin", "a")
    index(tmp_path, "pytorch_model.bin.index.json", {"a": A, "b": A, "c": B})
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["c"].file == B
    index(tmp_path, "pytorch_model.bin.index.json", {"a": A, "c": B})
    with pytest.raises(InputError, match="does not list 'b'"):
        open_checkpoint(str(tmp_path))
    index(tmp_path, "pytorch_model.bin.index.json", {"a": "model.safetensors"})
    with pytest.raises(InputError, match=r"'model.safetensors', absent|is not a .bin file"):
        open_checkpoint(str(tmp_path))
    index(tmp_path, "pytorch_model.bin.index.json", {"a": "../x.bin"})
    with pytest.raises(InputError, match=r"'\.\./x\.bin' is not a plain file name"):
        open_checkpoint(str(tmp_path))


def test_shards_without_an_index(tmp_path: Path) -> None:
    put(tmp_path, A, "a")
    with pytest.raises(InputError, match=f"'{B}' absent"):
        open_checkpoint(str(tmp_path))
    put(tmp_path, B, "b")
    assert files_of(tmp_path) == [A, B]


ST_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


@pytest.mark.parametrize(
    ("present", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["other.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),  # as mergekit
        (["other.safetensors", "other.bin"], "other.safetensors"),
        (["sd_xl_base_1.0.safetensors"], "sd_xl_base_1.0.safetensors"),
        (["flux1-dev.safetensors", "other.ckpt"], "flux1-dev.safetensors"),
        (["consolidated.00.pth"], "consolidated.00.pth"),
        (["v1-5-pruned.ckpt"], "v1-5-pruned.ckpt"),
        (["weights.pt", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth",
          "rng_state.pth", "scaler.pt", ".hidden.bin"], "weights.pt"),
    ],
)  # fmt: skip
def test_what_is_taken(present: Sequence[str], taken: str, tmp_path: Path) -> None:
    for file in present:
        put(tmp_path, file)
    assert files_of(tmp_path) == [taken]


def test_an_index_goes_before_single_files_of_its_kind_only(tmp_path: Path) -> None:
    put(tmp_path, A, "a")
    index(tmp_path, BIN_INDEX, {"a": A})
    put(tmp_path, "pytorch_model.bin")
    assert files_of(tmp_path) == [A]
    put(tmp_path, "model.safetensors")
    assert files_of(tmp_path) == ["model.safetensors"]
    put(tmp_path, "part.safetensors", "a")
    index(tmp_path, ST_INDEX, {"a": "part.safetensors"})
    assert files_of(tmp_path) == ["part.safetensors"]


def test_the_only_index_of_another_name_counts(tmp_path: Path) -> None:
    """As diffusers has them, with the same tensors in one file beside them."""
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    put(tmp_path, shards[0], "a")
    put(tmp_path, shards[1], "b")
    put(tmp_path, "consolidated.safetensors", "a", "b")
    with pytest.raises(InputError, match="is in both"):
        open_checkpoint(str(tmp_path))
    name = "diffusion_pytorch_model.safetensors.index.json"
    index(tmp_path, name, {"a": shards[0], "b": shards[1]})
    assert files_of(tmp_path) == shards
    index(tmp_path, name, {"a": shards[0], "b": shards[0]})
    with pytest.raises(InputError, match=name):
        open_checkpoint(str(tmp_path))


def test_several_files_with_the_same_tensors(tmp_path: Path) -> None:
    for file in ("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"):
        put(tmp_path, file, "a")
    with pytest.raises(InputError, match=r"is in both .* Give the one file to use"):
        open_checkpoint(str(tmp_path))
    assert files_of(tmp_path / "sd_xl_base_1.0.safetensors") == ["sd_xl_base_1.0.safetensors"]


@pytest.mark.parametrize("file", ["m.pth", "m.pt", "m.bin", "m.ckpt", "m.safetensors"])
def test_a_file_by_its_path(file: str, tmp_path: Path) -> None:
    put(tmp_path, file, "a")
    put(tmp_path, "model.safetensors", "b")
    checkpoint = open_checkpoint(str(tmp_path / file))
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.config is None


def test_notices(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, tmp_path / "m.ckpt")
    (notice,) = open_checkpoint(str(tmp_path)).notices
    assert notice == (
        "m.ckpt: what it holds under 'state_dict' is taken for the model; not read: 'epoch'"
    )


def test_adapters_are_no_models(tmp_path: Path) -> None:
    put(tmp_path, "adapter_model.bin")
    with pytest.raises(InputError, match="holds a LoRA adapter"):
        open_checkpoint(str(tmp_path))


def test_links_out_of_the_model(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "pytorch_model.bin")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").symlink_to("../elsewhere/pytorch_model.bin")
    with pytest.raises(InputError, match="outside the model's folder"):
        open_checkpoint(str(tmp_path / "model"))
