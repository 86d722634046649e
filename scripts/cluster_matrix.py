#!/usr/bin/env python3
"""Kill, stop and cut off the processes of real Dask clusters at work, and compare what comes of it.

    python scripts/cluster_matrix.py                       all kinds of harm, some minutes
    python scripts/cluster_matrix.py --faults killed hangs --trials 5 --seed 7
    python scripts/cluster_matrix.py --mutation token-not-looked-for --faults overwritten-opening

Every trial starts a scheduler and three workers (`dask scheduler`, `dask worker`, with certificates
made for the occasion) or a local cluster, merges three models of 134 million parameters on it, and
does harm at a random moment or at a chosen one. Then every file of the output is compared with that
of a run without a cluster, byte for byte; of lazymerge.json, what the merge decides. `lazymerge
verify` must find nothing, .lazymerge be gone, and every command have ended with the code and the
advice that the documents promise.

Workers are slowed down to 20 MB/s each and groups are small, so that a merge takes some seconds and
every worker makes a dozen groups (cluster_faults/hooks.py, cluster_faults/client.py): nothing of
that is in lazymerge itself.

The table goes to stdout as Markdown; trials and what is wrong with them to stderr. Exit 1 if
anything is; logs of such trials are kept.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cluster_faults.bench import Bench
from cluster_faults.kinds import KINDS
from cluster_faults.mutations import MUTATIONS, VARIABLE
from cluster_faults.trial import SkippedError, Trial


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one trial. skipped: why it could not be made."""

    kind: str
    wrong: list[str]
    was_struck: bool
    seconds: float
    skipped: str = ""


def run_trial(bench: Bench, kind: str, number: int, seed: int, *, is_told: bool) -> Outcome:
    """Makes one trial. is_told: says what was done even if nothing is wrong."""
    began = time.monotonic()
    trial = Trial(bench, kind, number, seed)
    skipped = ""
    try:
        KINDS[kind].make(trial)
    except SkippedError as error:
        skipped = str(error)
    except Exception as error:  # a broken trial is one that proves nothing
        trial.complain(f"{type(error).__name__}: {error}")
    finally:
        trial.close()
    seconds = time.monotonic() - began
    state = "skipped: " + skipped if skipped else "WRONG" if trial.wrong else "right"
    lines = [f"{kind} {number} (seed {seed}), {seconds:.1f} s: {state}"]
    if trial.wrong or is_told:
        lines += [f"    {event}" for event in trial.events]
    if trial.wrong:
        lines.append(f"    logs: {trial.folder / 'logs'}")
        shutil.rmtree(trial.output, ignore_errors=True)
    else:
        shutil.rmtree(trial.folder, ignore_errors=True)
    print("\n".join(lines), file=sys.stderr, flush=True)
    return Outcome(kind, trial.wrong, trial.was_struck, seconds, skipped)


def table(outcomes: list[Outcome]) -> list[str]:
    """A row for every kind."""
    rows = [
        "| harm | `--faults` | trials | struck | wrong | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        of_kind = [outcome for outcome in outcomes if outcome.kind == name]
        if not of_kind:
            continue
        tried = [outcome for outcome in of_kind if not outcome.skipped]
        if not tried:
            rows.append(f"| {kind.words} | {name} | 0 | | {of_kind[0].skipped} | |")
            continue
        rows.append(
            f"| {kind.words} | {name} | {len(tried)} | {sum(o.was_struck for o in tried)} "
            f"| {sum(bool(o.wrong) for o in tried)} | {median(o.seconds for o in tried):.0f} |"
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--trials", type=int, help="of each kind; default: as many as it deserves")
    parser.add_argument("--numbers", nargs="+", type=int, help="only these of each kind")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--jobs", type=int, default=3, help="trials at a time")
    parser.add_argument("--folder", type=Path, help="for models and outputs; default: a new one")
    parser.add_argument("--mutation", choices=MUTATIONS, help="build a mistake in")
    parser.add_argument("--tell", action="store_true", help="say what is done in every trial")
    parsed = parser.parse_args(arguments)
    seed = secrets.randbits(32) if parsed.seed is None else parsed.seed
    # shells have what they start in the background ignore it, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if parsed.mutation is not None:
        os.environ[VARIABLE] = parsed.mutation
    folder = parsed.folder or Path(tempfile.mkdtemp(prefix="lazymerge-matrix-"))
    began = time.monotonic()
    bench = Bench(folder)
    print(f"seed {seed}, in {folder}", file=sys.stderr, flush=True)
    wanted = [
        (kind, number)
        for kind in parsed.faults
        for number in parsed.numbers or range(parsed.trials or KINDS[kind].times)
    ]
    with ThreadPoolExecutor(parsed.jobs) as pool:
        begun = [
            pool.submit(run_trial, bench, kind, number, seed, is_told=parsed.tell)
            for kind, number in wanted
        ]
        try:
            outcomes = [each.result() for each in begun]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # those that have begun clean up after themselves
            raise
    print("\n".join(table(outcomes)))
    print(
        f"\n{len(outcomes)} trials, {parsed.jobs} at a time; seed {seed}, "
        f"{time.monotonic() - began:.0f} s"
    )
    if any(outcome.wrong for outcome in outcomes):
        bench.remove_models()
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
