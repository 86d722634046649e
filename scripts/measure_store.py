#!/usr/bin/env python3
"""Measure merges into an object store: bytes per second and memory, against plain uploads.

    python scripts/measure_store.py [--latency 0.05] [--rate 100MB] [--size 1GB] [--memory 1GiB]

Makes two models, starts a stand-in for an S3 store on the loopback interface, in a process of its
own, that throws away what it is given, with a pause before every answer and a bound of every
connection's rate, and then takes turns:

    upload     a file as long as the merged one, from the page cache, by boto3's own multipart
               uploads: as many parts at a time as those of a merge, and as long
    merge      lazymerge run RECIPE -o s3://…, in a process of its own, from its first block to its
               last object

Prints a table in Markdown. Client and server share the processors; a machine of two cores is soon
their limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy
import yaml
from lazymerge.output.store.uploads import MOST_UPLOADS, part_bytes
from lazymerge.sizes import format_memory, parse_size
from safetensors.numpy import save_file

MATRIX = (4096, 4096)
KEPT_BYTES = 1 << 20
"""Objects up to this size are kept: what a run reads again is small."""


class Handler(BaseHTTPRequestHandler):
    """As much of S3 as uploads need. Parts are counted and thrown away."""

    protocol_version = "HTTP/1.1"
    latency_seconds = 0.0
    bytes_per_second = 0.0
    objects: ClassVar[dict[str, tuple[int, bytes, str]]] = {}
    """Sizes, contents of small ones, and what was noted of them, by key."""
    uploads: ClassVar[dict[str, tuple[dict[int, int], str]]] = {}
    lock = threading.Lock()

    def setup(self) -> None:
        super().setup()
        self._room = memoryview(bytearray(1 << 20))

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)

    def _body(self) -> tuple[int, bytes]:
        """Its length, and the body itself if it is small."""
        length = left = int(self.headers.get("Content-Length") or 0)
        kept, began = bytearray(), time.perf_counter()
        while left and (count := self.rfile.readinto(self._room[: min(left, len(self._room))])):
            left -= count
            if length <= KEPT_BYTES:
                kept += self._room[:count]
            if self.bytes_per_second:
                due = (length - left) / self.bytes_per_second
                time.sleep(max(0.0, due - (time.perf_counter() - began)))
        return length, bytes(kept)

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        time.sleep(self.latency_seconds)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        key, query = self._asked()
        length, kept = self._body()
        etag = f'"{length:032x}"'
        with self.lock:
            if "partNumber" in query:
                self.uploads[query["uploadId"][0]][0][int(query["partNumber"][0])] = length
            elif self.headers.get("If-None-Match") and key in self.objects:
                etag = ""
            else:
                self.objects[key] = length, kept, self._noted()
        self._answer(200 if etag else 412, ETag=etag)

    def _noted(self) -> str:
        return self.headers.get("x-amz-meta-lazymerge-fingerprint") or ""

    def do_POST(self) -> None:
        key, query = self._asked()
        _, body = self._body()
        with self.lock:
            if "uploads" in query:
                number = str(len(self.uploads))
                self.uploads[number] = {}, self._noted()
                text = f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></{{}}>"
                text = text.format("InitiateMultipartUploadResult")
            elif "uploadId" in query:
                parts, noted = self.uploads.pop(query["uploadId"][0])
                self.objects[key] = sum(parts.values()), b"", noted
                text = "<CompleteMultipartUploadResult/>"
            else:
                for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    self.objects.pop(f"{key.rstrip('/')}/{name}", None)
                text = "<DeleteResult/>"
        self._answer(200, text.encode())

    def do_GET(self) -> None:
        key, query = self._asked()
        with self.lock:
            found = self.objects.get(key)
            if "uploads" in query:
                text = b"<ListMultipartUploadsResult/>"
            elif "list-type" in query:
                text = self._listed(key, query.get("prefix", [""])[0]).encode()
            else:
                text = b"" if found is None else found[1]
        is_there = found is not None or "list-type" in query or "uploads" in query
        size = 0 if found is None else found[0]
        self._answer(200 if is_there else 404, text, ETag=f'"{size:032x}"')

    def _listed(self, bucket: str, prefix: str) -> str:
        start = f"{bucket.rstrip('/')}/"
        entries = "".join(
            f"<Contents><Key>{escape(key.removeprefix(start))}</Key><Size>{size}</Size>"
            f'<ETag>"{size:032x}"</ETag></Contents>'
            for key, (size, _, _) in self.objects.items()
            if key.startswith(start + prefix)
        )
        return f"<ListBucketResult>{entries}</ListBucketResult>"

    def do_HEAD(self) -> None:
        found = self.objects.get(self._asked()[0])
        if found is None:
            self._answer(404)
            return
        size, _, noted = found
        headers = {"Content_Length": str(size), "ETag": f'"{size:032x}"'}
        self._answer(200, **headers, x_amz_meta_lazymerge_fingerprint=noted)

    def do_DELETE(self) -> None:
        key, query = self._asked()
        with self.lock:
            if "uploadId" in query:
                self.uploads.pop(query["uploadId"][0], None)
            else:
                self.objects.pop(key, None)
        self._answer(204)


def serve(latency: float, rate: float, pipe: Connection) -> None:
    """Serves until something comes through the pipe."""
    Handler.latency_seconds, Handler.bytes_per_second = latency, rate
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(f"http://127.0.0.1:{server.server_port}")
    pipe.recv()


def make_models(root: Path, size_bytes: int) -> None:
    """Two models of float16 matrices."""
    matrices = max(1, size_bytes // (2 * MATRIX[0] * MATRIX[1]))
    for number in range(2):
        generator = numpy.random.default_rng(number)
        matrix = generator.standard_normal(MATRIX, numpy.float32).astype(numpy.float16)
        tensors = {f"model.layers.{n}.w.weight": matrix for n in range(matrices)}
        (root / f"m{number}").mkdir()
        save_file(tensors, root / f"m{number}" / "model.safetensors")


def upload(path: Path) -> float:
    """Seconds that plain uploads of a file take."""
    import boto3
    from boto3.s3.transfer import TransferConfig

    part = part_bytes(path.stat().st_size)
    settings = TransferConfig(
        multipart_threshold=part, multipart_chunksize=part, max_concurrency=MOST_UPLOADS
    )
    client = boto3.client("s3")
    began = time.perf_counter()
    client.upload_file(str(path), "bucket", "plain", Config=settings)
    return time.perf_counter() - began


def merge(recipe: Path, memory: str) -> dict[str, Any]:
    """What a run reports, as `--json` prints it."""
    command = [sys.executable, "-m", "lazymerge", "run", str(recipe), "-o", "s3://bucket/merged"]
    options = ["--memory", memory, "--overwrite", "--json", "-q"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure merges into an object store.")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--rate", default="100MB", help="of every connection, per second; 0: none")
    parser.add_argument("--size", default="1GB", help="of every model, and of the output")
    parser.add_argument("--memory", nargs="+", default=["256MiB", "1GiB"])
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lazymerge-store-") as name:
        root = Path(name)
        make_models(root, parse_size(options.size))
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(root / f"m{number}")} for number in range(2)],
            "parameters": {"weight": 0.5},
        }
        (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
        ours, theirs = multiprocessing.Pipe()
        arguments = (options.latency, float(parse_size(options.rate)), theirs)
        server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        server.start()
        os.environ |= {
            "AWS_ENDPOINT_URL": ours.recv(),
            "AWS_ACCESS_KEY_ID": "measured",
            "AWS_SECRET_ACCESS_KEY": "measured",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        print("| memory | plain uploads | merge | | peak memory | projected |")
        print("|---|---|---|---|---|---|", flush=True)
        for memory in options.memory:
            print(measured(root, memory, options.runs), flush=True)
        ours.send(None)
        server.join()


def measured(root: Path, memory: str, runs: int) -> str:
    """A line of the table: medians of some runs."""
    path = root / "m0" / "model.safetensors"
    size = path.stat().st_size
    plain, merged, peaks, projected = [], [], [], 0
    for _ in range(runs):
        plain.append(size / upload(path))
        report = merge(root / "recipe.yml", memory)
        merged.append(report["bytes_written"] / report["seconds"])
        peaks.append(report["measured_bytes"])
        projected = report["memory"]["projected_bytes"]
    share = statistics.median(m / p for m, p in zip(merged, plain, strict=True))
    rates = (f"{statistics.median(rates) / 1e6:.0f} MB/s" for rates in (plain, merged))
    sizes = (format_memory(max(peaks)), format_memory(projected))
    return f"| `--memory {memory}` | {' | '.join(rates)} | {share:.0%} | {' | '.join(sizes)} |"


if __name__ == "__main__":
    main()
