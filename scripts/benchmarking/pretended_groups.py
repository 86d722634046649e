"""What a simulated worker of a cluster does with a group: it waits as long as the work would take,
and says how far it is, as a real one does."""

from __future__ import annotations

import time
from array import array

from lazymerge.cluster.group import Group, GroupResult
from lazymerge.cluster.worker import TOLD_SECONDS, TOPIC
from lazymerge.engine.streaming import FinishedTensor

CHECKSUM = "0" * 32


def pretend(fixed_s: float, rate_bytes_per_s: float, group: Group) -> GroupResult:
    """A result of the same size as that of the work, after the same time."""
    from distributed import get_worker

    worker = get_worker()
    began = time.monotonic()
    seconds = fixed_s + group.work_bytes / rate_bytes_per_s
    last = group.tasks[-1].write.name
    while (left := began + seconds - time.monotonic()) > 0:
        time.sleep(min(left, TOLD_SECONDS))
        if left > TOLD_SECONDS:
            done = round(min(1.0, 1 - left / seconds) * group.work_bytes)
            told = {"token": group.token, "group": group.number, "worker": worker.address}
            worker.log_event(
                TOPIC, {**told, "tensor": last, "read": done, "written": 0, "fetched": 0}
            )
    written = sum(placement.size_bytes for placement in group.placements)
    return GroupResult(
        number=group.number,
        worker=worker.address,
        tensors=tuple(
            FinishedTensor(task.write.name, CHECKSUM, False, array("d")) for task in group.tasks
        ),
        bytes_read=group.work_bytes - written,
        bytes_written=written,
        bytes_fetched=0,
        seconds=seconds,
        peak_bytes=0,
        projected_bytes=0,
        notes=(),
    )
