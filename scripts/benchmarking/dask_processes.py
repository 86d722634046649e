"""A Dask scheduler on this machine in one process, and any number of workers in another.

    python -m benchmarking.dask_processes scheduler FILE     writes its address into FILE
    python -m benchmarking.dask_processes workers ADDRESS N

Certificates come from the environment, as Dask reads it. Many workers share a process, for what is
measured is those who give them work; a worker is the real one, with its heartbeats and its
connections.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from .processes import SCRIPTS, BenchError, lazymerge_environment

START_SECONDS = 120.0
"""For 256 workers to register, on two processors."""


def write_certificates(folder: Path) -> dict[str, str]:
    """Makes certificates that end with the run; returns the environment that names them to Dask."""
    from distributed.security import Security

    made = Security.temporary()
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    key.touch(mode=0o600)
    key.write_text(made.tls_scheduler_key)
    certificate.write_text(made.tls_ca_file)
    environment = {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(certificate)}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        environment[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"] = str(key)
        environment[f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT"] = str(certificate)
    return environment


@contextmanager
def dask_process(arguments: list[str], certificates: dict[str, str], log: Path) -> Iterator[int]:
    """One of this module's processes while the block runs; gives its id."""
    environment = lazymerge_environment() | certificates
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), environment["PYTHONPATH"]])
    environment["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"] = "False"
    command = [sys.executable, "-m", "benchmarking.dask_processes", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def address_in(file: Path) -> str:
    """What the scheduler's process has written.

    Raises:
        BenchError: nothing, for a long time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(0.05)
    raise BenchError("the Dask scheduler does not start")


async def _schedule(file: Path) -> None:
    from distributed import Scheduler

    async with Scheduler(protocol="tls", host="127.0.0.1", port=0, dashboard=False) as scheduler:
        file.write_text(scheduler.address + "\n")
        await scheduler.finished()


async def _work(address: str, count: int) -> None:
    from distributed import Worker

    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                Worker(address, nthreads=1, memory_limit=None, dashboard=False, name=number)
            )
            for number in range(count)
        ]
        await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    if sys.argv[1] == "scheduler":
        asyncio.run(_schedule(Path(sys.argv[2])))
    else:
        asyncio.run(_work(sys.argv[2], int(sys.argv[3])))
