"""Storage that lists names which lead elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lazymerge.checkpoint import open_checkpoint, remote
from lazymerge.checkpoint.object_storage import GsTransport
from lazymerge.checkpoint.remote import open_remote_model
from lazymerge.checkpoint.transport import RemoteFile, Take
from lazymerge.errors import InputError, LazymergeError

from conftest import write_checkpoint

torch = pytest.importorskip("torch")


class Listing:
    """Files of a folder, listed with whatever names."""

    def __init__(self, root: Path, more: dict[str, bytes]) -> None:
        found = {path.name: path.read_bytes() for path in root.iterdir()}
        self.files = {f"gs://bucket/a/{name}": data for name, data in {**found, **more}.items()}

    def _file(self, url: str) -> RemoteFile:
        return RemoteFile(url, len(self.files[url]), "1")

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        return self._file(url), self.files[url][:count]

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        take(self.files[file.url][start:stop])

    def names(self, url: str) -> dict[str, RemoteFile]:
        return {each.removeprefix(f"{url}/"): self._file(each) for each in self.files}

    def place(self, url: str) -> str:
        return ""

    def check(self, file: RemoteFile) -> None:
        """It is what it was."""


def test_names_that_lead_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a", {"w": torch.ones(9)}, {"model_type": "llama"})
    target = tmp_path / "elsewhere.tiktoken"
    outside = [f"{target}", "../outside.tiktoken", "x\0.tiktoken", "\ud800.tiktoken"]
    storage = Listing(tmp_path / "a", dict.fromkeys((*outside, "good.tiktoken"), b"x"))
    monkeypatch.setattr(remote, "_transport", lambda _: storage)
    source = open_remote_model("gs://bucket/a").remote
    assert source is not None
    here = {path.name for path in Path(source.folder).iterdir()}
    assert here == {"config.json", "good.tiktoken"}
    assert not target.exists()
    assert not Path(source.folder, "../outside.tiktoken").exists()


@pytest.mark.parametrize("address", ["hf://org", "HTTPS://host/a", "ftp://host/a", "hf://o/n/f"])
def test_no_address(address: str) -> None:
    with pytest.raises(InputError, match=r"is no address that is read. Write hf://org/name"):
        open_checkpoint(address)


class EndlessList(GsTransport):
    asked = 0

    async def _json(self, path: str, wanted: Mapping[str, str]) -> dict[str, Any]:
        self.asked += 1
        items = [{"name": f"{wanted['prefix']}{self.asked}", "size": "1", "generation": "1"}]
        return {"items": items, "nextPageToken": str(self.asked)}


def test_a_list_without_an_end() -> None:
    pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")
    storage = EndlessList(None)
    with pytest.raises(LazymergeError, match=r"gs://bucket/a: .*more than 100 pages of files"):
        storage.names("gs://bucket/a")
    assert storage.asked == 100
