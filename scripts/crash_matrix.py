#!/usr/bin/env python3
"""Kill, fail and cut the power of real runs, at every step, and compare what comes of it.

    python scripts/crash_matrix.py                 all faults, some minutes
    python scripts/crash_matrix.py --faults kill power --trials 50 --seed 7

Every trial is a `lazymerge run` in a process of its own, with a library preloaded that counts the
calls that change files (faults/shim.c). A fault strikes at one of them; then the run is repeated
without faults, and every byte of the output is compared with that of an undisturbed run.

    kill       SIGKILL before every call, one after the other
    tear       SIGKILL in the middle of it: of what was to be written, half is
    again      SIGKILL at a random call of the run that goes on, one to three times
    replace    SIGKILL at a random call while --overwrite replaces an earlier output
    late       SIGKILL after a random time
    signal     SIGTERM or SIGINT after a random time; the process ends within two seconds
    journal    the journal is cut, or a byte of it altered, before the run goes on
    fail       a call and all after it fail: EIO, ENOSPC, EDQUOT, EROFS
    sync       fsync alone fails
    read       reading an input fails
    power      a random state of the disk that a power failure at a random call may leave
               (faults/power_loss.py); the machine has another boot id afterwards

The table goes to stdout as Markdown, what is wrong to stderr. Exit 1 if anything is.
"""

from __future__ import annotations

import argparse
import errno
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from faults.harness import REPOSITORY, Bench, Ended, complaints
from faults.power_loss import Disk, read_log

KILLED = -signal.SIGKILL


class Trials:
    """All kinds of trials; each returns what is wrong, in sentences."""

    def __init__(self, bench: Bench, random: Random) -> None:
        self.bench = bench
        self.random = random

    def go_on(self) -> list[str]:
        """Repeats the run, or resumes, and compares."""
        bench = self.bench
        if (bench.output / ".lazymerge" / "merge.json").exists() and self.random.random() < 0.5:
            status = bench.lazymerge("status", str(bench.output))
            wrong = complaints(status, [0])
            return wrong + bench.problems(bench.lazymerge("resume", str(bench.output)))
        return bench.problems(bench.run())

    def strike(self, number: int, *more: str, **faults: object) -> list[str]:
        """A run into what is there, killed at a call."""
        ended = self.bench.run(*more, faults=self.bench.faults(KILL_AT=number, **faults))
        return [] if ended.code in (KILLED, 0) else complaints(ended, [KILLED])

    def any_call(self) -> int:
        return self.random.randint(1, self.bench.calls)

    def kill(self, number: int) -> list[str]:
        self.bench.clear()
        return self.strike(number) + self.go_on()

    def tear(self, number: int) -> list[str]:
        self.bench.clear()
        return self.strike(number, TEAR=1) + self.go_on()

    def again(self, _: int) -> list[str]:
        self.bench.clear()
        wrong = []
        for _ in range(self.random.randint(2, 4)):
            wrong += self.strike(self.any_call())
        return wrong + self.go_on()

    def replace(self, _: int) -> list[str]:
        """The earlier output is whole, or no part of it is taken for the new one."""
        bench = self.bench
        bench.clear()
        wrong = bench.problems(bench.run())
        wrong += self.strike(self.any_call(), "--overwrite")
        if '"complete"' in bench.lazymerge("status", str(bench.output), "--json").out:
            wrong += complaints(bench.lazymerge("verify", str(bench.output)), [0])
        return wrong + bench.problems(bench.run("--overwrite"))

    def late(self, _: int) -> list[str]:
        self.bench.clear()
        ended, _ = self.after_a_while(signal.SIGKILL)
        return ([] if ended.code in (KILLED, 0) else complaints(ended, [KILLED])) + self.go_on()

    def signal(self, _: int) -> list[str]:
        self.bench.clear()
        number = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        ended, seconds = self.after_a_while(number)
        # before Python has come to its handlers, a signal ends it in its own way
        wrong = complaints(ended, [130, 0, -number, 1])
        if ended.code == 1 and "KeyboardInterrupt" not in ended.err:
            wrong.append(f"exit 1: {ended.err}")
        if seconds > 2:
            wrong.append(f"took {seconds:.1f} s to end")
        return wrong + self.go_on()

    def after_a_while(self, number: int) -> tuple[Ended, float]:
        """Sends a signal to a run; how it ended, and the seconds that it took to."""
        process = subprocess.Popen(
            [sys.executable, "-m", "lazymerge", *self.bench.command],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 10
        while not self.bench.output.exists() and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        time.sleep(self.random.uniform(0.0, 0.08))
        process.send_signal(number)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err), time.monotonic() - began

    def journal(self, _: int) -> list[str]:
        self.bench.clear()
        wrong = self.strike(self.random.randint(self.bench.calls // 4, self.bench.calls))
        path = self.bench.output / ".lazymerge" / "journal"
        if path.exists() and path.stat().st_size:
            data = bytearray(path.read_bytes())
            at = self.random.randrange(len(data))
            if self.random.random() < 0.5:
                del data[at:]
            else:
                data[at] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)
        return wrong + self.go_on()

    def fail(self, number: int) -> list[str]:
        self.bench.clear()
        code = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS][number % 4]
        ended = self.bench.run(faults=self.bench.faults(FAIL_AT=number, ERRNO=code))
        return complaints(ended, [0, 1, 2, 3]) + self.go_on()

    def sync(self, number: int) -> list[str]:
        self.bench.clear()
        faults = self.bench.faults(FAIL_AT=number % 12 + 1, FAIL_CALL="fsync", ERRNO=errno.EIO)
        return complaints(self.bench.run(faults=faults), [0, 1]) + self.go_on()

    def read(self, number: int) -> list[str]:
        self.bench.clear()
        model = str(self.bench.folder / self.random.choice(["base", "a", "b"]))
        faults = {"ROOT": model, "FAIL_AT": str(number), "FAIL_CALL": "read", "ERRNO": "5"}
        ended = self.bench.run(faults=faults)
        wrong = complaints(ended, [0, 1])
        if ended.code and model not in ended.err:
            wrong.append(f"does not name the file: {ended.err}")
        return wrong + self.go_on()

    def power(self, _: int) -> list[str]:
        """One power failure, or one in the run that goes on after another; in some trials while an
        earlier output is replaced."""
        bench = self.bench
        bench.clear()
        wrong = []
        boot = bench.folder / "boot"
        options = ["--overwrite"] if self.random.random() < 0.3 else []
        if options:
            wrong += bench.problems(bench.run())
        for failure in range(self.random.randint(1, 2)):
            log = bench.folder / "log"
            log.unlink(missing_ok=True)
            disk = Disk(bench.output)
            boot.write_text(f"boot {failure}\n")
            wrong += self.strike(self.any_call(), *options, LOG=log, BOOT=boot)
            for call in read_log(log):
                disk.apply(call)
            is_complete = str(bench.output / "lazymerge.json") in disk.durable
            disk.fail(self.random)
            if (bench.output / "lazymerge.json").exists():
                wrong += complaints(bench.lazymerge("verify", str(bench.output)), [0])
            elif is_complete and not options and bench.output.exists():
                wrong.append("the manifest was synced and is gone")
        boot.write_text("another boot\n")
        faults = {"ROOT": str(bench.output), "BOOT": str(boot)}
        return wrong + bench.problems(bench.run(*options, faults=faults))


