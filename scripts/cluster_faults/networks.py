"""Harm to networks: scheduler and command in one network namespace, every worker in one of its own,
joined by a bridge; a worker's link goes down while it writes on, for the disk is the same.

    head: 10.77.0.1 on br0 ─┬─ port0 ═ eth0 10.77.0.10 :worker0
                            ├─ port1 ═ eth0 10.77.0.11 :worker1
                            └─ …
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

from .bench import HERE
from .cluster import WORKERS, Cluster, free_port
from .trial import DaskWorker, SkippedError, Trial

HEAD_HOST = "10.77.0.1"


def _is_possible() -> bool:
    """Whether this process may make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


class Network:
    """Namespaces for a trial. They are gone when it is over."""

    def __init__(self, trial: Trial) -> None:
        """Raises:
        SkippedError: this machine does not make any.
        """
        if not _is_possible():
            raise SkippedError("network namespaces need root and `ip`")
        self._trial = trial
        self._name = f"lm{os.getpid()}-{trial.name}"
        self._count = 0
        self.head = self._added("head")
        _ip("-n", self.head, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.head, "addr", "add", f"{HEAD_HOST}/24", "dev", "br0")
        _ip("-n", self.head, "link", "set", "br0", "up")

    def _added(self, suffix: str) -> str:
        name = f"{self._name}-{suffix}"
        _ip("netns", "add", name)
        self._trial.at_end(lambda: _ip("netns", "del", name))
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def add_worker(self) -> tuple[list[str], str]:
        """A namespace for one more worker: what its command begins with, and its address."""
        number = self._count
        self._count += 1
        name, host = self._added(str(number)), f"10.77.0.{10 + number}"
        peer = ("peer", "name", "eth0", "netns", name)
        _ip("-n", self.head, "link", "add", f"port{number}", "type", "veth", *peer)
        _ip("-n", self.head, "link", "set", f"port{number}", "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{host}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return within(name), host

    def set_link(self, worker: DaskWorker, state: str) -> None:
        """up or down, of the worker's end of the bridge."""
        number = int(worker.name.removeprefix("worker"))
        self._trial.say(f"the link of {worker.name} goes {state}")
        _ip("-n", self.head, "link", "set", f"port{number}", state)


def within(name: str) -> list[str]:
    """What a command begins with that is to run in a namespace."""
    return ["ip", "netns", "exec", name]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SkippedError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _apart(trial: Trial) -> tuple[Network, Cluster]:
    """A cluster each of whose workers is in a namespace of its own."""
    network = Network(trial)
    cluster = Cluster(
        trial, nannies=trial.random.random() < 0.5, host=HEAD_HOST, prefix=within(network.head)
    )
    for _ in range(WORKERS):
        prefix, host = network.add_worker()
        cluster.add_workers(1, prefix=prefix, options=["--host", host])
    cluster.wait_for(WORKERS)
    return network, cluster


def cut_off(trial: Trial) -> None:
    """A worker's link goes down for good, and the worker writes on."""
    network, cluster = _apart(trial)
    client = trial.run(cluster.address, prefix=within(network.head))
    trial.was_struck = trial.sometime(client)
    network.set_link(trial.random.choice(trial.workers()), "down")
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def cut_off_for_a_while(trial: Trial) -> None:
    """A worker's link, or that of all, goes down, and comes back while the run goes on or after."""
    network, cluster = _apart(trial)
    client = trial.run(cluster.address, prefix=within(network.head))
    trial.was_struck = trial.sometime(client, latest=0.6)
    count = trial.random.choice([1, 1, WORKERS])
    chosen = trial.random.sample(trial.workers(), count)
    for worker in chosen:
        network.set_link(worker, "down")
    time.sleep(trial.random.uniform(1.0, 12.0))
    for worker in chosen:
        network.set_link(worker, "up")
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def cut_off_and_overwritten(trial: Trial) -> None:
    """A worker's link goes down when a tensor is half written, and the worker is stopped; another
    merge takes the output's place before it writes the rest and the link comes back."""
    network, cluster = _apart(trial)
    head = within(network.head)
    client = trial.run(cluster.address, prefix=head)
    trial.sometime(client, latest=0.6)
    trial.shut_gate("half")
    worker = trial.at_gate("half", client)
    trial.was_struck = client.is_alive
    network.set_link(worker, "down")
    trial.expect(client.ended(), 0)
    trial.expect_equal()
    again = trial.run(cluster.address, "--overwrite", merge=trial.bench.other_merge, prefix=head)
    trial.when(trial.random.uniform(0.0, 0.6), again)
    trial.say(f"{worker.name} writes the rest")
    trial.open_gate("half", worker)
    network.set_link(worker, "up")
    trial.expect(again.ended(), 0)
    trial.until_idle(worker)
    trial.expect_equal(trial.bench.other_merge)


def slow(trial: Trial) -> None:
    """Every message between scheduler, workers and command takes 20 to 80 ms, and one in fifty up
    to a second more. A worker is killed on top of that."""
    cluster = Cluster(trial, nannies=False)
    through = _relayed(trial, cluster.port)
    scheduler = f"{cluster.protocol}://127.0.0.1:{through}"
    for _ in range(WORKERS):
        port = free_port()
        listen = f"{cluster.protocol}://127.0.0.1:{port}"
        contact = f"{cluster.protocol}://127.0.0.1:{_relayed(trial, port)}"
        cluster.add_workers(
            1,
            scheduler=scheduler,
            options=["--listen-address", listen, "--contact-address", contact],
        )
    cluster.wait_for(WORKERS)
    client = trial.run(scheduler)
    trial.was_struck = trial.sometime(client)
    trial.signal(trial.random.choice(trial.workers()).pid, signal.SIGKILL, "a worker")
    trial.expect(client.ended(), 0)
    trial.expect_equal()


def _relayed(trial: Trial, target_port: int) -> int:
    """The port of a slow way to another."""
    port = free_port()
    seed = trial.random.randrange(1 << 30)
    command = [sys.executable, str(HERE / "relay.py"), str(port), str(target_port), str(seed)]
    trial.start("relay", command)
    return port
