"""All kinds of trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import workers
from .trial import Trial


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table. times: how often it is tried by default."""

    words: str
    make: Callable[[Trial], None]
    times: int = 2


KINDS: dict[str, Kind] = {
    "killed": Kind("SIGKILL of a worker", workers.killed, 4),
    "nanny": Kind("SIGKILL of a nanny, with its worker or without", workers.nanny, 3),
    "row": Kind("SIGKILL of workers one after the other", workers.in_a_row, 3),
    "all": Kind("SIGKILL of all workers; others join later", workers.all_at_once, 3),
    "half": Kind("SIGKILL of a worker when a tensor is half written", workers.half_written, 3),
    "untold": Kind("SIGKILL of a worker that has written all and told nothing", workers.untold),
    "hangs": Kind("SIGSTOP of a worker, for good", workers.hangs, 3),
    "wakes": Kind("SIGSTOP of a worker, SIGCONT while the run goes on", workers.wakes, 3),
    "late": Kind("SIGSTOP, SIGCONT when the run is complete", workers.writes_late, 3),
    "overwritten-opening": Kind(
        "SIGSTOP before the shard is opened, SIGCONT when another merge is in its place",
        workers.overwritten_at("opening"),
    ),
    "overwritten-half": Kind(
        "SIGSTOP when a tensor is half written, SIGCONT when another merge is in its place",
        workers.overwritten_at("half"),
    ),
}
