"""A block on a device, and the reductions that operations may ask of it.

Element by element a device computes what the processor does, to the bit. Sums need an order of
their own: the processor's (16 running sums) would leave a device idle, and torch's own depends on
the number of its processors. Here a block is folded: its second half is added to its first, until
4,096 sums are left, which the host adds. That is one pass of additions in an order that depends on
the length alone, so every device gives the same bits, and nothing is allocated.

Candidates are picked without a list of variable length: a running count of those inside the bracket
is made (a whole number below 2^24, exact in float32), and the places where it reaches the wanted
ranks are found by binary search.

                x   0.3  0.9  0.5  0.1  0.6      bracket [0.4, 1]
           inside   0    1    1    0    1
    running count   0    1    2    2    3
        rank 1, 3        ▲              ▲        values 0.9 and 0.6
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...graph.random_bits import MULTIPLIERS, ROOM_WORDS, ROUNDS, UNIT, WEYL, WORD
from ...graph.vector import Counts, sum_in_lanes
from .interface import Queue

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Tensor

    Numbers = NDArray[numpy.floating[Any]]

FOLDED_ELEMENTS = 1 << 12
"""Sums that the host adds up: 32 KiB to bring over, ten additions less to start."""

LEAST_COUNTERS = 64
"""Of a random draw, done at a time."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the vectors of a Reduce stage reduce in.

    queue: the one that computes; used from within its work.
    spare: uint8, a block of the working dtype and an element.
    ranks, found: working dtype; places: int32; as long as each other.
    exchange: pinned, uint8, 8 bytes for each of these.
    """

    queue: Queue
    spare: Tensor
    ranks: Tensor
    places: Tensor
    found: Tensor
    exchange: Tensor

    def download(self, tensor: Tensor) -> NDArray[Any]:
        """A copy of a tensor, shape (n,), on the host."""
        import numpy

        room = self.exchange.view(tensor.dtype)
        copy = numpy.empty(len(tensor), room.numpy().dtype)
        for first in range(0, len(tensor), len(room)):
            part = tensor[first : first + len(room)]
            received = room[: len(part)]
            self.queue.exchange(received, part)
            copy[first : first + len(part)] = received.numpy()
        return copy

    def upload(self, target: Tensor, values: NDArray[Any]) -> None:
        """Fills a tensor, no longer than `ranks`, with values from the host."""
        room = self.exchange.view(target.dtype)[: len(target)]
        room.numpy()[:] = values
        self.queue.exchange(target, room)

    def fold(self, values: Tensor, length: int) -> float:
        """The sum of the first `length` elements, in float64; they are overwritten."""
        while length > FOLDED_ELEMENTS:
            half = (length + 1) // 2
            values[: length - half].add_(values[half:length])
            length = half
        return sum_in_lanes(self.download(values[:length]))

    def places_of(self, running_count: Tensor, ranks: NDArray[Any]) -> Tensor:
        """Where a running count first reaches the ranks, int32; valid until the next call."""
        import torch

        wanted, places = self.ranks[: len(ranks)], self.places[: len(ranks)]
        self.upload(wanted, ranks)
        torch.searchsorted(running_count, wanted, out_int32=True, out=places)
        return places

    def values_at(self, vector: Tensor, running_count: Tensor, count: int, quota: int) -> Numbers:
        """The counted elements, or `quota` of them, evenly spread; in element order.

        count: where the running count ends.
        """
        import numpy
        import torch

        taken = min(count, quota)
        ranks = numpy.arange(taken) * count // max(1, taken) + 1
        values = numpy.empty(taken, self.exchange.view(vector.dtype).numpy().dtype)
        for first in range(0, taken, len(self.ranks)):
            part = ranks[first : first + len(self.ranks)]
            found = self.found[: len(part)]
            torch.index_select(vector, 0, self.places_of(running_count, part), out=found)
            values[first : first + len(part)] = self.download(found)
        return values


class DeviceVector:
    """A buffer of one block, on a device (graph/vector.py: Vector and Reducing)."""

    __slots__ = ("_workspace", "tensor")

    def __init__(self, tensor: Tensor, workspace: Workspace | None) -> None:
        """workspace: none in stages that reduce nothing."""
        self.tensor = tensor
        self._workspace = workspace

    def __getitem__(self, part: slice) -> DeviceVector:
        return DeviceVector(self.tensor[part], self._workspace)

    def copy_(self, other: DeviceVector) -> DeviceVector:
        self.tensor.copy_(other.tensor)
        return self

    def add_(self, other: DeviceVector | float) -> DeviceVector:
        return self._arithmetic(self.tensor.add_, other)

    def sub_(self, other: DeviceVector | float) -> DeviceVector:
        return self._arithmetic(self.tensor.sub_, other)

    def mul_(self, other: DeviceVector | float) -> DeviceVector:
        return self._arithmetic(self.tensor.mul_, other)

    def div_(self, other: DeviceVector) -> DeviceVector:
        self.tensor.div_(other.tensor)
        return self

    def abs_(self) -> DeviceVector:
        self.tensor.abs_()
        return self

    def clamp_min_(self, bound: float) -> DeviceVector:
        self.tensor.clamp_min_(bound)
        return self

    def clamp_max_(self, bound: float) -> DeviceVector:
        self.tensor.clamp_max_(bound)
        return self

    def ge_(self, bound: float) -> DeviceVector:
        self.tensor.ge_(bound)
        return self

    def gt_(self, bound: float) -> DeviceVector:
        self.tensor.gt_(bound)
        return self

    def eq_(self, value: float) -> DeviceVector:
        self.tensor.eq_(value)
        return self

    def _arithmetic(
        self, method: Callable[[Any], Tensor], other: DeviceVector | float
    ) -> DeviceVector:
        method(other.tensor if isinstance(other, DeviceVector) else other)
        return self

    @property
    def workspace(self) -> Workspace:
        """Where it is reduced."""
        assert self._workspace is not None, "an Apply operation reduces nothing"
        return self._workspace

    def _spare(self) -> Tensor:
        """Room for as many elements."""
        return self.workspace.spare.view(self.tensor.dtype)[: len(self.tensor)]

    def reduce_dot(self, other: DeviceVector, room: DeviceVector) -> float:
        import torch

        products = room.tensor
        torch.mul(self.tensor, other.tensor, out=products)
        return self.workspace.fold(products, len(products))

    def reduce_total(self) -> float:
        import torch

        count = len(self.tensor)
        half = (count + 1) // 2
        sums = self.workspace.spare[: 8 * half].view(torch.float64)
        sums.copy_(self.tensor[:half])
        sums[: count - half].add_(self.tensor[half:])
        return self.workspace.fold(sums, half)

    def zero_all_but_largest(self, value: float, below: float, stop_index: int, start: int) -> None:
        from torch import hardshrink

        split = min(max(stop_index - start, 0), len(self.tensor))
        kept_if_equal, dropped_if_equal = self.tensor[:split], self.tensor[split:]
        hardshrink(kept_if_equal, below, out=kept_if_equal)  # zeroes |x| ≤ below in one sweep
        hardshrink(dropped_if_equal, value, out=dropped_if_equal)

    def zero_largest(
        self, value: float, below: float, stop_index: int, start: int, room: DeviceVector
    ) -> None:
        import torch

        split = min(max(stop_index - start, 0), len(self.tensor))
        mask = room.mask()
        for part, place, limit in (
            (self.tensor[:split], mask[:split], below),
            (self.tensor[split:], mask[split:], value),
        ):
            for beyond, bound in ((torch.gt, limit), (torch.lt, -limit)):
                beyond(part, bound, out=place)
                part.masked_fill_(place, 0)

    def zero_up_to(self, other: DeviceVector, limit: float, room: DeviceVector) -> None:
        import torch

        torch.le(other.tensor, limit, out=room.mask())
        self.tensor.masked_fill_(room.mask(), 0)

    def zero_from(
        self, other: DeviceVector, bound: DeviceVector | float, room: DeviceVector
    ) -> None:
        import torch

        limit = bound.tensor if isinstance(bound, DeviceVector) else bound
        torch.ge(other.tensor, limit, out=room.mask())
        self.tensor.masked_fill_(room.mask(), 0)

    def draw(self, key: int, start: int, room: DeviceVector) -> None:
        fill_uniform_on_device(self.tensor, key, start, room.tensor)

    def mask(self) -> Tensor:
        """The vector's memory as room for a boolean per element."""
        import torch

        return self.tensor.view(torch.bool)[: len(self.tensor)]

    def reduce_counts(self, low: float, high: float, quota: int, room: DeviceVector) -> Counts:
        import torch

        above, inside = self._spare(), room.tensor
        torch.gt(self.tensor, high, out=above)
        torch.ge(self.tensor, low, out=inside)
        inside.sub_(above)
        above_count = int(self.workspace.fold(above, len(above)))
        torch.cumsum(inside, 0, out=inside)
        inside_count = int(self.workspace.download(inside[-1:])[0])
        taken = 0 if low == high else quota
        values = self.workspace.values_at(self.tensor, inside, inside_count, taken)
        return Counts(above_count, inside_count, values)

    def index_of_equal(self, value: float, rank: int, start: int) -> int:
        import numpy
        import torch

        equal = self._spare()
        torch.eq(self.tensor, value, out=equal)
        torch.cumsum(equal, 0, out=equal)
        places = self.workspace.places_of(equal, numpy.array([rank]))
        place = int(self.workspace.download(places)[0])
        if place == len(equal):
            raise IndexError(f"fewer than {rank} elements equal {value}")
        return start + place

    def to_host(self) -> Numbers:
        return self.workspace.download(self.tensor)


