#!/usr/bin/env python3
"""Feed damaged and hostile files to everything that lazymerge reads.

    python scripts/fuzz.py                            100,000 inputs, in five to ten minutes
    python scripts/fuzz.py --inputs 2000 --seed 7 --targets header journal
    python scripts/fuzz.py --replay fuzz-failures/header-7-1234

Inputs are made from valid ones by altering bytes, pieces, numbers, and parts of their JSON or YAML.
For each, one of two things must happen: it is accepted, or it is refused by an error that the
command line turns into a message (LazymergeError) of at most MESSAGE_CHARACTERS. Nothing else may:
no other exception, no more than SECONDS, no more than MEMORY_BYTES, nothing read outside the folder
of models and outputs, nothing written, made, renamed or removed outside the outputs, no process, no
connection. Of what is accepted, a target checks what must then be true; models and recipes that
are accepted are merged.

An input that fails is kept, and the command that repeats it printed. Exit 1 if one does.

A new target is a method of Place that puts an input where it belongs and has it read, and a line in
`targets`: the valid inputs it starts from, and how many of the inputs it gets.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import resource
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import lazymerge
import yaml
from lazymerge.checkpoint import Checkpoint, open_checkpoint, read_header
from lazymerge.checkpoint.broken_file import BrokenFileError
from lazymerge.checkpoint.scattered import FetchedBytes
from lazymerge.checkpoint.torch_file import parse_torch_file, read_torch_file
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.report import Silent
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError, LazymergeError
from lazymerge.output import lock as lock_module
from lazymerge.output.journal import JOURNAL_PATH, boot_id, read_journal
from lazymerge.output.lock import LOCK_PATH, OutputLock
from lazymerge.output.manifest import MERGE_PATH
from lazymerge.output.status import output_status
from lazymerge.recipe import Recipe, load_recipe, parse_recipe

from make_synthetic_checkpoint import LlamaShape, make_checkpoint

SHAPE = LlamaShape(hidden=16, intermediate=32, layers=2, heads=2, kv_heads=2, vocabulary=272)

SECONDS = 2.0
"""Of the processor's time, so that other work on the machine makes no difference."""

WAITING = 10
"""An input that waits for something may take so many times as long."""

MEMORY_BYTES = 1 << 30
"""Of address space, above what the process has before the first input."""

MESSAGE_CHARACTERS = 30_000
"""A recipe names a hundred problems at most, a line or two each."""

FOLDER = b"{FOLDER}"
"""In a kept input, what the folder of models was called: another run has another."""

TOKENS = [
    b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\\",
    b"\\ud800", b"NaN", b"Infinity", b"-1", b"1e999", b"0x10", b"null", b"true", b"[]", b"{}",
    b"18446744073709551616", b"9223372036854775807", b"-9223372036854775808", b"4294967296",
    b"../../../../etc/passwd", b"/etc/passwd", b"..", b".", b"\n", b"\r\n", b"\t", b"#", b"&a ",
    b"*a ", b"<<: ", b"!!python/object/apply:os.system [true]", b"!!binary ", b"---\n",
    b"%YAML 2.0\n", b"%TAG !a! tag:b\n" * 20,
    b"[" * 200, b'{"a":' * 100, b"a" * 5000, b"9" * 5000, "\u202e\u0000\ufeff".encode(),
    b"__metadata__", b"data_offsets", b"auto_map", b"weight_map", b"model.safetensors",
    b"cposix\nsystem\n", b"ctorch\nFloatStorage\n", b"\x8a\xff", b"(((((((", b"R", b"b", b"Q", b"t",
    b"q\x00h\x00\x86" * 200, b"r\xff\xff\xff\xff", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06",
]  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "a/b", "\ud800", "\0", "x" * 3000, [], {}, [[]],
    {"": {}}, [1, 2, 3], ["a"] * 50, "BF16", "I64", "linear", "..", "model.safetensors",
    [2**63] * 30_000,
]  # fmt: skip


