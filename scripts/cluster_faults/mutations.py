"""Mistakes that can be built into the processes of the matrix, to see whether it notices them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "LAZYMERGE_MUTATION"


def mutate_worker(names: dict[str, Any]) -> None:
    """names: of lazymerge.cluster.worker."""
    mutation = IN_WORKERS.get(os.environ.get(VARIABLE, ""))
    if mutation is not None:
        mutation(names)


def mutate_client() -> None:
    """In the process that runs the command."""
    mutation = IN_CLIENTS.get(os.environ.get(VARIABLE, ""))
    if mutation is not None:
        mutation()


def _last_tensor_unwritten(names: dict[str, Any]) -> None:
    range_writer: Any = names["RangeWriter"]

    class Forgetful(range_writer):  # type: ignore[misc]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._last = given[3][-1].name
            self._nowhere = os.open(os.devnull, os.O_WRONLY)

        def write(self, tensor: str, data: memoryview, offset: int) -> None:
            if tensor != self._last:
                super().write(tensor, data, offset)

        def place(self, tensor: str) -> tuple[int, int]:
            descriptor, start = super().place(tensor)
            return (self._nowhere if tensor == self._last else descriptor), start

    names["RangeWriter"] = Forgetful


def _token_not_looked_for(names: dict[str, Any]) -> None:
    from lazymerge.cluster import destination

    destination.token_path = lambda folder, token: Path("/")


def _versions_are_believed(names: dict[str, Any]) -> None:
    names["_check_versions"] = lambda wanted: None


def _dead_workers_are_believed() -> None:
    from lazymerge.cluster.coordinator import Coordinator
    from lazymerge.engine.streaming import FinishedTensor

    def died(self: Any, attempt: Any) -> None:
        if attempt.number not in self._made:
            self._made.add(attempt.number)
            for name in self._division.names(attempt.number):
                self._told.finished(FinishedTensor(name, "0" * 32, False, array("d")))

    Coordinator._died = died  # type: ignore[method-assign]


def _silence_is_waited_for() -> None:
    from lazymerge.cluster import coordinator

    coordinator.SILENT_SECONDS = coordinator.REPEAT_SECONDS = 1e9


def _token_is_kept() -> None:
    from lazymerge.cluster import workforce
    from lazymerge.output.folder import OWN_FOLDER

    @contextmanager
    def shown(folder: Path, token: str) -> Iterator[None]:
        (folder / OWN_FOLDER / f"cluster-{token}").touch()
        (folder / f"cluster-{token}").touch()
        yield

    names: dict[str, Any] = vars(workforce)
    names["shown_in_folder"] = shown


def _lock_is_not_taken() -> None:
    from lazymerge.output import lock

    lock._wait_for_lock = lambda descriptor: True
    lock._is_alive = lambda owner, descriptor, is_free: False
    lock.OutputLock.check = lambda self: None  # type: ignore[method-assign]


def _local_cluster_is_left() -> None:
    import subprocess
    import sys

    # what a worker process that nobody ended would look like
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)


def _versions_are_not_compared() -> None:
    from lazymerge.cluster import workforce

    names: dict[str, Any] = vars(workforce)
    names["check_versions"] = lambda client, wanted: []


def _failures_end_the_run() -> None:
    from lazymerge.cluster import coordinator

    coordinator.MOST_FAILURES = coordinator.MOST_DEATHS = 1


def _scheduler_is_not_waited_for() -> None:
    from lazymerge.cluster import coordinator

    coordinator.SCHEDULER_SECONDS = 3.0


IN_WORKERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "last-tensor-unwritten": _last_tensor_unwritten,
    "token-not-looked-for": _token_not_looked_for,
    "versions-not-compared": _versions_are_believed,
}

IN_CLIENTS: dict[str, Callable[[], None]] = {
    "dead-workers-believed": _dead_workers_are_believed,
    "silence-waited-for": _silence_is_waited_for,
    "token-kept": _token_is_kept,
    "lock-not-taken": _lock_is_not_taken,
    "process-left": _local_cluster_is_left,
    "versions-not-compared": _versions_are_not_compared,
    "one-failure-is-the-end": _failures_end_the_run,
    "scheduler-not-waited-for": _scheduler_is_not_waited_for,
}

MUTATIONS = sorted({*IN_WORKERS, *IN_CLIENTS})