def fill_uniform_on_device(out: Tensor, key: int, start: int, room: Tensor) -> None:
    """As fill_uniform of graph/random_bits.py, the same bits, by 64-bit integers of torch.

    out, room: shape (n,), float32 or float64, on one device; room is overwritten.
    """
    import torch

    per_word = 8 // room.element_size()
    words = room[: len(room) // per_word * per_word].view(torch.int64)
    most = len(words) // (ROOM_WORDS + 1)
    if most < LEAST_COUNTERS:  # a few elements: no room, and little is needed
        most = LEAST_COUNTERS
        words = torch.empty((ROOM_WORDS + 1) * most, dtype=torch.int64, device=out.device)
    first, stop = start // 4, -(-(start + len(out)) // 4)
    for begin in range(first, stop, most):
        count = min(most, stop - begin)
        rows = [words[row * count : (row + 1) * count] for row in range(ROOM_WORDS + 1)]
        torch.arange(begin, begin + count, out=rows[ROOM_WORDS])
        for lane, numbers in enumerate(_philox(key, rows)):
            element = 4 * begin + lane - start
            skipped = 0 if element >= 0 else 1
            target = out[element + 4 * skipped :: 4][: count - skipped]
            numbers.bitwise_right_shift_(8)
            target.copy_(numbers[skipped : skipped + len(target)])
    out.mul_(UNIT)


def _philox(key: int, rows: list[Tensor]) -> list[Tensor]:
    """Four words of each counter. rows: ROOM_WORDS to work in, then the counters."""
    import torch

    first, second, third, fourth, one, other, high = rows[:7]
    torch.bitwise_and(rows[ROOM_WORDS], WORD, out=first)
    torch.bitwise_right_shift(rows[ROOM_WORDS], 32, out=second)
    third.zero_()
    fourth.zero_()
    keys = [key & WORD, (key >> 32) & WORD]
    for _ in range(ROUNDS):
        torch.mul(first, MULTIPLIERS[0], out=one)  # wraps; the bits are those of unsigned numbers
        torch.mul(third, MULTIPLIERS[1], out=other)
        torch.bitwise_right_shift(other, 32, out=high)
        high.bitwise_and_(WORD).bitwise_xor_(second).bitwise_xor_(keys[0])
        first.copy_(high)
        torch.bitwise_and(other, WORD, out=second)
        torch.bitwise_right_shift(one, 32, out=high)
        high.bitwise_and_(WORD).bitwise_xor_(fourth).bitwise_xor_(keys[1])
        third.copy_(high)
        torch.bitwise_and(one, WORD, out=fourth)
        keys = [(word + step) & WORD for word, step in zip(keys, WEYL, strict=True)]
    return [first, second, third, fourth]
