"""What all tests share: checkpoints made on the fly, and random numbers that can be had again."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub: no test asks the real Hub

import numpy as np
import pytest
import torch
from hypothesis import settings
from lazymerge.cluster import worker
from lazymerge.engine import comparison, run
from lazymerge.engine.native import library
from lazymerge.engine.store import run as store_run
from lazymerge.inspection import scan
from safetensors.torch import save_file

from hub_server import TOKEN, HubServer, hub_server

settings.register_profile("lazymerge", deadline=None, print_blob=True)
settings.load_profile("lazymerge")

needs_kernels = pytest.mark.skipif(
    not library.is_available(), reason="the native kernels are not built, or not wanted"
)

SEED_VARIABLE = "LAZYMERGE_TEST_SEED"

MakeCheckpoint = Callable[..., Path]


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Write a checkpoint with the safetensors library, and return its folder.

    shards: files to spread the tensors over in turn; more than one come with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # cloned: the library refuses to write tensors that share memory
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(tensors.items())[number::shards])
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter as PEFT does, and return its folder.

    config: keys of adapter_config.json besides peft_type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _small_process() -> Iterator[None]:
    """A run counts what its process holds already, and that of the tests holds more the more tests
    it has run: here every run believes itself in a small one. tests/engine/test_runs.py says what
    happens in a large one, tests/engine/test_real_processes.py has real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, comparison, store_run, scan, worker):
            patch.setattr(module, "resident_bytes", lambda: 0)
        yield


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(folder, {name: tensor}, config=None, shards=1) → the folder.

    A relative folder lies in tmp_path.
    """

    def make(
        folder: Path | str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        shards: int = 1,
    ) -> Path:
        return write_checkpoint(tmp_path / folder, tensors, config, shards)

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of the test's own, with nothing in it, an empty cache and a token.

    The test is in a folder of its own: models of the Hub are not where local folders are.
    """
    from huggingface_hub import close_session, constants

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        close_session()


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed so that a failure shows it; LAZYMERGE_TEST_SEED repeats one."""
    value = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    print(f"{SEED_VARIABLE}={value}")
    return value


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    """Random numbers from the printed seed."""
    return np.random.default_rng(seed)
