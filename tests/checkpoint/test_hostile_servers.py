"""Servers that send what no honest one does: no wait without end, no key to a stranger."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from lazymerge.checkpoint import remote, transport, web_server
from lazymerge.checkpoint.hub import HubFile, HubSource
from lazymerge.checkpoint.remote import open_remote_model
from lazymerge.errors import LazymergeError

import range_server as serving
from conftest import write_checkpoint
from range_server import range_server

torch = pytest.importorskip("torch")
pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

RANGE = b'HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/100\r\nETag: "1"\r\n'
Send = Callable[[bytes], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(transport, "FIRST_PAUSE_SECONDS", 0.01)
    remote._transport.cache_clear()
    yield
    remote._transport.cache_clear()


@contextmanager
def answering(answer: Callable[[Send], None]) -> Iterator[str]:
    """A server whose answers to all requests are what is sent by a function; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def one(connection: socket.socket) -> None:
        def send(data: bytes) -> None:
            if ended.is_set():
                raise ConnectionError
            connection.sendall(data)

        with connection, suppress(OSError):
            connection.recv(1 << 16)
            answer(send)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        ended.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def read(address: str) -> bytes:
    file = transport.RemoteFile(f"{address}/file", 100, '"1"')
    data = bytearray()
    transport.read_range(remote._transport("http"), file, 0, 10, data.extend)
    return bytes(data)


def drip(send: Send, start: bytes, drop: bytes) -> None:
    send(start)
    while True:
        send(drop)
        time.sleep(0.05)


