"""Models of the Hub, opened: by what requests, and what is said when a Hub is broken or hostile."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.checkpoint import hub as hub_module
from lazymerge.checkpoint import open_checkpoint
from lazymerge.checkpoint.hub import fetch, find_source, read_start
from lazymerge.checkpoint.hub_reference import HubReference, hub_reference
from lazymerge.errors import InputError, LazymergeError

import hub_server
from conftest import MakeCheckpoint, write_checkpoint
from hub_server import TOKEN, HubServer

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "RETRIES", 0)


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint, hub: HubServer) -> Path:
    """A sharded model beside which lie other files, published as org/a."""
    tensors = {f"t{n}": torch.full((40, 30), float(n)) for n in range(6)}
    folder = make_checkpoint("a", tensors, {"model_type": "llama"}, shards=2)
    for name in ("pytorch_model.bin", "modeling_a.py", "tokenizer.json", "README.md"):
        (folder / name).write_bytes(b"{}")
    hub.publish("org/a", folder)
    return folder


def cached(tmp_path: Path) -> list[str]:
    """Names of all files in the cache but the library's locks and marks."""
    cache = tmp_path / "cache"
    return sorted(path.name for path in cache.glob("*/snapshots/*/*"))


def refused(reference: str, error: type[LazymergeError] = InputError) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(reference)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


# References


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/a", HubReference("org/a", "main")),
        ("org/a@v1.0", HubReference("org/a", "v1.0")),
        ("org/a@refs/pr/3", HubReference("org/a", "refs/pr/3")),
        ("hf://org/a@v1.0", HubReference("org/a", "v1.0")),
        ("org/a@", None),
        ("org/a@../x", None),
        ("org/a@/x", None),
        ("org/a@x//y", None),
        ("org/..", None),
        ("../a", None),
        ("a", None),
        ("org/a/b", None),
        ("org/a.safetensors", None),
        ("org/a+org/b", None),
        ("org/a\n", None),
        ("örg/a", None),
    ],
)
def test_references(reference: str, expected: HubReference | None) -> None:
    assert hub_reference(reference) == expected


def test_a_local_folder_goes_first(model: Path, hub: HubServer) -> None:
    write_checkpoint(Path("org/a"), {"local": torch.ones(1)})
    assert list(open_checkpoint("org/a").tensors) == ["local"]
    opened = open_checkpoint("org/a@v1")
    assert list(opened.tensors) == ["local"]
    assert opened.notices == ("is the local folder org/a; its revision is not looked at",)
    assert hub.log == []
    assert "t0" in open_checkpoint("hf://org/a").tensors


# What is asked for


def test_weights_are_not_fetched(model: Path, hub: HubServer, tmp_path: Path) -> None:
    opened, local = open_checkpoint("org/a"), open_checkpoint(str(model))
    assert opened.tensors == local.tensors
    assert opened.config == local.config
    assert opened.header_bytes_read == local.header_bytes_read
    assert opened.files == tuple(replace(file, modified_ns=None) for file in local.files)
    assert sorted(hub.fetched()) == ["config.json", INDEX]
    assert cached(tmp_path) == ["config.json", INDEX]
    ranged = {request.file: request.range for request in hub.log if request.range}
    assert ranged == {
        name: f"bytes=0-{(model / name).stat().st_size - 1}" for name in sorted(ranged)
    }
    assert sorted(ranged) == sorted(FILES)
    assert {request.token for request in hub.log} == {f"Bearer {TOKEN}"}


def test_no_more_than_the_header_is_read(hub: HubServer, make_checkpoint: MakeCheckpoint) -> None:
    hub.publish("org/big", make_checkpoint("big", {"t": torch.zeros(1 << 20)}))
    open_checkpoint("org/big")
    assert [request.range for request in hub.log if request.file] == ["bytes=0-131071"]


def test_a_long_header_takes_a_second_request(
    hub: HubServer, make_checkpoint: MakeCheckpoint
) -> None:
    tensors = {f"{n:0100}": torch.zeros(1) for n in range(1500)}
    folder = make_checkpoint("long", tensors)
    hub.publish("org/long", folder)
    assert open_checkpoint("org/long").tensors == open_checkpoint(str(folder)).tensors
    assert len([request for request in hub.log if request.range]) == 2


