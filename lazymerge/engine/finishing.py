"""What a run writes when all tensors are there: the small files, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.tensor import DTYPES
from ..graph.node import Write
from ..methods import METHODS
from ..output.card import model_card
from ..output.layout import INDEX_NAME, index_json
from ..output.manifest import CHECKSUM, write_text
from ..output.sidecars import copy_sidecars
from ..version import __version__
from .blocks import elements_per_block
from .plan import Plan
from .scheduler import SPAN_BLOCKS
from .stages import row_elements

if TYPE_CHECKING:
    from .report import RunReport


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


def write_beside_weights(plan: Plan, folder: Path, *, fsync: bool) -> None:
    """Writes index, config, tokenizer files and model card."""
    if len(plan.shards) > 1:
        write_text(folder / INDEX_NAME, index_json(plan.shards), fsync=fsync)
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "config.json", text, fsync=fsync)
    copy_sidecars(plan.sidecar_folder, plan.sidecars, folder, fsync=fsync)
    signature = METHODS[plan.recipe.merge_method].signature
    card = model_card(
        folder.absolute().name,
        plan.recipe.text,
        signature.name,
        signature.summary,
        signature.source,
        list(plan.checkpoints),
        plan.recipe.base_model,
        __version__,
    )
    write_text(folder / "README.md", card, fsync=fsync)


def manifest(
    plan: Plan, beginning: Mapping[str, Any], checksums: Mapping[str, str], report: RunReport
) -> dict[str, Any]:
    """The manifest of a complete output.

    beginning: its first half. checksums: of all tensors, by name.
    """
    writes = {write.name: write for write in plan.graph.writes}
    return {
        **{key: value for key, value in beginning.items() if key != "format"},
        "memory": {
            **plan.memory.as_dict(),
            "measured_bytes": report.measured_bytes,
            "measured_vram_bytes": report.measured_vram_bytes,
        },
        "nonfinite": list(report.nonfinite),
        "device_name": report.device,
        "run": {
            "seconds": round(report.seconds, 3),
            "bytes_read": report.bytes_read,
            "bytes_written": report.bytes_written,
            "resumed_tensors": report.resumed_tensors,
        },
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
