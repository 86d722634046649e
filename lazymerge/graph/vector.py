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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import factorial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Numbers = NDArray[numpy.floating[Any]]

LANES = 16
"""Running sums of a reduction: four vector registers of four doubles."""

SLICE_ROWS, SLICE_ELEMENTS = 256, 1 << 12
"""What is done at a time where numpy needs room of its own: 32 KiB each."""

PRODUCT_ELEMENTS = 1 << 14
"""Of a product of factors, formed at a time: 64 or 128 KiB."""

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
    def clamp_max_(self: V, bound: float, /) -> V: ...
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
    def record_largest(self) -> float: ...
    def record_signs(self, others: Sequence[Any], models: int) -> tuple[float, ...]: ...
    def record_keep_largest(self, value: float, below: float, stop_index: int) -> None: ...
    def record_drop_largest(self, value: float, below: float, stop_index: int) -> None: ...
    def record_zero_up_to(self, other: Any, limit: float) -> None: ...
    def record_zero_from(self, other: Any, bound: Any) -> None: ...
    def record_draw(self, key: int) -> None: ...
    def record_exp(self) -> None: ...
    def record_log(self) -> None: ...
    def record_rank_rows(self, row_elements: int) -> None: ...
    def record_row_dot(self, other: Any, row_elements: int) -> Any: ...
    def record_row_total(self, row_elements: int) -> Any: ...
    def record_row_max(self, row_elements: int) -> Any: ...
    def record_sub_rows(self, rows: Any, row_elements: int) -> None: ...
    def record_div_rows(self, rows: Any, row_elements: int) -> None: ...
    def record_wait(self) -> None: ...
    def record_hold(self) -> None: ...
    def record_scale_rows(self, table: Any, row_elements: int) -> None: ...
    def record_scale_columns(self, table: Any) -> None: ...
    def record_load_product(self, left: Any, right: Any) -> None: ...
    def record_column_dot(self, other: Any, row_elements: int) -> Any: ...
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
    def zero_largest(
        self, value: float, below: float, stop_index: int, start: int, room: Any
    ) -> None: ...
    def zero_up_to(self, other: Any, limit: float, room: Any) -> None: ...
    def zero_from(self, other: Any, bound: Any, room: Any) -> None: ...
    def draw(self, key: int, start: int, room: Any) -> None: ...
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


def product(one: Vector, other: Vector) -> float:
    """Σ oneᵢ otherᵢ as `dot` has it, products formed in float64 whatever the vectors are."""
    if isinstance(one, Recording):
        return one.record_dot(other)
    import numpy

    lanes = numpy.zeros(LANES)
    for left, right in _slices(one, other):
        with numpy.errstate(over="ignore", invalid="ignore"):
            products = left.astype(numpy.float64) * right
            whole = len(products) // LANES * LANES
            rows = products[:whole].reshape(-1, LANES)
            if whole:
                rows[0] += lanes
                numpy.add.reduce(rows, axis=0, out=lanes)
            lanes[: len(products) - whole] += products[whole:]
    return sum_of_lanes(lanes.tolist())


def largest(vector: Vector) -> float:
    """The largest |xᵢ|; nan does not count."""
    if isinstance(vector, Recording):
        return vector.record_largest()
    import numpy

    return max(
        float(numpy.fmax.reduce(numpy.absolute(part), initial=0.0)) for (part,) in _slices(vector)
    )


