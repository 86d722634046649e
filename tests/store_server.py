"""moto's S3 server, behind something that makes it late, fail, hang up and strike at chosen
requests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

werkzeug_app = pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto is not installed")
serving = pytest.importorskip("werkzeug.serving", reason="moto is not installed")

SECRET = "TheSecretOfATest"


@dataclass(frozen=True)
class Request:
    """One that has come. number: from 0. line: method, path and query."""

    number: int
    line: str

    @property
    def writes(self) -> bool:
        return not self.line.startswith(("GET", "HEAD"))


@dataclass
class StoreServer:
    """before: is called with every request; what it returns is the status of the answer, in place
    of the store's own; HANG_UP: the connection ends. after: the same, when the store has done as
    asked.
    """

    address: str
    before: Callable[[Request], int | None] = lambda _: None
    after: Callable[[Request], object] = lambda _: None
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What makes clients come here."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "TheKeyOfATest",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def reset(self) -> None:
        self.before, self.after, self.seen = lambda _: None, lambda _: None, []


HANG_UP = -1


class _Strikes:
    """The application, and what is to happen before and after it."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.server = StoreServer("")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        server = self.server
        query = f"?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else ""
        with server.lock:
            line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}"
            request = Request(len(server.seen), line)
            server.seen.append(request)
        status = server.before(request)
        if status is not None:
            left = int(environ.get("CONTENT_LENGTH") or 0)
            if status == HANG_UP:
                environ["wsgi.input"].read(left // 2)
                hang_up(environ)
            environ["wsgi.input"].read(left)
            code = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}.get(status, "Other")
            text = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
            headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(text)))]
            start_response(f"{status} STRUCK", headers)
            return [text]
        answer = list(self.application(environ, start_response))
        if server.after(request) == HANG_UP:
            hang_up(environ)
        return answer


def hang_up(environ: dict[str, Any]) -> None:
    """Ends the connection that a request has come by."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("it hangs up")


@contextmanager
def store_server() -> Iterator[StoreServer]:
    """A server on the loopback interface, without buckets."""
    dispatcher = werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app)
    application = _Strikes(dispatcher)

    class Quiet(werkzeug_app.MotoRequestHandler):  # type: ignore[misc, name-defined]
        def log(self, *_: Any) -> None:
            """Nothing."""

    server = serving.make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    application.server.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield application.server
    finally:
        server.shutdown()
        thread.join()


def wait_until(is_so: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits for something to be so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
