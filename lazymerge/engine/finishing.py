"""What a run writes when all tensors are there: the small files, and the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import is_plain_name
from ..checkpoint.tensor import DTYPES
from ..errors import InputError, brief
from ..graph.node import Write
from ..methods import METHODS
from ..output.card import model_card
from ..output.checksum import file_checksum
from ..output.layout import INDEX_NAME, index_json
from ..output.manifest import CHECKSUM, MANIFEST_NAME, count, write_bytes
from ..output.sidecars import copy_sidecars
from ..version import __version__
from .blocks import elements_per_block
from .plan import Plan
from .scheduler import SPAN_BLOCKS
from .stages import row_elements

if TYPE_CHECKING:
    from .report import RunReport
    from .timeline import Timeline


def span_bytes(plan: Plan) -> dict[str, int]:
    """Length of every output tensor's spans, by name."""
    return {
        write.name: span_elements(plan, write) * DTYPES[write.dtype].item_bytes
        for write in plan.graph.writes
    }


def span_elements(plan: Plan, write: Write) -> int:
    """Elements of an output tensor's spans, which its checksum is made of."""
    row = row_elements(plan.graph, write)
    return SPAN_BLOCKS * elements_per_block(plan.execution.device, row)


def beside_weights(plan: Plan, name: str) -> Iterator[tuple[str, bytes | Path]]:
    """Names of the files beside the weights (index, config, tokenizer files, model card), and their
    contents, or the files that they are copied from.

    name: of the output, the title of its card.
    """
    if plan.split is not None:  # they are the whole's
        return
    if len(plan.shards) > 1:
        yield INDEX_NAME, index_json(plan.shards).encode()
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        yield "config.json", text.encode()
    made = {} if plan.tokenizer is None else plan.tokenizer.files
    for file in sorted([*plan.sidecars, *made]):
        yield file, made[file] if file in made else Path(plan.beside_folder, file)
    signature = METHODS[plan.recipe.merge_method].signature
    card = model_card(
        name,
        plan.recipe.text,
        signature.name,
        signature.summary,
        signature.source,
        list(plan.checkpoints),
        plan.recipe.base_model,
        __version__,
        plan.recipe.name if plan.recipe.part_of else None,
    )
    yield "README.md", card.encode()


def write_beside_weights(
    plan: Plan, folder: Path, name: str, *, fsync: bool, only: Collection[str] | None = None
) -> tuple[str, ...]:
    """Writes what `beside_weights` names; returns the names.

    name: of the output. only: some of them.

    Raises:
        OSError: one cannot be written.
        LazymergeError: one that is copied cannot be read.
    """
    written = []
    for file, content in beside_weights(plan, name):
        if only is not None and file not in only:
            continue
        if isinstance(content, bytes):
            write_bytes(folder / file, content, fsync=fsync)
        else:
            copy_sidecars(plan.beside_folder, [file], folder, fsync=fsync)
        written.append(file)
    return tuple(written)


def manifest(
    plan: Plan,
    beginning: Mapping[str, Any],
    checksums: Mapping[str, str],
    beside: Sequence[str],
    folder: Path,
    report: RunReport,
    timeline: Timeline,
) -> dict[str, Any]:
    """The manifest of a complete output.

    beginning: its first half. checksums: of all tensors, by name.
    beside: names of the small files in the folder. timeline: of this run.

    Raises:
        OSError: one of them cannot be read.
    """
    writes = {write.name: write for write in plan.graph.writes}
    return {
        **{key: value for key, value in beginning.items() if key != "format"},
        "name": folder.absolute().name,
        "memory": {
            **plan.memory.as_dict(),
            "measured_bytes": report.measured_bytes,
            "measured_vram_bytes": report.measured_vram_bytes,
        },
        "nonfinite": [asdict(tensor) for tensor in report.nonfinite],
        "device_name": report.device,
        "run": {
            "seconds": round(report.seconds, 3),
            "bytes_read": report.bytes_read,
            "bytes_written": report.bytes_written,
            "resumed_tensors": report.resumed_tensors,
        },
        "timeline": timeline.as_dict(),
        "shards": {shard.file: shard.size_bytes for shard in plan.shards},
        "files": {name: file_checksum(folder / name) for name in beside},
        "checksum": CHECKSUM,
        "tensors": {
            tensor.name: {
                "file": shard.file,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "span_elements": span_elements(plan, writes[tensor.name]),
                "checksum": checksums[tensor.name],
            }
            for shard in plan.shards
            for tensor in shard.tensors
        },
    }


MOST_NAME_BYTES = 255
"""Of a file, on every filesystem in use."""


def faults(document: Mapping[str, Any], folder: Path, *, small_files: bool = True) -> list[str]:
    """What a look at the files shows to be missing from a complete output, or too short or long;
    one sentence each.

    document: its manifest. small_files: those beside the weights are looked at too.

    Raises:
        InputError: the manifest is damaged.
    """
    try:
        sizes = {name: count(size) for name, size in document["shards"].items()}
        names = [*sizes, *document["files"].keys()]
        parts = [part for name in names for part in name.split("/")]
        if not all(map(is_plain_name, parts)):
            raise ValueError("a file's name leads elsewhere")
        if any(len(os.fsencode(part)) > MOST_NAME_BYTES for part in parts):
            raise ValueError("a file's name is longer than any can be")
        unlike = (
            document["output"]["tensors"] != len(document["tensors"])
            or {entry["file"] for entry in document["tensors"].values()} != sizes.keys()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST_NAME} is damaged ({brief(error)})") from error
    found = []
    if unlike:
        found.append(f"{folder / MANIFEST_NAME} does not list all tensors and shards")
    for name in names if small_files else sizes:
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
            continue
        size = path.stat().st_size
        if size != sizes.get(name, size):
            found.append(f"{path} holds {size:,} bytes, the manifest says {sizes[name]:,}")
    return found