KINDS: dict[str, tuple[str, Callable[[Trials, int], list[str]]]] = {
    "kill": ("SIGKILL before a call", Trials.kill),
    "tear": ("SIGKILL in the middle of a call", Trials.tear),
    "again": ("SIGKILL two to four times", Trials.again),
    "replace": ("SIGKILL during --overwrite", Trials.replace),
    "late": ("SIGKILL at a random time", Trials.late),
    "signal": ("SIGINT, SIGTERM, SIGHUP at a random time", Trials.signal),
    "journal": ("journal torn or altered", Trials.journal),
    "fail": ("EIO, ENOSPC, EDQUOT, EROFS from a call on", Trials.fail),
    "sync": ("EIO from fsync", Trials.sync),
    "read": ("EIO from reading an input", Trials.read),
    "power": ("power failure", Trials.power),
}

AT_EVERY_CALL = ("kill", "tear", "fail")


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--trials", type=int, default=40, help="of each that has no fixed number")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parsed = parser.parse_args(arguments)
    seed = secrets.randbits(32) if parsed.seed is None else parsed.seed
    # shells have what they start in the background ignore it, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wrong = 0
    began = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory(prefix="lazymerge-crash-") as name:
        folder = Path(name)
        bench = Bench(folder)
        if not bench.can_inject:
            print("crash_matrix: a C compiler and Linux are needed", file=sys.stderr)
            return 2
        print(f"seed {seed}; {bench.calls} calls in an undisturbed run", file=sys.stderr)
        for kind in parsed.faults:
            words, trial = KINDS[kind]
            numbers = range(1, bench.calls + 1) if kind in AT_EVERY_CALL else range(parsed.trials)
            failures = 0
            for number in numbers:
                found = trial(Trials(bench, Random(f"{seed}/{kind}/{number}")), number)
                for problem in found:
                    print(f"{kind} {number} (seed {seed}): {problem}", file=sys.stderr)
                failures += bool(found)
            rows.append(f"| {words} | `--faults {kind}` | {len(numbers)} | {failures} |")
            print(rows[-1], file=sys.stderr)
            wrong += failures
    print("| fault | crash_matrix.py | times tried | bytes lost or wrong, in trials |")
    print("| --- | --- | --- | --- |")
    print("\n".join(rows))
    print(
        f"\n{bench.calls} calls that change files in an undisturbed run; seed {seed}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