class Hostile(Exception):
    """Something that no input may lead to."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads files.

    valid: inputs to start from.
    read: puts an input where it belongs and has it read; raises Hostile if what was accepted is
        not as it must be.
    share: how many of the inputs it gets, against the others.
    """

    valid: list[bytes]
    read: Callable[[bytes], None]
    share: int


# ------------------------------------------------------------------------------- inputs


def damaged(valid: list[bytes], random: Random) -> bytes:
    """An input made from valid ones."""
    data = random.choice(valid)
    if random.random() < 0.5:
        altered = _altered_document(data, random)
        if altered is not None:
            data = altered
            if random.random() < 0.5:
                return data
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        data = _altered_bytes(data, random.choice(valid), random)
    return data


def _altered_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    start = random.randint(0, len(data))
    stop = min(len(data), start + random.choice([0, 1, 2, 8, 64, 1024]))
    match random.randrange(8):
        case 0:
            if not data:
                return data
            at = random.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:start] + data[stop:]
        case 2:
            return data[:start]
        case 3:
            return data[:stop] + data[start:stop] * random.choice([1, 2, 50]) + data[stop:]
        case 4:
            at = random.randint(0, len(other))
            return data[:start] + other[at : at + 200] + data[stop:]
        case 5:
            numbers = list(re.finditer(rb"-?\d+", data))
            if not numbers:
                return data
            number = random.choice(numbers)
            text = random.choice([b"0", b"-1", b"1e3", b"18446744073709551616", b"007", b"3.5"])
            return data[: number.start()] + text + data[number.end() :]
        case 6:
            return data[:start] + random.randbytes(random.choice([1, 4, 16])) + data[stop:]
        case _:
            return data[:start] + random.choice(TOKENS) + data[stop:]


def _altered_document(data: bytes, random: Random) -> bytes | None:
    """The input with parts of its JSON exchanged; None if it holds none."""
    prefix = b""
    if len(data) > 8 and data[8:9] == b"{":  # a safetensors header
        length = int.from_bytes(data[:8], "little")
        prefix, data, rest = data[:8], data[8 : 8 + length], data[8 + length :]
    is_yaml = data.startswith((b"base_model:", b"dtype:"))
    try:
        document = yaml.safe_load(data) if is_yaml else json.loads(data)
    except ValueError:
        return None
    for _ in range(random.choice([1, 1, 2, 5])):
        document = _altered_value(document, random, 0)
    if is_yaml:
        return yaml.safe_dump(document).encode("utf-8", "surrogatepass")
    text = json.dumps(document)
    if random.random() < 0.1 and text.startswith("{"):
        text = text[:-1] + "," + text[1:]  # every key twice
    encoded = text.encode()
    return len(encoded).to_bytes(8, "little") + encoded + rest if prefix else encoded


def _altered_value(value: Any, random: Random, depth: int) -> Any:
    if depth < 8 and random.random() < 0.85:
        if isinstance(value, dict) and value:
            key = random.choice(list(value))
            changed = dict(value)
            chance = random.random()
            if chance < 0.1:
                del changed[key]
            elif chance < 0.2:
                changed[str(random.choice(VALUES))] = changed.pop(key)
            else:
                changed[key] = _altered_value(value[key], random, depth + 1)
            return changed
        if isinstance(value, list) and value:
            at = random.randrange(len(value))
            items = [*value]
            if random.random() < 0.2:
                items.insert(at, items[at])
            else:
                items[at] = _altered_value(value[at], random, depth + 1)
            return items
        if isinstance(value, int) and not isinstance(value, bool):
            return value + random.choice([-1, 1, 8, -8, 2**32, -(2**40)])
        if isinstance(value, str) and value and random.random() < 0.5:
            at = random.randrange(len(value))
            return value[:at] + random.choice(["", "/", "..", "\0", "x", '"']) + value[at + 1 :]
    return random.choice(VALUES)


# ------------------------------------------------------------------------------ targets