def test_a_server_that_ignores_ranges(model: Path, hub: HubServer) -> None:
    hub.ignores_ranges = True
    assert open_checkpoint("org/a").tensors == open_checkpoint(str(model)).tensors


def test_revisions(hub: HubServer, make_checkpoint: MakeCheckpoint) -> None:
    old = hub.publish("org/a", make_checkpoint("old", {"old": torch.ones(1)}), "v1")
    hub.publish("org/a", make_checkpoint("new", {"new": torch.ones(1)}))
    assert list(open_checkpoint("org/a").tensors) == ["new"]
    for revision in ("v1", old):
        opened = open_checkpoint(f"org/a@{revision}")
        assert list(opened.tensors) == ["old"]
        assert opened.hub is not None
        assert (opened.hub.revision, opened.hub.commit) == (revision, old)


# The cache


def test_offline_with_a_cold_cache(
    model: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("org/a@v1")
    assert "'org/a@v1'" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download org/a --revision v1" in message
    assert hub.log == []


def test_offline_with_half_a_cache(
    model: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_checkpoint("org/a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("org/a")
    assert message.startswith("model 'org/a' of the Hub")
    assert FILES[0] in message
    assert "HF_HUB_OFFLINE" in message


def warm(reference: str) -> None:
    source = find_source(HubReference(reference))
    for name in ("config.json", INDEX, *FILES):
        fetch(source, name, lambda _: None)


def test_offline_with_a_warm_cache(
    model: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm("org/a")
    hub.log.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/a").tensors == open_checkpoint(str(model)).tensors
    assert hub.log == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_does_not_answer_is_replaced_by_the_cache(
    model: Path, hub: HubServer, status: int
) -> None:
    warm("org/a")
    hub.answers["org/a"] = (status, "")
    opened = open_checkpoint("org/a")
    assert opened.tensors == open_checkpoint(str(model)).tensors
    (notice,) = opened.notices
    assert "is taken from the cache" in notice
    assert f"the Hub answers {status}" in notice


def test_a_commit_outlives_its_repository(model: Path, hub: HubServer) -> None:
    warm("org/a")
    commit = hub.branches["org/a"]["main"]
    del hub.commits["org/a"]
    assert "has no such model" in refused("org/a")
    assert "t0" in open_checkpoint(f"org/a@{commit}").tensors


# Errors


@pytest.mark.parametrize(
    ("status", "code", "expected", "exit_code"),
    [
        (404, "RepoNotFound", "is no local folder, and the Hub", 2),
        (401, "RepoNotFound", "log in", 2),
        (403, "GatedRepo", "is gated. Ask for access at", 2),
        (404, "RevisionNotFound", "has no revision 'main'", 2),
        (403, "", "may not be read (the Hub answers 403)", 2),
        (403, "DisabledRepo", "may not be read", 2),
        (500, "", "the Hub answers 500. Try again later", 1),
        (429, "", "the Hub answers 429. Try again later", 1),
        (418, "", "the Hub answers 418", 1),
    ],
)
def test_errors_of_the_list(
    model: Path, hub: HubServer, status: int, code: str, expected: str, exit_code: int
) -> None:
    hub.answers["org/a"] = (status, code)
    with pytest.raises(LazymergeError) as caught:
        open_checkpoint("org/a")
    assert caught.value.exit_code == exit_code
    message = refused("org/a", LazymergeError)
    assert "'org/a'" in message
    assert expected in message


@pytest.mark.parametrize("file", ["config.json", FILES[1]])
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "GatedRepo", "is gated"),
        (404, "EntryNotFound", "the Hub lists"),
        (403, "", "may not be read (the Hub answers 403)"),
    ],
)
def test_errors_of_files(
    model: Path, hub: HubServer, file: str, status: int, code: str, expected: str
) -> None:
    hub.answers[f"org/a/{file}"] = (status, code)
    assert expected in refused("org/a")


def test_a_hub_that_is_not_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    message = refused("org/a", LazymergeError)
    assert message.startswith("model 'org/a': cannot be had from http://127.0.0.1:1: ")
    assert message.endswith("Try again, or name a local folder.")


def test_a_misspelt_local_folder(hub: HubServer) -> None:
    Path("models/Llama-3-8B").mkdir(parents=True)
    message = refused("models/Llama-3-8b")
    assert "is no local folder" in message
    assert "'Llama-3-8B': is one of them meant?" in message


def test_a_torch_file_that_is_none(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    hub.publish("org/bin", tmp_path / "bin")
    message = refused("org/bin")
    assert "'org/bin'" in message
    assert "pytorch_model.bin: is not a file that torch.save writes" in message


def test_a_start_that_is_cut_short(model: Path, hub: HubServer) -> None:
    source = find_source(HubReference("org/a"))
    hub.cut[f"org/a/{FILES[0]}"] = [100] * 9
    with pytest.raises(LazymergeError, match="cannot be had from"):
        read_start(source, FILES[0], 1000)


# Hostile Hubs

EVIL = "../../../../evil.safetensors"


def outside(tmp_path: Path) -> list[str]:
    """What has been written beside the cache and what the test has made."""
    return sorted(
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*evil*")
        if path.relative_to(tmp_path).parts[0] != "a"
    )


@pytest.mark.parametrize(
    "name", [EVIL, "/tmp/evil.json", "..", "a/../../evil.json", "evil\0.json", "..\\evil.json"]
)
def test_names_that_lead_out_of_the_cache(
    model: Path, hub: HubServer, tmp_path: Path, name: str
) -> None:
    hub.names["org/a"] = [name]
    opened = open_checkpoint("org/a")
    assert opened.hub is not None
    assert name not in opened.hub.sizes
    assert outside(tmp_path) == []


def test_an_index_that_leads_out_of_the_cache(hub: HubServer, tmp_path: Path, model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"t0": EVIL}}))
    hub.publish("org/a", model)
    hub.names["org/a"] = [EVIL]
    assert "is not a plain file name" in refused("org/a")
    assert outside(tmp_path) == []


