"""What a merge did to a tensor, in sums over its elements.

    inputs   x₀ (the reference), x₁ … xₙ; the last of them may be what was made of the others
    changes  δᵢ = xᵢ − x₀, formed in the working dtype

Of these it gathers ⟨x₀, x₀⟩, ⟨δᵢ, x₀⟩ and ⟨δᵢ, δⱼ⟩; in how many places δᵢ is not 0, in how many
δᵢ and δⱼ have the same sign, and in how many the models' changes contradict each other; and the
largest |δᵢ|. Norms, cosines and shares follow from these, of a tensor or of many: all but the
largest are sums, and add up.

A product of two float32 numbers is exact in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..operation import BlockInput, Cost, Done, Parameters, Pass, ReduceOperation, register
from ..vector import largest, product, signs
from .gram import exact_sum

if TYPE_CHECKING:
    from ..vector import Vector

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Moments:
    """What was gathered of a tensor, or of several that have the same models, added up.

    n is the number of changes: of all inputs but the reference.

    reference_square: ⟨x₀, x₀⟩.
    reference_products: n numbers, ⟨δᵢ, x₀⟩.
    products: n × n, ⟨δᵢ, δⱼ⟩.
    agreements: n × n, in how many places δᵢ and δⱼ are both above 0 or both below; on the
        diagonal, where δᵢ is not 0.
    largest: n numbers, the largest |δᵢ|.
    changed: in how many places a model's change is not 0.
    mixed: in how many of them two models' changes have opposite signs.
    """

    reference_square: float
    reference_products: tuple[float, ...]
    products: tuple[tuple[float, ...], ...]
    agreements: tuple[tuple[float, ...], ...]
    largest: tuple[float, ...]
    changed: float
    mixed: float


def number_count(change_count: int) -> int:
    """How many numbers are gathered for so many changes."""
    pairs = change_count * (change_count + 1) // 2
    return 1 + 2 * change_count + 2 * pairs + 2


def moments_of(numbers: Sequence[float]) -> Moments:
    """What the numbers that MergeStatistics gathers are, each in its place.

    Raises:
        ValueError: there are too few or too many.
    """
    count = _change_count(len(numbers))
    pairs = count * (count + 1) // 2
    square, *rest = numbers
    references, rest = rest[:count], rest[count:]
    products, rest = rest[:pairs], rest[pairs:]
    sizes, rest = rest[:count], rest[count:]
    agreements, (changed, mixed) = rest[:pairs], rest[pairs:]
    return Moments(
        reference_square=square,
        reference_products=tuple(references),
        products=symmetric(products, count),
        agreements=symmetric(agreements, count),
        largest=tuple(sizes),
        changed=changed,
        mixed=mixed,
    )


def _change_count(numbers: int) -> int:
    """Of how many changes there are so many numbers.

    Raises:
        ValueError: of none.
    """
    count = 1
    while number_count(count) < numbers:
        count += 1
    if number_count(count) != numbers:
        raise ValueError(f"{numbers} numbers")
    return count


def symmetric(lower: Sequence[float], size: int) -> tuple[tuple[float, ...], ...]:
    """The matrix whose lower triangle this is, row by row."""
    first = [row * (row + 1) // 2 for row in range(size)]
    return tuple(
        tuple(lower[first[max(row, column)] + min(row, column)] for column in range(size))
        for row in range(size)
    )


def added(rows: Sequence[Sequence[float]]) -> Numbers:
    """The numbers of several stretches of elements, as those of all of them.

    Sums are exact until they are rounded once (math.fsum), whatever the order.
    """
    columns = list(zip(*rows, strict=True))
    sizes = _largest_columns(len(columns))
    return tuple(
        max(column) if number in sizes else exact_sum(column)
        for number, column in enumerate(columns)
    )


def _largest_columns(numbers: int) -> range:
    """Places of the largest magnitudes among the numbers."""
    count = _change_count(numbers)
    first = 1 + count + count * (count + 1) // 2
    return range(first, first + count)


@register
class MergeStatistics(ReduceOperation[Numbers, Numbers]):
    """Norms, products and signs of the changes δᵢ = xᵢ − x₀ of inputs x₀ … xₙ, n ≥ 1.

    Parameters:
        is_merge: the last input is what was made of the others.

    Result: `number_count(n)` floats; `moments_of` says what they are.
    """

    name = "merge_statistics"
    is_recordable = True
    is_for_host = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return block_count * (number_count(input_count - 1) * 32 + 64)  # floats, and their tuple

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass:
        return Pass(state=None)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Numbers:
        reference, *changes = scratch
        inputs[0].read_into(reference)
        for source, change in zip(inputs[1:], changes, strict=True):
            source.read_into(change)
            change.sub_(reference)
        return gathered(reference, changes, is_merge=bool(parameters["is_merge"]))

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[Numbers],
    ) -> Done[Numbers]:
        return Done(added(partials))


def gathered(reference: Vector, changes: Sequence[Vector], *, is_merge: bool) -> Numbers:
    """The numbers of one block. is_merge: the last change is that of the merge's result."""
    pairs = [(row, column) for row in range(len(changes)) for column in range(row + 1)]
    return (
        product(reference, reference),
        *(product(change, reference) for change in changes),
        *(product(changes[row], changes[column]) for row, column in pairs),
        *map(largest, changes),
        *signs(changes, len(changes) - is_merge),
    )
