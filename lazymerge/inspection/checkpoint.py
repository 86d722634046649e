"""What is in a checkpoint, and what looks wrong about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..architecture import LayerStacks, find_layer_stacks
from ..checkpoint.tensor import Checkpoint
from .facts import Facts, facts_of
from .faults import header_suspicions, sequence_of
from .parts import Part, active_parameters, parts_of
from .scan import TensorScan
from .scan_faults import scan_suspicions
from .suspicions import Suspicion

DOCUMENT_FORMAT = 1
"""Of the JSON document; a change that is not an addition makes it another."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a checkpoint. size_bytes: of all of it. tensor_bytes: of the tensors in it."""

    file: str
    size_bytes: int
    tensors: int
    tensor_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    parts: what its parameters are for. active: parameters that one token is computed with; None:
        all, or not known. shards: in the order of names.
    suspicions: what looks wrong, mistakes first. scans: of every tensor, where they were read.
    """

    checkpoint: Checkpoint
    stacks: LayerStacks
    parts: tuple[Part, ...]
    active: int | None
    facts: Facts
    shards: tuple[Shard, ...]
    suspicions: tuple[Suspicion, ...]
    scans: tuple[TensorScan, ...] | None = None

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes by dtype, the largest first."""
        sizes: dict[str, int] = {}
        for tensor in self.checkpoint.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; docs/models.md says what is in it."""
        checkpoint = self.checkpoint
        return {
            "format": DOCUMENT_FORMAT,
            "reference": checkpoint.reference,
            "folder": checkpoint.folder,
            "parameters": checkpoint.parameter_count,
            "active_parameters": self.active,
            "size_bytes": checkpoint.size_bytes,
            "header_bytes_read": checkpoint.header_bytes_read,
            "dtypes": self.dtypes,
            "layer_stacks": [
                {"prefix": stack.prefix, "layers": stack.layer_count} for stack in self.stacks
            ],
            "parts": [asdict(part) for part in self.parts],
            "facts": {**asdict(self.facts), "head": self.facts.head},
            "shards": [asdict(shard) for shard in self.shards],
            "files": [asdict(file) for file in checkpoint.files],
            "tensors": {
                t.name: {
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "file": t.file,
                    "bytes": [t.start, t.stop_exclusive],
                }
                for t in checkpoint.tensors.values()
            },
            "config": checkpoint.config,
            **({"adapter": checkpoint.adapter.as_dict()} if checkpoint.adapter else {}),
            "notices": list(checkpoint.notices),
            "suspicions": [asdict(each) for each in self.suspicions],
            "scan": None if self.scans is None else _scans_dict(self.scans),
        }


def _scans_dict(scans: Sequence[TensorScan]) -> dict[str, dict[str, Any]]:
    """By name; norms beyond the floats are null, since JSON has no infinity."""
    found = {}
    for scan in scans:
        entry = asdict(scan)
        del entry["name"]
        for key in ("norm", "largest"):
            if entry[key] == float("inf"):
                entry[key] = None
        found[scan.name] = entry
    return found


def inspect_checkpoint(
    checkpoint: Checkpoint, scans: Sequence[TensorScan] | None = None
) -> Inspection:
    """Looks into a checkpoint's headers and small files, and at what a scan has found."""
    stacks = find_layer_stacks(checkpoint.tensors)
    parts = parts_of(checkpoint)
    facts = facts_of(checkpoint)
    found = [*header_suspicions(checkpoint, stacks, facts)]
    if scans is not None:
        found += scan_suspicions(checkpoint, stacks, scans)
    return Inspection(
        checkpoint=checkpoint,
        stacks=stacks,
        parts=parts,
        active=active_parameters(parts),
        facts=facts,
        shards=_shards(checkpoint),
        suspicions=sequence_of(found),
        scans=None if scans is None else tuple(scans),
    )


def _shards(checkpoint: Checkpoint) -> tuple[Shard, ...]:
    counts: dict[str, tuple[int, int]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.folder is None:
            tensors, size = counts.get(tensor.file, (0, 0))
            counts[tensor.file] = (tensors + 1, size + tensor.size_bytes)
    return tuple(
        Shard(file.path, file.size_bytes, *counts.get(file.path, (0, 0)))
        for file in checkpoint.files
    )
