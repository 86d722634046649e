#!/usr/bin/env python3
"""Measure what planning a merge of models that lie elsewhere costs: requests, bytes and seconds.

    python scripts/measure_remote_planning.py [--latency 0.05] [--runs 3]

Three models of 13 billion parameters, headers and holes, with a tokenizer of 2.7 MB beside each,
are served on the loopback interface by a process of its own, with a pause before every answer: by a
web server, in safetensors and in torch files, and by a stand-in for the Hugging Face Hub. The
command is `lazymerge plan --dry-run`, from start to end as a process.

A Markdown table goes to stdout; of several runs the fastest counts. How often the command waits for
answers, one after the other, is told by how much longer it takes with a pause of a second.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "checkpoint"))

from lazymerge.sizes import format_bytes
from torch_bytes import mapping, pickled, storage
from torch_bytes import tensor as pickled_tensor

from benchmarking.processes import lazymerge_environment, run_measured
from hub_server import HubServer, hub_server
from measure_planning import ITEM_BYTES, LLAMA, RECIPE, Tensor, llama_13b, write_checkpoint
from range_server import range_server

MODELS = 3
LONG_PAUSE_SECONDS = 1.0
TOKENS = 32_000
TOKENIZER_MODEL_BYTES = 500_000


@dataclass(frozen=True, slots=True)
class Cost:
    """What one plan took. cpu_seconds: of the command's own."""

    requests: int
    bytes_sent: int
    seconds: float
    cpu_seconds: float


def write_beside(folder: Path) -> None:
    """A tokenizer's files, of the sizes that Llama 2 has."""
    tokens = {f"▁token{number}": number for number in range(TOKENS)}
    merges = [f"▁tok en{number:011}" for number in range(2 * TOKENS)]
    model = {"type": "BPE", "vocab": tokens, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}, ensure_ascii=False))
    (folder / "tokenizer.model").write_bytes(bytes(TOKENIZER_MODEL_BYTES))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")


def write_torch_files(folder: Path, tensors: Sequence[Tensor], files: int = 3) -> None:
    """The tensors as torch.save writes them, in files whose data are holes."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    share = -(-len(tensors) // files)
    for number in range(files):
        name = f"pytorch_model-{number + 1:05}-of-{files:05}.bin"
        part = tensors[number * share : (number + 1) * share]
        write_torch_file(folder / name, part)
        places |= {tensor[0]: name for tensor in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(LLAMA))


def write_torch_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """A zip file of entries without compression; contents begin at multiples of 64 bytes."""
    pickle = {
        name: pickled_tensor(
            shape,
            tuple(prod(shape[number + 1 :]) for number in range(len(shape))),
            stored=storage(str(key), prod(shape), "HalfStorage"),
        )
        for key, (name, _, shape) in enumerate(tensors)
    }
    entries: list[tuple[bytes, bytes | int]] = [
        (b"x/data.pkl", pickled(mapping(pickle))),
        (b"x/byteorder", b"little"),
    ]
    for key, (_, dtype, shape) in enumerate(tensors):
        entries.append((f"x/data/{key}".encode(), prod(shape) * ITEM_BYTES[dtype]))
    entries.append((b"x/version", b"3\n"))
    records = []
    with path.open("wb") as stream:
        for name, content in entries:
            offset = stream.tell()
            size = content if isinstance(content, int) else len(content)
            padding = -(offset + 30 + len(name) + 4) % 64
            extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            header = (20, 0, 0, 0, 0, 0, size, size, len(name), len(extra))
            stream.write(struct.pack("<4sHHHHHLLLHH", b"PK\3\4", *header) + name + extra)
            if isinstance(content, bytes):
                stream.write(content)
            else:
                stream.truncate(stream.tell() + size)
                stream.seek(0, 2)
            records.append((name, offset, size))
        start = stream.tell()
        for name, offset, size in records:
            extra = struct.pack("<HHQ", 1, 8, offset)
            fields = (45, 45, 0, 0, 0, 0, 0, size, size, len(name), len(extra), 0, 0, 0, 0)
            stream.write(struct.pack("<4sHHHHHHLLLHHHHHLL", b"PK\1\2", *fields, 0xFFFFFFFF))
            stream.write(name + extra)
        length, count = stream.tell() - start, len(records)
        end = (44, 45, 45, 0, 0, count, count, length, start)
        stream.write(struct.pack("<4sQHHLLQQQQ", b"PK\6\6", *end))
        stream.write(struct.pack("<4sLQL", b"PK\6\7", 0, start + length, 1))
        short = (0, 0, count, count, length, 0xFFFFFFFF, 0)
        stream.write(struct.pack("<4sHHHHLLH", b"PK\5\6", *short))


def make_models(root: Path) -> None:
    """Folders safetensors-N and torch-N."""
    tensors = [*llama_13b()]
    for number in range(MODELS):
        write_checkpoint(root / f"safetensors-{number}", tensors, LLAMA)
        write_torch_files(root / f"torch-{number}", tensors)
        for kind in ("safetensors", "torch"):
            write_beside(root / f"{kind}-{number}")


def serve_web(root: Path, latency: float, pipe: Connection) -> None:
    """A web server; for everything that comes through the pipe but None it tells what it sent."""
    with range_server(root) as server:
        server.latency_seconds = latency
        pipe.send(server.address)
        while pipe.recv() is not None:
            pipe.send((len(server.log), server.bytes_sent))


def serve_hub(root: Path, latency: float, pipe: Connection) -> None:
    """The same of a stand-in for the Hub."""
    with hub_server() as server:
        server.latency_seconds = latency
        for number in range(MODELS):
            publish(server, f"org/m{number}", root / f"safetensors-{number}")
        pipe.send(server.endpoint)
        while pipe.recv() is not None:
            pipe.send((len(server.log), server.bytes_sent))


def publish(server: HubServer, repository: str, folder: Path) -> None:
    """Makes a folder's files a model; they are mapped."""
    files = {}
    for path in folder.iterdir():
        with path.open("rb") as stream:
            files[path.name] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    commit = f"{len(server.commits) + 1:040}"
    server.commits[repository] = {commit: files}  # type: ignore[dict-item]
    server.branches[repository] = {"main": commit}


