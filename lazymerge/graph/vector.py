"""What operations compute with: vectors of one block, and the few reductions they may ask of them.

An operation is written once, in place, against `Vector`. Four things stand in for one:

    a torch tensor     computes at once
    a device's vector  is computed on an accelerator (engine/device)
    a recording vector writes down what it is asked, so that the native kernels can run all of it in
                       one trip through the block (engine/native)
    a test's own       float64 references

All of them compute every operation in IEEE 754 arithmetic of the working dtype and round after each
one, so they agree to the bit. That is why there is no add with a factor here: torch turns it into a
fused multiply-add on processors that have one.

Sums have an order too. They run in float64, over 16 interleaved lanes (element i of the block goes
to lane i mod 16, in order), which are then added from the first to the last. That is a few vector
registers wide, so it costs nothing, and it is the same on every processor, which the sums of BLAS
libraries are not. Accelerators have an order of their own (engine/device/vector.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Numbers = NDArray[numpy.floating[Any]]

LANES = 16
"""Running sums of a reduction: four vector registers of four doubles."""

V = TypeVar("V", bound="Vector")


class Vector(Protocol):
    """A buffer of one block, shape (n,), of the working dtype; every method works in place and
    returns the vector. Comparisons leave 1 where they hold and 0 elsewhere (nan: 0)."""

    def copy_(self: V, other: V, /) -> V: ...
    def add_(self: V, other: V | float, /) -> V: ...
    def sub_(self: V, other: V | float, /) -> V: ...
    def mul_(self: V, other: V | float, /) -> V: ...
    def div_(self: V, other: V, /) -> V: ...
    def abs_(self: V, /) -> V: ...
    def clamp_min_(self: V, bound: float, /) -> V: ...
    def ge_(self: V, bound: float, /) -> V: ...
    def gt_(self: V, bound: float, /) -> V: ...
    def eq_(self: V, value: float, /) -> V: ...


@dataclass(frozen=True, slots=True)
class Counts:
    """One block's elements in relation to a bracket [low, high].

    above: elements > high. inside: elements in [low, high]. values: at most a quota of those
    inside, evenly spread, in element order (none where low == high: they are all equal).
    """

    above: int
    inside: int
    values: Numbers


@runtime_checkable
class Recording(Protocol):
    """A vector that writes down what it is asked, these functions included."""

    def record_dot(self, other: Any) -> float: ...
    def record_total(self) -> float: ...
    def record_keep_largest(self, value: float, below: float, stop_index: int) -> None: ...
    def record_count_inside(self, low: float, high: float, quota: int) -> Counts: ...
    def record_find_equal(self, value: float, rank: int) -> int: ...
    def record_copy(self) -> Numbers: ...


@runtime_checkable
class Reducing(Protocol):
    """A vector that is not in the processor's reach and reduces itself; the methods are the
    functions below."""

    def reduce_dot(self, other: Any, room: Any) -> float: ...
    def reduce_total(self) -> float: ...
    def zero_all_but_largest(
        self, value: float, below: float, stop_index: int, start: int
    ) -> None: ...
    def reduce_counts(self, low: float, high: float, quota: int, room: Any) -> Counts: ...
    def index_of_equal(self, value: float, rank: int, start: int) -> int: ...
    def to_host(self) -> Numbers: ...


def dot(one: Vector, other: Vector, room: Vector) -> float:
    """Σ oneᵢ otherᵢ in float64, in the order described above.

    room: of the same shape; overwritten. The vectors are float64.
    """
    if isinstance(one, Recording):
        return one.record_dot(other)
    if isinstance(one, Reducing):
        return one.reduce_dot(other, room)
    import numpy

    left, right, products = (cast("Any", vector).numpy() for vector in (one, other, room))
    with numpy.errstate(over="ignore", invalid="ignore"):  # inf and nan are results like any other
        numpy.multiply(left, right, out=products)
    return sum_in_lanes(products)


def total(vector: Vector) -> float:
    """Σ vectorᵢ in float64, in the order described above."""
    if isinstance(vector, Recording):
        return vector.record_total()
    if isinstance(vector, Reducing):
        return vector.reduce_total()
    return sum_in_lanes(cast("Any", vector).numpy())


def sum_in_lanes(values: Numbers) -> float:
    """The sum of an array, shape (n,), in float64, in the order described above."""
    import numpy

    whole = len(values) // LANES * LANES
    lanes = numpy.zeros(LANES)
    rows = values[:whole].reshape(-1, LANES)
    with numpy.errstate(over="ignore", invalid="ignore"):
        if whole:  # over the first axis numpy adds row by row
            numpy.add.reduce(rows, axis=0, dtype=numpy.float64, out=lanes)
        lanes[: len(values) - whole] += values[whole:]
    return sum_of_lanes(lanes.tolist())


def sum_of_lanes(lanes: Sequence[float]) -> float:
    """The lanes, from the first to the last."""
    sum_so_far = 0.0
    for lane in lanes:
        sum_so_far += lane
    return sum_so_far


def keep_largest(vector: Vector, value: float, below: float, stop_index: int, start: int) -> None:
    """Zeroes, in place, the elements whose magnitude does not reach a threshold; nan stays.

    Magnitudes above `value` survive, and those equal to it whose flat index is below `stop_index`.

    below: the next smaller magnitude of the dtype (0 for 0): |x| > below is |x| ≥ value.
    start: flat index of the block's first element.
    """
    if isinstance(vector, Recording):
        vector.record_keep_largest(value, below, stop_index)
        return
    if isinstance(vector, Reducing):
        vector.zero_all_but_largest(value, below, stop_index, start)
        return
    from torch import hardshrink

    tensor = cast("Any", vector)
    split = min(max(stop_index - start, 0), len(tensor))
    kept_if_equal, dropped_if_equal = tensor[:split], tensor[split:]
    hardshrink(kept_if_equal, below, out=kept_if_equal)  # zeroes |x| ≤ below in one sweep
    hardshrink(dropped_if_equal, value, out=dropped_if_equal)


def count_inside(vector: Vector, low: float, high: float, quota: int, room: Vector) -> Counts:
    """How many elements lie above and inside a bracket, and a share of the latter.

    quota: the most values to return.
    room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        return vector.record_count_inside(low, high, quota)
    if isinstance(vector, Reducing):
        return vector.reduce_counts(low, high, quota, room)
    import numpy

    values = cast("Any", vector).numpy()
    masks = cast("Any", room).numpy().view(numpy.bool_)
    above, inside = masks[: len(values)], masks[len(values) : 2 * len(values)]
    numpy.greater(values, values.dtype.type(high), out=above)
    numpy.greater_equal(values, values.dtype.type(low), out=inside)
    above_count = int(numpy.count_nonzero(above))
    inside_count = int(numpy.count_nonzero(inside)) - above_count
    if low == high or inside_count == 0:
        return Counts(above_count, inside_count, values[:0].copy())
    numpy.not_equal(inside, above, out=inside)
    found = values[inside]
    return Counts(above_count, inside_count, spread(found, quota))


