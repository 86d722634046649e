"""The JSON Schema of the document that `lazymerge plan --json` prints and `plan --save` writes.

What a saved plan is run from (recipe, models, output, tensors, graph) is in both; disk, suspicions,
estimate and intermediates are only in what is printed. A change that could break a program that
reads it changes PLAN_FORMAT; new members may come without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from ..checkpoint.tensor import DTYPES
from ..engine.baseline import Libraries
from ..engine.blocks import DeviceClass
from ..engine.execution import Kernels, ReadMode
from ..engine.memory import MemoryPlan, VramPlan
from ..engine.plan import PLAN_FORMAT
from .estimate import Estimate
from .measurement import Measured, MeasuredKind

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
DTYPE: Schema = {"enum": list(DTYPES)}
SHAPE: Schema = {"type": "array", "items": COUNT}
BYTES: Schema = {
    "description": "First byte and the byte after the last, from the start of the file.",
    "type": "array",
    "items": COUNT,
    "minItems": 2,
    "maxItems": 2,
}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
VALUE: Schema = {"type": ["string", "number", "boolean", "null"]}


def plan_schema() -> Schema:
    """The schema (draft 2020-12) of format PLAN_FORMAT."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Plan of lazymerge, format {PLAN_FORMAT}",
        **_object(
            {
                "format": {"const": PLAN_FORMAT},
                "lazymerge": _said(TEXT, "The version that made it."),
                "torch": _said(TEXT, "The version of torch, which last bits may depend on."),
                "fingerprint": _said(
                    DIGEST, "Equal fingerprints: equal bytes of output, file by file."
                ),
                "recipe": _recipe(),
                "totals": _totals(),
                "memory": _memory(),
                "read_mode": {"enum": list(get_args(ReadMode))},
                "kernels": {"enum": list(get_args(Kernels))},
                "device": {"enum": list(get_args(DeviceClass))},
                "notices": {"type": "array", "items": TEXT},
                "models": {"type": "array", "items": _model()},
                "output": _output(),
                "tensors": {"type": "array", "items": _tensor()},
                "graph": _said(
                    {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    "Operations, inputs before users. Numbers in them are places in this list.",
                ),
            },
            {
                "streams": _said(
                    {"type": "boolean"}, "Models of the Hub are not downloaded but streamed."
                ),
                "whole_files": _said(
                    {"type": "boolean"}, "Of servers without ranges, files are read whole."
                ),
                "downloads": _said(
                    {
                        "type": "array",
                        "items": _object({"model": TEXT, "file": TEXT, "size_bytes": COUNT}),
                    },
                    "Files of the Hub that are not in its cache, and are needed to run.",
                ),
                "suspicions": {"type": "array", "items": _suspicion()},
                "disk": _object({"needed_bytes": COUNT, "free_bytes": COUNT}),
                "cache_disk": _said(
                    _object({"needed_bytes": COUNT, "free_bytes": COUNT}),
                    "The same of the cache (--cache): by how much it may grow.",
                ),
                "estimate": _estimate(),
                "intermediates": _said(
                    {"type": "array", "items": {"type": "object"}},
                    "Merges that are written before it (--write-intermediate).",
                ),
            },
        ),
        "$defs": {"node": {"oneOf": [_read(), _computed(), _write()]}},
    }


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def _said(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description}


