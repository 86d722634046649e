"""Harm to schedulers, to the command that runs a merge, and to clusters of this machine alone."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from lazymerge.cluster.coordinator import SCHEDULER_SECONDS
from lazymerge.output.lock import LOCK_PATH

from .cluster import WORKERS, Cluster, made
from .trial import Process, Trial

INTERRUPTED = 130

ENDS_SECONDS = 5.0
"""From Ctrl-C to the end of the command, cluster of its own included."""

LINGERS_SECONDS = 2.0
"""After the end of a command: multiprocessing's resource tracker ends when it sees that."""

GONE_SECONDS = 15.0
"""From the end of a command that was killed to that of its cluster's last process."""


def scheduler_anew(trial: Trial) -> None:
    """The scheduler is killed, and started anew at the same address a little later; workers, too,
    if they have ended with it. The run goes on, or ends with advice and is resumed."""
    cluster = made(trial, nannies=True)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    _kill_scheduler(trial, cluster)
    time.sleep(trial.random.uniform(0.0, 5.0))
    cluster.start_scheduler()
    cluster.add_workers(2)
    ended = client.ended()
    trial.expect(ended, 0, 1)
    if ended.code:
        trial.expect_advice(ended)
        trial.expect(trial.resume("--cluster", cluster.address).ended(), 0)
    trial.expect_equal()


def _kill_scheduler(trial: Trial, cluster: Cluster) -> None:
    trial.signal(cluster.scheduler.pid, signal.SIGKILL, "the scheduler")
    cluster.scheduler.popen.wait()


def scheduler_gone(trial: Trial) -> None:
    """The scheduler is killed for good. The command says so within about a minute; the output is
    resumed on another cluster, or without one, while old workers may be at it."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    _kill_scheduler(trial, cluster)
    _ends_in_time(trial, client)
    _resume_anywhere(trial, trial.random.choice(["none", "local", "new"]))
    trial.expect_equal()


def _ends_in_time(trial: Trial, client: Process) -> None:
    began = time.monotonic()
    ended = client.ended()
    seconds = time.monotonic() - began
    if ended.code == 0:  # what was missing came before the scheduler's end
        trial.expect(ended, 0)
        return
    trial.expect(ended, 1, says="scheduler")
    trial.expect_advice(ended)
    if seconds > SCHEDULER_SECONDS + 15:
        trial.complain(f"took {seconds:.0f} s to end")


def _resume_anywhere(trial: Trial, where: str) -> None:
    if where == "none":
        process = trial.resume()
    elif where == "local":
        process = trial.resume("--cluster", "local:2")
    else:
        process = trial.resume("--cluster", made(trial).address)
    trial.expect(process.ended(), 0)


def scheduler_stops(trial: Trial) -> None:
    """The scheduler is stopped, and goes on some seconds later."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    trial.signal(cluster.scheduler.pid, signal.SIGSTOP, "the scheduler")
    time.sleep(trial.random.uniform(2.0, 12.0))
    trial.signal(cluster.scheduler.pid, signal.SIGCONT, "the scheduler")
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def scheduler_hangs(trial: Trial) -> None:
    """The scheduler is stopped for good. As when it is killed."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    trial.signal(cluster.scheduler.pid, signal.SIGSTOP, "the scheduler")
    _ends_in_time(trial, client)
    _resume_anywhere(trial, "none")
    trial.expect_equal()


def client_killed(trial: Trial) -> None:
    """The command is killed, once or twice, and resumed on the same cluster while workers may be
    writing for it still."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    for _ in range(trial.random.randint(1, 2)):
        trial.was_struck |= trial.when(trial.progress() + trial.random.uniform(0.05, 0.4), client)
        trial.signal(client.pid, signal.SIGKILL, "the command")
        trial.expect(client.ended(), -signal.SIGKILL, 0)
        time.sleep(trial.random.choice([0.0, 0.0, 2.0]))
        client = trial.resume("--cluster", cluster.address)
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def interrupted(trial: Trial) -> None:
    """Ctrl-C, SIGTERM or SIGHUP to the command, which ends with advice; it is resumed on the same
    cluster."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    _interrupt(trial, client, trial.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
    trial.expect(trial.resume("--cluster", cluster.address).ended(), 0)
    trial.expect_equal()


def _interrupt(
    trial: Trial, client: Process, number: signal.Signals, *, of_all: bool = False
) -> None:
    """of_all: to the command's process group, as a terminal does."""
    began = time.monotonic()
    if of_all:
        trial.say(f"{number.name} to the command and the processes of its cluster")
        with suppress(ProcessLookupError):
            os.killpg(client.pid, number)
    else:
        trial.signal(client.pid, number, "the command")
    ended = client.ended()
    seconds = time.monotonic() - began
    is_complete = (trial.output / "lazymerge.json").exists()
    trial.expect(ended, *([0, INTERRUPTED] if is_complete else [INTERRUPTED]))
    if ended.code:
        trial.expect_advice(ended)
    if seconds > ENDS_SECONDS:
        trial.complain(f"took {seconds:.1f} s to end")
    else:
        trial.say(f"it took {seconds:.1f} s to end")


