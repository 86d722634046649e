"""lazymerge.json: where a merged model came from, and what its bytes are.

It is the last file a run writes: a folder that has it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST_NAME = "lazymerge.json"
MANIFEST_FORMAT = 1

CHECKSUM = "xxh3_128 of the xxh3_128 digests of the tensor's spans"
"""How a tensor's checksum is formed: spans, runs of as many elements as the manifest says, may be
finished in any order."""


def write_manifest(output: Path, contents: Mapping[str, Any]) -> None:
    """Writes the manifest under its final name in one step."""
    document = {"format": MANIFEST_FORMAT, **contents}
    write_text(output / MANIFEST_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a small file so that it has either its old contents or all of the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