def signs(vectors: Sequence[Vector], models: int) -> tuple[float, ...]:
    """How often signs agree.

    For each pair of vectors, row by row of a triangle, each with itself included: in how many
    places both are above 0 or both below. Then of the first ones: in how many places one is not 0,
    and in how many one is above 0 and one below.

    vectors: of a recording, neighbours. models: how many are the first ones.
    """
    first = vectors[0]
    if isinstance(first, Recording):
        return first.record_signs(vectors[1:], models)
    import numpy

    size = len(vectors)
    counts = [0] * (size * (size + 1) // 2 + 2)
    for parts in _slices(*vectors):
        above, below = [part > 0 for part in parts], [part < 0 for part in parts]
        pairs = [(row, column) for row in range(size) for column in range(row + 1)]
        for place, (row, column) in enumerate(pairs):
            agreeing = (above[row] & above[column]) | (below[row] & below[column])
            counts[place] += int(numpy.count_nonzero(agreeing))
        any_above, any_below = (numpy.any(side[:models], axis=0) for side in (above, below))
        counts[-2] += int(numpy.count_nonzero(any_above | any_below))
        counts[-1] += int(numpy.count_nonzero(any_above & any_below))
    return tuple(map(float, counts))


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


def drop_largest(
    vector: Vector, value: float, below: float, stop_index: int, start: int, room: Vector
) -> None:
    """Zeroes, in place, exactly what `keep_largest` would leave; nan stays.

    room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        vector.record_drop_largest(value, below, stop_index)
        return
    if isinstance(vector, Reducing):
        vector.zero_largest(value, below, stop_index, start, room)
        return
    values, split = _array(vector), min(max(stop_index - start, 0), len(_array(vector)))
    for part, limit in ((values[:split], below), (values[split:], value)):
        limit = part.dtype.type(limit)
        above, beneath = _masks(room, len(part))
        numpy = _numpy()
        numpy.greater(part, limit, out=above)
        numpy.less(part, -limit, out=beneath)
        numpy.logical_or(above, beneath, out=above)
        numpy.copyto(part, 0, where=above)


def zero_up_to(vector: Vector, other: Vector, limit: float, room: Vector) -> None:
    """Zeroes, in place, the elements where `other` ≤ limit (where it is nan: none).

    room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        vector.record_zero_up_to(other, limit)
        return
    if isinstance(vector, Reducing):
        vector.zero_up_to(other, limit, room)
        return
    numpy, values, others = _numpy(), _array(vector), _array(other)
    mask, _ = _masks(room, len(values))
    numpy.less_equal(others, others.dtype.type(limit), out=mask)
    numpy.copyto(values, 0, where=mask)


def zero_from(vector: Vector, other: Vector, bound: Vector | float, room: Vector) -> None:
    """Zeroes, in place, the elements where `other` ≥ bound (where one is nan: none).

    room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        vector.record_zero_from(other, bound)
        return
    if isinstance(vector, Reducing):
        vector.zero_from(other, bound, room)
        return
    numpy, values, others = _numpy(), _array(vector), _array(other)
    mask, _ = _masks(room, len(values))
    limit = others.dtype.type(bound) if isinstance(bound, float) else _array(bound)
    numpy.greater_equal(others, limit, out=mask)
    numpy.copyto(values, 0, where=mask)


def draw(vector: Vector, key: int, start: int, room: Vector) -> None:
    """Fills a vector with random numbers in [0, 1), multiples of 2⁻²⁴ (graph/random_bits.py).

    They are a function of the key and of the element's flat index alone.

    room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        vector.record_draw(key)
        return
    if isinstance(vector, Reducing):
        vector.draw(key, start, room)
        return
    from .random_bits import fill_uniform

    fill_uniform(_array(vector), key, start, _array(room))


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


# Rows are vectors along the last dimension. What follows asks for blocks of whole rows
# (ApplyOperation.is_by_rows), except for scale_rows, scale_columns, load_product and column_dot.
# Numbers by row are arrays of float64, shape (rows of the block,), or what stands for one in a
# recording.


def rank_rows(vector: Vector, row_elements: int) -> None:
    """Replaces every element by the rank of its magnitude within its row: 0 for the smallest; equal
    ones in ascending order, nan last.

    Other vectors must be filled anew afterwards, except those that this function has filled or that
    `hold` has been called for.
    """
    if isinstance(vector, Recording):
        vector.record_rank_rows(row_elements)
        return
    import numpy

    for row in _array(vector).reshape(-1, row_elements):
        order = numpy.argsort(numpy.absolute(row), kind="stable")
        row[order] = numpy.arange(row_elements, dtype=row.dtype)


def row_dot(one: Vector, other: Vector, row_elements: int, room: Vector) -> Numbers:
    """Σ oneᵢ otherᵢ of every row, in float64 and in the order of `dot`.

    room: of the same shape; overwritten. The vectors are float64.
    """
    if isinstance(one, Recording):
        return cast("Numbers", one.record_row_dot(other, row_elements))
    import numpy

    with numpy.errstate(over="ignore", invalid="ignore"):
        numpy.multiply(_array(one), _array(other), out=_array(room))
    return _row_sums(_array(room), row_elements)


def row_total(vector: Vector, row_elements: int) -> Numbers:
    """Σ vectorᵢ of every row, in float64 and in the order of `total`."""
    if isinstance(vector, Recording):
        return cast("Numbers", vector.record_row_total(row_elements))
    return _row_sums(_array(vector), row_elements)


def _row_sums(values: Numbers, row_elements: int) -> Numbers:
    import numpy

    matrix = values.reshape(-1, row_elements)
    whole = row_elements // LANES * LANES
    sums: Numbers = numpy.zeros(len(matrix))
    with numpy.errstate(over="ignore", invalid="ignore"):
        for top in range(0, len(matrix), SLICE_ROWS):
            rows = matrix[top : top + SLICE_ROWS]
            lanes = numpy.zeros((len(rows), LANES))
            for first in range(0, whole, LANES):
                lanes += rows[:, first : first + LANES]
            lanes[:, : row_elements - whole] += rows[:, whole:]
            for lane in range(LANES):
                sums[top : top + len(rows)] += lanes[:, lane]
    return sums


def row_max(vector: Vector, row_elements: int) -> Numbers:
    """The largest element of every row; nan where there is one. Of 0 and -0 either is."""
    if isinstance(vector, Recording):
        return cast("Numbers", vector.record_row_max(row_elements))
    import numpy

    largest: Numbers = _array(vector).reshape(-1, row_elements).max(axis=1).astype(numpy.float64)
    return largest


def wait_for_rows(vector: Vector) -> None:
    """Says that numbers by row that have been asked for are used next, in `sub_rows`, `div_rows`.

    Every vector must be filled anew afterwards, except those that `hold` has been called for.
    """
    if isinstance(vector, Recording):
        vector.record_wait()


def hold(vector: Vector) -> None:
    """Keeps a vector's contents over the next waits; without it they are lost there."""
    if isinstance(vector, Recording):
        vector.record_hold()


def sub_rows(vector: Vector, rows: Numbers, row_elements: int) -> None:
    """Subtracts from every element its row's number. The vector is float64."""
    if isinstance(vector, Recording):
        vector.record_sub_rows(rows, row_elements)
        return
    matrix = _array(vector).reshape(-1, row_elements)
    with _numpy().errstate(over="ignore", invalid="ignore"):
        _numpy().subtract(matrix, rows[:, None], out=matrix)


def div_rows(vector: Vector, rows: Numbers, row_elements: int) -> None:
    """Divides every element by its row's number. The vector is float64."""
    if isinstance(vector, Recording):
        vector.record_div_rows(rows, row_elements)
        return
    matrix = _array(vector).reshape(-1, row_elements)
    with _numpy().errstate(over="ignore", invalid="ignore", divide="ignore"):
        _numpy().divide(matrix, rows[:, None], out=matrix)


def scale_rows(vector: Vector, table: Numbers, row_elements: int, start: int) -> None:
    """Multiplies every element by its row's number.

    table: float64, shape (rows of the tensor,); its numbers are rounded to the working dtype first.
    start: flat index of the block's first element.
    """
    if isinstance(vector, Recording):
        vector.record_scale_rows(table, row_elements)
        return
    values = _array(vector)
    first_row, column = divmod(start, row_elements)
    head = min(len(values), (row_elements - column) % row_elements)
    number = values.dtype.type
    with _numpy().errstate(over="ignore", invalid="ignore"):
        if head:
            values[:head] *= number(table[first_row])
            first_row += 1
        rows = (len(values) - head) // row_elements
        matrix = values[head : head + rows * row_elements].reshape(rows, row_elements)
        matrix *= table[first_row : first_row + rows, None].astype(values.dtype, copy=False)
        if len(values) > head + rows * row_elements:
            values[head + rows * row_elements :] *= number(table[first_row + rows])


def scale_columns(vector: Vector, table: Numbers, start: int) -> None:
    """Multiplies every element by its column's number.

    table: float64, shape (row elements,); its numbers are rounded to the working dtype first.
    start: flat index of the block's first element.
    """
    if isinstance(vector, Recording):
        vector.record_scale_columns(table)
        return
    values = _array(vector)
    table = table.astype(values.dtype, copy=False)
    with _numpy().errstate(over="ignore", invalid="ignore"):
        for first, matrix in _whole_rows(values, len(table), start):
            matrix *= table[first : first + matrix.shape[1]]


def load_product(vector: Vector, left: Numbers, right: Numbers, start: int) -> None:
    """Fills a vector with left @ right, a matrix that it is a stretch of, row by row.

    Each element is a sum of the working dtype that begins at 0 and takes one term after the other;
    nothing of it depends on where blocks begin and end.

    left: shape (rows of the tensor, r); right: (r, row elements); both of the working dtype and
    contiguous. start: flat index of the block's first element.
    """
    if isinstance(vector, Recording):
        vector.record_load_product(left, right)
        return
    import numpy

    values = _array(vector)
    values.fill(0)
    terms = numpy.empty(PRODUCT_ELEMENTS, values.dtype)
    with numpy.errstate(over="ignore", invalid="ignore"):
        for row, column, sums in _tiles(values, right.shape[1], start):
            rows, columns = sums.shape
            term = terms[: sums.size].reshape(sums.shape)
            for one, other in zip(
                left[row : row + rows].T, right[:, column : column + columns], strict=True
            ):
                numpy.multiply(one[:, None], other, out=term)
                numpy.add(sums, term, out=sums)


def _tiles(values: Any, row_elements: int, start: int) -> Iterator[tuple[int, int, Any]]:
    """A block as matrices of at most PRODUCT_ELEMENTS, each with the row and the column of the
    tensor that it begins at."""
    done = 0
    while done < len(values):
        row, column = divmod(start + done, row_elements)
        left = len(values) - done
        if column or left < row_elements or row_elements > PRODUCT_ELEMENTS:
            columns = min(row_elements - column, left, PRODUCT_ELEMENTS)
            rows = 1
        else:
            columns, rows = row_elements, min(left, PRODUCT_ELEMENTS) // row_elements
        yield row, column, values[done : done + rows * columns].reshape(rows, columns)
        done += rows * columns


def column_dot(one: Vector, other: Vector, row_elements: int, start: int, room: Vector) -> Numbers:
    """Σ oneᵢ otherᵢ of every column, row by row, in float64, shape (row_elements,).

    start: flat index of the block's first element. room: of the same shape; overwritten. The
    vectors are float64.
    """
    if isinstance(one, Recording):
        return cast("Numbers", one.record_column_dot(other, row_elements))
    import numpy

    products = _array(room)
    sums: Numbers = numpy.zeros(row_elements)
    with numpy.errstate(over="ignore", invalid="ignore"):
        numpy.multiply(_array(one), _array(other), out=products)
        for first, matrix in _whole_rows(products, row_elements, start):
            part = sums[first : first + matrix.shape[1]]
            for row in matrix:
                part += row
    return sums


def _whole_rows(values: Any, row_elements: int, start: int) -> list[tuple[int, Any]]:
    """A block as matrices: the end of a row, whole rows, the beginning of one; each with the column
    that it begins at."""
    column = start % row_elements
    head = min(len(values), (row_elements - column) % row_elements)
    rows = (len(values) - head) // row_elements
    body = head + rows * row_elements
    parts = [
        (column, values[:head].reshape(1, -1)),
        (0, values[head:body].reshape(rows, row_elements)),
        (0, values[body:].reshape(1, -1)),
    ]
    return [part for part in parts if part[1].size]


# Functions of one element, in float64. Libraries differ in the last bit of theirs, between versions
# and processors, so these are sums and products in a fixed order, the same for all who compute.

EXP_LOWEST = -708.0
"""Below this e^x is taken as e^-708, 3e-308: the result stays normal."""

LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
"""ln 2 in two parts; n times the first is exact for |n| < 2^20 (fdlibm, e_exp.c)."""

LOG2_E = 1.4426950408889634

EXP_TERMS = tuple(1.0 / factorial(n) for n in range(13, -1, -1))
"""Taylor's series of e^r, from the highest power down; what is left out is below 4e-18."""

LOG_TERMS = tuple(2.0 / n for n in range(21, 0, -2))
"""Of ln((1 + s)/(1 − s)) = 2s + 2/3 s³ + …; |s| ≤ 0.172 leaves out less than 1e-19."""

SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


def exponential(vector: Vector, room: Vector, more_room: Vector) -> None:
    """e^x of every element, within 2 ulps; for x ≤ 709. The vector is float64.

    room, more_room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        vector.record_exp()
        return
    import numpy

    for x, power, result in _slices(vector, room, more_room):
        with numpy.errstate(invalid="ignore"):
            numpy.copyto(x, EXP_LOWEST, where=x < EXP_LOWEST)
            numpy.multiply(x, LOG2_E, out=power)
            numpy.rint(power, out=power)
            numpy.subtract(x, power * LN2_HIGH, out=x)
            numpy.subtract(x, power * LN2_LOW, out=x)
            _polynomial(EXP_TERMS, x, result)
            exponents = numpy.where(numpy.isfinite(power), power, 0).astype(numpy.int64)
            scales = ((exponents + 1023) << 52).view(numpy.float64)
            numpy.multiply(result, scales, out=x)


def logarithm(vector: Vector, room: Vector, more_room: Vector) -> None:
    """ln x of every element, within 3 ulps; for normal x > 0. The vector is float64.

    room, more_room: of the same shape; overwritten.
    """
    if isinstance(vector, Recording):
        vector.record_log()
        return
    import numpy

    for x, square, result in _slices(vector, room, more_room):
        # x = m 2^e with √½ ≤ m < √2
        exponents = (x.view(numpy.int64) - SQRT_HALF_BITS) >> 52
        m = (x.view(numpy.int64) - (exponents << 52)).view(numpy.float64)
        e = exponents.astype(numpy.float64)
        with numpy.errstate(invalid="ignore", divide="ignore", over="ignore"):
            s = (m - 1.0) / (m + 1.0)
            numpy.multiply(s, s, out=square)
            _polynomial(LOG_TERMS, square, result)
            numpy.multiply(result, s, out=result)
            numpy.add(result, e * LN2_LOW, out=result)
            numpy.add(result, e * LN2_HIGH, out=result)
            numpy.copyto(x, result, where=numpy.isfinite(x))


def _polynomial(terms: Sequence[float], x: Any, out: Any) -> None:
    """Horner's scheme, from the highest power down."""
    import numpy

    out[:] = terms[0]
    for term in terms[1:]:
        numpy.multiply(out, x, out=out)
        numpy.add(out, term, out=out)


def _slices(*vectors: Any) -> Iterator[Any]:
    arrays = [_array(vector) for vector in vectors]
    for first in range(0, len(arrays[0]), SLICE_ELEMENTS):
        yield [array[first : first + SLICE_ELEMENTS] for array in arrays]


def _numpy() -> Any:
    import numpy

    return numpy


def _array(vector: Any) -> Any:
    """The memory of a torch tensor as an array."""
    return vector.numpy()


def _masks(room: Any, count: int) -> tuple[Any, Any]:
    """Room for two booleans per element, in a vector of 4 or 8 bytes per element."""
    import numpy

    masks = room.numpy().view(numpy.bool_)
    return masks[:count], masks[count : 2 * count]
