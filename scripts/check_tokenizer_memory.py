#!/usr/bin/env python3
"""Check that the embeddings of models with different vocabularies merge in little memory.

    python scripts/check_tokenizer_memory.py                       four models, 262144 x 8192, 1 GiB
    python scripts/check_tokenizer_memory.py --tokens 20000 --width 64 --memory 512MiB

Makes models that consist of an embedding of zeros (sparse files: they take no room on the disk) and
a BPE tokenizer with two merges for every token. They share most tokens, under other numbers, and
each has some of its own. Their union is merged by `lazymerge run`; the output takes room: 4.9 GB by
default, in a temporary folder. Says what the run projected and what it took, by its own word and
the kernel's. Exit 1 if it took more than it projected or than the limit.

This process stays small: to the kernel, the peak memory of a child starts from that of its parent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import string
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazymerge.sizes import parse_size

REPOSITORY = Path(__file__).resolve().parents[1]

OWN_SHARE = 0.05
"""Of a model's tokens: those that the others have not."""


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="lazymerge-tokenizers-", dir=arguments.folder) as name:
        folder = Path(name)
        names = [f"model_{number}" for number in range(arguments.models)]
        for number, model in enumerate(names):
            make_model(folder / model, number, arguments.tokens, arguments.width)
        recipe = folder / "recipe.yml"
        recipe.write_text(_recipe(folder, names))
        result, peak_bytes = _run(recipe, folder / "out", arguments.memory)
    memory = result["memory"]
    limit_bytes = parse_size(arguments.memory)
    print(f"limit      {limit_bytes >> 20} MiB")
    print(f"projected  {memory['projected_bytes'] >> 20} MiB, {memory['workers']} workers")
    print(f"measured   {memory['measured_bytes'] >> 20} MiB by its own word")
    print(f"measured   {peak_bytes >> 20} MiB by the kernel's")
    taken = max(peak_bytes, memory["measured_bytes"])
    return int(taken > min(limit_bytes, memory["projected_bytes"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=262_144, help="of each model")
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    return parser.parse_args()


def words() -> Iterator[str]:
    """All words of one letter, two, three …; every part of a word comes before it."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def make_model(folder: Path, number: int, tokens: int, width: int) -> None:
    """A model of one embedding, of zeros, and its tokenizer."""
    folder.mkdir()
    shared = round(tokens * (1 - OWN_SHARE))
    first_own = shared + number * (tokens - shared)
    chosen = [
        *itertools.islice(words(), shared),
        *itertools.islice(words(), first_own, first_own + tokens - shared),
    ]
    write_tokenizer(folder / "tokenizer.json", chosen, seed=number)
    header = json.dumps(
        {
            "model.embed_tokens.weight": {
                "dtype": "BF16",
                "shape": [tokens, width],
                "data_offsets": [0, 2 * tokens * width],
            }
        }
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * tokens * width)
    config = {"model_type": "llama", "vocab_size": tokens, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(path: Path, chosen: list[str], seed: int) -> None:
    """A BPE tokenizer of these words, numbered in an order of its own.

    Raises:
        ValueError: a word's part is not among them.
    """
    known = set(chosen)
    merges = [
        part
        for word in chosen
        if len(word) > 1
        for part in dict.fromkeys(((word[:-1], word[-1]), (word[0], word[1:])))
    ]
    if not all(left in known and right in known for left, right in merges):
        raise ValueError("a word's part is missing")
    numbers = list(range(len(chosen)))
    random.Random(seed).shuffle(numbers)
    document = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "BPE",
            "vocab": dict(zip(chosen, numbers, strict=True)),
            "merges": merges,
        },
    }
    path.write_text(json.dumps(document))


def _recipe(folder: Path, names: list[str]) -> str:
    models = "".join(
        f"  - {{model: {json.dumps(str(folder / name))}, parameters: {{weight: 1}}}}\n"
        for name in names
    )
    return f"merge_method: linear\nmodels:\n{models}tokenizer_source: union\n"


def _run(recipe: Path, output: Path, memory: str) -> tuple[dict[str, dict[str, int]], int]:
    """The manifest of a run, and the peak memory of its process."""
    command = [sys.executable, "-m", "lazymerge", "run", str(recipe), "-o", str(output)]
    command += ["--memory", memory, "--no-fsync", "-q"]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"lazymerge ended with exit code {process.returncode}")
    manifest: dict[str, dict[str, int]] = json.loads((output / "lazymerge.json").read_text())
    return manifest, usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
