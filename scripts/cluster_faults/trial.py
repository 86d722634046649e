"""One trial: its folder, its processes, the moments at which it strikes, and what must be true
afterwards."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lazymerge.output.journal import read_journal
from lazymerge.output.manifest import MANIFEST_NAME

from faults.harness import Ended, complaints

from .bench import HERE, OUTPUT_NAME, Bench, Merge
from .hooks import TRIAL_VARIABLE

LOOK_SECONDS = 0.03

OPTIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("--no-fsync",),
    ("--workers", "2"),
    ("--memory", "400MiB"),
    ("--read-mode", "mmap"),
)
"""Of runs: none of them changes a byte of the output."""

PATIENCE_SECONDS = 150.0
"""For anything that a trial waits for: longer than lazymerge waits for workers."""

HEAD_LINES = 2
"""Of a journal: whose it is, and the first process that wrote it."""


@dataclass(slots=True)
class Process:
    """A process that a trial has started, in a session of its own. err: where it writes."""

    name: str
    popen: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        return self.popen.poll() is None

    def ended(self, seconds: float = PATIENCE_SECONDS) -> Ended:
        """How it ends. If it does not, it is killed, and its code is that of SIGKILL."""
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.popen.wait()
        return Ended(
            self.popen.returncode,
            self.out.read_text(errors="replace"),
            self.err.read_text(errors="replace"),
        )


@dataclass(frozen=True, slots=True)
class DaskWorker:
    """A worker process, as it told of itself when it started."""

    pid: int
    name: str
    address: str
    parent: int


class TrialError(Exception):
    """A trial could not be made: something that it needs did not come to pass."""


class SkippedError(Exception):
    """This machine cannot make the trial; says why."""


class Trial:
    """Trials of all kinds have this in common.

    wrong: what is not as it should be, in sentences. events: what was done, and when.
    was_struck: the harm was done while the run was at work.
    """

    def __init__(self, bench: Bench, kind: str, number: int, seed: int) -> None:
        self.bench = bench
        self.random = Random(f"{seed}/{kind}/{number}")
        self.name = f"{kind}-{number}"
        self.folder = bench.folder / "trials" / self.name
        for name in ("workers", "given", "gates", "logs", "scratch"):
            (self.folder / name).mkdir(parents=True)
        self.output = self.folder / OUTPUT_NAME
        self.wrong: list[str] = []
        self.events: list[str] = []
        self.was_struck = False
        self._processes: list[Process] = []
        self._began = time.monotonic()
        self._closing: list[Callable[[], None]] = []

    def say(self, text: str) -> None:
        """Notes what is done."""
        self.events.append(f"{time.monotonic() - self._began:6.1f} s  {text}")

    def complain(self, text: str) -> None:
        """Notes what is wrong."""
        self.say(f"WRONG: {text}")
        self.wrong.append(text)

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts a process, whose output goes to the trial's logs."""
        number = len(self._processes)
        out, err = (self.folder / "logs" / f"{number:02d}-{name}.{end}" for end in ("out", "err"))
        with out.open("wb") as out_file, err.open("wb") as err_file:
            popen = subprocess.Popen(
                list(command),
                env={
                    **self.bench.environment,
                    TRIAL_VARIABLE: str(self.folder),
                    "TMPDIR": str(self.folder / "scratch"),
                    **(environment or {}),
                },
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )
        process = Process(name, popen, out, err)
        self._processes.append(process)
        return process

    def lazymerge(
        self,
        *arguments: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts the command."""
        self.say(f"lazymerge {' '.join(arguments)}".replace(f"{self.folder}/", ""))
        client = [sys.executable, str(HERE / "client.py"), *arguments]
        # a worker of a local cluster is told by the environment what others are told by an option
        more = {"DASK_DISTRIBUTED__WORKER__PRELOAD": json.dumps([str(HERE / "hooks.py")])}
        return self.start("client", [*prefix, *client], {**more, **(environment or {})})

    def run(
        self,
        cluster: str,
        *more: str,
        merge: Merge | None = None,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        is_plain: bool = False,
    ) -> Process:
        """Starts a merge into the output. cluster: its address. is_plain: without OPTIONS."""
        recipe = str((merge or self.bench.merge).recipe)
        arguments = ["-o", str(self.output), *self.bench.options, "--cluster", cluster]
        options = [*(() if is_plain else self.random.choice(OPTIONS)), *more]
        return self.lazymerge(
            "run", recipe, *arguments, *options, prefix=prefix, environment=environment
        )

    def resume(self, *more: str, prefix: Sequence[str] = ()) -> Process:
        """Starts to go on with the output."""
        return self.lazymerge("resume", str(self.output), *more, prefix=prefix)

    def progress(self) -> float:
        """Share of the tensors that the output's journal says are finished."""
        with suppress(OSError):
            lines = (self.output / ".lazymerge" / "journal").read_bytes().count(b"\n")
            return max(0, lines - HEAD_LINES) / self.bench.tensors
        return 0.0

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits until something is so.

        Raises:
            TrialError: it never was.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TrialError(f"waited {PATIENCE_SECONDS:.0f} s for {what}")
            time.sleep(LOOK_SECONDS)
        return found

    def when(self, share: float, client: Process) -> bool:
        """Waits until a share of the tensors is finished; False: the run has ended before."""
        self.until(
            lambda: self.progress() >= share or not client.is_alive,
            f"{share:.0%} of the tensors",
        )
        is_at_work = client.is_alive
        self.say(f"{self.progress():.0%} of the tensors are finished")
        return is_at_work

    def sometime(self, client: Process, latest: float = 0.85) -> bool:
        """As `when`, at a random moment."""
        return self.when(self.random.uniform(0.0, latest), client)

    def shut_gate(self, moment: str, shard: str = "") -> None:
        """The next worker that comes to a moment is to wait there. shard: only if it is at that."""
        new = self.folder / f"gate-{moment}"
        new.write_text(shard)
        new.rename(self.folder / "gates" / moment)

    def given(self, worker: DaskWorker) -> tuple[str, set[str]]:
        """The shard that a worker is at, and the tensors that it is to make."""
        given = json.loads((self.folder / "given" / str(worker.pid)).read_text())
        return given["shard"], set(given["tensors"])

    def finished(self) -> set[str]:
        """The tensors that the output's journal says are finished."""
        with suppress(OSError):
            return set(read_journal(self.output).finished)
        return set()

    def at_gate(self, moment: str, client: Process, but: DaskWorker | None = None) -> DaskWorker:
        """The worker that waits at a gate. but: that has waited there before.

        Raises:
            TrialError: there is none.
        """
        folder = self.folder / "gates"

        def there() -> list[int]:
            if not client.is_alive:
                raise TrialError(f"the run has ended, and no worker has come to {moment!r}")
            before = "" if but is None else str(but.pid)
            found = [path.name.split(".")[1] for path in folder.glob(f"{moment}.*")]
            return [int(pid) for pid in found if pid != before]

        (pid, *_) = self.until(there, f"a worker at {moment!r}")
        worker = next(worker for worker in self.workers() if worker.pid == pid)
        self.say(f"{worker.name} (process {pid}) is at {moment!r}")
        return worker

    def open_gate(self, moment: str, worker: DaskWorker) -> None:
        """Lets it go on."""
        (self.folder / "gates" / f"{moment}.{worker.pid}.open").touch()

    def workers(self) -> list[DaskWorker]:
        """Those that are alive, in the order of their names."""
        found = []
        for path in (self.folder / "workers").glob("[0-9]*"):
            if _is_alive(int(path.name)):
                with suppress(OSError, ValueError):
                    found.append(DaskWorker(int(path.name), **json.loads(path.read_text())))
        return sorted(found, key=lambda worker: (worker.name, worker.pid))

    def signal(self, pid: int, number: signal.Signals, whom: str) -> None:
        """Sends a signal, and notes it."""
        self.say(f"{number.name} to {whom} (process {pid})")
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def lines(self, pid: int) -> list[str]:
        """What a worker has noted of its groups: begins, ends, fails."""
        with suppress(OSError):
            text = (self.folder / "groups").read_text()
            return [line for line in text.splitlines() if line.split()[1] == str(pid)]
        return []

    def until_idle(self, worker: DaskWorker) -> str:
        """Waits until a worker has ended what it was at; the last that it has noted."""

        def last() -> str:
            if not _is_alive(worker.pid):
                return "is not there any more"
            lines = self.lines(worker.pid)
            return lines[-1] if lines and lines[-1].split()[2] != "begins" else ""

        return str(self.until(last, f"{worker.name} to end its group"))

    def expect(self, ended: Ended, *codes: int, says: str = "") -> None:
        """Complains of how the command has ended. says: what it must have said."""
        self.say(f"the command has ended: exit {ended.code}")
        for text in complaints(ended, codes):
            self.complain(text)
        if says not in ended.err:
            self.complain(f"does not say {says!r}: {ended.err.strip()[-500:]}")

    def expect_advice(self, ended: Ended) -> None:
        """Complains if the command has not said how to go on."""
        how = f"go on with: lazymerge resume {shlex.quote(str(self.output))}"
        if self.progress() and how not in ended.err:
            self.complain(f"does not say how to go on: {ended.err.strip()[-500:]}")

    def expect_equal(self, merge: Merge | None = None) -> None:
        """Compares all files of the output with those of a run without a cluster, and verifies."""
        if not (self.output / MANIFEST_NAME).exists():
            self.complain("the output is not complete")
            return
        for text in (merge or self.bench.merge).differences(self.output):
            self.complain(text)
        ended = self.bench.lazymerge("verify", str(self.output))
        for text in complaints(ended, [0]):
            self.complain(f"verify: {text}")
        self.say("all files are compared, and verified")

    def expect_no_processes(self, seconds: float) -> None:
        """Complains of what of a local cluster is left after a while."""
        deadline = time.monotonic() + seconds
        while (left := self._marked()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        if left:
            self.complain(f"processes are left: {', '.join(map(_command_of, left))}")
        else:
            self.say("no process is left")

    def at_end(self, close: Callable[[], None]) -> None:
        """Has something done when the trial is over."""
        self._closing.append(close)

    def close(self) -> None:
        """Ends what is left of the trial's processes, and those that they have started."""
        deadline = time.monotonic() + 10
        while (left := self._marked()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(10)
        for close in reversed(self._closing):
            close()

    def _marked(self) -> list[int]:
        """Processes that have the trial's folder in their environment."""
        mark = f"{TRIAL_VARIABLE}={self.folder}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0") and _is_alive(int(path.parent.name)):
                    found.append(int(path.parent.name))
        return found


def _is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped; one that has ended and not been waited for does not."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _command_of(pid: int) -> str:
    with suppress(OSError):
        words = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
        return f"{pid} ({words.strip()[:120]})"
    return str(pid)
