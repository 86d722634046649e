#!/usr/bin/env python3
"""Time lazymerge against mergekit: same recipes, same inputs, same disk.

    python scripts/bench_vs_mergekit.py --work /tmp/bench --runs 3 --compare --json bench.json

In the work folder it makes a virtual environment with mergekit (unless --mergekit-venv names one)
and three synthetic bfloat16 Llama checkpoints: a base, and two perturbations of it. For every
method it then runs, as cold processes,

    python -m lazymerge run RECIPE -o OUT --no-fsync --overwrite -q
    mergekit-yaml RECIPE OUT --quiet

with this script's python for the former. --no-fsync because mergekit does not sync its output
either. Before each run the inputs are read once, so that they are in the page cache if they fit,
and dirty pages of earlier runs are written back; the output is deleted after it. The programs
take turns, and who goes first alternates. The default size needs 9 GB of disk (11 GB with
--compare) and memory for mergekit.

At the end, or on an interrupt, outputs are deleted, and so are the checkpoints that this call made
unless --keep is given. A work folder that --work named keeps its mergekit, recipes and logs.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarking.inputs import (
    SIZES,
    make_checkpoints,
    recipe_document,
    recipe_inputs,
    tensor_bytes,
    warm_page_cache,
    write_recipe,
)
from benchmarking.processes import (
    SCRIPTS,
    BenchError,
    delete,
    lazymerge_environment,
    offline_environment,
    run_measured,
    run_plain,
)
from benchmarking.programs import (
    PEERS,
    lazymerge_command,
    machine_facts,
    make_venv,
    mergekit_command,
    peer_facts,
)

METHODS = ("linear", "task_arithmetic", "slerp", "ties")

PROGRAMS = ("lazymerge", "mergekit")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one program.

    wall_s: from its start to its end as a process.
    cpu_s: user and system time of the process and of the children it waited for.
    peak_rss_bytes: of the largest single process among these.
    """

    method: str
    program: str
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """The medians of all runs of one program with one method.

    moved_bytes: every input of the recipe once and the output once, whatever the program really
        reads. moved_bytes_per_s: by the median of wall_s.
    """

    method: str
    program: str
    runs: int
    wall_s: float
    cpu_s: float
    peak_rss_bytes: float
    moved_bytes: int
    moved_bytes_per_s: float


def compare_outputs(one: Path, other: Path) -> dict[str, object]:
    """What check_ulp.py says about the distance of two merges, dtype by dtype."""
    script = str(SCRIPTS / "check_ulp.py")
    command = [sys.executable, script, "--between", str(one), str(other), "--json"]
    document = json.loads(run_plain(command, capture=True))
    dtypes = document["dtypes"]
    assert isinstance(dtypes, dict)
    return dtypes


def median_rows(
    measurements: Sequence[Measurement], moved_bytes: dict[tuple[str, str], int]
) -> list[Row]:
    """One row per method and program, in the order of the measurements."""
    rows: list[Row] = []
    for method in dict.fromkeys(measurement.method for measurement in measurements):
        for program in PROGRAMS:
            runs = [m for m in measurements if (m.method, m.program) == (method, program)]
            wall_s = statistics.median(run.wall_s for run in runs)
            moved = moved_bytes[method, program]
            rows.append(
                Row(
                    method=method,
                    program=program,
                    runs=len(runs),
                    wall_s=wall_s,
                    cpu_s=statistics.median(run.cpu_s for run in runs),
                    peak_rss_bytes=statistics.median(run.peak_rss_bytes for run in runs),
                    moved_bytes=moved,
                    moved_bytes_per_s=moved / wall_s,
                )
            )
    return rows


