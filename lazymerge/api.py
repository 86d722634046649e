"""The same things from Python as from the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .adapters import open_model
from .checkpoint import Checkpoint
from .engine import comparison, unfinished
from .engine import intermediates as parts
from .engine.blocks import DeviceClass
from .engine.comparing import run_comparison
from .engine.comparison import Comparison
from .engine.download import missing_files
from .engine.execution import DEFAULT_READ_MODE, ReadMode
from .engine.network import network
from .engine.output_report import OutputReport, report_of
from .engine.plan import DEFAULT_MAX_SHARD_BYTES, Plan
from .engine.planning import plan_recipe_file
from .engine.report import Observer, RunReport
from .engine.resources import Resources
from .engine.run import run_plan
from .engine.saved_plans import load_plan
from .engine.store.contents import check_no_intermediates, unfinished_plan
from .engine.store.run import run_into_store
from .engine.store.status import store_status
from .engine.store.verification import verify_in_store
from .engine.verification import Checked, Verification, verify_output
from .errors import InputError
from .inspection.checkpoint import Inspection, inspect_checkpoint
from .inspection.scan import Scanned, scan_checkpoint
from .inspection.suspicions import Suspicion
from .inspection.suspicions import suspicions as find_suspicions
from .output.status import OutputStatus, output_status
from .output.store.address import StoreAddress, local_place, place_of
from .sizes import format_bytes, parse_size

if TYPE_CHECKING:
    from .cluster.workforce import DaskWorkforce


def plan(
    recipe: Path | str,
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    read_mode: ReadMode = DEFAULT_READ_MODE,
    device: DeviceClass | None = None,
    vram: int | str | None = None,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_BYTES,
    truncate_embeddings: bool = False,
    seed: int | None = None,
    statistics: bool = False,
    stream: bool = False,
    cache: Path | str | None = None,
    cache_limit: int | str | None = None,
    whole_files: bool = False,
    connections: int | None = None,
    max_gap: int | str | None = None,
) -> Plan:
    """Plans a merge from headers alone; reads no tensor data and writes nothing.

    recipe: path of a recipe (YAML), or of a saved plan (.json).
    memory: bound of the process's peak resident set, in bytes or as "512MiB"; by default 2 GiB or
        half of what is available.
    workers: threads that compute; by default one per processor.
    read_mode: how inputs are read, "pread" or "mmap"; the output is the same.
    device: "cpu" or "cuda"; by default that of a saved plan, else "cpu".
    vram: bound of what is allocated on the GPU, in bytes or as "4GiB"; by default 80% of what is
        free when the plan is run.
    max_shard_size: largest output file, in bytes or as "5GB".
    truncate_embeddings: merge the common leading rows where vocabularies differ in size.
    seed: of random methods, in place of the recipe's.
    statistics: the run is to gather what the merge does to every tensor, for `report`.
    stream: models of the Hub that are not in its cache are read over the network while they are
        merged, and not downloaded first.
    cache: folder where what is fetched of inputs that lie elsewhere is kept for later runs.
    cache_limit: that it may occupy, in bytes or as "100GB"; by default half of what is free there.
    whole_files: files of servers that send no ranges are read from beginning to end, into the cache
        or else into memory.
    connections: requests at a time; by default 8, or LAZYMERGE_CONNECTIONS.
    max_gap: bytes between two ranges that are fetched with them, or as "4MiB"; by default 1 MiB, or
        LAZYMERGE_MAX_GAP.

    Raises:
        RecipeError: the recipe is wrong; all its problems are named with their lines.
        InputError: a model cannot be opened, or tensors cannot be merged.
        DoesNotFitError: the memory does not suffice.
    """
    resources = Resources(
        limit_bytes=parse_size(memory) if isinstance(memory, str) else memory,
        device=device,
        vram_limit_bytes=parse_size(vram) if isinstance(vram, str) else vram,
        workers=workers,
        read_mode=read_mode,
        gathers=statistics,
        streams=stream,
        network=network(cache, cache_limit, whole_files, connections, max_gap),
    )
    if Path(recipe).suffix == ".json":
        if seed is not None:
            raise InputError(
                f"{recipe} is a saved plan, and its random numbers are part of it; plan the recipe "
                "again with the other seed"
            )
        return load_plan(recipe, resources)
    return plan_recipe_file(
        recipe,
        resources,
        max_shard_bytes=(
            parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        ),
        truncate_embeddings=truncate_embeddings,
        seed=seed,
    )


def suspicions(plan: Plan) -> tuple[Suspicion, ...]:
    """What looks wrong about a merge, mistakes first; no tensor data is read.

    Every one has a `kind` (a short slug), a `message` (one sentence that names what to do) and a
    `severity`: "mistake" where it is very likely wrong, "note" where it is worth knowing.
    """
    return find_suspicions(plan)


def run(
    plan: Plan,
    output: Path | str,
    *,
    intermediates: Mapping[str, Path | str] | None = None,
    overwrite: bool = False,
    fsync: bool = True,
    observer: Observer | None = None,
    strict: bool = False,
    recheck: bool = False,
    hash_inputs: bool = False,
    statistics: bool = False,
    cluster: str | None = None,
    worker_memory: int | str | None = None,
) -> RunReport:
    """Runs a plan into a folder, or goes on with what an earlier run of it has left there.

    output: a folder that is empty, does not exist, or holds an unfinished output of the same plan;
        or the address of such a prefix in an object store, "s3://bucket/prefix".
    intermediates: folders of merges that the recipe uses, by name: they are written too, before it.
    overwrite: replace what an earlier merge has left there.
    fsync: wait until the data is on disk before files get their final names.
    observer: is told how the run proceeds, from the workers' threads.
    strict: inf or nan in the output is an error; without it the report names the tensors.
    recheck: read what an earlier run has finished before believing it.
    hash_inputs: read all inputs once before, so that any change of them is noticed.
    statistics: gather on the way what the merge did to every tensor, for `report`.
    cluster: a Dask cluster that makes the tensors: "local:4", "tls://host:8786".
    worker_memory: bound of each of its processes, in bytes or as "4GiB"; by default 60% of what
        the Dask worker has.

    Raises:
        InputError: the folder cannot be used, or integer tensors differ between models.
        DoesNotFitError: the disk is full.
        LazymergeError: reading or writing fails.

    Whatever it raises, tensors that are complete stay, for another run to go on with; if there are
    none, the files it has made are removed.
    """
    plan = plan.with_statistics() if statistics else plan
    place = place_of(output)
    workforce = None if cluster is None else _workforce(cluster, worker_memory)
    if isinstance(place, StoreAddress):
        check_no_intermediates(place, intermediates or {})
        return run_into_store(
            plan,
            place,
            overwrite=overwrite,
            observer=observer,
            strict=strict,
            recheck=recheck,
            hash_inputs=hash_inputs,
            workforce=workforce,
        )
    outputs = parts.outputs_of(plan, output, intermediates or {})
    is_one = len(outputs) == 1
    if not is_one:
        parts.check_outputs(outputs, overwrite=overwrite)
        if overwrite:
            parts.clear_earlier(outputs, fsync=fsync)
    reports = [
        run_plan(
            each.plan,
            each.folder,
            overwrite=overwrite and is_one,  # of several all is replaced by now
            fsync=fsync,
            observer=observer,
            strict=strict,
            recheck=recheck,
            hash_inputs=hash_inputs,
            workforce=workforce,
        )
        for each in outputs
    ]
    return reports[-1]


def _workforce(cluster: str, worker_memory: int | str | None) -> DaskWorkforce:
    from .cluster.connection import parse_address
    from .cluster.workforce import DaskWorkforce

    limit = parse_size(worker_memory) if isinstance(worker_memory, str) else worker_memory
    return DaskWorkforce(parse_address(cluster), limit_bytes=limit)


def plan_intermediate(plan: Plan, name: str) -> Plan:
    """The plan that writes one of the merges that the others of its recipe use, which else is never
    written: with the same bytes that they are made from, rounded once, to its own dtype.

    Raises:
        InputError: the recipe uses no merge of that name.
        DoesNotFitError: the memory does not suffice.
    """
    return parts.plan_intermediate(plan, name)


def plan_of_unfinished(
    output: Path | str,
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    read_mode: ReadMode = DEFAULT_READ_MODE,
    vram: int | str | None = None,
    cache: Path | str | None = None,
    cache_limit: int | str | None = None,
    connections: int | None = None,
    max_gap: int | str | None = None,
) -> Plan:
    """The plan that an unfinished output was begun by; `run` it into the same folder to go on.

    As of `plan`.

    Raises:
        InputError: there is nothing unfinished, or recipe, inputs or version have changed since.
        DoesNotFitError: the memory does not suffice.
    """
    resources = Resources(
        limit_bytes=parse_size(memory) if isinstance(memory, str) else memory,
        vram_limit_bytes=parse_size(vram) if isinstance(vram, str) else vram,
        workers=workers,
        read_mode=read_mode,
        network=network(cache, cache_limit, False, connections, max_gap),
    )
    place = place_of(output)
    if isinstance(place, StoreAddress):
        return unfinished_plan(place, resources)
    return unfinished.plan_of_unfinished(place, resources)


def resume(
    output: Path | str,
    *,
    memory: int | str | None = None,
    observer: Observer | None = None,
    cluster: str | None = None,
    worker_memory: int | str | None = None,
) -> RunReport:
    """Goes on with an unfinished output. As `plan_of_unfinished`, then `run`."""
    return run(
        plan_of_unfinished(output, memory=memory),
        output,
        observer=observer,
        cluster=cluster,
        worker_memory=worker_memory,
    )


def status(output: Path | str) -> OutputStatus:
    """How far an output is.

    Raises:
        InputError: it is no output of lazymerge.
    """
    place = place_of(output)
    return store_status(place) if isinstance(place, StoreAddress) else output_status(place)


def inspect(
    model: str | Checkpoint,
    *,
    scan: bool = False,
    memory: int | str | None = None,
    workers: int | None = None,
    scanned: Scanned | None = None,
    stream: bool = False,
) -> Inspection:
    """What is in a model, and what looks wrong about it: from its headers and small files, or from
    all of its data.

    model: as recipes name one (a folder, a file, an id on the Hub, an address, with an adapter or
        without), or one that is open.
    scan: read all tensors once, for nan, inf, zeros, outliers and layers that are equal.
    memory: bound of the process's peak resident set while it does, in bytes or as "512MiB".
    workers: threads that read; by default one per processor.
    scanned: is told after every tensor: its bytes, its name. From these threads.
    stream: a model of the Hub that is not in its cache is scanned over the network.

    Raises:
        InputError: it cannot be opened, or is not on this machine and is to be scanned.
        DoesNotFitError: the memory does not suffice.
        LazymergeError: reading fails.
    """
    checkpoint = open_model(model) if isinstance(model, str) else model
    if not scan:
        return inspect_checkpoint(checkpoint)
    missing = () if stream else missing_files([checkpoint], checkpoint.folder, ())
    if missing:
        size = format_bytes(sum(file.size_bytes for file in missing))
        raise InputError(
            f"{checkpoint.reference}: {size} in {len(missing)} files are not on this machine yet "
            f"({missing[0].name}); read them over the network with --stream, or download them "
            f"first: hf download {missing[0].source.repository}"
        )
    limit = parse_size(memory) if isinstance(memory, str) else memory
    scans = scan_checkpoint(
        checkpoint, memory=limit, workers=workers, scanned=scanned, streams=stream
    )
    return inspect_checkpoint(checkpoint, scans)


def verify(
    output: Path | str,
    *,
    recompute: int = 0,
    seed: int | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    checked: Checked | None = None,
) -> Verification:
    """Compares a complete output with its manifest and, for some tensors, with its inputs.

    recompute: how many tensors to merge again. seed: which ones.
    checked: is told after every tensor: its bytes, its name.

    Raises:
        InputError: it is no complete output, or its inputs are not what they were.
    """
    resources = Resources(
        limit_bytes=parse_size(memory) if isinstance(memory, str) else memory, workers=workers
    )
    place = place_of(output)
    if isinstance(place, StoreAddress):
        return verify_in_store(
            place, recompute=recompute, seed=seed, resources=resources, checked=checked
        )
    return verify_output(
        place, recompute=recompute, seed=seed, resources=resources, checked=checked
    )


def report(output: Path | str) -> OutputReport:
    """What a merge that is complete took, and what it did to its models.

    Its `statistics` hold every tensor's moments; `engine.statistics.change_of` gives norms, cosines
    and shares of one tensor or of several. None where the merge was made without statistics.

    Raises:
        InputError: it is no complete output, or its documents are damaged.
    """
    return report_of(local_place(output))


def diff(
    first: str | Path,
    second: str | Path,
    *,
    memory: int | str | None = None,
    workers: int | None = None,
    tensors: str | None = None,
    stream: bool = False,
) -> Comparison:
    """How two models differ, tensor by tensor, in one pass over both; nothing is written.

    first, second: folders, files, ids on the Hub, addresses, model+adapter; the first is the
        reference.
    memory, workers: as of `plan`.
    tensors: a regular expression; tensors with such names alone.
    stream: models of the Hub that are not in its cache are read over the network.

    Raises:
        InputError: a model cannot be opened.
        DoesNotFitError: the memory does not suffice.
        LazymergeError: reading fails.
        re.error: `tensors` is no regular expression.
    """
    pattern = None if tensors is None else re.compile(tensors)
    plan = comparison.plan_comparison(
        str(first),
        str(second),
        Resources(
            limit_bytes=parse_size(memory) if isinstance(memory, str) else memory,
            workers=workers,
            streams=stream,
        ),
        lambda name: pattern is None or pattern.search(name) is not None,
    )
    return run_comparison(plan)
