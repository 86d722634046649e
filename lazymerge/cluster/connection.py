"""Reaching a cluster: one that is there, by its scheduler's address, or one of this machine's own.

    tls://host:8786, tcp://host:8786     a scheduler, however it was started
    local:4                              four worker processes here, gone at the end of the run

Certificates are Dask's own configuration (distributed.comm.tls in its files, or
DASK_DISTRIBUTED__COMM__TLS__CA_FILE and the like), and nothing here sees them. Local clusters make
theirs for the run: whoever reaches a scheduler's port can have workers run anything, and on a
machine that others use too, they reach it.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from ..engine.memory import default_workers
from ..errors import InputError, LazymergeError

if TYPE_CHECKING:
    from distributed import Client

LOCAL = re.compile(r"local:(\d{1,4})")
ADDRESS = re.compile(r"(tls|tcp)://[^\s/@]+:\d{1,5}")

CONNECT_SECONDS = 30.0
"""For a scheduler to answer; Dask's own default."""

ANSWER_SECONDS = 10.0
"""For a worker to say which versions it has: the first to ask has it import lazymerge, which takes
a second or two where the disk is slow."""

CLOSE_SECONDS = 10.0
"""For the end of a cluster of this machine's own."""

GPU = "GPU"
"""The Dask resource that workers with an accelerator have: `dask worker … --resources "GPU=1"`."""


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """What --cluster says. local_workers: 0 for a scheduler that is there."""

    text: str
    local_workers: int = 0

    @property
    def is_open(self) -> bool:
        """Whether traffic is neither encrypted nor kept to this machine."""
        if self.local_workers or not self.text.startswith("tcp://"):
            return False
        host = self.text.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        with suppress(ValueError):
            return not ip_address(host).is_loopback
        return host != "localhost"


def parse_address(text: str) -> ClusterAddress:
    """Raises:
    InputError: it is no address of a cluster.
    """
    match = LOCAL.fullmatch(text)
    if match and int(match[1]):
        return ClusterAddress(text, int(match[1]))
    if not ADDRESS.fullmatch(text):
        raise InputError(
            f"--cluster {text[:100]!r}: give local:N for N workers on this machine, or the address "
            "of a Dask scheduler, tls://host:8786 or tcp://host:8786"
        )
    return ClusterAddress(text)


@contextmanager
def connected(address: ClusterAddress, *, threads: int | None, device: str) -> Iterator[Client]:
    """A client of the cluster.

    threads: of each worker of a local cluster; None: this machine's processors are shared out.
    device: the class of device that is to compute.

    Raises:
        InputError: Dask is not installed, it has no certificates, or a local cluster cannot have so
            many GPUs.
        LazymergeError: no scheduler answers, or the workers of a local cluster do not start.
    """
    try:
        import distributed
        import distributed.security
    except ImportError as error:
        raise InputError(
            f"--cluster takes Dask, which is not installed ({error}). Install it: pip install "
            "'lazymerge[dask]'"
        ) from None
    if not address.local_workers:
        with _client(distributed, address.text) as client:
            yield client
        return
    if device != "cpu" and address.local_workers > 1:
        raise InputError(
            f"--cluster {address.text} --device {device}: a local cluster has one worker for its "
            "GPU, local:1; for several start workers with dask-cuda, and give their scheduler"
        )
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(
                _local_cluster(distributed, address.local_workers, threads, device)
            )
            client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        except (OSError, RuntimeError, TimeoutError) as error:
            raise LazymergeError(
                f"the workers of {address.text} do not start ({line_of(error).rstrip('.')}). A "
                "Python program that has them started needs if __name__ == '__main__': around what "
                "it does, for each of them loads it"
            ) from error
        yield client