class Place:
    """Models, a recipe, an output that is complete and one that is not, and what reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for number, name in enumerate(("base", "a", "b")):
            make_checkpoint(
                folder / name, SHAPE, dtype="bfloat16", seed=number, tokenizer=True, shards=2
            )
        (folder / "single").mkdir()
        (folder / "torch").mkdir()
        _write_float8(folder / "float8")
        _write_adapter(folder / "adapter")
        self.shard = _short(next(folder.glob("base/*.safetensors")).read_bytes())
        self.recipes = [self._recipe(method) for method in ("ties", "linear", "dare_ties")]
        self.gradients = self.recipes[0].replace(
            b"density: 0.5", b"density: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.3}]"
        )
        (folder / "recipe.yml").write_bytes(self.recipes[0])
        self.plan = lazymerge.plan(folder / "recipe.yml", max_shard_size=20_000, workers=1)
        self.plan.save(folder / "plan.json")
        run_plan(self.plan, folder / "complete", fsync=False)
        self._leave_unfinished()
        self.kept = folder / "kept"
        shutil.copytree(folder / "unfinished", self.kept)

    def _recipe(self, method: str) -> bytes:
        parameters = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.5}
        models = [
            {"model": str(self.folder / name), "parameters": parameters} for name in ("a", "b")
        ]
        base = {} if method == "linear" else {"base_model": str(self.folder / "base")}
        document = {"merge_method": method, **base, "models": models, "dtype": "bfloat16"}
        return yaml.safe_dump(document).encode()

    def _leave_unfinished(self) -> None:
        class Stop(Exception):
            pass

        class Stopper(Silent):
            count = 0

            def finished(self, tensor: str) -> None:
                self.count += 1
                if self.count == 7:
                    raise Stop

        try:
            run_plan(self.plan, self.folder / "unfinished", fsync=False, observer=Stopper())
        except Stop:
            return
        raise AssertionError("it should have been stopped")

    def targets(self) -> dict[str, Target]:
        def files(*paths: str) -> list[bytes]:
            return [(self.folder / path).read_bytes() for path in paths]

        owner = {"pid": 1, "host": "h", "boot": boot_id(), "started": 3}
        shards = [path.name for path in sorted((self.folder / "base").glob("*.safetensors"))]
        return {
            "header": Target([_short(data) for data in files(*[f"base/{s}" for s in shards])],
                             self.header, 40),
            "torch": Target([torch_file(wrapped=True), torch_file(wrapped=False)], self.torch, 20),
            "pickle": Target([_pickle_of(torch_file(wrapped)) for wrapped in (True, False)],
                             self.pickle, 20),
            "scales": Target(files("float8/config.json"), self.scales, 5),
            "index": Target(files("base/model.safetensors.index.json"), self.index, 10),
            "config": Target(files("base/config.json"), self.config, 10),
            "sidecar": Target(files("base/tokenizer.json"), self.sidecar, 1),
            "tokenizer": Target(files("base/tokenizer.json"), self.tokenizer, 5),
            "tokens": Target(files("base/tokenizer_config.json"), self.tokens, 2),
            "adapter": Target(files("adapter/adapter_config.json"), self.adapter, 5),
            "factors": Target(files("adapter/adapter_model.safetensors"), self.factors, 5),
            "name": Target([b"second", "größer als".encode()], self.name, 3),
            "recipe": Target([*self.recipes, self.gradients], self.recipe, 20),
            "plan": Target(files("plan.json"), self.saved_plan, 2),
            "journal": Target(files(f"kept/{JOURNAL_PATH}"), self.journal, 10),
            "merge": Target(files(f"kept/{MERGE_PATH}"), self.merge, 3),
            "lock": Target([json.dumps(owner).encode()], self.lock, 3),
            "manifest": Target(files("complete/lazymerge.json"), self.manifest, 2),
        }  # fmt: skip

    def header(self, data: bytes) -> None:
        path = self.folder / "single" / "model.safetensors"
        put(path, data)
        header = read_header(path)
        end = header.bytes_read
        for tensor in sorted(header.tensors, key=lambda tensor: tensor.start):
            if tensor.start != end and tensor.size_bytes:
                raise Hostile(f"{tensor} overlaps another, or leaves a gap")
            end = max(end, tensor.stop_exclusive)
        if end != len(data):
            raise Hostile(f"tensors end at {end}, the file at {len(data)}")
        self._merge(self._linear("single"))

    def torch(self, data: bytes) -> None:
        """A file as torch.save writes it."""
        path = self.folder / "torch" / "pytorch_model.bin"
        put(path, data)
        _check_fetched(path, data)
        checkpoint = open_checkpoint(str(path.parent))
        _check_storages(checkpoint, data)
        self._merge(self._linear("torch"))

    def pickle(self, data: bytes) -> None:
        """The pickle of one, in a zip file that is as it should be."""
        stream = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(torch_file(wrapped=False))) as sound,
            zipfile.ZipFile(stream, "w") as altered,
        ):
            for entry in sound.infolist():
                is_pickle = entry.filename.endswith("/data.pkl")
                altered.writestr(entry.filename, data if is_pickle else sound.read(entry))
        self.torch(stream.getvalue())

    def scales(self, data: bytes) -> None:
        """The config of a model of float8 blocks, which says how large they are."""
        put(self.folder / "float8" / "config.json", data)
        self._merge(self._linear("float8"))

    def index(self, data: bytes) -> None:
        self._open_with("model.safetensors.index.json", data)

    def config(self, data: bytes) -> None:
        self._open_with("config.json", data)

    def sidecar(self, data: bytes) -> None:
        copied = self._open_with("tokenizer.json", data, model="base")
        if (copied / "tokenizer.json").read_bytes() != data:
            raise Hostile("changes a tokenizer")

    def tokenizer(self, data: bytes) -> None:
        """The vocabulary of one of two models, matched with the other's."""
        self._unite_with("tokenizer.json", data)

    def tokens(self, data: bytes) -> None:
        """What stands beside a vocabulary, of one of two models."""
        self._unite_with("tokenizer_config.json", data)

    def _unite_with(self, name: str, data: bytes) -> None:
        path = self.folder / "a" / name
        before = path.read_bytes()
        put(path, data)
        try:
            text = self.recipes[0].decode() + "tokenizer_source: union\n"
            self._merge(parse_recipe(text, "recipe.yml", signatures()))
        finally:
            put(path, before)

    def adapter(self, data: bytes) -> None:
        """What an adapter says of itself."""
        self._fold_in("adapter_config.json", data)

    def factors(self, data: bytes) -> None:
        """Its tensors."""
        self._fold_in("adapter_model.safetensors", data)

    def _fold_in(self, name: str, data: bytes) -> None:
        path = self.folder / "adapter" / name
        before = path.read_bytes()
        put(path, data)
        try:
            self._merge(self._linear("base", f"+{self.folder / 'adapter'}"))
        finally:
            put(path, before)

    def _open_with(self, name: str, data: bytes, model: str = "a") -> Path:
        path = self.folder / model / name
        before = path.read_bytes()
        put(path, data)
        try:
            checkpoint = open_checkpoint(str(path.parent))
            for tensor in checkpoint.tensors.values():
                if "/" in tensor.file:
                    raise Hostile(f"reads {tensor.file}")
            return self._merge(parse_recipe(self.recipes[0].decode(), "recipe.yml", signatures()))
        finally:
            put(path, before)

    def name(self, data: bytes) -> None:
        """A shard and a vocabulary of this name in a model's folder."""
        if b"/" in data:
            return  # a name in another folder
        with setting_up():
            folder = self.folder / "names"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            put(folder / "first.safetensors", self.shard)
            for suffix in (b".safetensors", b".tiktoken"):
                try:
                    with open(os.path.join(os.fsencode(folder), data + suffix), "xb") as stream:
                        stream.write(self.shard.replace(b".weight", b".weighs"))
                except (OSError, ValueError):
                    return  # no name that a file can have
        self._merge(self._linear("names"))

    def _linear(self, name: str, adapter: str = "") -> Recipe:
        entry = {"model": str(self.folder / name) + adapter, "parameters": {"weight": 1.0}}
        text = yaml.safe_dump({"merge_method": "linear", "models": [entry]})
        return parse_recipe(text, "recipe.yml", signatures())

    def _merge(self, recipe: Recipe) -> Path:
        """Plans and runs a merge of what was accepted, into an output of its own."""
        plan = make_plan(recipe, Resources(workers=1))
        plan.summary()
        with setting_up():
            shutil.rmtree(self.folder / "out", ignore_errors=True)
        run_plan(plan, self.folder / "out", fsync=False)
        return self.folder / "out"

    def recipe(self, data: bytes) -> None:
        path = self.folder / "fuzzed.yml"
        put(path, data)
        self._merge(load_recipe(path, signatures()))

    def saved_plan(self, data: bytes) -> None:
        path = self.folder / "fuzzed.json"
        put(path, data)
        load_plan(path).summary()

    @contextmanager
    def _unfinished_with(self, name: str, data: bytes) -> Iterator[Path]:
        folder = self.folder / "unfinished"
        with setting_up():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.kept, folder)
            (folder / name).write_bytes(data)
        yield folder

    def journal(self, data: bytes) -> None:
        """A run goes on from it, and all is as it should be: its lines have checksums."""
        path = self.folder / "unfinished" / JOURNAL_PATH
        with setting_up():
            path.parent.mkdir(parents=True, exist_ok=True)
        put(path, data)
        found = read_journal(self.folder / "unfinished")
        whole = read_journal(self.kept)
        for name, record in found.finished.items():
            known = whole.finished.get(name)
            if known is None or known.checksum != record.checksum:
                raise Hostile(f"believes {record}")
        output_status(self.folder / "unfinished")

    def merge(self, data: bytes) -> None:
        with self._unfinished_with(MERGE_PATH, data) as folder:
            output_status(folder)
            plan_of_unfinished(folder)

    def lock(self, data: bytes) -> None:
        lock_module.NAMED_SECONDS = 0.001  # nobody is about to write a name
        with self._unfinished_with(LOCK_PATH, data) as folder:
            output_status(folder)
            OutputLock(folder).release()

    def manifest(self, data: bytes) -> None:
        path = self.folder / "complete" / "lazymerge.json"
        before = path.read_bytes()
        put(path, data)
        try:
            output_status(path.parent)
            verify_output(path.parent)
        finally:
            put(path, before)