def local_worker(trial: Trial) -> None:
    """A worker of a local cluster is killed."""
    client = trial.run("local:3")
    trial.was_struck = trial.sometime(client)
    worker = trial.random.choice(trial.workers())
    trial.signal(worker.pid, signal.SIGKILL, f"worker {worker.name}")
    trial.expect(client.ended(), 0)
    trial.expect_no_processes(LINGERS_SECONDS)
    _expect_no_scratch(trial)
    trial.expect_equal()


def _expect_no_scratch(trial: Trial) -> None:
    left = sorted(path.name for path in (trial.folder / "scratch").iterdir())
    if left:
        trial.complain(f"left in TMPDIR: {left}")


def local_interrupted(trial: Trial) -> None:
    """Ctrl-C to a command with a local cluster: as a terminal sends it, to all of its processes,
    or to the command alone. Nothing stays; it is resumed without a cluster."""
    client = trial.run("local:3")
    trial.was_struck = trial.sometime(client)
    _interrupt(trial, client, signal.SIGINT, of_all=trial.random.random() < 0.6)
    trial.expect_no_processes(LINGERS_SECONDS)
    _expect_no_scratch(trial)
    _resume_anywhere(trial, "none")
    trial.expect_equal()


def local_killed(trial: Trial) -> None:
    """A command with a local cluster is killed: its cluster's processes end, and the output is
    resumed without waiting for that."""
    client = trial.run("local:3")
    trial.was_struck = trial.sometime(client)
    trial.signal(client.pid, signal.SIGKILL, "the command")
    trial.expect(client.ended(), -signal.SIGKILL, 0)
    is_resumed_first = trial.random.random() < 0.5
    if is_resumed_first:
        _resume_anywhere(trial, "none")
    trial.expect_no_processes(GONE_SECONDS)
    if not is_resumed_first:
        _resume_anywhere(trial, "local")
    trial.expect_equal()


def two_commands(trial: Trial) -> None:
    """A second command on the same output, on the same cluster or without one, is refused, and the
    first goes on."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.until(
        lambda: (trial.output / LOCK_PATH).exists() or not client.is_alive, "the first one's lock"
    )
    trial.was_struck = client.is_alive
    second = trial.run(cluster.address) if trial.random.random() < 0.5 else trial.resume()
    trial.expect(second.ended(), 2, says="is being written by")
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def many_harms(trial: Trial) -> None:
    """Anything at random, several times: workers killed, stopped and started, the scheduler stopped
    for a moment, the command killed or interrupted and run again, until it is complete."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    harms = trial.random.choices(["kill", "stop", "add", "pause", "client", "interrupt"], k=6)
    stopped: list[int] = []
    for harm in harms:
        trial.when(trial.progress() + trial.random.uniform(0.02, 0.15), client)
        there = [worker for worker in trial.workers() if worker.pid not in stopped]
        trial.was_struck |= client.is_alive
        if harm == "kill" and there:
            cluster.kill(trial.random.choice(there), with_nanny=trial.random.random() < 0.3)
        elif harm == "stop" and len(there) > 1:
            stopped.append(trial.random.choice(there).pid)
            trial.signal(stopped[-1], signal.SIGSTOP, "a worker")
        elif harm == "pause":
            trial.signal(cluster.scheduler.pid, signal.SIGSTOP, "the scheduler")
            time.sleep(trial.random.uniform(0.5, 3.0))
            trial.signal(cluster.scheduler.pid, signal.SIGCONT, "the scheduler")
        elif harm in ("client", "interrupt"):
            number = signal.SIGKILL if harm == "client" else signal.SIGINT
            trial.signal(client.pid, number, "the command")
            trial.expect(client.ended(), -signal.SIGKILL, INTERRUPTED, 0)
            client = trial.run(cluster.address)
        if harm == "add" or len(trial.workers()) <= len(stopped):
            cluster.add_workers(1)
    trial.expect(client.ended(), 0)
    trial.expect_equal()
    for pid in stopped:
        trial.signal(pid, signal.SIGCONT, "a worker")
    time.sleep(1.0 if stopped else 0.0)
    trial.expect_equal()


def joins_late(trial: Trial) -> None:
    """The command is there before the workers are, and they come one by one."""
    cluster = Cluster(trial)
    client = trial.run(cluster.address)
    for _ in range(WORKERS):
        time.sleep(trial.random.uniform(0.0, 3.0))
        trial.was_struck |= client.is_alive
        cluster.add_workers(1)
    trial.expect(client.ended(), 0)
    trial.expect_equal()
