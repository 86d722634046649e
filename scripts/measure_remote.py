#!/usr/bin/env python3
"""Measure merges of models on a web server: bytes per second, against plain parallel downloads.

    python scripts/measure_remote.py [--latency 0.05] [--rate 100MB] [--size 512MB] [--runs 7]

Makes models, serves them on the loopback interface from a process of its own, with a pause before
every answer and a bound of every connection's rate, and prints the tables of docs/remote.md. It
takes turns:

    download   the byte ranges of the plan, as many at a time, each by a plain request of its own,
               thrown away as they come
    merge      a run, from the first byte to the last

The server shares the processors with what is measured; a machine of two cores is soon its limit.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy
import yaml
from lazymerge import plan as make_plan
from lazymerge.engine.plan import Plan
from lazymerge.engine.run import run_plan
from lazymerge.engine.sample_requests import MOST_REQUEST_BYTES
from lazymerge.sizes import format_bytes, format_memory, parse_size
from safetensors.numpy import save_file

from range_server import range_server

MATRIX = (4096, 4096)
SMALL = (64, 1024)
MODELS = 3

METHODS: Mapping[str, Mapping[str, object]] = {
    "linear": {"parameters": {"weight": 0.5}},
    "ties": {"base_model": "m0", "parameters": {"weight": 0.5, "density": 0.5}},
    "slerp": {"base_model": "m0", "parameters": {"t": 0.4}},
}
TABLES = ("methods", "memory", "connections", "gaps", "cache")


def serve(root: Path, latency: float, rate: float, pipe: Connection) -> None:
    """Serves a folder. What comes through the pipe is answered with the number and the bytes of the
    ranges that have been asked for since; nothing ends it."""
    with range_server(root) as server:
        server.latency_seconds, server.bytes_per_second = latency, rate
        pipe.send(server.address)
        while pipe.recv() is not None:
            log, server.log = server.log, []
            ends = [wanted.removeprefix("bytes=").split("-") for _, wanted in log if wanted]
            pipe.send((len(log), sum(int(stop) + 1 - int(start) for start, stop in ends)))


@dataclass(frozen=True)
class Turns:
    """Seconds of plain downloads, and of the runs that took turns with them."""

    plain: list[float]
    merged: list[float]

    def columns(self, size: int) -> tuple[str, ...]:
        """Rates, and how they compare. size: bytes that each has fetched."""
        plain, middle = statistics.median(self.plain), statistics.median(self.merged)
        shares = [f"{plain / seconds:.0%}" for seconds in sorted(self.merged, reverse=True)]
        return rate(size, plain), rate(size, middle), f"{plain / middle:.0%}", spread(shares)


@dataclass
class Bench:
    """Models, and the server that they are on."""

    root: Path
    address: str
    pipe: Connection
    runs: int

    def asked(self) -> tuple[int, int]:
        """How many ranges were asked for since the last call, and their bytes."""
        self.pipe.send("asked")
        number, size = self.pipe.recv()
        return number, size

    def plan(self, method: str, **options: object) -> Plan:
        """A merge of the models by a method."""
        models = [f"{self.address}/m{number}" for number in range(MODELS)]
        recipe = {"merge_method": method, **METHODS[method]}
        if "base_model" in recipe:
            recipe["base_model"], *models = models
        if method == "slerp":
            del models[1:]
        recipe["models"] = [{"model": model} for model in models]
        return self.plan_of(recipe, **options)

    def plan_of(self, recipe: object, **options: object) -> Plan:
        path = self.root / "recipe.yml"
        path.write_text(yaml.safe_dump(recipe))
        return make_plan(path, **{"memory": "1GiB", **options})  # type: ignore[arg-type]

    def merge(self, plan: Plan) -> float:
        """Seconds that a run takes."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        began = time.perf_counter()
        run_plan(plan, self.root / "out", fsync=False)
        return time.perf_counter() - began

    def taking_turns(self, *plans: Plan) -> list[Turns]:
        """Runs of plans and plain downloads of what they fetch. All take turns, for the
        machine's own speed changes from minute to minute."""
        turns = [Turns([], []) for _ in plans]
        for _ in range(self.runs):
            for plan, found in zip(plans, turns, strict=True):
                found.plain.append(download(plan))
                found.merged.append(self.merge(plan))
        return turns