@contextmanager
def _local_cluster(
    distributed: Any, workers: int, threads: int | None, device: str
) -> Iterator[Any]:
    """A cluster of this machine's own, which nobody else can use and of which nothing stays."""
    import dask
    from distributed.utils import LoopRunner

    scratch = tempfile.mkdtemp(prefix="lazymerge-dask-")
    settings = {
        "temporary-directory": scratch,
        "distributed.scheduler.http.routes": [],  # a port of its own cannot be had without
        "distributed.worker.http.routes": [],
    }
    runner = LoopRunner()
    _start_resource_tracker()
    with _ctrl_c_for_this_thread():
        runner.start()
    try:
        with (
            dask.config.set(settings),
            distributed.LocalCluster(
                loop=runner.loop,
                n_workers=workers,
                threads_per_worker=threads or max(1, default_workers() // workers),
                processes=True,
                memory_limit=None,  # the engine keeps to its own
                security=distributed.security.Security.temporary(),
                protocol="tls://",
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                local_directory=scratch,
                silence_logs=50,
                env={"PYTHONWARNINGS": "ignore"},
                resources={GPU: 1} if device != "cpu" else None,
            ) as cluster,
        ):
            yield cluster
    finally:
        runner.stop()
        shutil.rmtree(scratch, ignore_errors=True)


def _start_resource_tracker() -> None:
    """Of multiprocessing: when it is started later, it unblocks signals that are blocked here. It
    clears up after a command that was interrupted while its workers were being started, and would
    say so on the terminal."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


@contextmanager
def _ctrl_c_for_this_thread() -> Iterator[None]:
    """Threads that are started in the block, and the processes that they start, do not get SIGINT:
    a terminal sends it to all processes of a command, and each would die with a traceback before
    the command has them end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_certificates(distributed: Any, address: str) -> None:
    """Raises:
    InputError: there are none for an address that takes some.
    """
    variables = "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …__TLS__CLIENT__CERT and …__TLS__CLIENT__KEY"
    try:
        security = distributed.security.Security()
        context = security.get_connection_args("client")["ssl_context"]
    except OSError as error:  # errors of ssl are some too
        raise InputError(
            f"the certificates for {address} cannot be read: {line_of(error)}. Dask finds them by "
            f"{variables}, or by distributed.comm.tls in its configuration"
        ) from error
    if context is None:
        raise InputError(
            f"{address} takes certificates. Dask finds them by {variables}, or by "
            "distributed.comm.tls in its configuration"
        )


@contextmanager
def _client(distributed: Any, address: str) -> Iterator[Client]:
    if address.startswith("tls://"):
        _check_certificates(distributed, address)
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise LazymergeError(f"no Dask scheduler answers at {address}: {line_of(error)}") from error
    try:
        yield client
    finally:
        with suppress(Exception):  # it may be gone
            client.close(timeout=2)


def line_of(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def check_versions(client: Client, wanted: Mapping[str, str]) -> list[str]:
    """Compares the packages that the workers compute with to this process's.

    Returns the addresses of workers that do not answer. They are no reason to wait: one that hangs
    has taken nothing else with it. Every worker compares again when it is given something.

    Raises:
        InputError: some differ; all of them are named.
        OSError: the scheduler does not answer.
    """
    found = client.sync(_asked, client, [*workers_of(client, "cpu")])
    problems = []
    for worker, there in sorted(found.items()):
        if isinstance(there, Exception):
            problems.append(f"{worker} cannot say which lazymerge it has: {line_of(there)}")
            continue
        for package, here in wanted.items():
            if there is not None and there.get(package) != here:
                has = there.get(package, "(none)")
                problems.append(f"{worker} has {package} {has}, here it is {here}")
    if problems:
        raise InputError(
            "\n".join(problems[:10])
            + "\nthe output's bytes depend on these versions: install the same on all machines"
        )
    return sorted(worker for worker, there in found.items() if there is None)


async def _asked(client: Client, workers: Sequence[str]) -> dict[str, Any]:
    """What each worker says of its versions; None: nothing."""
    from .worker import versions_here

    async def ask(worker: str) -> Any:
        answers = await client.run(versions_here, workers=[worker], on_error="return")
        return answers.get(worker)

    asked = {worker: asyncio.ensure_future(ask(worker)) for worker in workers}
    if asked:
        await asyncio.wait(asked.values(), timeout=ANSWER_SECONDS)
    answers: dict[str, Any] = {}
    for worker, answer in asked.items():
        is_told = answer.done() and not answer.cancelled()
        if not is_told:
            answer.cancel()
            answers[worker] = None
        else:
            told = answer.exception() or answer.result()
            is_unreachable = isinstance(told, OSError | TimeoutError)
            answers[worker] = None if is_unreachable else told
    return answers


def workers_of(client: Client, device: str) -> dict[str, int]:
    """The workers that can compute, by address, with their threads.

    Raises:
        OSError: the scheduler does not answer.
    """
    return {address: int(facts["nthreads"]) for address, facts in _facts(client, device).items()}


def paused_and_others(client: Client, device: str) -> tuple[frozenset[str], dict[str, int]]:
    """The workers that begin nothing, for Dask finds that they hold too much memory; and all, as
    workers_of.

    Raises:
        OSError: the scheduler does not answer.
    """
    found = _facts(client, device)
    paused = frozenset(worker for worker, facts in found.items() if facts["status"] == "paused")
    return paused, {address: int(facts["nthreads"]) for address, facts in found.items()}


def _facts(client: Client, device: str) -> dict[str, Any]:
    """What the scheduler knows of the workers that can compute, by address."""
    found = client.sync(_identity, client)["workers"]
    return {
        address: facts
        for address, facts in found.items()
        if device == "cpu" or facts["resources"].get(GPU, 0) >= 1
    }


async def _identity(client: Any) -> Any:
    """What the scheduler says of itself. Not Client.scheduler_info: what that returns may be what
    the client asks for every two seconds of its own accord, which has no workers in it."""
    return await client.scheduler.identity(n_workers=-1)
