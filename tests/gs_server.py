"""A stand-in for Google Cloud Storage: what lazymerge asks of its JSON API, over files of a folder.

The API's reference is what it follows: https://cloud.google.com/storage/docs/json_api/v1 (objects:
get, list; an object's data by alt=media; a generation that is not the object's own is not found).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 2
"""Objects in one answer to a listing: the rest is asked for page by page."""


@dataclass
class GsServer:
    """The stand-in. Buckets are the folders of `root`.

    answers: statuses in place of the next answers. cuts: of the next answers with data, how many
    bytes are sent before the connection ends.
    log: path and query of every request.
    """

    root: Path
    address: str = ""
    answers: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    log: list[tuple[str, dict[str, str]]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server: GsServer = self.server.of_test
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        server.log.append((parts.path, query))
        if server.answers:
            self._answer({"error": {"code": server.answers[0]}}, server.answers.pop(0))
            return
        match = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", parts.path)
        if match is None or not (server.root / match[2]).is_dir():
            self._answer({"error": {"code": 404}}, 404)
        elif match[3] is None:
            self._list(server.root / match[2], query)
        else:
            self._object(server, server.root / match[2] / unquote(match[3]), query)

    def _list(self, bucket: Path, query: dict[str, str]) -> None:
        assert query["delimiter"] == "/"
        folder = bucket / query["prefix"]
        paths = sorted(path for path in folder.glob("*") if path.is_file())
        first = int(query.get("pageToken", "0"))
        page: dict[str, object] = {
            "items": [
                {"name": query["prefix"] + path.name, **_facts(path)}
                for path in paths[first : first + PAGE]
            ]
        }
        if first + PAGE < len(paths):
            page["nextPageToken"] = str(first + PAGE)
        self._answer(page)

    def _object(self, server: GsServer, path: Path, query: dict[str, str]) -> None:
        facts = _facts(path) if path.is_file() else None
        if facts is None or query.get("generation", facts["generation"]) != facts["generation"]:
            self._answer({"error": {"code": 404}}, 404)
        elif query.get("alt") != "media":
            self._answer(facts)
        else:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert match is not None
            data = path.read_bytes()
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if server.cuts:
                stop = start + server.cuts.pop(0)
                self.close_connection = True
            self.wfile.write(data[start:stop])

    def _answer(self, document: dict[str, object], status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _facts(path: Path) -> dict[str, object]:
    status = path.stat()
    return {"size": str(status.st_size), "generation": str(status.st_mtime_ns)}


class _Listening(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Who has read enough may hang up."""


@contextmanager
def gs_server(root: Path) -> Iterator[GsServer]:
    """The stand-in, while the block runs."""
    listening = _Listening(("127.0.0.1", 0), _Handler)
    server = GsServer(root, f"http://127.0.0.1:{listening.server_address[1]}")
    listening.of_test = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
