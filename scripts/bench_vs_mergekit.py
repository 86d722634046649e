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
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

# This process imports neither torch nor numpy. A child's peak memory, as the kernel counts it,
# starts from that of the process that forked it, so a large parent would be charged to the child.

SCRIPTS = Path(__file__).resolve().parent

SIZES: dict[str, str] = {
    "0.1b": "llama-0.1b",
    "1.1b": "tinyllama-1.1b",
    "3b": "llama-3b",
    "7b": "llama2-7b",
    "13b": "llama2-13b",
}
"""Shape of make_synthetic_checkpoint.py by the name of the size."""

MERGEKIT_REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")
"""Installed one after the other: mergekit alone would bring any torch."""

RECIPES: dict[str, str] = {
    "linear": """\
merge_method: linear
models:
  - model: {base}
    parameters: {{weight: 0.2}}
  - model: {a}
    parameters: {{weight: 0.5}}
  - model: {b}
    parameters: {{weight: 0.3}}
dtype: bfloat16
""",
    "task_arithmetic": """\
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 0.6}}
  - model: {b}
    parameters: {{weight: 0.4}}
dtype: bfloat16
""",
    "slerp": """\
merge_method: slerp
base_model: {a}
models:
  - model: {a}
  - model: {b}
parameters:
  t: 0.4
dtype: bfloat16
""",
    "ties": """\
merge_method: ties
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 0.6, density: 0.5}}
  - model: {b}
    parameters: {{weight: 0.4, density: 0.5}}
dtype: bfloat16
""",
}
"""By method; base, a and b are filled in."""

PROGRAMS = ("lazymerge", "mergekit")


class BenchError(Exception):
    """The benchmark cannot go on."""


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


