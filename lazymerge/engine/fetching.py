"""Inputs that lie elsewhere, fetched ahead of the workers and let go of behind them.

For every file there is one of the same size in memory (memfd_create), empty at first. Requests fill
it, chunk by chunk, at the chunks' own offsets; what reads inputs reads it like any other file. When
nobody will want a chunk any more, a hole takes its place, and its memory is free again.

    file in memory     ··········▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓░░░░░░░░░░░░······
                        let go of │ being merged  │ on its way │ not asked for

A worker says what a job reads before it begins, and waits until that is there. Ahead of it, chunks
are asked for in the order of the schedule, as many as the memory allows (`fetch_bytes` of the
plan), several requests at a time, and neighbouring chunks by one request. A tensor that is read in
two passes is kept between them if there is room, and fetched again if there is not.

What a worker needs is held until it is done with it; the plan sees to it that all workers' jobs fit
at once, so that nobody waits for ever. No byte of the output depends on any of this.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal

from ..checkpoint.range_cache import RangeCache, is_keepable
from ..errors import LazymergeError
from ..graph.graph import Graph
from ..output.holes import make_hole
from .memory_files import empty_file, pages, store
from .needed_ranges import last_stage, path_of, sampled_bytes
from .network import Network
from .remote_inputs import CachedInput, Distant
from .sample_requests import MOST_REQUEST_BYTES, SampleRequest, sample_requests
from .scheduler import Job
from .stages import TensorTask
from .wanted_chunks import HELD, Key, WantedChunks, joined

CLOSE_SECONDS = 2.0
"""How long the end of a run waits for requests to end."""

WAKE_SECONDS = 0.1
"""How often who waits for bytes looks whether the run has been stopped."""


@dataclass(slots=True)
class _Chunk:
    """What is known of a chunk that is there, or is to be.

    pins: workers that need it. wanted: bytes that are still to be read of it in the last passes of
    tasks, by their numbers; HELD: it is wanted until the task is finished.
    """

    state: Literal["queued", "coming", "here"]
    size_bytes: int
    pins: int = 0
    wanted: dict[int, int] = field(default_factory=dict)


class Fetcher:
    """Fetches what a run's workers read. Safe to use from several threads."""

    def __init__(
        self,
        graph: Graph,
        tasks: Sequence[TensorTask],
        files: Mapping[str, Distant],
        budget_bytes: int,
        workers: int,
        is_stopped: Callable[[], bool],
        network: Network | None = None,
        cache: RangeCache | None = None,
        held: Mapping[str, int] | None = None,
        held_bytes: int = 0,
    ) -> None:
        """files: that lie elsewhere, by path. budget_bytes: what may be held of them.

        workers: that may hold something at a time.

        cache: where what comes is kept. held: files in memory that are there already, by path, of
        held_bytes. Both are closed with the rest.
        """
        network = network or Network()
        self._network = network
        self.cache = cache
        self._held_files = dict(held or {})
        self._share = budget_bytes // workers
        self._sifted: dict[Key, int] = {}
        self._picking = ThreadPoolExecutor(network.connections, "picking")
        self._graph = graph
        self._tasks = tasks
        self._files = files
        if cache is not None:
            self._files = {path: _cached(file, cache) for path, file in files.items()}
        self._budget = budget_bytes
        self._is_stopped = is_stopped
        self._wanted = WantedChunks(graph, tasks, files, network.gap_bytes)
        self._layouts = self._wanted.layouts
        self._descriptors = {path: empty_file(path, files[path]) for path in self._layouts}
        self._chunks: dict[Key, _Chunk] = {}
        self._urgent: dict[Key, None] = {}
        self._queued: dict[Key, None] = {}
        self._again: dict[int, deque[Key]] = {}
        self._positions: dict[int, float] = {}
        self._done: set[int] = set()
        self._held = 0
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._beside = held_bytes
        self.most_held_bytes = held_bytes
        self.bytes_fetched = 0
        self.requests = 0
        count = network.connections if self._layouts else 0
        self._most_request = max(1, min(MOST_REQUEST_BYTES, budget_bytes // max(1, 2 * count)))
        self._protect_cached()
        self._ahead = self._all_chunks()
        self._next = next(self._ahead, None)
        self._fill()
        self._threads = [
            threading.Thread(target=self._work, name=f"fetching-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def descriptors(self) -> Mapping[str, int]:
        """The files in memory, by path."""
        return {**self._descriptors, **self._held_files}

    def acquire(self, job: Job) -> None:
        """Waits until all that a job reads is there; it stays until `release`.

        Raises:
            LazymergeError: it cannot be fetched.
        """
        needed = self._wanted.of_job(job)
        if not needed:
            return
        if self._is_picked(job, needed):
            self._pick(job, needed)
            return
        size = sum(map(self._wanted.size, needed))
        if size > self._budget:  # it would be waited for without end
            raise LazymergeError(
                f"{job.task.write.name} needs {size:,} bytes of inputs that lie elsewhere at once, "
                f"and the plan has set {self._budget:,} aside: a defect of lazymerge. Give it more "
                "--memory, or download the models"
            )
        with self._changed:
            self._begin(job, needed)
            known = [key for key in needed if key in self._chunks]
            for key in known:  # first, so that nothing of it has to make room
                self._pin(key, job.task_index)
            for key in needed.keys() - set(known):
                self._make_room(self._wanted.size(key))
                if key not in self._chunks:  # another worker may have asked for it
                    self._add_chunk(key, {})
                self._pin(key, job.task_index)
            self._fill()
            self._changed.notify_all()
            while not all(self._chunks[key].state == "here" for key in needed):
                self._wait()

    def release(self, job: Job) -> None:
        """Says that a job is done with what it has read."""
        needed = self._wanted.of_job(job)
        if not needed:
            return
        if self._is_picked(job, needed):
            self._drop(job, needed)
            return
        is_last = job.task.stages[job.stage] is last_stage(job.task)
        with self._changed:
            for key, size in needed.items():
                chunk = self._chunks[key]
                chunk.pins -= 1
                left = chunk.wanted.get(job.task_index, 0)
                if is_last and left != HELD:
                    chunk.wanted[job.task_index] = left - size
                    if left <= size:
                        del chunk.wanted[job.task_index]
                self._let_go_if_unwanted(key)
            self._fill()
            self._changed.notify_all()

    # samples of tensors that are too large to be held whole

    def _is_picked(self, job: Job, needed: Mapping[Key, int]) -> bool:
        """Whether what a job reads lies here and there, in more chunks than its share of the memory
        holds: then it is asked for piece by piece."""
        is_sample = len(job.pieces) == 1 and len(job.pieces[0]) > 1
        return is_sample and sum(map(self._wanted.size, needed)) > self._share

    def _picked_bytes(self, job: Job) -> int:
        stage = job.task.stages[job.stage]
        return sampled_bytes(self._graph, stage, self._files)

    def _pick(self, job: Job, needed: Mapping[Key, int]) -> None:
        """Has the pieces of a sample there; `_drop` lets go of them."""
        stage = job.task.stages[job.stage]
        reads = [read for read in self._graph.reads_of(stage.id) if path_of(read) in self._files]
        with self._changed:
            self._make_room(self._picked_bytes(job))
            self._held += self._picked_bytes(job)
            self._note_held()
            for key in needed:  # what else is there of them must not be let go of meanwhile
                self._sifted[key] = self._sifted.get(key, 0) + 1
            found = {
                key for key in needed if key in self._chunks and self._chunks[key].state != "queued"
            }
        requests = sample_requests(
            reads,
            joined(job.pieces[0]),
            self._layouts,
            self._network.gap_bytes,
            self._network.connections,
            lambda path, number: (path, number) in found,
        )
        waiting = [self._picking.submit(self._pick_one, request) for request in requests]
        try:
            for each in waiting:
                each.result()
        finally:
            for each in waiting:
                each.cancel()
            wait(waiting)  # none of them may write when the files are closed
        with self._changed:
            while any(self._chunks[key].state != "here" for key in found):
                self._wait()

    def _pick_one(self, request: SampleRequest) -> None:
        if self._closing or self._is_stopped():
            raise FetchingStopped
        path = request.path
        descriptor = self._descriptors[path]

        def put(data: Any, offset: int) -> None:
            self._store(path, descriptor, data, offset)

        self.requests += 1
        take = request.sifting(put)
        self._files[path].read(request.start, request.stop, take, keeps=request.keeps)

    def _drop(self, job: Job, needed: Mapping[Key, int]) -> None:
        with self._changed:
            self._held -= self._picked_bytes(job)
            for key in needed:
                self._sifted[key] -= 1
                if self._sifted[key]:
                    continue
                del self._sifted[key]
                if key in self._chunks:
                    self._let_go_if_unwanted(key)
                else:
                    self._make_hole(key)
            self._fill()
            self._changed.notify_all()

    def finished(self, task_index: int) -> None:
        """Says that an output tensor is complete."""
        with self._changed:
            self._done.add(task_index)
            for key in self._wanted.forget(task_index):
                chunk = self._chunks.get(key)
                if chunk is not None:
                    chunk.wanted.pop(task_index, None)
                    self._let_go_if_unwanted(key)
            self._positions.pop(task_index, None)
            self._again.pop(task_index, None)
            self._fill()
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all requests and gives all memory back, at once or, where a server is silent, as
        soon as that is over."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._picking.shutdown(wait=False)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            # the numbers of closed files are given to others, and a request would write to those
            threading.Thread(target=self._close_later, name="closing", daemon=True).start()
        else:
            self._close_files()

    def _close_later(self) -> None:
        for thread in self._threads:
            thread.join()
        self._close_files()

    def _close_files(self) -> None:
        for descriptors in (self._descriptors, self._held_files):
            while descriptors:
                os.close(descriptors.popitem()[1])
        if self.cache is not None:
            self.cache.close()

    def _protect_cached(self) -> None:
        if self.cache is not None:
            for path, layout in self._layouts.items():
                file = self._files[path].identity
                self.cache.protect(file, zip(layout.starts, layout.stops, strict=True))

    # what is to be there; all of this with the lock

    def _begin(self, job: Job, needed: Mapping[Key, int]) -> None:
        """Takes note of where a task is; what of it lies ahead and has been let go of, or was never
        asked for, is to be fetched."""
        index = job.task_index
        places = self._wanted.of_task(index)
        position = min(places[key].position for key in needed)
        self._positions[index] = position
        self._again[index] = deque(
            key
            for key, place in places.items()
            if place.position >= position and key not in self._chunks and key not in needed
        )

    def _pin(self, key: Key, index: int) -> None:
        chunk = self._chunks[key]
        chunk.pins += 1
        chunk.wanted.setdefault(index, self._wanted.of_task(index)[key].wanted)
        if chunk.state == "queued":
            self._queued.pop(key, None)
            self._urgent[key] = None

    def _make_room(self, size_bytes: int) -> None:
        while self._held + size_bytes > self._budget:
            key = self._dispensable()
            if key is None:
                self._wait()
            else:
                self._let_go(key)

    def _dispensable(self) -> Key | None:
        """The chunk that will be wanted last, of those that nobody needs now: of the last task;
        what it has read already, from behind, before what it will read next."""
        last: tuple[tuple[int, bool, float], Key] | None = None
        for key, chunk in self._chunks.items():
            if chunk.pins or chunk.state == "coming" or key in self._sifted:
                continue
            index = min(chunk.wanted, default=1 << 62)
            place = self._wanted.of_task(index)[key].position if chunk.wanted else 0.0
            is_behind = place < self._positions.get(index, 0.0)
            if last is None or (index, is_behind, place) > last[0]:
                last = (index, is_behind, place), key
        return None if last is None else last[1]

    def _fill(self) -> None:
        """Asks for what will be read next, while there is room."""
        for index in sorted(self._again):
            waiting = self._again[index]
            while waiting:
                if waiting[0] not in self._chunks and not self._ask(waiting[0], index):
                    return
                waiting.popleft()
        while self._next is not None:
            index, key = self._next
            chunk = self._chunks.get(key)
            if index in self._done:
                pass
            elif chunk is not None:
                chunk.wanted.setdefault(index, self._wanted.of_task(index)[key].wanted)
            elif not self._ask(key, index):
                return
            self._next = next(self._ahead, None)

    def _ask(self, key: Key, index: int) -> bool:
        """Whether there was room for a chunk."""
        size = self._wanted.size(key)
        if self._held + size > self._budget:
            return False
        self._add_chunk(key, {index: self._wanted.of_task(index)[key].wanted})
        self._queued[key] = None
        return True

    def _add_chunk(self, key: Key, wanted: dict[int, int]) -> None:
        size = self._wanted.size(key)
        self._chunks[key] = _Chunk("queued", size, wanted=wanted)
        self._held += size
        self._note_held()

    def _note_held(self) -> None:
        self.most_held_bytes = max(self.most_held_bytes, self._held + self._beside)

    def _let_go_if_unwanted(self, key: Key) -> None:
        chunk = self._chunks[key]
        is_needed = chunk.pins or chunk.wanted or key in self._sifted
        if not is_needed and chunk.state != "coming":
            self._let_go(key)

    def _let_go(self, key: Key) -> None:
        chunk = self._chunks.pop(key)
        self._held -= chunk.size_bytes
        self._queued.pop(key, None)
        self._urgent.pop(key, None)
        if chunk.state == "here":
            self._make_hole(key)

    def _make_hole(self, key: Key) -> None:
        layout = self._layouts[key[0]]
        make_hole(self._descriptors[key[0]], *pages(layout.starts[key[1]], layout.stops[key[1]]))

    def _wait(self) -> None:
        """Waits until something has changed.

        Raises:
            LazymergeError: a request has failed. FetchingStopped: the run has been stopped.
        """
        if self._error is not None:
            raise self._error
        if self._closing or self._is_stopped():
            raise FetchingStopped
        self._changed.wait(WAKE_SECONDS)

    def _all_chunks(self) -> Iterator[tuple[int, Key]]:
        for index in range(len(self._tasks)):
            if index in self._done:
                continue
            for key in self._wanted.of_task(index):
                yield index, key

    # requests

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._closing or self._error or (group := self._take_group())):
                        self._changed.wait()
                    if self._closing or self._error:
                        return
                self._fetch(group)
        except FetchingStopped:
            return
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take_group(self) -> list[Key]:
        """Neighbouring chunks for one request."""
        first = next(iter(self._urgent), None) or next(iter(self._queued), None)
        if first is None:
            return []
        path, number = first
        layout, size = self._layouts[path], 0
        group: list[Key] = []
        while (path, number) in self._urgent or (path, number) in self._queued:
            size += layout.stops[number] - layout.starts[number]
            if group and (
                size > self._most_request or layout.starts[number] != layout.stops[number - 1]
            ):
                break
            group.append((path, number))
            number += 1
        for key in group:
            self._urgent.pop(key, None)
            self._queued.pop(key, None)
            self._chunks[key].state = "coming"
        return group

    def _fetch(self, group: Sequence[Key]) -> None:
        """Fills neighbouring chunks; each is there as soon as its last byte is."""
        path = group[0][0]
        layout, descriptor = self._layouts[path], self._descriptors[path]
        offset = layout.starts[group[0][1]]
        stop = layout.stops[group[-1][1]]
        coming = deque(group)

        def take(piece: Any) -> None:
            nonlocal offset
            offset = self._store(path, descriptor, piece, offset)
            while coming and offset >= layout.stops[coming[0][1]]:
                self._arrived(coming.popleft())

        self.requests += 1
        self._files[path].read(offset, stop, take)
        if coming:
            raise LazymergeError(f"{path}: not all of what was asked for came. Try again")

    def _store(self, path: str, descriptor: int, piece: Any, offset: int) -> int:
        """Puts bytes in their place; returns where the next go."""
        if self._closing:
            raise FetchingStopped
        return store(path, descriptor, piece, offset)

    def _arrived(self, key: Key) -> None:
        with self._changed:
            layout = self._layouts[key[0]]
            self.bytes_fetched += layout.stops[key[1]] - layout.starts[key[1]]
            self._chunks[key].state = "here"
            self._let_go_if_unwanted(key)
            self._changed.notify_all()


class FetchingStopped(Exception):
    """The run has been stopped; nobody waits for what was asked for."""


def _cached(file: Distant, cache: RangeCache) -> Distant:
    return CachedInput(file, cache) if is_keepable(file.identity) else file
