"""`--log-json`: what happens in a run, for machines; one JSON object per line.

Every object has `time` (seconds since 1970) and `event`; docs/watching.md lists the events and what
else each has.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from ..engine.intermediates import Output
    from ..engine.plan import Plan
    from ..engine.report import RunReport

STDERR = "-"
"""In place of a file: the standard error stream, on which then nothing is displayed."""

PROGRESS_SECONDS = 1.0

LogJsonOption = Annotated[
    str | None,
    typer.Option(
        "--log-json",
        metavar="FILE",
        help="Append what happens to FILE, one JSON object per line; - is stderr.",
    ),
]


class JsonLog:
    """A log that is open. Safe to use from several threads."""

    seconds = PROGRESS_SECONDS
    """Between events that say how far the run is."""

    def __init__(self, stream: TextIO | FileIO) -> None:
        self._stream: TextIO | FileIO | None = stream
        self._lock = threading.Lock()

    def event(self, event: str, **facts: Any) -> None:
        """Writes a line. A log that cannot be written to any more does not end a merge."""
        with self._lock:
            line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
            try:
                if isinstance(self._stream, FileIO):
                    self._stream.write(f"{line}\n".encode())
                elif self._stream is not None:
                    print(line, file=self._stream, flush=True)
            except (OSError, ValueError):
                self._stream = None

    def planned(self, output: Output, suspicions: Sequence[Mapping[str, Any]]) -> None:
        """What is going to be made. suspicions: what looks wrong about it."""
        self.plan_made(output.plan, str(output.folder), output.name, suspicions)

    def plan_made(
        self,
        plan: Plan,
        place: str,
        part: str | None,
        suspicions: Sequence[Mapping[str, Any]],
    ) -> None:
        """The same. place: of the output. part: name of the merge, where it is one that others
        use."""
        self.event(
            "plan",
            output=place,
            recipe=plan.recipe.path,
            part=part,
            fingerprint=plan.fingerprint,
            tensors=len(plan.tensors),
            bytes_read=plan.bytes_read,
            bytes_written=plan.bytes_written,
            workers=plan.memory.workers,
            projected_bytes=plan.memory.projected_bytes,
            limit_bytes=plan.memory.limit_bytes,
            notices=list(plan.notices),
            suspicions=list(suspicions),
        )

    def done(self, report: RunReport) -> None:
        """What came of it."""
        from dataclasses import asdict

        self.event("done", **asdict(report))


@contextmanager
def json_log(wanted: str | None) -> Iterator[JsonLog | None]:
    """The log that is asked for, while the block runs; what ends it early is logged.

    Raises:
        InputError: the file cannot be opened.
    """
    if wanted is None:
        yield None
        return
    from ..errors import InputError, LazymergeError

    stream: TextIO | FileIO = sys.stderr
    if wanted != STDERR:
        from ..output.target import check_target

        if not Path(wanted).is_char_device() and not Path(wanted).is_fifo():
            check_target(Path(wanted), b'{"time": ', b'"event": ', option="--log-json")
        try:
            stream = FileIO(wanted, "a")  # without a buffer: a line is there when it is written
        except OSError as error:
            raise InputError(f"--log-json: cannot write {wanted}: {error.strerror}") from error
    log = JsonLog(stream)
    try:
        yield log
    except BaseException as error:
        code = error.exit_code if isinstance(error, LazymergeError) else 1
        is_interrupted = isinstance(error, KeyboardInterrupt)
        message = "interrupted" if is_interrupted else str(error)
        log.event("error", message=message, exit_code=130 if is_interrupted else code)
        raise
    finally:
        if isinstance(stream, FileIO):
            stream.close()
