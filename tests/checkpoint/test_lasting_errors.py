"""What is wrong with an address for good is said at once; what may pass is asked for again."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lazymerge.checkpoint import remote, transport
from lazymerge.checkpoint.remote import open_remote_model
from lazymerge.errors import InputError, LazymergeError

from conftest import write_checkpoint
from range_server import RangeServer, range_server

torch = pytest.importorskip("torch")
pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

SOON_SECONDS = 2.0
"""A second try would come later: after TRIES of them 15 seconds have passed."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    write_checkpoint(tmp_path / "models" / "a", {"w": torch.ones(99)}, {"model_type": "llama"})
    with range_server(tmp_path / "models") as serving:
        yield serving


def refused(address: str) -> str:
    """What opening a model says, which must not take long."""
    remote._transport.cache_clear()  # which hosts have answered is known to it
    began = time.monotonic()
    with pytest.raises(LazymergeError) as caught:
        open_remote_model(address)
    assert time.monotonic() - began < SOON_SECONDS
    return str(caught.value)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


class TestAtOnce:
    def test_nobody_listens(self) -> None:
        said = refused(f"http://127.0.0.1:{free_port()}/x")
        assert "the connection failed" in said
        assert "Correct the address" in said

    def test_a_host_that_is_not_known(self) -> None:
        assert "'nowhere.invalid' is no known host" in refused("https://nowhere.invalid/x")

    def test_a_server_that_speaks_no_tls(self, server: RangeServer) -> None:
        assert "it speaks no TLS" in refused(server.address.replace("http:", "https:") + "/a")

    @pytest.mark.parametrize(
        "target", ["/a/config.json", "ftp://host/x", "http:///x", "https://nowhere.invalid/signed"]
    )
    def test_redirects_that_lead_nowhere(self, server: RangeServer, target: str) -> None:
        server.redirects["a/config.json"] = target
        said = refused(f"{server.address}/a")
        assert f"{server.address}/a/config.json" in said
        assert "signed" not in said

    @pytest.mark.parametrize("has_ranges", [False, True])
    def test_a_packed_answer(self, server: RangeServer, has_ranges: bool) -> None:
        server.has_ranges = has_ranges
        server.headers["Content-Encoding"] = "gzip\x1b[31m"
        assert "sends it packed (gzip[31m)" in refused(f"{server.address}/a")

    @pytest.mark.parametrize("status", [400, 401, 403, 405, 418, 304])
    def test_statuses(self, server: RangeServer, status: int) -> None:
        server.answers["a/model.safetensors.index.json"] = [status]
        assert f"answers {status}" in refused(f"{server.address}/a")
        paths = [path for path, _ in server.log]
        assert paths.count("a/model.safetensors.index.json") == 1

    def test_a_certificate_that_is_not_trusted(
        self, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        certificate = self_signed(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        with range_server(server.root, context) as secure:
            said = refused(f"{secure.address}/a")
        assert "the server's certificate is not accepted (self-signed certificate)" in said

    def test_a_redirect_from_tls_to_none(
        self, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self_signed(tmp_path))
        monkeypatch.setitem(fsspec_options(), "https", {"ssl": False})  # whoever it is
        with range_server(server.root, context) as secure:
            assert open_remote_model(f"{secure.address}/a").tensors
            secure.redirects["a/config.json"] = f"{server.address}/a/config.json"
            said = refused(f"{secure.address}/a")
        assert "sends it on to where nobody vouches for what comes" in said
        assert server.log == []


class TestThatPasses:
    @pytest.fixture(autouse=True)
    def short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "FIRST_PAUSE_SECONDS", 0.01)
        remote._transport.cache_clear()

    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
    def test_statuses(self, server: RangeServer, status: int) -> None:
        server.answers["a/config.json"] = [status, status]
        assert open_remote_model(f"{server.address}/a").tensors

    def test_a_host_that_answered_when_it_was_planned(self) -> None:
        file = transport.RemoteFile(f"http://127.0.0.1:{free_port()}/x", 10, "one")
        with pytest.raises(LazymergeError, match=r"the connection failed .*tried 6 times"):
            transport.read_range(remote._transport("http"), file, 0, 10, lambda _: None)

    @pytest.mark.parametrize("status", [401, 403])
    def test_rights_that_end(self, server: RangeServer, status: int) -> None:
        """A file could be read, and may be again: no reason to throw away what has been merged."""
        source = open_remote_model(f"{server.address}/a").remote
        assert source is not None
        server.answers["a/model.safetensors"] = [status]
        with pytest.raises(LazymergeError, match=f"may not be read .*answers {status}") as caught:
            source.read("model.safetensors", 0, 10, lambda _: None)
        assert not isinstance(caught.value, InputError)


def fsspec_options() -> dict[str, object]:
    from fsspec.config import conf

    remote._transport.cache_clear()
    options: dict[str, object] = conf
    return options


def self_signed(folder: Path) -> Path:
    """A file with a certificate for 127.0.0.1 that nobody trusts, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


class TestInterruptions:
    def test_a_silent_server(self, tmp_path: Path) -> None:
        """Ctrl-C ends a command, whatever it waits for."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            listening.settimeout(60)
            recipe = tmp_path / "recipe.yml"
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            recipe.write_text(
                f"merge_method: linear\nmodels: [{{model: {address}/a}}, {{model: {address}/b}}]\n"
                "parameters: {weight: 1}\n"
            )
            command = [sys.executable, "-m", "lazymerge", "plan", "--dry-run", str(recipe)]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                connection, _ = listening.accept()
                time.sleep(0.3)  # it waits for the answer then
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=10)
                connection.close()
        assert (process.returncode, said) == (130, "lazymerge: interrupted\n")

    def test_a_writer_that_fails(self, server: RangeServer) -> None:
        """What receives bytes may fail like the network, and is not asked again."""
        source = open_remote_model(f"{server.address}/a").remote
        assert source is not None
        given: list[bytes] = []

        def full(piece: memoryview) -> None:
            given.append(bytes(piece))
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            source.read("model.safetensors", 0, 10, full)
        assert len(given) == 1