def measure(
    root: Path,
    serve: Callable[[Path, float, Connection], None],
    models: Callable[[str], str],
    latency: float,
    options: Sequence[str] = (),
) -> Cost:
    """One plan, with a server of its own. models: their folder, by the server's address."""
    ours, theirs = multiprocessing.Pipe()
    spawned = multiprocessing.get_context("spawn")
    server = spawned.Process(target=serve, args=(root, latency, theirs))
    server.start()
    try:
        address = ours.recv()
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            recipe = Path(scratch, "recipe.yml")
            recipe.write_text(RECIPE.format(method="task_arithmetic", folder=models(address)))
            recipe.write_text(recipe.read_text().replace("-/", "-").replace("/m/", "/m"))
            environment = {**lazymerge_environment(), "HF_ENDPOINT": address, "HF_HOME": scratch}
            del environment["HF_HUB_OFFLINE"]
            command = [sys.executable, "-m", "lazymerge", "plan", str(recipe), "--dry-run"]
            run = run_measured([*command, *options], environment, Path(scratch, "log"))
        ours.send("how much")
        requests, bytes_sent = ours.recv()
    finally:
        ours.send(None)
        server.join()
    return Cost(requests, bytes_sent, run.wall_s, run.cpu_s)


WAYS = {
    "web server, safetensors": (serve_web, lambda address: f"{address}/safetensors-", ()),
    "web server, torch files": (serve_web, lambda address: f"{address}/torch-", ()),
    "Hub, safetensors, `--stream`": (serve_hub, lambda address: "org/m", ("--stream",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    milliseconds = round(1000 * arguments.latency)
    pause = f"{milliseconds} ms"
    print(f"| three 13B models | requests | bytes sent | waits | processor time | {pause} |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="lazymerge-remote-") as name:
        root = Path(name)
        make_models(root)
        for way, (serve, models, options) in WAYS.items():
            costs = {
                pause: [measure(root, serve, models, pause, options) for _ in range(arguments.runs)]
                for pause in (0.0, arguments.latency, LONG_PAUSE_SECONDS)
            }
            near, far, slow = (min(cost.seconds for cost in each) for each in costs.values())
            cpu_seconds = min(cost.cpu_seconds for each in costs.values() for cost in each)
            sent = costs[arguments.latency][0]
            print(
                f"| {way} | {sent.requests} | {format_bytes(sent.bytes_sent)} "
                f"| {(slow - near) / LONG_PAUSE_SECONDS:.0f} | {cpu_seconds:.2f} s | {far:.2f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
