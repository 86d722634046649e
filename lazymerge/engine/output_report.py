"""What can be said of a complete output afterwards: what the run took, and what the merge did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, brief
from ..output.folder import is_unfinished
from ..output.manifest import MANIFEST_NAME, STATISTICS_NAME, count, read_document
from .statistics import Statistics, load_statistics


@dataclass(frozen=True, slots=True)
class OutputReport:
    """What is known of a merge that is complete. Sizes in bytes.

    output: the folder. recipe: path of its recipe. method: of the merge.
    models: as the recipe writes them. tensors: how many were written.
    seconds, bytes_read, bytes_written, resumed_tensors: of the last run.
    measured_bytes: its peak resident set; projected_bytes: what the plan said; limit_bytes: what it
        might be.
    statistics: of every tensor; None where the merge was made without --stats.
    """

    output: str
    recipe: str
    method: str
    models: tuple[str, ...]
    tensors: int
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed_tensors: int
    measured_bytes: int
    projected_bytes: int
    limit_bytes: int
    statistics: Statistics | None


def report_of(output: Path | str) -> OutputReport:
    """Reads what a run has left in an output folder.

    Raises:
        InputError: it is no complete output, or its documents are damaged.
    """
    folder = Path(output)
    path = folder / MANIFEST_NAME
    if not path.is_file() or is_unfinished(folder):
        state = "is not complete" if is_unfinished(folder) else "is no output of lazymerge"
        raise InputError(f"{folder} {state}: there is no {MANIFEST_NAME} in it")
    document = read_document(path)
    has_statistics = (folder / STATISTICS_NAME).is_file()
    statistics = load_statistics(folder) if has_statistics else None
    if statistics is not None and statistics.fingerprint != document.get("fingerprint"):
        raise InputError(
            f"{folder / STATISTICS_NAME} is of another merge than the one that is there; remove it"
        )
    try:
        return _report(folder, document, statistics)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({brief(error)})") from error


def _report(
    folder: Path, document: Mapping[str, Any], statistics: Statistics | None
) -> OutputReport:
    run, memory, recipe = document["run"], document["memory"], document["recipe"]
    models = [model["reference"] for model in document["models"]]
    texts = [recipe["path"], recipe["merge_method"], *models]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("text expected")
    seconds = run["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
        raise TypeError("seconds expected")
    return OutputReport(
        output=str(folder.absolute()),
        recipe=recipe["path"],
        method=recipe["merge_method"],
        models=tuple(models),
        tensors=count(document["output"]["tensors"]),
        seconds=float(seconds),
        bytes_read=count(run["bytes_read"]),
        bytes_written=count(run["bytes_written"]),
        resumed_tensors=count(run["resumed_tensors"]),
        measured_bytes=count(memory["measured_bytes"]),
        projected_bytes=count(memory["projected_bytes"]),
        limit_bytes=count(memory["limit_bytes"]),
        statistics=statistics,
    )