class TestDripping:
    def test_a_body(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each try brings a little, so there are many; but not without end."""
        monkeypatch.setattr(web_server, "SLOW_SECONDS", 0.1)
        monkeypatch.setattr(transport, "TRIES", 2)

        def slowly(send: Send) -> None:
            drip(send, RANGE + b"Transfer-Encoding: chunked\r\n\r\n", b"1;x\r\nx\r\n")

        with (
            answering(slowly) as address,
            pytest.raises(LazymergeError, match=r"bytes came in .* seconds|another range"),
        ):
            read(address)

    def test_headers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "CONNECT_SECONDS", 0.1)
        monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.2)
        monkeypatch.setattr(transport, "TRIES", 2)
        with (
            answering(lambda send: drip(send, RANGE, b"X-More: 1\r\n")) as address,
            pytest.raises(LazymergeError, match=r"the connection failed .*tried 2 times"),
        ):
            read(address)


def endlessly(send: Send) -> None:
    send(RANGE + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        send(b"a\r\n0123456789\r\n")


def test_more_than_was_asked_for() -> None:
    with answering(endlessly) as address:
        assert read(address) == b"0123456789"


class TestHub:
    @pytest.fixture
    def source(self, monkeypatch: pytest.MonkeyPatch) -> HubSource:
        from huggingface_hub import constants

        monkeypatch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return HubSource("org/name", "main", "a" * 40, "/nowhere", {"file": 100})

    def read(self, source: HubSource, address: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
        from huggingface_hub import constants

        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        data = bytearray()
        HubFile(source, "file").read_range(0, 10, data.extend)
        return bytes(data)

    def test_more_than_was_asked_for(
        self, source: HubSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with answering(endlessly) as address:
            assert self.read(source, address, monkeypatch) == b"0123456789"

    def test_a_packed_answer(self, source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
        """A few bytes of it may become gigabytes."""
        packed = RANGE + b"Content-Encoding: gzip\r\nContent-Length: 10\r\n\r\n" + bytes(10)
        with (
            answering(lambda send: send(packed)) as address,
            pytest.raises(LazymergeError, match=r"hf://org/name@a+/file: .*packed \('gzip'\)"),
        ):
            self.read(source, address, monkeypatch)

    def test_a_password_in_the_address(
        self, source: HubSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HF_ENDPOINT may hold one; messages do not."""
        monkeypatch.setattr(transport, "TRIES", 1)
        with pytest.raises(
            LazymergeError, match=r"cannot be had from http://127\.0\.0\.1:9:"
        ) as said:
            self.read(source, "http://somebody:TheSecretOfATest@127.0.0.1:9", monkeypatch)
        assert "TheSecretOfATest" not in str(said.value)


@pytest.mark.parametrize("place", ["client_kwargs", "headers"])
def test_headers_of_the_user_are_not_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from fsspec.config import conf

    key = {"X-Key": "TheSecretOfATest"}
    given = {"headers": key} if place == "headers" else {"client_kwargs": {"headers": key}}
    monkeypatch.setitem(conf, "http", given)
    write_checkpoint(tmp_path / "a", {"w": torch.ones(9)}, {"model_type": "llama"})
    seen: dict[str, set[str | None]] = {}
    answer = serving._Handler._answer

    def noted(self: serving._Handler, server: serving.RangeServer, path: str) -> None:
        seen.setdefault(server.address, set()).add(self.headers.get("X-Key"))
        answer(self, server, path)

    monkeypatch.setattr(serving._Handler, "_answer", noted)
    with range_server(tmp_path) as asked, range_server(tmp_path) as other:
        for name in ("config.json", "model.safetensors"):
            asked.redirects[f"a/{name}"] = f"/b/{name}"
            asked.redirects[f"b/{name}"] = f"{other.address}/a/{name}"
        assert len(open_remote_model(f"{asked.address}/a").tensors) == 1
    assert seen == {asked.address: {"TheSecretOfATest"}, other.address: {None}}


def test_an_address_of_ip_version_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a", {"w": torch.ones(9)}, {"model_type": "llama"})
    monkeypatch.setattr(serving._Listening, "address_family", socket.AF_INET6)
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving._Listening(("::1", 0), serving._Handler) as listening:
        address = f"http://[::1]:{listening.server_address[1]}"
        listening.of_test = serving.RangeServer(tmp_path, address)  # type: ignore[attr-defined]
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        assert len(open_remote_model(f"{address}/a").tensors) == 1
        listening.shutdown()


@pytest.mark.parametrize("etag", ['"' + "x" * 5000 + '"', '"\x9b31m\xff"', '"\u00e4"'])
def test_strange_versions(tmp_path: Path, etag: str) -> None:
    """They end up in plans and messages."""
    write_checkpoint(tmp_path / "a", {"w": torch.ones(9)}, {"model_type": "llama"})
    pins = []
    with range_server(tmp_path) as server:
        for each in (etag, etag, etag + "x"):
            server.etag = each
            pins.append(open_remote_model(f"{server.address}/a").files[0].pin)
    assert all(pin and len(pin) == 32 and pin.isalnum() and pin.isascii() for pin in pins)
    assert pins[0] == pins[1] != pins[2]


def test_an_index_that_leads_elsewhere(tmp_path: Path) -> None:
    """The message names the address, not this machine's folder."""
    index = '{"weight_map": {"w": "../b/model.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with range_server(tmp_path) as server, pytest.raises(LazymergeError) as caught:
        open_remote_model(server.address)
    assert f"{server.address}/model.safetensors.index.json" in str(caught.value)
    assert "'../b/model.safetensors' is not a plain file name" in str(caught.value)


CHANGED = "Thu, 26 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "is_lasting"),
    [
        ({"ETag": '"1"'}, True),
        ({"ETag": 'W/"1"'}, False),
        ({"ETag": 'W/"1"', "Last-Modified": CHANGED, "Date": CHANGED.replace("10", "11")}, False),
        ({"Last-Modified": CHANGED, "Date": "Thu, 26 Nov 2026 10:00:01 GMT"}, True),
        ({"Last-Modified": CHANGED, "Date": CHANGED}, False),
        ({"Last-Modified": CHANGED}, False),
        ({"Last-Modified": "yesterday", "Date": CHANGED}, False),
        ({"Last-Modified": CHANGED, "Date": "Thu, 26 Nov 99999 10:00:01 GMT"}, False),
        ({"Last-Modified": "Thu, 26 Nov 2026 10:00:00 -0000", "Date": CHANGED}, False),
        ({}, False),
    ],
)
def test_versions_that_will_not_be_those_of_other_bytes(
    headers: dict[str, str], is_lasting: bool
) -> None:
    assert web_server._is_lasting(headers) is is_lasting
