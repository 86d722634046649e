#!/usr/bin/env python3
"""Kill merges into an object store at their requests, run them again, compare every object.

    python scripts/crash_store.py [--kills 40] [--seed 1]

moto's S3 server runs in this process and strikes the merge (SIGKILL) when one of its requests
comes, or when it has done as asked. Killed anywhere between the first request and the last, up to
three times, then run to its end. After every kill no index or manifest may be there before all
shards are, and no shard that is there may be less than whole; at the end every object is compared
with the file of a local run, and no upload may be left open. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import boto3
import lazymerge
import moto.s3.models
import numpy
import yaml
from safetensors.numpy import save_file

from store_server import Request, StoreServer, store_server

ROOT = Path(__file__).parents[1]
PART_BYTES = 1 << 16
SHARD_BYTES = 400_000
OUT = "s3://models/out/merged"
PROGRAM = f"""
import lazymerge.output.store.uploads as uploads
uploads.PART_BYTES = {PART_BYTES}
from lazymerge.cli.main import command
command()
"""


def make_models(root: Path) -> None:
    """Two models of 1.6 MB and a recipe."""
    for name in "ab":
        drawn = numpy.random.default_rng(ord(name))
        tensors = {
            f"model.layers.{n}.w.weight": drawn.standard_normal((200, 330), numpy.float32)
            for n in range(6)
        }
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text('{"model_type": "llama"}')
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(root / name)} for name in "ab"],
        "parameters": {"weight": 0.5},
    }
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))


def merge(root: Path, server: StoreServer, at: int | None, *, is_after: bool) -> str | None:
    """Runs the merge; at: number of the request at which it is killed. Returns that request."""
    server.reset()
    environment = {**os.environ, **server.environment, "PYTHONPATH": str(ROOT)}
    options = ["-o", OUT, "--max-shard-size", str(SHARD_BYTES), "--workers", "2", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", "recipe.yml", *options], cwd=root, env=environment
    )
    struck: list[str] = []

    def strike(request: Request) -> None:
        if request.number == at:
            struck.append(request.line)
            process.send_signal(signal.SIGKILL)
            process.wait()

    if is_after:
        server.after = strike
    else:
        server.before = strike
    code = process.wait()
    server.before = server.after = lambda _: None
    if not struck and code:
        raise SystemExit(f"the merge ended with exit code {code}")
    return struck[0] if struck else None


def objects() -> dict[str, bytes]:
    """What is under the prefix."""
    bucket = boto3.resource("s3").Bucket("models")
    found = bucket.objects.filter(Prefix="out/merged/")
    return {each.key.removeprefix("out/merged/"): each.get()["Body"].read() for each in found}


def check(local: Path, shards: set[str], *, is_complete: bool) -> None:
    """Compares what is there with a local run's files."""
    there = objects()
    for name in shards & there.keys():
        assert there[name] == (local / name).read_bytes(), name
    if {"model.safetensors.index.json", "config.json", "lazymerge.json"} & there.keys():
        assert shards <= there.keys()
    if not is_complete:
        return
    assert there.keys() == {path.name for path in local.iterdir()}, there.keys()
    for name in there.keys() - {"lazymerge.json"}:
        assert there[name] == (local / name).read_bytes(), name
    ours, theirs = (
        json.loads(text)
        for text in (there["lazymerge.json"], (local / "lazymerge.json").read_text())
    )
    assert all(ours[key] == theirs[key] for key in ("tensors", "files", "fingerprint"))
    assert not list(boto3.resource("s3").Bucket("models").multipart_uploads.all())


def kind_of(line: str) -> str:
    """A request, for the table."""
    method, _, path = line.partition(" ")
    name = path.partition("?")[0].rpartition("/")[2]
    if "partNumber" in path:
        return "a part of a shard"
    if "uploads" in path:
        return "shard: begins" if method == "POST" else "uploads: listed"
    if "uploadId" in path:
        return "shard: made of its parts" if method == "POST" else "upload: aborted"
    if "list-type" in path:
        return "objects: listed"
    if "/shards/" in path or "delete" in path:
        return "records of shards"
    kind = {"lock": "lock", "merge.json": "merge.json", "lazymerge.json": "lazymerge.json"}
    return kind.get(name, "a shard" if name.endswith(".safetensors") else "small files")


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill merges into an object store.")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = 1
    struck: Counter[str] = Counter()
    merges = 0
    with tempfile.TemporaryDirectory(prefix="lazymerge-crash-") as name, store_server() as server:
        root = Path(name)
        make_models(root)
        plan = lazymerge.plan(root / "recipe.yml", max_shard_size=SHARD_BYTES)
        lazymerge.run(plan, root / "merged", fsync=False)
        shards = {shard.file for shard in plan.shards}
        os.environ |= server.environment
        bucket = boto3.resource("s3").Bucket("models")
        bucket.create()
        requests: list[int] = []
        while sum(struck.values()) < options.kills or not requests:
            bucket.objects.delete()
            for _ in range(3 if requests else 0):
                at, is_after = drawn.randrange(requests[0]), drawn.random() < 0.5
                line = merge(root, server, at, is_after=is_after)
                if line is None:  # it came to its end before
                    break
                struck[kind_of(line)] += 1
                check(root / "merged", shards, is_complete=False)
            merge(root, server, None, is_after=False)
            requests = requests or [len(server.seen)]
            check(root / "merged", shards, is_complete=True)
            merges += 1
    print(f"\n{sum(struck.values())} kills in {merges} merges, seed {options.seed}\n")
    print("| killed at a request for | times |\n|---|---|")
    for kind, times in sorted(struck.items(), key=lambda pair: -pair[1]):
        print(f"| {kind} | {times} |")


if __name__ == "__main__":
    main()