@pytest.mark.parametrize("sha", ["../../../evil", "", "main", "0" * 39, "0" * 41, "A" * 40])
def test_commits_that_are_none(model: Path, hub: HubServer, tmp_path: Path, sha: str) -> None:
    hub.sha = sha or "?"
    assert "names no commit" in refused("org/a")
    assert outside(tmp_path) == []


@pytest.mark.parametrize("etag", ['"../../../../evil"', 'W/"/evil"', '"..\\evil"', '".."'])
def test_etags_that_lead_out_of_the_cache(
    model: Path, hub: HubServer, tmp_path: Path, etag: str
) -> None:
    hub.etag = etag
    assert "which is not a file's name" in refused("org/a")
    assert outside(tmp_path) == []


def test_lengths_that_are_not_true(model: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.lengths[f"org/a/{FILES[0]}"] = 10**15
    assert "bytes came where 131,072 were asked for" in refused("org/a", LazymergeError)
    hub.lengths = {"org/a/config.json": 10**15}
    assert "at most" in refused("org/a")
    hub.lengths = {"org/a/config.json": 5}
    shutil.rmtree(tmp_path / "cache")
    assert "the Hub lists 5" in refused("org/a")


def test_a_header_that_is_none(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors").write_bytes(b"\xff" * 1000)
    hub.publish("org/x", tmp_path / "x")
    message = refused("org/x")
    assert "org/x/model.safetensors: claims a header of" in message


def test_a_config_without_an_end(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub lists its size, and sends on until the disk is full."""
    write_checkpoint(tmp_path / "m", {"w": torch.ones(9)}, {"model_type": "llama"})
    hub.publish("org/m", tmp_path / "m")
    send = hub_server._Handler._send_file
    sent = 0

    def endlessly(
        self: Any, hub: HubServer, name: str, commit: str, data: bytes, *, with_body: bool
    ) -> None:
        nonlocal sent
        if not with_body or not name.endswith("/config.json"):
            send(self, hub, name, commit, data, with_body=with_body)
            return
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            while sent < 30_000_000:
                sent += self.wfile.write(bytes(1 << 16))

    monkeypatch.setattr(hub_server._Handler, "_send_file", endlessly)
    monkeypatch.setattr(hub_module, "SPARE_BYTES", 1_000_000)
    with pytest.raises(InputError, match=r"config.json with 23 bytes, and sends more than 1,000"):
        open_checkpoint("org/m")
    assert sent < 30_000_000
