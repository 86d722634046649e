#!/usr/bin/env python3
"""Measure merges of models on a web server: bytes per second, against plain parallel downloads.

    python scripts/measure_remote.py [--latency 0.05] [--rate 100MB] [--size 512MB] [--models 3]

Makes models, serves them on the loopback interface from a process of its own, with a pause before
every answer and a bound of every connection's rate, and then takes turns:

    download   the byte ranges of the plan, 8 at a time, each by a plain request of its own, thrown
               away as they come
    merge      lazymerge run, from the first byte to the last

The server shares the processors with what is measured; a machine of two cores is soon its limit.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy
import yaml
from lazymerge import plan as make_plan
from lazymerge.engine.fetching import CONNECTIONS, MOST_REQUEST_BYTES
from lazymerge.engine.plan import Plan
from lazymerge.engine.run import run_plan
from lazymerge.sizes import parse_size
from safetensors.numpy import save_file

from range_server import range_server

MATRIX = (4096, 4096)


def serve(root: Path, latency: float, rate: float, pipe: Connection) -> None:
    """Serves a folder until something comes through the pipe."""
    with range_server(root) as server:
        server.latency_seconds, server.bytes_per_second = latency, rate
        pipe.send(server.address)
        pipe.recv()


def make_models(root: Path, count: int, size_bytes: int) -> None:
    """Models of float16 matrices."""
    matrices = max(1, size_bytes // (2 * MATRIX[0] * MATRIX[1]))
    for number in range(count):
        generator = numpy.random.default_rng(number)
        matrix = generator.standard_normal(MATRIX, numpy.float32).astype(numpy.float16)
        tensors = {f"model.layers.{n}.w.weight": matrix for n in range(matrices)}
        (root / f"m{number}").mkdir()
        save_file(tensors, root / f"m{number}" / "model.safetensors")


def ranges_of(plan: Plan) -> list[tuple[str, int, int]]:
    """Address, first byte and last of what the plan fetches, in pieces like those of a run."""
    ranges = []
    for path, chunks in plan.chunks_to_fetch.items():
        start = stop = chunks.starts[0]
        for first, last in zip(chunks.starts, chunks.stops, strict=True):
            if first != stop or last - start > MOST_REQUEST_BYTES:
                ranges.append((path, start, stop))
                start = first
            stop = last
        ranges.append((path, start, stop))
    return sorted(ranges, key=lambda each: each[1])  # as the merge needs them


def download(ranges: list[tuple[str, int, int]]) -> float:
    """Seconds that plain downloads take."""
    address = urlsplit(ranges[0][0])

    def work(mine: list[tuple[str, int, int]]) -> None:
        connection = http.client.HTTPConnection(address.netloc)
        room = bytearray(1 << 20)
        for path, start, stop in mine:
            headers = {"Range": f"bytes={start}-{stop - 1}"}
            connection.request("GET", urlsplit(path).path, headers=headers)
            answer = connection.getresponse()
            while answer.readinto(room):
                pass

    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(work, [ranges[number::CONNECTIONS] for number in range(CONNECTIONS)]))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure merges of models on a web server.")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--rate", default="100MB", help="of every connection, per second")
    parser.add_argument("--size", default="512MB", help="of every model")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--method", default="linear", choices=["linear", "ties", "slerp"])
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lazymerge-remote-") as name:
        root = Path(name)
        make_models(root, options.models, parse_size(options.size))
        ours, theirs = multiprocessing.Pipe()
        arguments = (root, options.latency, float(parse_size(options.rate)), theirs)
        server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        server.start()
        address = ours.recv()
        models = [{"model": f"{address}/m{number}"} for number in range(options.models)]
        recipe: dict[str, object] = {"merge_method": options.method, "models": models}
        if options.method == "ties":
            recipe |= {"base_model": f"{address}/m0", "models": models[1:]}
            recipe["parameters"] = {"weight": 0.5, "density": 0.5}
        elif options.method == "slerp":
            recipe |= {"base_model": f"{address}/m0", "models": models[1:2]}
            recipe["parameters"] = {"t": 0.4}
        else:
            recipe["parameters"] = {"weight": 0.5}
        (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
        plan = make_plan(root / "recipe.yml", memory=options.memory)
        size = plan.bytes_to_fetch
        print(
            f"{size / 1e6:.0f} MB to fetch, at most {plan.memory.fetch_bytes / 2**20:.0f} MiB "
            f"held, {CONNECTIONS} connections",
            flush=True,
        )
        ratios = []
        for number in range(options.runs):
            plain = download(ranges_of(plan))
            began = time.perf_counter()
            run_plan(plan, root / "out", overwrite=number > 0, fsync=False)
            merged = time.perf_counter() - began
            ratios.append(plain / merged)
            print(
                f"download {size / plain / 1e6:.0f} MB/s, merge {size / merged / 1e6:.0f} MB/s: "
                f"{plain / merged:.0%}",
                flush=True,
            )
        print(f"median: {statistics.median(ratios):.0%}")
        ours.send(None)
        server.join()


if __name__ == "__main__":
    main()
