"""All kinds of trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import coordinators, networks, unfit, workers
from .trial import Trial


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table. times: how often it is tried by default."""

    words: str
    make: Callable[[Trial], None]
    times: int = 2


KINDS: dict[str, Kind] = {
    "killed": Kind("SIGKILL of a worker", workers.killed, 3),
    "nanny": Kind("SIGKILL of a nanny, with its worker or without", workers.nanny),
    "row": Kind("SIGKILL of workers one after the other", workers.in_a_row),
    "all": Kind("SIGKILL of all workers; others join later", workers.all_at_once),
    "half": Kind("SIGKILL of a worker when a tensor is half written", workers.half_written, 3),
    "untold": Kind("SIGKILL of a worker that has written all and told nothing", workers.untold),
    "hangs": Kind("SIGSTOP of a worker, for good", workers.hangs),
    "wakes": Kind("SIGSTOP of a worker, SIGCONT while the run goes on", workers.wakes),
    "late": Kind("SIGSTOP of a worker, SIGCONT when the run is complete", workers.writes_late),
    "overwritten-opening": Kind(
        "SIGSTOP before it opens the shard, SIGCONT when another merge is half done in its place",
        workers.overwritten_opening,
    ),
    "overwritten-half": Kind(
        "SIGSTOP when a tensor is half written, SIGCONT when another merge is in its place",
        workers.overwritten_half,
    ),
    "joins": Kind("workers that come one by one, the first late", coordinators.joins_late),
    "scheduler-anew": Kind(
        "SIGKILL of the scheduler, started anew at its address", coordinators.scheduler_anew
    ),
    "scheduler-gone": Kind("SIGKILL of the scheduler, for good", coordinators.scheduler_gone),
    "scheduler-stops": Kind(
        "SIGSTOP of the scheduler, SIGCONT up to 12 s later", coordinators.scheduler_stops
    ),
    "scheduler-hangs": Kind("SIGSTOP of the scheduler, for good", coordinators.scheduler_hangs, 1),
    "client": Kind(
        "SIGKILL of the command, resumed on the same cluster", coordinators.client_killed
    ),
    "interrupted": Kind(
        "SIGINT, SIGTERM, SIGHUP to the command, resumed on the same cluster",
        coordinators.interrupted,
    ),
    "two": Kind("a second command on the same output", coordinators.two_commands),
    "local-worker": Kind("`local:3`: SIGKILL of a worker", coordinators.local_worker),
    "local-client": Kind("`local:3`: SIGKILL of the command", coordinators.local_killed),
    "local-interrupted": Kind("`local:3`: Ctrl-C", coordinators.local_interrupted),
    "many": Kind("six of these, one after the other", coordinators.many_harms),
    "cut-off": Kind("a worker's link goes down, for good", networks.cut_off),
    "cut-off-back": Kind(
        "links go down, and come back 1 to 12 s later", networks.cut_off_for_a_while
    ),
    "cut-off-overwritten": Kind(
        "a link goes down, and comes back when another merge is in its place",
        networks.cut_off_and_overwritten,
    ),
    "slow": Kind("a slow network with losses, and SIGKILL of a worker", networks.slow),
    "no-input": Kind("a model is not there on one worker", unfit.no_input),
    "no-output": Kind("the output is not there on one worker", unfit.no_output),
    "disk-full": Kind("ENOSPC, EDQUOT, EIO from one worker's writes", unfit.disk_full),
    "scratch-full": Kind("Dask's disk is full on one worker", unfit.scratch_full, 1),
    "version": Kind("another version of lazymerge on one worker", unfit.other_version),
    "no-lazymerge": Kind("no lazymerge on one worker", unfit.no_lazymerge),
    "memory": Kind("too little memory on one worker, or on all", unfit.little_memory),
    "no-plugin": Kind("a plugin is not there on one worker", unfit.no_plugin, 1),
}