@contextmanager
def setting_up() -> Iterator[None]:
    """While an input is put where it belongs, nothing is watched."""
    watched = _watched[:]
    _watched.clear()
    try:
        yield
    finally:
        _watched.extend(watched)


def put(path: Path, data: bytes) -> None:
    """Writes a file that is about to be read."""
    with setting_up():
        path.write_bytes(data)


def _short(data: bytes) -> bytes:
    """A shard with as little data as its header says, the numbers made small."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entry["shape"] = [2, 3]
        entry["data_offsets"] = [end, end + 12]
        end += 12
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def _write_float8(folder: Path) -> None:
    """A model of float8 weights with a scale for each block."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {"layers.0.weight": torch.ones(6, 5).to(torch.float8_e4m3fn)}
    save_file(tensors | {"layers.0.weight_scale_inv": torch.ones(2, 2)}, folder / "x.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [3, 4]}
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def _write_adapter(folder: Path) -> None:
    """A LoRA adapter of two layers' projections."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(SHAPE.layers):
        for module, out in (
            ("self_attn.q_proj", SHAPE.hidden),
            ("mlp.up_proj", SHAPE.intermediate),
        ):
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.ones(2, SHAPE.hidden)
            tensors[f"{name}.lora_B.weight"] = torch.ones(out, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"layers.1.mlp.up_proj": 8, ".*q_proj": 2},
        "rank_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def torch_file(wrapped: bool) -> bytes:
    """What torch.save writes of a few tensors, two of them in one storage.

    wrapped: under a name, beside other things.
    """
    import torch

    weight = torch.ones(4, 3)
    tensors = {
        "model.layers.0.w": weight,
        "model.layers.1.w": weight[1:],
        "norm": torch.nn.Parameter(torch.zeros(5).bfloat16()),
        "scale": torch.ones(2).to(torch.float8_e4m3fn),
        "steps": torch.tensor(3),
    }
    stream = io.BytesIO()
    torch.save({"state_dict": tensors, "epoch": 1.5} if wrapped else tensors, stream)
    return stream.getvalue()


def _pickle_of(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read("archive/data.pkl")


class _OneAtATime(Executor):
    """Does what it is given at once: no threads."""

    def map(self, work: Callable[..., Any], *items: Any, **_: Any) -> Iterator[Any]:
        return map(work, *items)


def _check_fetched(path: Path, data: bytes) -> None:
    """A torch file that lies elsewhere must be taken, or refused, as the same file is here."""
    source = FetchedBytes(data[:100], len(data), lambda a, b: data[a:b], _OneAtATime())
    try:
        fetched: object = parse_torch_file(source, path.name).tensors
    except BrokenFileError as error:
        fetched = f"{path}: {error}"
    try:
        found: object = read_torch_file(path, path.name).tensors
    except InputError as error:
        found = str(error)
    if fetched != found:
        raise Hostile(f"{found} here, {fetched} elsewhere")


def _check_storages(checkpoint: Checkpoint, data: bytes) -> None:
    """Every tensor must lie within an entry that holds a storage, as Python finds them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    places = []
    for entry in entries:
        lengths = struct.unpack_from("<HH", data, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(lengths)
        places.append((start, start + entry.file_size))
    for tensor in checkpoint.tensors.values():
        if not any(a <= tensor.start <= tensor.stop_exclusive <= b for a, b in places):
            raise Hostile(f"{tensor} lies outside the storages {places}")


# ------------------------------------------------------------------------------- limits

_watched: list[Path] = []
"""The folder of models and outputs, while an input is being read."""

_problem: list[str] = []

OUTPUTS = ("out", "unfinished")
"""Folders in it that may be written to while an input is being read."""

CHANGES = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2,
    "os.rmdir": 1, "os.setxattr": 1, "os.symlink": 2, "os.truncate": 1, "os.utime": 1,
}  # fmt: skip
"""Events of Python for changes of names and files, and how many paths each begins with."""

FORBIDDEN = (
    "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "pickle.find_class",
)  # fmt: skip


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Remembers what no input may lead to. Source: Python, sys.addaudithook (PEP 578)."""
    if not _watched:
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int):
            return
        name = os.path.abspath(os.fsdecode(path))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            if not _is_output(name):
                _problem.append(f"opens {name} ({mode}) for writing")
        elif not (Path(name).is_relative_to(_watched[0]) or _is_ours(name)):
            _problem.append(f"opens {name} ({mode})")
    elif event in CHANGES:
        count = CHANGES[event]
        paths = arguments[1:count] if event == "os.symlink" else arguments[:count]
        if any(isinstance(path, int) for path in paths):  # what has been opened
            return
        folders = [a for a in arguments[count:] if isinstance(a, int) and a >= 0][-count:]
        inside = os.readlink(f"/proc/self/fd/{folders[0]}") if event in DIRECTED and folders else ""
        for path in paths:
            name = os.path.abspath(os.path.join(inside, os.fsdecode(path)))
            if not _is_output(name):
                _problem.append(f"{event} {name}")
    elif event in FORBIDDEN:
        _problem.append(f"{event} {arguments}")


DIRECTED = ("os.remove", "os.rmdir", "os.rename")
"""Events whose last arguments are descriptors of the folders that their paths start at, or -1."""


def _is_output(name: str) -> bool:
    return any(Path(name).is_relative_to(_watched[0] / output) for output in OUTPUTS)


def _is_ours(name: str) -> bool:
    """Files of Python's, the system's and lazymerge's own."""
    roots = [sys.prefix, sys.base_prefix, str(Path(lazymerge.__file__).parent), "/proc", "/sys"]
    is_python = name.endswith((".py", ".pyc", ".so"))
    return (
        is_python or any(name.startswith(root) for root in roots) or name.endswith("baseline.json")
    )


def _alarm(*_: object) -> None:
    raise Hostile(f"takes more than {SECONDS} s")


def attempt(target: Target, data: bytes, folder: Path) -> tuple[bool, str | None]:
    """Whether an input is accepted, and what is wrong with what came of it."""
    _problem.clear()
    _watched.append(folder)
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING * SECONDS)
    accepted = False
    try:
        target.read(data)
        accepted = True
    except LazymergeError as error:
        if not str(error).strip():
            return False, "an error without a word"
        if len(str(error)) > MESSAGE_CHARACTERS:
            return False, f"an error of {len(str(error)):,} characters"
    except Hostile as error:
        return False, str(error)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        _watched.clear()
    if time.process_time() - start > SECONDS:  # where the alarm was caught on its way
        return accepted, f"took more than {SECONDS} s"
    return accepted, _problem[0] if _problem else None


