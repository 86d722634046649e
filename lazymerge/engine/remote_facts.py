"""What is to be said of inputs that lie elsewhere: how much, from where, what a cache has of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.range_cache import (
    check_cache_folder,
    default_limit_bytes,
    held_bytes,
    is_keepable,
    taken_bytes,
)
from ..errors import DoesNotFitError
from ..output.folder import free_disk_bytes
from ..sizes import format_bytes, format_memory
from . import needed_ranges
from .memory import MemoryPlan
from .needed_ranges import FileChunks
from .network import Network
from .remote_inputs import Distant, is_held_whole


@dataclass(frozen=True, slots=True)
class CacheState:
    """A cache before a run. In bytes.

    folder: absolute. held_bytes: what it has of what the run reads.
    kept_bytes: what it will have of that afterwards. limit_bytes: that it may occupy.
    grows_bytes: by how much it may become larger.
    """

    folder: str
    held_bytes: int
    kept_bytes: int
    limit_bytes: int
    grows_bytes: int


def cache_state(
    files: Mapping[str, Distant],
    chunks: Mapping[str, FileChunks],
    network: Network,
    output_bytes: int,
) -> CacheState | None:
    """What a cache has of what is read. files: that lie elsewhere, by path. chunks: of them.

    Raises:
        InputError: the folder is something else.
        DoesNotFitError: files that come whole have no room in it.
    """
    folder = network.cache_folder
    if folder is None or not chunks:
        return None
    check_cache_folder(folder)
    needed = [
        (identity, place)
        for path, layout in chunks.items()
        if is_keepable(identity := files[path].identity)
        for place in zip(layout.starts, layout.stops, strict=True)
    ]
    held = held_bytes(folder, needed, needed_ranges.CHUNK_BYTES)
    total = sum(stop - start for _, (start, stop) in needed)
    limit = network.cache_limit_bytes
    if limit is None:
        limit = default_limit_bytes(folder, output_bytes)
    whole = sum(
        layout.stops[-1] - layout.starts[0]
        for path, layout in chunks.items()
        if not files[path].has_ranges and not is_held_whole(files[path], network)
    )
    if whole > limit:
        raise DoesNotFitError(
            f"{format_bytes(whole)} of files that come whole do not fit into the cache {folder} of "
            f"{format_bytes(limit)}: give it more (--cache-limit), or download the models"
        )
    room = max(0, limit - taken_bytes(folder))
    return CacheState(folder, held, min(total, limit), limit, min(room, total - held))


def check_cache_disk(state: CacheState | None, output: Path, output_bytes: int) -> None:
    """Checks that a cache has room to grow, beside what an output takes of the same disk.

    Raises:
        DoesNotFitError: it has not.
    """
    if state is None:
        return
    free = free_disk_bytes(Path(state.folder))
    beside = output_bytes if is_same_disk(state.folder, output) else 0
    if state.grows_bytes + beside > free:
        also = f" beside the output's {format_bytes(beside)}" if beside else ""
        raise DoesNotFitError(
            f"the cache {state.folder} may grow by {format_bytes(state.grows_bytes)}{also}, and "
            f"its disk has {format_bytes(free)} free; give a smaller --cache-limit, or another "
            "folder"
        )


def is_same_disk(first: str | Path, second: str | Path) -> bool:
    """Whether two folders, or where they would be, are on one filesystem."""
    return _device(Path(first)) == _device(Path(second))


def _device(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.stat(folder).st_dev


def network_facts(
    files: Mapping[str, Distant],
    chunks: Mapping[str, FileChunks],
    memory: MemoryPlan,
    network: Network,
    state: CacheState | None,
) -> list[tuple[str, str]]:
    """What is read over the network, as (label, sentence) pairs for people."""
    if not files:
        return []
    size = sum(layout.size_bytes for layout in chunks.values())
    places = ", ".join(dict.fromkeys(files[path].place for path in chunks))
    of_files = f"of {_files(len(chunks))} of {places}"
    if state is None:
        text = f"{format_bytes(size)} {of_files}, at most {_at_a_time(memory)}"
        facts = [("network", f"{text}; nothing of it is kept")]
    elif state.held_bytes == size:
        facts = [("network", f"nothing: all {format_bytes(size)} {of_files} are in the cache")]
    else:
        left = format_bytes(size - state.held_bytes)
        facts = [("network", f"{left} {of_files}, at most {_at_a_time(memory)}")]
    whole = {path: files[path] for path in chunks if not files[path].has_ranges}
    if whole:
        in_memory = any(is_held_whole(file, network) for file in whole.values())
        whole_bytes = sum(file.size_bytes for file in whole.values())
        facts.append(
            (
                "whole",
                f"{_files(len(whole))} ({format_bytes(whole_bytes)}) come "
                f"from beginning to end only: read into {'memory' if in_memory else 'the cache'} "
                "before the merge begins",
            )
        )
    if state is not None:
        facts.append(("cache", _cache_text(state, size)))
    return facts


def _cache_text(state: CacheState, size: int) -> str:
    limit = f"limit {format_bytes(state.limit_bytes)}"
    if state.held_bytes == size:
        return f"{state.folder} has all of it; {limit}"
    has = f"has {format_bytes(state.held_bytes)} more, " if state.held_bytes else ""
    kept = "all" if state.kept_bytes == size else format_bytes(state.kept_bytes)
    return f"{state.folder} {has}will have {kept} of it after the run; {limit}"


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _at_a_time(memory: MemoryPlan) -> str:
    return f"{format_memory(memory.fetch_bytes)} at a time"