def spread(values: Numbers, quota: int) -> Numbers:
    """At most `quota` of the values, evenly spread, in order, as an array of their own."""
    import numpy

    kept: Numbers = values.copy()
    if len(values) > quota:
        kept = values[numpy.arange(quota) * len(values) // quota]
    return kept


def find_equal(vector: Vector, value: float, rank: int, start: int) -> int:
    """The flat index of the `rank`-th element (from 1) that equals `value`.

    start: flat index of the block's first element.
    """
    if isinstance(vector, Recording):
        return vector.record_find_equal(value, rank)
    if isinstance(vector, Reducing):
        return vector.index_of_equal(value, rank, start)
    import numpy

    values = cast("Any", vector).numpy()
    return start + int(numpy.flatnonzero(values == values.dtype.type(value))[rank - 1])


def copy_of(vector: Vector) -> Numbers:
    """The vector's elements as an array of their own."""
    if isinstance(vector, Recording):
        return vector.record_copy()
    if isinstance(vector, Reducing):
        return vector.to_host()
    return cast("Numbers", cast("Any", vector).numpy().copy())


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two writable buffers of one length hold the same bytes; copies nothing."""
    difference: int = ctypes.CDLL(None).memcmp(
        (ctypes.c_char * len(one)).from_buffer(one),
        (ctypes.c_char * len(other)).from_buffer(other),
        ctypes.c_size_t(len(one)),
    )
    return difference == 0
