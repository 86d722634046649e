"""Run a command to its end and measure it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]

SAMPLING_S = 0.1
"""Seconds between looks at the anonymous memory of a child."""


class BenchError(Exception):
    """The benchmark cannot go on."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one command.

    wall_s: from its start to its end as a process.
    cpu_s: user and system time of the process and of the children it waited for.
    peak_rss_bytes: of the largest single process among these; pages of mapped files included.
    peak_anonymous_bytes: what of the process itself was not pages of files, as sampled; 0 where
        the system does not say, or where it ended before the first look.
    stdout: what it printed there.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    stdout: str


def offline_environment() -> dict[str, str]:
    """The environment of every child: nothing is looked up on the network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def lazymerge_environment() -> dict[str, str]:
    """As offline_environment, and the lazymerge of this script's checkout, installed or not."""
    environment = offline_environment()
    paths = [str(SCRIPTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def run_measured(command: Sequence[str], environment: dict[str, str], log: Path) -> Run:
    """Run a command to its end.

    log: receives its stderr; a file beside it its stdout. Raises BenchError, with the end of
    both, when it fails. On an interrupt the child is ended before the exception goes on.
    """
    printed = log.with_name(f"{log.stem}.stdout")
    with log.open("wb") as errors, printed.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the child and its children
            process.wait()
            raise
        finally:
            wall_s = time.perf_counter() - started
            sampler.end()
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
    stdout = printed.read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0:
        tail = (stdout + log.read_text(encoding="utf-8", errors="replace"))[-3000:]
        raise BenchError(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    rss_unit = 1 if sys.platform == "darwin" else 1024
    return Run(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * rss_unit,
        peak_anonymous_bytes=sampler.peak_bytes,
        stdout=stdout,
    )


class _Sampler(threading.Thread):
    """Looks at the anonymous memory of a process until it is told to end."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="memory sampler", daemon=True)
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLING_S):
            try:
                status = self._status.read_text(encoding="utf-8", errors="replace")
            except OSError:
                return  # no /proc, or the process has ended
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes(status))

    def end(self) -> None:
        self._ended.set()
        self.join()


def anonymous_bytes(status: str) -> int:
    """Anonymous resident memory by the text of /proc/PID/status; 0 if it does not say."""
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def run_plain(
    command: Sequence[str], environment: dict[str, str] | None = None, *, capture: bool = False
) -> str:
    """Run a command that is not measured; returns its stdout when captured.

    Raises BenchError when it fails.
    """
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)}\nended with {done.returncode}")
    return done.stdout or ""


def delete(folders: Sequence[Path]) -> None:
    """Delete folders, whether they exist or not."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
