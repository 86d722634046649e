"""What a run has its inputs by that lie elsewhere: cache, whole files, requests ahead of use."""

from __future__ import annotations

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
        if whole:
            size = sum(file.size_bytes for file in whole.values())
            where = "memory" if in_memory else "the cache"
            noted(f"{format_bytes(size)} of files that come whole are read into {where} first")
        if cache is not None:
            cached = {path: file for path, file in whole.items() if path not in in_memory}
            fill_cache(cache, cached, layouts, network.connections)
        held = load(in_memory, layouts, network.connections)
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


def tell_of_cache(fetcher: Fetcher, noted: Callable[[str], None]) -> None:
    """Says what came from the cache, and what is wrong with it."""
    cache = fetcher.cache
    if cache is None:
        return
    noted(f"{format_bytes(cache.found_bytes)} of what was read came from the cache {cache.folder}")
    if cache.problem is not None:
        noted(f"the cache {cache.folder} could not be written to: {cache.problem}")
