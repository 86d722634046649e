"""How far an output is, from what its folder says; the process that writes it is not asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, brief
from .folder import is_unfinished
from .journal import JournalContents, read_journal
from .lock import Owner, lock_owner
from .manifest import MANIFEST_NAME, MERGE_PATH, count, read_document

State = Literal["complete", "running", "unfinished"]

RATE_SECONDS = 60.0
"""The rate is that of what was finished in the last minute of work."""


TRIES = 3
TRY_AGAIN_SECONDS = 0.02
"""A run may come to its end between two looks at its folder; that takes it some milliseconds."""


@dataclass(frozen=True, slots=True)
class OutputStatus:
    """What can be said of an output.

    recipe: path of its recipe. fingerprint: of its plan.
    part: name of the merge, where it is one that others of the recipe use.
    tensors, bytes: finished. total_tensors, total_bytes: of the whole output.
    owner: the process at work on it.
    sessions: how many processes have worked on it.
    began: when the first of them began, in seconds since 1970; None where nothing says so.
    last: when the last tensor was finished.
    bytes_per_second: written, lately; None where there is too little to tell.
    seconds_left: at that rate, while a process is at work.
    """

    state: State
    recipe: str
    fingerprint: str
    tensors: int
    total_tensors: int
    bytes: int
    total_bytes: int
    part: str | None = None
    owner: Owner | None = None
    sessions: int = 0
    began: float | None = None
    last: float | None = None
    bytes_per_second: float | None = None
    seconds_left: float | None = None


def output_status(output: Path | str) -> OutputStatus:
    """Looks at an output.

    Raises:
        InputError: it is no output of lazymerge, or its documents are damaged.
    """
    for _ in range(TRIES - 1):
        with suppress(InputError):
            return _status(Path(output))
        time.sleep(TRY_AGAIN_SECONDS)
    return _status(Path(output))


def _status(folder: Path) -> OutputStatus:
    unfinished = is_unfinished(folder)
    path = folder / (MERGE_PATH if unfinished else MANIFEST_NAME)
    if not path.is_file():
        raise InputError(f"{folder} is no output of lazymerge: it has no {MANIFEST_NAME}")
    document = read_document(path)
    try:
        facts = facts_of(document)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({brief(error)})") from error
    if not unfinished:
        return OutputStatus(
            state="complete",
            tensors=facts["total_tensors"],
            bytes=facts["total_bytes"],
            **facts,
        )
    try:
        journal = read_journal(folder)
    except OSError as error:
        raise InputError(f"cannot read the journal of {folder}: {error.strerror}") from error
    owner = lock_owner(folder)
    if owner is None and not is_unfinished(folder):  # it came to its end just now
        return _status(folder)
    done = sum(record.stop_exclusive - record.start for record in journal.finished.values())
    rate = _rate(journal, time.time() if owner else None)
    left = max(0, facts["total_bytes"] - done)
    return OutputStatus(
        state="running" if owner else "unfinished",
        tensors=len(journal.finished),
        bytes=done,
        owner=owner,
        sessions=len(journal.sessions),
        began=journal.sessions[0].at if journal.sessions else None,
        last=max((record.at for record in journal.finished.values()), default=None),
        bytes_per_second=rate,
        seconds_left=left / rate if owner and rate else None,
        **facts,
    )


def facts_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest, or the beginning of one, says of any output.

    Raises:
        AttributeError, KeyError, TypeError: it is damaged.
    """
    part = document["recipe"].get("part")
    facts = {
        "recipe": document["recipe"]["path"],
        "part": None if part is None else part["name"],
        "fingerprint": document["fingerprint"],
        "total_tensors": count(document["output"]["tensors"]),
        "total_bytes": count(document["output"]["bytes"]),
    }
    for key in ("recipe", "fingerprint", *([] if part is None else ["part"])):
        if not isinstance(facts[key], str):
            raise TypeError(f"{key} is no text")
    return facts


def _rate(journal: JournalContents, now: float | None) -> float | None:
    """Bytes per second of the last session, in its last minute; now: while it goes on."""
    if not journal.sessions:
        return None
    session = journal.sessions[-1]
    records = [record for record in journal.finished.values() if record.session == session]
    if not records:
        return None
    last = max(record.at for record in records)
    until = last if now is None else max(last, now)
    since = max(session.at, until - RATE_SECONDS)
    done = sum(record.stop_exclusive - record.start for record in records if record.at >= since)
    return done / (until - since) if done and until > since else None