def _map_of(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _recipe() -> Schema:
    return _object(
        {
            "path": TEXT,
            "merge_method": TEXT,
            "base_model": _or_null(TEXT),
            "seed": {"type": "integer"},
            "text": _said(TEXT, "The recipe's YAML, letter by letter."),
        },
        {"part": _object({"name": TEXT, "seeds": _map_of({"type": "integer"})})},
    )


def _totals() -> Schema:
    by_passes = {**_map_of(COUNT), "propertyNames": {"pattern": "^[0-9]+$"}}
    return _object(
        {
            "tensors": COUNT,
            "parameters": COUNT,
            "operations": _said(_map_of(COUNT), "How many of each kind."),
            "passes": _said(by_passes, "Output tensors by number of passes."),
            "bytes_read": _said(COUNT, "In all passes."),
            "bytes_written": COUNT,
            "header_bytes_read": _said(COUNT, "What planning has read."),
            "bytes_to_download": COUNT,
            "bytes_to_fetch": _said(COUNT, "Of inputs that are not on the local disk."),
        },
        {"bytes_cached": _said(COUNT, "How much of that the cache has (--cache).")},
    )


def _memory() -> Schema:
    vram = _of_dataclass(VramPlan, {"hungriest": TEXT, "limit_bytes": _or_null(COUNT)})
    special = {
        "libraries": {"enum": list(get_args(Libraries))},
        "hungriest": _said(TEXT, "The tensor that asks for the largest buffers."),
        "vram": _or_null(vram),
    }
    schema = _of_dataclass(MemoryPlan, special)
    schema["properties"]["projected_bytes"] = _said(COUNT, "The peak resident set, as planned.")
    schema["required"].append("projected_bytes")
    return schema


def _of_dataclass(kind: type, special: Mapping[str, Schema]) -> Schema:
    """An object with the fields of a dataclass: counts, but for special ones."""
    assert is_dataclass(kind)
    return _object({field.name: special.get(field.name, COUNT) for field in fields(kind)})


def _model() -> Schema:
    file = _object(
        {
            "path": TEXT,
            "size_bytes": COUNT,
            "modified_ns": _or_null({"type": "integer"}),
            "header_digest": TEXT,
        },
        {"pin": _said(TEXT, "Of a file at an address: its version, an ETag or the like.")},
    )
    hub = _object({"repository": TEXT, "commit": TEXT})
    return _object(
        {
            "reference": TEXT,
            "folder": TEXT,
            "parameters": COUNT,
            "size_bytes": COUNT,
            "dtypes": _said(_map_of(COUNT), "Bytes by dtype."),
            "files": {"type": "array", "items": file},
        },
        {"hub": hub, "adapter": {"type": "object"}},
    )


def _output() -> Schema:
    tensor = _object({"dtype": DTYPE, "shape": SHAPE, "bytes": BYTES})
    shard = _object({"file": TEXT, "size_bytes": COUNT, "tensors": _map_of(tensor)})
    return _object(
        {
            "max_shard_bytes": COUNT,
            "shards": {"type": "array", "items": shard},
            "config": _said({"type": ["object", "null"]}, "The output's config.json."),
            "sidecar_folder": TEXT,
            "sidecars": {"type": "array", "items": TEXT},
        },
        {"tokenizer": {"type": "object"}},
    )


def _tensor() -> Schema:
    return _object(
        {
            "name": TEXT,
            "method": TEXT,
            "parameters": _map_of(VALUE),
            "models": _said(_map_of(_map_of(VALUE)), "Parameters by model."),
        }
    )


def _read() -> Schema:
    return _object(
        {
            "kind": {"const": "read"},
            "folder": TEXT,
            "file": TEXT,
            "tensor": TEXT,
            "dtype": DTYPE,
            "shape": SHAPE,
            "bytes": BYTES,
        },
        {
            "row_count": COUNT,
            "rows": _said(TEXT, "Which row stands where, compressed; as they are without it."),
        },
    )


def _computed() -> Schema:
    places = {"type": "array", "items": COUNT}
    return _object(
        {
            "kind": {"enum": ["reduce", "apply"]},
            "operation": TEXT,
            "parameters": {"type": "object"},
            "inputs": _said(places, "Whose blocks it takes."),
            "statistics": _said(places, "Whose finished results it uses."),
            "shape": SHAPE,
            "working_dtype": DTYPE,
        }
    )


def _write() -> Schema:
    return _object(
        {
            "kind": {"const": "write"},
            "tensor": TEXT,
            "dtype": DTYPE,
            "shape": SHAPE,
            "source": COUNT,
        }
    )


def _suspicion() -> Schema:
    severity = {"enum": ["mistake", "note"]}
    return _object({"kind": TEXT, "message": TEXT, "severity": severity})


def _estimate() -> Schema:
    seconds = _or_null(NUMBER)
    kind = _of_dataclass(MeasuredKind, {"tensor": TEXT, "bytes_per_s": NUMBER})
    rate, basis = _or_null(NUMBER), _or_null(TEXT)
    measured = _of_dataclass(
        Measured,
        {
            "kinds": {"type": "array", "items": kind},
            "cached_share": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
            "reading_rate": _said(rate, "Bytes per second; null: not known."),
            "reading_basis": _said(basis, "The file that was read for it."),
            "writing_rate": rate,
            "writing_basis": {"enum": ["written", "read", None]},
            "seconds": NUMBER,
            "network_rate": _said(rate, "Bytes per second; null: not known, or not needed."),
        },
    )
    times = ("computing_seconds", "reading_seconds", "writing_seconds", "network_seconds")
    schema = _of_dataclass(Estimate, {**dict.fromkeys(times, seconds), "measured": measured})
    bounds = {"least_seconds": seconds, "most_seconds": seconds}
    schema["properties"] |= bounds
    schema["required"] += bounds
    return _said(schema, "How long a run takes here; with --measure.")