def offline_environment() -> dict[str, str]:
    """The environment of every child: nothing is looked up on the network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def lazymerge_environment() -> dict[str, str]:
    """As offline_environment, and the lazymerge of this script's checkout, installed or not."""
    environment = offline_environment()
    paths = [str(SCRIPTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def run_measured(
    command: Sequence[str], environment: dict[str, str], log: Path
) -> tuple[float, float, int]:
    """Run a command to its end: wall seconds, CPU seconds, peak resident bytes.

    log: receives what it prints. Raises BenchError, with the end of the log, when it fails.
    On an interrupt the child is ended before the exception goes on.
    """
    with log.open("wb") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the child and its children
            process.wait()
            raise
        wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise BenchError(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    rss_unit = 1 if sys.platform == "darwin" else 1024
    return wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * rss_unit


def run_plain(
    command: Sequence[str], environment: dict[str, str] | None = None, *, capture: bool = False
) -> str:
    """Run a command that is not measured; returns its stdout when captured."""
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


def make_mergekit_venv(folder: Path) -> None:
    """A virtual environment with mergekit, made once."""
    if (folder / "bin" / "mergekit-yaml").exists():
        return
    print(f"installing mergekit in {folder}", file=sys.stderr)
    try:
        run_plain([sys.executable, "-m", "venv", "--clear", str(folder)])
        for requirement in MERGEKIT_REQUIREMENTS:
            run_plain([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", requirement])
    except BaseException:
        delete([folder])
        raise


def make_checkpoints(folder: Path, size: str) -> tuple[dict[str, Path], list[Path]]:
    """The three checkpoints by role, and those that had to be made."""
    paths = {role: folder / f"{size}-{role}" for role in ("base", "a", "b")}
    made: list[Path] = []
    base = str(paths["base"])
    contents = {
        "base": ["--random", "--shape", SIZES[size], "--dtype", "bfloat16", "--tokenizer"],
        "a": ["--perturb-of", base, "--scale", "0.002"],
        "b": ["--perturb-of", base, "--scale", "0.002"],
    }
    for seed, (role, path) in enumerate(paths.items(), start=1):
        if (path / "config.json").exists():  # written last: the checkpoint is complete
            continue
        made.append(path)
        script = str(SCRIPTS / "make_synthetic_checkpoint.py")
        try:
            run_plain([sys.executable, script, str(path), *contents[role], "--seed", str(seed)])
        except BaseException:
            delete(made)
            raise
    return paths, made


def tensor_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def warm_page_cache(folders: Sequence[Path]) -> None:
    """Write back what earlier runs left dirty, and read the inputs once."""
    os.sync()
    buffer = bytearray(1 << 20)
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def delete(folders: Sequence[Path]) -> None:
    """Delete folders, whether they exist or not."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def compare_outputs(one: Path, other: Path) -> dict[str, object]:
    """What check_ulp.py says about the distance of two merges, dtype by dtype."""
    script = str(SCRIPTS / "check_ulp.py")
    command = [sys.executable, script, "--between", str(one), str(other), "--json"]
    document = json.loads(run_plain(command, capture=True))
    dtypes = document["dtypes"]
    assert isinstance(dtypes, dict)
    return dtypes


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder; empty where the system does not say."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    for line in mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []:
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0]
    return ""


def machine_facts(mergekit_python: Path, work: Path) -> dict[str, str]:
    """What the numbers depend on."""
    versions_of = (
        "import importlib.metadata as m, sys; print(sys.version.split()[0], "
        "m.version('torch'), m.version('safetensors'), m.version('mergekit'))"
    )
    python, torch, safetensors, mergekit = run_plain(
        [str(mergekit_python), "-c", versions_of], capture=True
    ).split()
    lazymerge = run_plain(
        [sys.executable, "-c", "from lazymerge.version import __version__ as v; print(v)"],
        lazymerge_environment(),
        capture=True,
    ).strip()
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes / 2**30:.1f} GiB",
        "load": f"{os.getloadavg()[0]:.2f} before the first run",  # others at work slow both
        "system": f"{platform.system()} {platform.release()}, files on {file_system(work) or '?'}",
        "lazymerge": f"{lazymerge} (python {platform.python_version()}, "
        f"torch {importlib.metadata.version('torch')}, "
        f"safetensors {importlib.metadata.version('safetensors')})",
        "mergekit": f"{mergekit} (python {python}, torch {torch}, safetensors {safetensors})",
    }


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
        make_mergekit_venv(venv)
    mergekit = venv / "bin" / "mergekit-yaml"
    if not mergekit.exists():
        raise BenchError(f"{mergekit}: not there")
    facts = machine_facts(venv / "bin" / "python", work)
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
        recipe.write_text(
            RECIPES[method].format(**{role: path.resolve() for role, path in inputs.items()}),
            encoding="utf-8",
        )
        used = [path for role, path in inputs.items() if f"{{{role}}}" in RECIPES[method]]
        lazymerge_command = [sys.executable, "-m", "lazymerge", "run", str(recipe)]
        lazymerge_command += ["-o", str(outputs["lazymerge"]), "--no-fsync", "--overwrite", "-q"]
        mergekit_command = [str(mergekit), str(recipe), str(outputs["mergekit"]), "--quiet"]
        commands = {
            "lazymerge": (lazymerge_command, lazymerge_environment()),
            "mergekit": (mergekit_command, offline_environment()),
        }
        for run in range(parsed.runs):
            order = PROGRAMS if run % 2 == 0 else PROGRAMS[::-1]
            for program in order:
                output = outputs[program]
                delete([output])
                warm_page_cache(used)
                log = work / f"{program}.log"
                wall_s, cpu_s, peak_rss_bytes = run_measured(*commands[program], log)
                measurement = Measurement(method, program, wall_s, cpu_s, peak_rss_bytes)
                measurements.append(measurement)
                print(
                    f"{method} run {run + 1} of {parsed.runs}, {program}: {wall_s:.2f} s, "
                    f"CPU {cpu_s:.2f} s, peak {peak_rss_bytes / 1e9:.2f} GB",
                    file=sys.stderr,
                )
                written_bytes = tensor_bytes(output)
                if written_bytes == 0:
                    raise BenchError(f"{program} ended well but left no safetensors in {output}")
                read_bytes = sum(tensor_bytes(path) for path in used)
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
        if method not in RECIPES:
            raise argparse.ArgumentTypeError(
                f"no method {method!r}; there are {', '.join(RECIPES)}"
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
        "--methods", type=_methods, default=list(RECIPES), help="default: " + ",".join(RECIPES)
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
