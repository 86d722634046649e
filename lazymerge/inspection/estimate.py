"""How long a run will take, from what a plan moves and how fast this machine was measured to be.

    computing   bytes read in all passes / the rate of each kind of tensor, inputs being in memory
    disk        bytes that are not in the page cache, once, / reading rate
                + bytes written / writing rate
    network     bytes that are fetched, once, / its rate

Later passes over a tensor find it in the page cache. Computing, disk and network overlap, at best
completely: a run takes between the longest of them and their sum.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ..engine.needed_ranges import path_of
from ..engine.plan import Plan
from ..graph.node import Read
from .measurement import Measured

EVERYTHING_CACHED = 0.95
"""A share of the inputs in the page cache from which on the rest is not counted: probes miss."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a run takes, in seconds; None: not known, for something could not be measured.

    computing_seconds: reading from memory, merging, writing to memory.
    reading_seconds: from the disk, what is not in memory. writing_seconds: to the disk.
    disk_bytes_read: what is not in the page cache, once.
    network_seconds: fetching what lies elsewhere. network_bytes: of that, each byte once.
    """

    computing_seconds: float | None
    reading_seconds: float | None
    writing_seconds: float | None
    bytes_read: int
    disk_bytes_read: int
    bytes_written: int
    measured: Measured
    network_seconds: float | None = 0.0
    network_bytes: int = 0

    @property
    def disk_seconds(self) -> float | None:
        if self.reading_seconds is None or self.writing_seconds is None:
            return None
        return self.reading_seconds + self.writing_seconds

    @property
    def least_seconds(self) -> float | None:
        """If computing, disk and network never wait for each other; of what is known."""
        return max((part for part in self._parts if part is not None), default=None)

    @property
    def most_seconds(self) -> float | None:
        """If they always do; None where a part is not known."""
        known = [part for part in self._parts if part is not None]
        return sum(known) if len(known) == len(self._parts) else None

    @property
    def _parts(self) -> tuple[float | None, ...]:
        network = () if not self.network_bytes else (self.network_seconds,)
        return (self.computing_seconds, self.disk_seconds, *network)

    @property
    def without_network(self) -> Estimate:
        """The same, as if what is fetched were in memory."""
        return replace(self, network_bytes=0, network_seconds=0.0)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            **asdict(self),
            "least_seconds": self.least_seconds,
            "most_seconds": self.most_seconds,
        }


def estimate(plan: Plan, measured: Measured) -> Estimate:
    """The time that a plan's run takes on the machine that was measured."""
    inputs = unique_bytes_read(plan)
    cached = measured.cached_share or 0.0
    from_disk = 0 if cached >= EVERYTHING_CACHED else round((1 - cached) * inputs)
    return Estimate(
        computing_seconds=_computing_seconds(plan, measured),
        reading_seconds=_seconds(from_disk, measured.reading_rate),
        writing_seconds=_seconds(plan.bytes_written, measured.writing_rate),
        bytes_read=plan.bytes_read,
        disk_bytes_read=from_disk,
        bytes_written=plan.bytes_written,
        measured=measured,
        network_seconds=_seconds(plan.bytes_to_fetch, measured.network_rate),
        network_bytes=plan.bytes_to_fetch,
    )


def unique_bytes_read(plan: Plan) -> int:
    """What is read of the inputs on the local disk, each byte counted once."""
    places = {
        (node.folder, node.tensor.file, node.tensor.start): node.size_bytes
        for node in plan.graph
        if isinstance(node, Read) and path_of(node) not in plan.remote_inputs
    }
    return sum(places.values())


def _computing_seconds(plan: Plan, measured: Measured) -> float | None:
    """Tensors of kinds that were not measured are taken to be as fast as the others together."""
    known = sum(kind.bytes_read for kind in measured.kinds)
    if not known:
        return None if plan.bytes_read else 0.0
    seconds = sum(kind.bytes_read / kind.bytes_per_s for kind in measured.kinds)
    return seconds * plan.bytes_read / known


def _seconds(count: int, rate: float | None) -> float | None:
    if not count:
        return 0.0
    return None if not rate else count / rate