def print_report(
    facts: dict[str, str],
    rows: Sequence[Row],
    measurements: Sequence[Measurement],
    comparisons: dict[str, dict[str, object]],
    size: str,
    input_bytes: int,
) -> None:
    """The table, and what is needed to read it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # in a pipe rich assumes 80 columns and would cut numbers
    for name, value in facts.items():
        console.print(f"{name:>10}  {value}", highlight=False)
    table = Table(title=f"{size}, bfloat16, {input_bytes / 1e9:.2f} GB per model")
    table.add_column("method")
    table.add_column("program")
    for column in ("wall s", "(min-max)", "CPU s", "peak RSS GB", "GB/s"):
        table.add_column(column, justify="right")
    for column in ("wall", "CPU", "peak RSS"):
        table.add_column(f"{column} ratio", justify="right")
    theirs = {row.method: row for row in rows if row.program == "mergekit"}
    for row in rows:
        walls = [
            run.wall_s
            for run in measurements
            if (run.method, run.program) == (row.method, row.program)
        ]
        other = theirs[row.method]
        ratios = ["", "", ""]
        if row.program == "lazymerge":
            ratios = [
                f"{other.wall_s / row.wall_s:.2f}",
                f"{other.cpu_s / row.cpu_s:.2f}",
                f"{other.peak_rss_bytes / row.peak_rss_bytes:.2f}",
            ]
        table.add_row(
            row.method,
            row.program,
            f"{row.wall_s:.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            f"{row.cpu_s:.2f}",
            f"{row.peak_rss_bytes / 1e9:.2f}",
            f"{row.moved_bytes_per_s / 1e9:.2f}",
            *ratios,
            end_section=row.program == PROGRAMS[-1],
        )
    console.print(table)
    console.print(
        f"Runs per number: {rows[0].runs}. Every number is its own median over them; a ratio is "
        "mergekit's median divided by lazymerge's (above 1: lazymerge needs less). Wall time "
        "includes starting python. Peak RSS is that of the largest single process and includes "
        "the pages of mapped files. GB/s: input and output files once each, by the median wall "
        "time. GB are 1e9 bytes.",
        highlight=False,
    )
    for method, dtypes in comparisons.items():
        for dtype, found in dtypes.items():
            assert isinstance(found, dict)
            console.print(
                f"{method}: of {found['elements']:,} {dtype} elements {found['above_one']:,} "
                f"differ by more than one ulp of the output dtype between the programs, at most "
                f"by {found['max_error']:.0f} (representable values from one to the other; many "
                f"near zero), {found['max_difference']:.3g} in absolute terms",
                highlight=False,
            )


def benchmark(parsed: argparse.Namespace, work: Path, to_delete: list[Path]) -> None:
    """Measure and print; what must not stay behind is added to to_delete as it comes up."""
    venv = parsed.mergekit_venv or work / "mergekit-venv"
    if parsed.mergekit_venv is None:
        make_venv(venv, PEERS["mergekit"])
    elif not (venv / "bin" / "mergekit-yaml").exists():
        raise BenchError(f"{venv / 'bin' / 'mergekit-yaml'}: not there")
    facts = {**machine_facts(work), "mergekit": peer_facts(PEERS["mergekit"], venv)}
    inputs, made = make_checkpoints(work, parsed.size)
    if not parsed.keep:
        to_delete += made
    outputs = {program: work / f"out-{program}" for program in PROGRAMS}
    to_delete += outputs.values()

    measurements: list[Measurement] = []
    moved_bytes: dict[tuple[str, str], int] = {}
    comparisons: dict[str, dict[str, object]] = {}
    for method in parsed.methods:
        recipe = work / f"{parsed.size}-{method}.yml"
        document = recipe_document(method, list(inputs.values()))
        write_recipe(recipe, document)
        used = recipe_inputs(document)
        commands = {
            "lazymerge": (
                lazymerge_command(recipe, outputs["lazymerge"], "-q"),
                lazymerge_environment(),
            ),
            "mergekit": (
                mergekit_command(venv, recipe, outputs["mergekit"]),
                offline_environment(),
            ),
        }
        for run in range(parsed.runs):
            order = PROGRAMS if run % 2 == 0 else PROGRAMS[::-1]
            for program in order:
                output = outputs[program]
                delete([output])
                warm_page_cache(used)
                log = work / f"{program}.log"
                measured = run_measured(*commands[program], log)
                measurement = Measurement(
                    method, program, measured.wall_s, measured.cpu_s, measured.peak_rss_bytes
                )
                measurements.append(measurement)
                print(
                    f"{method} run {run + 1} of {parsed.runs}, {program}: "
                    f"{measured.wall_s:.2f} s, CPU {measured.cpu_s:.2f} s, "
                    f"peak {measured.peak_rss_bytes / 1e9:.2f} GB",
                    file=sys.stderr,
                )
                written_bytes = tensor_bytes(output)
                if written_bytes == 0:
                    raise BenchError(f"{program} ended well but left no safetensors in {output}")
                read_bytes = tensor_bytes(*used)
                moved_bytes[method, program] = read_bytes + written_bytes
                if not (parsed.compare and run == parsed.runs - 1):
                    delete([output])
        if parsed.compare:
            comparisons[method] = compare_outputs(outputs["lazymerge"], outputs["mergekit"])
            delete(list(outputs.values()))

    rows = median_rows(measurements, moved_bytes)
    print_report(facts, rows, measurements, comparisons, parsed.size, tensor_bytes(inputs["base"]))
    if parsed.json is not None:
        document = {
            "facts": facts,
            "size": parsed.size,
            "rows": [asdict(row) for row in rows],
            "runs": [asdict(measurement) for measurement in measurements],
            "between_the_programs": comparisons,
        }
        parsed.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    for method in methods:
        if method not in METHODS:
            raise argparse.ArgumentTypeError(
                f"no method {method!r}; there are {', '.join(METHODS)}"
            )
    return methods


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where all files go (default: a temporary folder)"
    )
    parser.add_argument(
        "--methods", type=_methods, default=list(METHODS), help="default: " + ",".join(METHODS)
    )
    parser.add_argument("--runs", type=_positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--size", choices=SIZES, default="1.1b", help="default: 1.1b")
    parser.add_argument("--mergekit-venv", type=Path, metavar="DIR", help="one that exists already")
    parser.add_argument("--compare", action="store_true", help="also compare the two outputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints it makes")
    parsed = parser.parse_args(arguments)

    temporary = parsed.work is None
    work = Path(tempfile.mkdtemp(prefix="bench-")) if temporary else parsed.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had them ignored
        signal.signal(signal_number, _interrupt)
    to_delete: list[Path] = []
    if temporary:
        if parsed.keep:
            print(f"working in {work}", file=sys.stderr)
        else:
            to_delete.append(work)
    try:
        benchmark(parsed, work, to_delete)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        delete(to_delete)
    return 0


if __name__ == "__main__":
    sys.exit(main())