@contextmanager
def bench(latency: float, rate: float, size_bytes: int, runs: int) -> Iterator[Bench]:
    """Models on a server, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="lazymerge-remote-") as name:
        root = Path(name)
        make_models(root, size_bytes)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(root, latency, rate, theirs)
        )
        server.start()
        try:
            yield Bench(root, ours.recv(), ours, runs)
        finally:
            ours.send(None)
            server.join()


def make_models(root: Path, size_bytes: int) -> None:
    """Models m0, m1, … of float16 matrices; and `small`, of many small ones."""
    matrices = max(1, size_bytes // (2 * MATRIX[0] * MATRIX[1]))
    for number in range(MODELS):
        generator = numpy.random.default_rng(number)
        matrix = generator.standard_normal(MATRIX, numpy.float32).astype(numpy.float16)
        tensors = {f"model.layers.{n}.w.weight": matrix for n in range(matrices)}
        (root / f"m{number}").mkdir()
        save_file(tensors, root / f"m{number}" / "model.safetensors")
        (root / f"m{number}" / "config.json").write_text('{"model_type": "llama"}')
    matrix = numpy.ones(SMALL, numpy.float16)
    layers = 600
    tensors = {
        f"model.layers.{n}.{part}.weight": matrix
        for n in range(layers)
        for part in ("a", "b", "c", "d")
    }
    (root / "small").mkdir()
    save_file(tensors, root / "small" / "model.safetensors")
    config = f'{{"model_type": "llama", "num_hidden_layers": {layers}}}'
    (root / "small" / "config.json").write_text(config)
    os.sync()  # what is still to be written to the disk would be while the first run is measured


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


def download(plan: Plan) -> float:
    """Seconds that plain downloads of what a plan fetches take."""
    ranges, count = ranges_of(plan), plan.execution.network.connections
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
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, [ranges[number::count] for number in range(count)]))
    return time.perf_counter() - began


def table(*rows: tuple[str, ...]) -> None:
    """Prints a table in Markdown; the first row is its head."""
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not number:
            print(f"|{'|'.join('---' for _ in row)}|")
    print(flush=True)


def rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e6:.0f} MB/s"


def spread(texts: list[str]) -> str:
    """`84 to 91%` of `84%`, `91%` and what lies between."""
    first, last = texts[0], texts[-1]
    unit = first.lstrip("0123456789")
    return first if first == last else f"{first.removesuffix(unit)} to {last}"


def measure_methods(bench: Bench) -> None:
    rows = [("method", "fetched", "plain downloads", "merge", "", "of single runs")]
    plans = [bench.plan(method) for method in METHODS]
    for method, plan, turns in zip(METHODS, plans, bench.taking_turns(*plans), strict=True):
        size = plan.bytes_to_fetch
        rows.append((method, format_bytes(size), *turns.columns(size)))
    table(*rows)


def measure_memory(bench: Bench) -> None:
    """What has to be fetched twice where the limit is small. By the command itself: this process
    holds more."""
    rows = [("ties, `--memory`", "held at a time", "fetched, of what is needed", "merge")]
    least = bench.plan("ties").memory.smallest_limit_bytes // (1 << 20) + 4
    for limit in (f"{least}MiB", f"{least + 64}MiB", "512MiB", "1GiB"):
        plan = bench.plan("ties", memory=limit)
        command = [sys.executable, "-m", "lazymerge", "run", str(bench.root / "recipe.yml")]
        command += ["-o", str(bench.root / "out"), "--memory", limit, "--overwrite", "--json", "-q"]
        bench.asked()
        done = subprocess.run([*command, "--no-fsync"], check=True, stdout=subprocess.PIPE)
        share = bench.asked()[1] / plan.bytes_to_fetch
        seconds = json.loads(done.stdout)["seconds"]
        held = format_memory(plan.memory.fetch_bytes)
        rows.append((limit, held, f"{share:.0%}", rate(plan.bytes_to_fetch, seconds)))
    table(*rows)


def measure_connections(bench: Bench) -> None:
    """Where the network is slower, processors have more time."""
    head = ("`LAZYMERGE_CONNECTIONS`", "method", "plain downloads", "merge", "", "of single runs")
    rows: list[tuple[str, ...]] = [head]
    for count in (4, 8, 16):
        plans = [bench.plan(method, connections=count) for method in ("linear", "ties")]
        for method, plan, turns in zip(
            ("linear", "ties"), plans, bench.taking_turns(*plans), strict=True
        ):
            rows.append((str(count), method, *turns.columns(plan.bytes_to_fetch)))
    table(*rows)


def measure_gaps(bench: Bench) -> None:
    """Every other layer of a model of small ones: half of its file, in hundreds of places."""
    rows = [("`LAZYMERGE_MAX_GAP`", "requests", "fetched", "seconds")]
    model = f"{bench.address}/small"
    slices = [{"sources": [{"model": model, "layer_range": [n, n + 1]}]} for n in range(0, 600, 2)]
    for gap in ("0", "256KiB", "1MiB", "16MiB"):
        plan = bench.plan_of({"merge_method": "passthrough", "slices": slices}, max_gap=gap)
        bench.asked()
        seconds = statistics.median(bench.merge(plan) for _ in range(bench.runs))
        requests = bench.asked()[0] // bench.runs
        rows.append((gap, str(requests), format_bytes(plan.bytes_to_fetch), f"{seconds:.2f} s"))
    table(*rows)


def measure_cache(bench: Bench) -> None:
    rows = [("linear", "merge")]
    cache = bench.root / "cache"
    for what, folder in (("without a cache", None), ("into a cache", cache), ("from it", cache)):
        seconds = []
        for _ in range(bench.runs):
            if what == "into a cache":
                shutil.rmtree(cache, ignore_errors=True)
            seconds.append(bench.merge(bench.plan("linear", cache=folder)))
        size = bench.plan("linear").bytes_to_fetch
        rows.append((what, rate(size, statistics.median(seconds))))
    table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure merges of models on a web server.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--rate", default="100MB", help="of every connection, per second")
    parser.add_argument("--size", default="512MB", help="of every model")
    parser.add_argument("--runs", type=int, default=7, help="of which the medians count")
    options = parser.parse_args()
    measures: dict[str, Callable[[Bench], None]] = {
        "methods": measure_methods,
        "memory": measure_memory,
        "connections": measure_connections,
        "gaps": measure_gaps,
        "cache": measure_cache,
    }
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"there is no table {unknown.pop()}, only {', '.join(TABLES)}")
    size, rate_bytes = parse_size(options.size), float(parse_size(options.rate))
    with bench(options.latency, rate_bytes, size, options.runs) as made:
        for name in options.tables or TABLES:
            measures[name](made)


if __name__ == "__main__":
    main()