def limit_memory() -> None:
    """No more than MEMORY_BYTES above what there is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--targets", nargs="+", help="default: all")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="one input that was kept")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), metavar="DIR")
    parsed = parser.parse_args(arguments)
    seed = secrets.randbits(32) if parsed.seed is None else parsed.seed
    began = time.perf_counter()
    for number_of_signal in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number_of_signal, _alarm)
    with tempfile.TemporaryDirectory(prefix="lazymerge-fuzz-") as name:
        folder = Path(name)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
        targets = Place(folder).targets()
        chosen = parsed.targets or list(targets)
        if unknown := set(chosen) - set(targets):
            parser.error(f"there are no targets {sorted(unknown)}, only {list(targets)}")
        rows, failures = [], 0
        sys.addaudithook(_audit)
        limit_memory()
        if parsed.replay:
            data = parsed.replay.read_bytes().replace(FOLDER, bytes(folder))
            accepted, problem = attempt(targets[parsed.replay.name.split("-")[0]], data, folder)
            print(problem or ("accepted" if accepted else "refused"))
            return 1 if problem else 0
        whole = sum(targets[target].share for target in chosen)
        for label in chosen:
            target = targets[label]
            for data in target.valid:
                if attempt(target, data, folder) != (True, None):
                    raise AssertionError(f"{label}: a valid input is refused: {data!r}")
            counts: Counter[str] = Counter()
            slowest = 0.0
            tried = round(parsed.inputs * target.share / whole)
            for number in range(tried):
                data = damaged(target.valid, Random(f"{seed}/{label}/{number}"))
                start = time.process_time()
                accepted, problem = attempt(target, data, folder)
                slowest = max(slowest, time.process_time() - start)
                counts["accepted" if accepted else "refused"] += 1
                if problem is None:
                    continue
                counts["failed"] += 1
                kept = parsed.keep / f"{label}-{seed}-{number}"
                parsed.keep.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data.replace(bytes(folder), FOLDER))
                again = f"python scripts/fuzz.py --replay {kept}"
                print(f"{label} {number}: {problem}\n  again: {again}", file=sys.stderr)
            failures += counts["failed"]
            rows.append(
                f"| {label} | {tried:,} | {counts['accepted']:,} | {counts['refused']:,} | "
                f"{slowest * 1000:.0f} ms | {counts['failed']} |"
            )
            print(rows[-1], file=sys.stderr)
    print("| input | tried | accepted | refused | slowest | wrong |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - began
    print(f"\nseed {seed}, {seconds:.0f} s, peak memory {peak_bytes / 2**20:.0f} MiB")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
