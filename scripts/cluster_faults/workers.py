"""Harm to workers: they are killed, they hang, they come back."""

from __future__ import annotations

import signal
import time

from .cluster import WORKERS, Cluster, made
from .trial import DaskWorker, Process, Trial


def killed(trial: Trial) -> None:
    """A worker is killed at a random moment."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    cluster.kill(trial.random.choice(trial.workers()))
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def nanny(trial: Trial) -> None:
    """A nanny is killed, and its worker with it, or the nanny alone."""
    cluster = made(trial, nannies=True)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    chosen = trial.random.choice(trial.workers())
    if trial.random.random() < 0.5:
        cluster.kill(chosen, with_nanny=True)
    else:
        pid = cluster.processes[chosen.name].pid
        trial.signal(pid, signal.SIGKILL, f"the nanny of {chosen.name}, not to the worker")
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def in_a_row(trial: Trial) -> None:
    """Workers are killed one after the other, until one is left, or a nanny's fourth is killed."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client, latest=0.3)
    for _ in range(WORKERS + 1 if cluster.nannies else WORKERS - 1):
        there = trial.workers()
        if not there or not client.is_alive:
            break
        cluster.kill(trial.random.choice(there))
        time.sleep(trial.random.uniform(0.05, 1.0))
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def all_at_once(trial: Trial) -> None:
    """All workers are killed, and their nannies; others join a little later."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    for worker in trial.workers():
        cluster.kill(worker, with_nanny=True)
    time.sleep(trial.random.uniform(0.0, 8.0))
    cluster.add_workers(2)
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def _at(trial: Trial, moment: str) -> tuple[Cluster, Process, DaskWorker]:
    """A run one of whose workers waits at a moment of its work."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.sometime(client, latest=0.6)
    trial.shut_gate(moment)
    worker = trial.at_gate(moment, client)
    trial.was_struck = client.is_alive
    return cluster, client, worker


def half_written(trial: Trial) -> None:
    """A worker is killed when a tensor is written in part."""
    cluster, client, worker = _at(trial, "half")
    cluster.kill(worker, with_nanny=trial.random.random() < 0.5)
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def untold(trial: Trial) -> None:
    """A worker is killed when its group is written, and before it tells."""
    cluster, client, worker = _at(trial, "written")
    cluster.kill(worker, with_nanny=trial.random.random() < 0.5)
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def hangs(trial: Trial) -> None:
    """A worker is stopped for good; in every other trial its nanny, too."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client)
    worker = trial.random.choice(trial.workers())
    _stop(trial, cluster, worker, with_nanny=trial.random.random() < 0.5)
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def _stop(trial: Trial, cluster: Cluster, worker: DaskWorker, *, with_nanny: bool) -> None:
    if with_nanny and cluster.nannies:
        nanny_pid = cluster.processes[worker.name].pid
        trial.signal(nanny_pid, signal.SIGSTOP, f"the nanny of {worker.name}")
    trial.signal(worker.pid, signal.SIGSTOP, worker.name)


def wakes(trial: Trial) -> None:
    """A worker is stopped, and goes on some seconds later, while the run does."""
    cluster = made(trial)
    client = trial.run(cluster.address)
    trial.was_struck = trial.sometime(client, latest=0.5)
    worker = trial.random.choice(trial.workers())
    trial.signal(worker.pid, signal.SIGSTOP, worker.name)
    time.sleep(trial.random.uniform(0.5, 6.0))
    trial.signal(worker.pid, signal.SIGCONT, worker.name)
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def writes_late(trial: Trial) -> None:
    """A worker is stopped in the middle of its work, and goes on when the run is complete."""
    cluster, client, worker = _at(trial, trial.random.choice(["opened", "half"]))
    moment = _moment_of(trial, worker)
    trial.signal(worker.pid, signal.SIGSTOP, worker.name)
    trial.open_gate(moment, worker)
    trial.expect(client.ended(), 0)
    trial.expect_equal()
    _go_on(trial, cluster, worker)
    trial.expect_equal()


def _moment_of(trial: Trial, worker: DaskWorker) -> str:
    return next((trial.folder / "gates").glob(f"*.{worker.pid}")).stem


def _go_on(trial: Trial, cluster: Cluster, worker: DaskWorker) -> None:
    trial.signal(worker.pid, signal.SIGCONT, worker.name)
    last = trial.until_idle(worker)
    trial.say(f"{worker.name}: {' '.join(last.split()[2:4]) or last}")


def overwritten_half(trial: Trial) -> None:
    """A worker is stopped when a tensor is half written; the run is complete; another merge takes
    the output's place. The worker goes on before that is complete, or after."""
    cluster, client, worker = _at(trial, "half")
    trial.signal(worker.pid, signal.SIGSTOP, worker.name)
    trial.open_gate("half", worker)
    trial.expect(client.ended(), 0)
    other = trial.bench.other_merge
    again = trial.run(cluster.address, "--overwrite", merge=other)
    if trial.random.random() < 0.7:
        trial.when(trial.random.uniform(0.1, 0.6), again)
        _go_on(trial, cluster, worker)
    trial.expect(again.ended(), 0)
    trial.expect_equal(other)
    _go_on(trial, cluster, worker)
    trial.expect_equal(other)


def overwritten_opening(trial: Trial) -> None:
    """A worker is stopped before it opens the shard; the run is complete; another merge takes the
    output's place. The worker goes on when that has finished the same tensors and not their shard:
    there is a file then of the name and the length that it was told, and what it would write into
    it would stay."""
    _, client, worker = _at(trial, "opening")
    shard, tensors = trial.given(worker)
    trial.signal(worker.pid, signal.SIGSTOP, worker.name)
    trial.open_gate("opening", worker)
    trial.expect(client.ended(), 0)
    fresh = made(trial, nannies=False)
    other = trial.bench.other_merge
    trial.shut_gate("opening", shard)
    again = trial.run(fresh.address, "--overwrite", merge=other)
    held = trial.at_gate("opening", again, but=worker)
    partial = trial.output / f"{shard}.partial"
    trial.until(
        lambda: tensors <= trial.finished() or not partial.exists(), f"the tensors of {worker.name}"
    )
    trial.was_struck = partial.exists()
    trial.say(f"{partial.name} is {'' if partial.exists() else 'not '}there")
    trial.signal(worker.pid, signal.SIGCONT, worker.name)
    trial.say(f"{worker.name}: {' '.join(trial.until_idle(worker).split()[2:4])}")
    trial.open_gate("opening", held)
    trial.expect(again.ended(), 0)
    trial.expect_equal(other)
