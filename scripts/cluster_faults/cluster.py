"""Schedulers and workers, as people start them."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from .bench import HERE
from .trial import DaskWorker, Process, Trial

WORKERS = 3

MEMORY_LIMIT = "1GiB"


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """A scheduler and workers, each a process of its own.

    nannies: workers have nannies, which start them anew.
    """

    def __init__(
        self,
        trial: Trial,
        *,
        protocol: str = "tls",
        nannies: bool = True,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        """prefix: of the scheduler's command."""
        self.trial = trial
        self.protocol = protocol
        self.nannies = nannies
        self.host = host
        self.port = free_port()
        self.address = f"{protocol}://{host}:{self.port}"
        self._prefix = prefix
        self._count = 0
        self.processes: dict[str, Process] = {}
        self.start_scheduler()

    def start_scheduler(self) -> None:
        """Starts the scheduler, at the same address each time."""
        options = ["--host", self.host, "--port", str(self.port), "--protocol", self.protocol]
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", *options]
        self.scheduler = self.trial.start("scheduler", [*self._prefix, *command, "--no-dashboard"])
        self.trial.say(f"a scheduler is started at {self.address}")

    def add_workers(
        self,
        count: int = WORKERS,
        *,
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        memory_limit: str = MEMORY_LIMIT,
        scheduler: str | None = None,
        nannies: bool | None = None,
    ) -> list[str]:
        """Starts workers; their names. prefix: of their command. scheduler: its address."""
        names = []
        nannies = self.nannies if nannies is None else nannies
        for _ in range(count):
            name = f"worker{self._count}"
            self._count += 1
            command = [
                *(sys.executable, "-m", "distributed.cli.dask_worker", scheduler or self.address),
                *("--name", name, "--nthreads", "1", "--no-dashboard"),
                *("--memory-limit", memory_limit),
                *("--local-directory", str(self.trial.folder / "scratch" / name)),
                *("--preload", str(HERE / "hooks.py")),
                "--nanny" if nannies else "--no-nanny",
                *options,
            ]
            self.processes[name] = self.trial.start(name, [*prefix, *command], environment)
            names.append(name)
        with_nannies = "with nannies" if nannies else "without nannies"
        self.trial.say(f"{', '.join(names)} {with_nannies} {'is' if count == 1 else 'are'} started")
        return names

    def wait_for(self, count: int) -> list[DaskWorker]:
        """Waits until so many workers are there."""
        return list(
            self.trial.until(
                lambda: (
                    (found := self.trial.workers()) if len(self.trial.workers()) >= count else []
                ),
                f"{count} workers",
            )
        )

    def kill(self, worker: DaskWorker, *, with_nanny: bool = False) -> None:
        """SIGKILL; with its nanny, which is killed first."""
        if with_nanny and self.nannies:
            nanny = self.processes[worker.name]
            self.trial.signal(nanny.pid, signal.SIGKILL, f"the nanny of {worker.name}")
        self.trial.signal(worker.pid, signal.SIGKILL, worker.name)


def made(trial: Trial, *, nannies: bool | None = None, protocol: str | None = None) -> Cluster:
    """A cluster with all its workers there. By default with nannies or without, at random."""
    cluster = Cluster(
        trial,
        protocol=protocol or trial.random.choice(["tls", "tls", "tcp"]),
        nannies=trial.random.random() < 0.5 if nannies is None else nannies,
    )
    cluster.add_workers()
    cluster.wait_for(WORKERS)
    return cluster
