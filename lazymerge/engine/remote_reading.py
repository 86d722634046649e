"""What a run has its inputs by that lie elsewhere: cache, whole files, requests ahead of use."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from ..checkpoint.range_cache import RangeCache
from ..graph.graph import Graph
from ..sizes import format_bytes
from . import needed_ranges
from .fetching import Fetcher
from .memory import MemoryPlan, connection_bytes
from .needed_ranges import chunks_of, path_of, reads_of_task
from .network import Network
from .remote_inputs import Distant, is_held_whole
from .stages import TensorTask
from .whole_files import fill_cache, load


def open_fetcher(
    graph: Graph,
    tasks: Sequence[TensorTask],
    files: Mapping[str, Distant],
    network: Network,
    memory: MemoryPlan,
    is_stopped: Callable[[], bool],
    noted: Callable[[str], None],
) -> Fetcher:
    """Begins to fetch what some tasks read.

    files: that lie elsewhere, by path. noted: is told what a person should know.

    Raises:
        InputError: the cache cannot be used, or a file is not what it was.
        LazymergeError: a file does not come.
    """
    reads = {read.id: read for task in tasks for read in reads_of_task(graph, task)}
    layouts = chunks_of(
        [read for read in reads.values() if path_of(read) in files], network.gap_bytes
    )
    whole = {path: files[path] for path in layouts if not files[path].has_ranges}
    in_memory = {path: file for path, file in whole.items() if is_held_whole(file, network)}
    with ExitStack() as undo:
        cache = None
        if network.cache_folder is not None:
            cache = RangeCache(
                network.cache_folder, network.cache_limit_bytes, needed_ranges.CHUNK_BYTES
            )
            undo.callback(cache.close)
        _tell_of_whole(in_memory, "memory", noted)
        held = load(in_memory, layouts, network.connections)
        for descriptor in held.values():
            undo.callback(os.close, descriptor)
        if cache is not None:
            missing = {
                path: file
                for path, file in whole.items()
                if path not in held
                and not cache.has(file.identity, layouts[path].starts[0], layouts[path].stops[-1])
            }
            _tell_of_whole(missing, "the cache", noted)
            fill_cache(cache, missing, layouts, network.connections)
        undo.pop_all()
    held_bytes = sum(layouts[path].held_bytes for path in held)
    return Fetcher(
        graph,
        tasks,
        {path: file for path, file in files.items() if path not in held},
        memory.fetch_bytes - connection_bytes(network) - held_bytes,
        memory.workers,
        is_stopped,
        network,
        cache,
        held,
        held_bytes,
    )


def _tell_of_whole(files: Mapping[str, Distant], where: str, noted: Callable[[str], None]) -> None:
    if files:
        size = format_bytes(sum(file.size_bytes for file in files.values()))
        noted(f"{size} of files that come whole are read into {where} first")


def tell_of_cache(fetcher: Fetcher, noted: Callable[[str], None]) -> None:
    """Says what came from the cache, and what is wrong with it."""
    cache = fetcher.cache
    if cache is None:
        return
    found, brought = cache.found_bytes, cache.brought_bytes
    if found:
        share = "all" if not brought else format_bytes(found)
        noted(f"{share} of {format_bytes(found + brought)} came from the cache {cache.folder}")
    if cache.problem is not None:
        noted(f"the cache {cache.folder} could not be written to: {cache.problem}")
