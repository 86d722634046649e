#!/usr/bin/env python3
"""Kill, fail and cut the power of real runs, at every step, and compare what comes of it.

    python scripts/crash_matrix.py                 all faults, some minutes
    python scripts/crash_matrix.py --faults kill power --trials 50 --seed 7

Every trial is a `lazymerge run` in a process of its own, with a library preloaded that counts the
calls that change files (faults/shim.c). A fault strikes at one of them; then the run is repeated
without faults, and every byte of the output is compared with that of an undisturbed run. Where
nothing but the process was lost, every finished tensor must have been kept.

    kill       SIGKILL before every call, one after the other
    tear       SIGKILL in the middle of it: of what was to be written, half is
    again      SIGKILL at a random call of the run that goes on, one to three times
    replace    SIGKILL, an error or a signal while --overwrite replaces an earlier output
    late       SIGKILL after a random time
    signal     SIGTERM, SIGINT or SIGHUP after a random time; exit 130 within two seconds
    journal    the journal is cut, or a byte of it altered, before the run goes on
    fail       a call and all after it fail: EIO, ENOSPC, EDQUOT, EROFS
    once       a call fails, and those after it do not
    sync       one fsync fails; in most trials the run that goes on is killed
    read       reading an input fails
    power      a random state of the disk that a power failure at a random call may leave
               (faults/power_loss.py); the machine has another boot id afterwards

The table goes to stdout as Markdown, what is wrong to stderr. Exit 1 if anything is.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from lazymerge.output.journal import read_journal
from lazymerge.output.lock import LOCK_PATH
from lazymerge.output.manifest import MANIFEST_NAME, MERGE_PATH

from faults.harness import REPOSITORY, Bench, Ended, complaints
from faults.power_loss import Disk, read_log

KILLED = -signal.SIGKILL
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


OPTIONS = (
    [],
    ["--recheck"],
    ["--no-fsync"],
    ["--workers", "1"],
    ["--read-mode", "mmap"],
    ["--hash-inputs"],
)
"""Of runs that are struck: none of them changes a byte of the output."""


class Trials:
    """All kinds of trials; each returns what is wrong, in sentences.

    was_struck: whether the last trial's fault came to pass.
    """

    def __init__(self, bench: Bench, random: Random) -> None:
        self.bench = bench
        self.random = random
        self.was_struck = False

    def begin(self, *, in_any_form: bool) -> None:
        """Clears the output. in_any_form: it is to be one shard or several."""
        if in_any_form and self.random.random() < 0.5:
            self.bench = self.bench.in_one_shard
        self.bench.clear()

    def options(self) -> list[str]:
        return self.random.choice(OPTIONS)

    def go_on(self, *, keeps: bool = True) -> list[str]:
        """Repeats the run, or resumes, and compares.

        keeps: every tensor that the journal names must be kept, and not made again.
        """
        bench = self.bench
        finished = None if (bench.output / MANIFEST_NAME).exists() else finished_tensors(bench)
        wrong = []
        if (bench.output / MERGE_PATH).exists() and self.random.random() < 0.5:
            wrong += complaints(bench.lazymerge("status", str(bench.output)), [0])
            wrong += bench.problems(bench.lazymerge("resume", str(bench.output)))
        else:
            wrong += bench.problems(bench.run())
        if keeps and finished is not None and not wrong:
            document = json.loads((bench.output / MANIFEST_NAME).read_text())
            if document["run"]["resumed_tensors"] != finished:
                kept = document["run"]["resumed_tensors"]
                wrong.append(f"{finished} tensors were finished, and {kept} of them kept")
        return wrong

    def strike(self, number: int, *more: str, **faults: object) -> list[str]:
        """A run into what is there, killed at a call."""
        ended = self.bench.run(*more, faults=self.bench.faults(KILL_AT=number, **faults))
        self.was_struck |= ended.code == KILLED
        return [] if ended.code in (KILLED, 0) else complaints(ended, [KILLED])

    def disturb(
        self, *more: str, codes: Sequence[int], **faults: object
    ) -> tuple[Ended, list[str]]:
        """A run into what is there, some of whose calls fail; what is wrong with how it ends."""
        ended = self.bench.run(*more, faults=self.bench.faults(**faults))
        self.was_struck |= self.bench.was_struck
        return ended, complaints(ended, codes)

    def any_call(self) -> int:
        return self.random.randint(1, self.bench.calls)

    def kill(self, number: int) -> list[str]:
        self.begin(in_any_form=False)
        return self.strike(number) + self.go_on()

    def tear(self, number: int) -> list[str]:
        self.begin(in_any_form=False)
        return self.strike(number, TEAR=1) + self.go_on()

    def again(self, _: int) -> list[str]:
        self.begin(in_any_form=True)
        wrong = []
        for _ in range(self.random.randint(2, 4)):
            wrong += self.strike(self.any_call(), *self.options())
        return wrong + self.go_on()

    def replace(self, _: int) -> list[str]:
        """The earlier output is whole, or no part of it is taken for the new one."""
        self.begin(in_any_form=True)
        bench = self.bench
        wrong = bench.problems(bench.run())
        manner = self.random.choice(["kill", "fail", "signal"])
        if manner == "kill":
            wrong += self.strike(self.any_call(), "--overwrite")
        elif manner == "fail":
            _, found = self.disturb(
                "--overwrite",
                codes=[0, 1],
                FAIL_AT=self.random.randint(1, bench.calls // 2),
                FAIL_COUNT=1,
                ERRNO=errno.EIO,
            )
            wrong += found
        else:
            number = self.random.choice(SIGNALS)
            ended, _ = self.after_a_while(number, "--overwrite")
            self.was_struck = ended.code != 0
            wrong += complaints(ended, [0, 1, 130, -number])
        if '"complete"' in bench.lazymerge("status", str(bench.output), "--json").out:
            wrong += complaints(bench.lazymerge("verify", str(bench.output)), [0])
        return wrong + bench.problems(bench.run("--overwrite"))

    def late(self, _: int) -> list[str]:
        self.begin(in_any_form=True)
        ended, _ = self.after_a_while(signal.SIGKILL, *self.options())
        self.was_struck = ended.code == KILLED
        return ([] if ended.code in (KILLED, 0) else complaints(ended, [KILLED])) + self.go_on()

    def signal(self, _: int) -> list[str]:
        self.begin(in_any_form=True)
        number = self.random.choice(SIGNALS)
        ended, seconds = self.after_a_while(number, *self.options())
        self.was_struck = ended.code != 0
        # once all is done, Python takes itself apart, and a signal then ends it as it will
        is_done = (self.bench.output / MANIFEST_NAME).exists()
        wrong = complaints(ended, [0, 1, 130, -number] if is_done else [130])
        if seconds > 2:
            wrong.append(f"took {seconds:.1f} s to end")
        return wrong + self.go_on()

    def after_a_while(self, number: int, *more: str) -> tuple[Ended, float]:
        """Sends a signal to a run, at a random time after its lock is there; how it ended, and the
        seconds that it took to."""
        process = subprocess.Popen(
            [sys.executable, "-m", "lazymerge", *self.bench.command, *more],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 10
        while not (self.bench.output / LOCK_PATH).exists() and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        time.sleep(self.random.uniform(0.0, 0.05))
        process.send_signal(number)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err), time.monotonic() - began

    def journal(self, _: int) -> list[str]:
        self.begin(in_any_form=True)
        wrong = self.strike(self.random.randint(self.bench.calls // 4, self.bench.calls))
        self.was_struck = False
        path = self.bench.output / ".lazymerge" / "journal"
        if path.exists() and path.stat().st_size:
            self.was_struck = True
            data = bytearray(path.read_bytes())
            at = self.random.randrange(len(data))
            if self.random.random() < 0.5:
                del data[at:]
            else:
                data[at] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)
        return wrong + self.go_on()

    def fail(self, number: int) -> list[str]:
        self.begin(in_any_form=False)
        code = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS][number % 4]
        _, wrong = self.disturb(codes=[0, 1, 2, 3], FAIL_AT=number, ERRNO=code)
        return wrong + self.go_on(keeps=False)

    def once(self, number: int) -> list[str]:
        """What is not to be gone on with is removed."""
        self.begin(in_any_form=False)
        code = [errno.EIO, errno.ENOSPC][number % 2]
        ended, wrong = self.disturb(codes=[0, 1, 3], FAIL_AT=number, FAIL_COUNT=1, ERRNO=code)
        if ended.code and not finished_tensors(self.bench) and self.bench.output.exists():
            left = sorted(str(path) for path in self.bench.output.rglob("*"))
            wrong.append(f"nothing was finished, and there is left: {left}")
        return wrong + self.go_on(keeps=False)

    def sync(self, _: int) -> list[str]:
        """In most trials the run that goes on is killed, too."""
        self.begin(in_any_form=True)
        _, wrong = self.disturb(
            codes=[0, 1],
            FAIL_AT=self.random.randint(1, 12),
            FAIL_COUNT=1,
            FAIL_CALL="fsync",
            ERRNO=errno.EIO,
        )
        if self.random.random() < 0.7:
            wrong += self.strike(self.any_call(), *self.options())
        return wrong + self.go_on(keeps=False)

    def read(self, number: int) -> list[str]:
        self.begin(in_any_form=True)
        model = str(self.bench.folder / self.random.choice(["base", "a", "b"]))
        ended, wrong = self.disturb(
            codes=[0, 1], ROOT=model, FAIL_AT=number, FAIL_CALL="read", ERRNO=errno.EIO
        )
        if ended.code and model not in ended.err:
            wrong.append(f"does not name the file: {ended.err}")
        return wrong + self.go_on()

    def power(self, _: int) -> list[str]:
        """One power failure, or one in the run that goes on after another; in some trials while an
        earlier output is replaced."""
        self.begin(in_any_form=True)
        bench = self.bench
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
            is_complete = str(bench.output / MANIFEST_NAME) in disk.durable
            disk.fail(self.random)
            if (bench.output / MANIFEST_NAME).exists():
                wrong += complaints(bench.lazymerge("verify", str(bench.output)), [0])
            elif is_complete and not options and bench.output.exists():
                wrong.append("the manifest was synced and is gone")
        boot.write_text("another boot\n")
        return wrong + bench.problems(bench.run(*options, faults=bench.faults(BOOT=boot)))


def finished_tensors(bench: Bench) -> int:
    """How many tensors an output's journal says are finished."""
    return len(read_journal(bench.output).finished)


