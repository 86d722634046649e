"""Making shards of an output in a store: what a run does with those that are missing, and a machine
of a cluster with the one that it is given.

A shard may be made twice, or by two machines at the same time: the bytes are the same, each has an
upload of its own, and the object is there as soon as the first of them is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...output.layout import Shard
from ...output.store.address import StoreAddress
from ...output.store.client import Store
from ...output.store.records import ShardRecord, TensorRecord
from ...output.store.uploads import Made, ShardUploads
from ..device.interface import Device
from ..streaming import AbandonedError, Conditions, FinishedTensor, Told, Work, stream
from .memory import CLIENT_BYTES, store_needs


@dataclass(frozen=True, slots=True)
class Target:
    """Where shards are to be made, and of which plan. Holds no credentials, and can be pickled."""

    address: StoreAddress
    fingerprint: str


def store_shard(
    work: Work,
    shard: Shard,
    target: Target,
    told: Told,
    conditions: Conditions,
    *,
    device: Device | None = None,
) -> tuple[ShardRecord, int]:
    """Makes one shard in a store; returns what the object that says so holds, which has been put
    beside it, and the most bytes that were in memory on their way. As `store_shards`."""
    records: list[ShardRecord] = []
    held_bytes = store_shards(
        work, [shard], target, told, records.append, conditions, device=device
    )
    return records[0], held_bytes


def store_shards(
    work: Work,
    shards: Sequence[Shard],
    target: Target,
    told: Told,
    made: Made,
    conditions: Conditions,
    *,
    device: Device | None = None,
) -> int:
    """Makes shards in a store, in their order, and beside each the object that says that it is
    complete; returns the most bytes of them, and of fetched inputs, that were in memory at a time.

    work: whose tasks are all tensors of the shards, and no others; `memory.store_bytes` of it is
        what they may occupy.
    made: is told of every shard that is complete, from another thread.
    told, conditions, device: as of `stream`.

    Raises:
        InputError: the store may not be written to.
        LazymergeError: reading or writing fails, or a tensor holds inf or nan and may not.
        AbandonedError: interrupted, and workers still run.

    What is not complete is then not there: its upload is aborted, or left for a run to abort.
    """
    ordered = in_order_of_files(work, shards)
    needs = store_needs(work.graph, shards, work.execution.device)
    recorded = _Recorded(told)
    uploads = recorded.uploads = ShardUploads(
        Store(target.address),
        shards,
        target.fingerprint,
        made,
        recorded.sent,
        window_bytes=work.memory.store_bytes - CLIENT_BYTES,
        span_bytes=needs.span_bytes,
    )

    def check_both() -> None:
        uploads.check()
        conditions.check()

    try:
        fetched = stream(
            ordered,
            uploads,
            recorded,
            replace(conditions, check=check_both),
            where=str(target.address),
            device=device,
        )
        uploads.wait(conditions.check)
    except AbandonedError as error:
        _close_later(error, uploads)
        raise
    except BaseException:
        uploads.close()
        raise
    return fetched + uploads.most_held_bytes


def in_order_of_files(work: Work, shards: Sequence[Shard]) -> Work:
    """The same work, its tensors made in the order in which they lie in the shards."""
    places = [tensor.name for shard in shards for tensor in shard.tensors]
    tasks = {task.write.name: task for task in work.tasks}
    if tasks.keys() != set(places):
        raise ValueError("the tasks are not those of the shards")
    return replace(work, tasks=[tasks[name] for name in places])


class _Recorded:
    """Hands on what is told, and keeps what is known of finished tensors. Bytes are written when
    they have been uploaded."""

    uploads: ShardUploads

    def __init__(self, told: Told) -> None:
        self._told = told
        self._last = ""

    def began(self, tensor: str) -> None:
        self._told.began(tensor)

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        self._last = tensor
        self._told.moved(bytes_read, 0, tensor)

    def noted(self, message: str) -> None:
        self._told.noted(message)

    def fetched(self, size_bytes: int) -> None:
        self._told.fetched(size_bytes)

    def sent(self, size_bytes: int) -> None:
        """Some bytes have been uploaded."""
        self._told.moved(0, size_bytes, self._last)

    def finished(self, tensor: FinishedTensor) -> None:
        self._told.finished(tensor)
        record = TensorRecord(tensor.checksum, tensor.is_nonfinite, tuple(tensor.statistics))
        self.uploads.finished(tensor.name, record)


def _close_later(error: AbandonedError, uploads: ShardUploads) -> None:
    """Closes the uploads when the workers have ended, if the process lives to see that."""

    def wait_and_close() -> None:
        for ended in error.running:
            ended.wait()
        error.close_inputs()
        uploads.close()

    threading.Thread(target=wait_and_close, name="closing", daemon=True).start()
