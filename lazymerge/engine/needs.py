"""How a merge is executed, and what that occupies: what is asked for, made to fit its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.node import Read
from ..output.layout import Shard
from ..recipe import Recipe
from .device.memory import DEFAULT_WORKERS, default_device_limit_bytes
from .execution import Execution
from .likeness import Kind
from .memory import MemoryPlan, default_limit_bytes, default_workers, plan_memory
from .needed_ranges import FetchNeeds, chunks_of, fetch_needs, path_of
from .remote_inputs import Distant, check_ranges, is_held_whole, remote_inputs
from .resources import Resources
from .stages import TensorTask
from .store.memory import StoreNeeds, store_needs
from .tokenizer import TokenizerPlan


def execution_of(
    resources: Resources, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]
) -> Execution:
    """How a merge is executed, of what is asked for."""
    if not resources.gathers:
        return resources.execution
    reference = checkpoints[recipe.main_model]
    files = frozenset(f"{reference.folder}/{file.path}" for file in reference.files)
    return replace(resources.execution, reference_files=files)


def memory_of(
    graph: Graph,
    kinds: tuple[Kind, ...],
    resources: Resources,
    execution: Execution,
    tokenizer: TokenizerPlan | None,
    fetches: FetchNeeds | None,
    store: StoreNeeds | None = None,
) -> MemoryPlan:
    """What a merge occupies, with the limit and the workers that are asked for, or by default.

    Raises:
        DoesNotFitError: the limit does not suffice.
    """
    limit, workers = resources.limit_bytes, resources.workers
    on_device = execution.device != "cpu"
    if limit is None:
        limit = default_device_limit_bytes() if on_device else default_limit_bytes()
    if workers is None:
        workers = default_workers()
        workers = min(DEFAULT_WORKERS, workers) if on_device else workers
    return plan_memory(
        graph,
        kinds,
        limit,
        workers,
        execution,
        beside_bytes=0 if tokenizer is None else tokenizer.held_bytes,
        planning_bytes=0 if tokenizer is None else tokenizer.planning_bytes,
        fetches=fetches,
        store=store,
    )


def store_needs_of(
    graph: Graph, shards: tuple[Shard, ...], execution: Execution
) -> StoreNeeds | None:
    """What must be held of an output on its way into a store; None where it is a folder.

    Raises:
        InputError: an accelerator is to compute it.
    """
    if not execution.stores:
        return None
    if execution.device != "cpu":
        raise InputError(
            f"--device {execution.device} writes to folders only: leave it out, or merge into a "
            "folder and copy that"
        )
    return store_needs(graph, shards, execution.device)


def fetch_needs_of(
    graph: Graph,
    tasks: tuple[TensorTask, ...],
    checkpoints: Mapping[str, Checkpoint],
    execution: Execution,
) -> FetchNeeds | None:
    """What must be held of inputs that lie elsewhere; None where there are none.

    Raises:
        InputError: one comes as a whole only, and may not.
    """
    paths = remote_inputs(checkpoints.values(), streams=execution.streams)
    return needs_of_remote(graph, tasks, paths, execution)


def needs_of_remote(
    graph: Graph,
    tasks: Sequence[TensorTask],
    paths: Mapping[str, Distant],
    execution: Execution,
) -> FetchNeeds | None:
    """As fetch_needs, for files that may come as a whole only. paths: of the files that lie
    elsewhere; None is returned where there are none.

    Raises:
        InputError: one comes as a whole only, and may not.
    """
    if not paths:
        return None
    network = execution.network
    chunks = chunks_of(
        (node for node in graph if isinstance(node, Read) and path_of(node) in paths),
        network.gap_bytes,
    )
    read = {path: paths[path] for path in chunks}
    check_ranges(read, network)
    whole = [path for path, file in read.items() if is_held_whole(file, network)]
    ranged = {path: file for path, file in paths.items() if path not in whole}
    needs = fetch_needs(graph, tasks, ranged, execution.device)
    return replace(needs, whole_bytes=sum(chunks[path].held_bytes for path in whole))