KINDS: dict[str, tuple[str, Callable[[Trials, int], list[str]]]] = {
    "kill": ("SIGKILL before a call", Trials.kill),
    "tear": ("SIGKILL in the middle of a call", Trials.tear),
    "again": ("SIGKILL two to four times", Trials.again),
    "replace": ("SIGKILL during --overwrite", Trials.replace),
    "late": ("SIGKILL at a random time", Trials.late),
    "signal": ("SIGINT, SIGTERM, SIGHUP at a random time", Trials.signal),
    "journal": ("journal torn or altered", Trials.journal),
    "fail": ("EIO, ENOSPC, EDQUOT, EROFS from a call on", Trials.fail),
    "once": ("EIO, ENOSPC from one call", Trials.once),
    "sync": ("EIO from an fsync, then mostly SIGKILL", Trials.sync),
    "read": ("EIO from reading an input", Trials.read),
    "power": ("power failure", Trials.power),
}

AT_EVERY_CALL = ("kill", "tear", "fail", "once")


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
            failures = struck = 0
            for number in numbers:
                trials = Trials(bench, Random(f"{seed}/{kind}/{number}"))
                found = trial(trials, number)
                struck += trials.was_struck
                for problem in found:
                    print(f"{kind} {number} (seed {seed}): {problem}", file=sys.stderr)
                failures += bool(found)
            rows.append(f"| {words} | `--faults {kind}` | {len(numbers)} | {struck} | {failures} |")
            print(rows[-1], file=sys.stderr)
            wrong += failures
    print("| fault | crash_matrix.py | times tried | struck | bytes lost or wrong, in trials |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    print(
        f"\n{bench.calls} calls that change files in an undisturbed run; seed {seed}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
