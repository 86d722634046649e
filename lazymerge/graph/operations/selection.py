"""The k-th largest element of a whole tensor, exactly, without sorting it.

The methods that keep the largest changes of a model need one number per (tensor, model): the
threshold that exactly k elements reach. Others need two, or a few quantiles. Sorting 10⁸ elements
for it takes minutes and gigabytes. Here it takes one pass, and memory for a fixed number of
candidates:

    sample     65,536 or more elements at fixed places tell roughly where the k-th lies:
               a bracket [low, high] that holds it but for bad luck
    bracket    one pass counts, block by block, the elements above the bracket and those in it,
               and keeps the values in it (about 1% of the tensor)

                    below            bracket            above
               ├───────────────┼────────────────┼───────────────────┤   |xᵢ − x₀|
                                 candidates       counted only

               If k falls among the candidates, the k-th largest is found in them, exactly.
               If the bracket missed, or held more candidates than there is room for, a better
               bracket is made of what was seen and the pass is repeated.
    locate     Of equal magnitudes at the threshold the first survive (or the last, for those who
               count from below), so that exactly k do. When only some of them survive, one block
               is read again to find the element at which to stop, or to begin.

Heavy ties (identical models, coarse dtypes) make the bracket shrink to a single value; then
counting alone decides and nothing is collected.

The search ends, whatever the data: brackets are guessed GUESSES times; from then on every pass
halves the range of floats in which the threshold can lie (`most_passes` is the bound). Most
tensors need one guess, sorted and periodic ones several.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ..operation import BlockInput, Cost, Done, Parameters, Pass, ReduceOperation, Sample, register
from ..vector import Counts, copy_of, count_inside, find_equal

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from ..vector import Vector

    Magnitudes = NDArray[numpy.floating[Any]]

SAMPLE_RUN_ELEMENTS = 256
"""The sample is made of runs of this many neighbours: 512 bytes in bfloat16, one page touched."""

SAMPLE_RUNS = 256
SAMPLE_RUNS_LARGE = 1024
"""For tensors over 2^24 elements, whose candidates would not fit behind the smaller sample."""

CANDIDATES = 1 << 19
"""Values kept per model and tensor: 2 MB in float32, 4 MB in float64. Tensors of no more elements
need no sample: all their values are candidates. The brackets of larger ones hold about 0.8 % of
their elements, so that this is enough for tensors of 60 million; larger ones take one more pass."""

ALL_CANDIDATES = 1 << 21
"""Values kept per tensor; with more than four models each gets its share of it."""

COUNTS_BYTES = 320
"""Of one block's counts besides its values: a Counts, an array's header, a tuple."""

MIN_BLOCK_CANDIDATES = 64
"""Every block may keep this many, so that the values kept stay a sample of all blocks."""

MARGIN_DEVIATIONS = 3.0
"""Half width of the bracket in standard errors of the sampled rank. The standard error is
measured between the sample's runs, so rows of different scale widen it. A miss (about one in
400) costs one more pass and nothing else."""


GUESSES = 8
"""Full passes whose bracket is a guess from what was seen; later ones halve what is left."""

NARROWING_SAMPLE = 1 << 16
"""Candidates, of those kept, that a narrower bracket is guessed from."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Which elements of one model's |xᵢ − x₀| survive.

    Those above `value`, and those equal to it whose flat index is below `stop_index`. Exactly:
    those above `below` before that index, and those above `value` from there on.

    below: the next smaller magnitude in the dtype of the search (0 for 0): |x| > below is
        |x| ≥ value. Where the last of equal ones survive, the two change places.
    """

    value: float
    below: float
    stop_index: int


@dataclass(frozen=True, slots=True)
class Search:
    """What is known of one model's threshold so far.

    keep: k, how many elements shall survive.
    known_low, known_high: the threshold certainly lies in [known_low, known_high].
    low, high: the bracket [low, high], within that range, that the next pass looks at.
    passes: full passes made so far.
    """

    keep: int
    known_low: float = 0.0
    known_high: float = math.inf
    low: float = 0.0
    high: float = math.inf
    passes: int = 0


@dataclass(frozen=True, slots=True)
class Locate:
    """The threshold is known; in `block` the `rank`-th element equal to it is the last that
    survives, or, where the last of equal ones do, the last that does not."""

    value: float
    below: float
    block: int
    rank: int
    keeps_last: bool = False

    def settled(self, index: int) -> Threshold:
        """The threshold, given the flat index of that element."""
        if self.keeps_last:
            return Threshold(self.below, self.value, index + 1)
        return Threshold(self.value, self.below, index + 1)


Entry = Search | Locate | Threshold


@dataclass(frozen=True, slots=True)
class State:
    """What one pass is for.

    entries: of each column, those of its searches.
    quota: candidates that one block may keep for each search.
    """

    entries: tuple[tuple[Entry, ...], ...]
    quota: int
    is_sample: bool = False
    only_block: int | None = None


class _Selection(ReduceOperation[tuple[Any, ...], Any]):
    """A search for the k-th largest values of some vectors, several k for each if need be.

    Subclasses say which vectors: `columns` of them, loaded one after the other.
    """

    is_sampling = True

    def wanted(self, parameters: Parameters) -> tuple[int, ...]:
        """How many thresholds are searched of each column."""
        return tuple(map(len, self.keep(parameters, ())))

    @abstractmethod
    def keep(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[Sequence[int]]:
        """The counts k of each column (1 ≤ k ≤ element count); their number is known without
        statistics, and never larger with them."""

    @abstractmethod
    def prepare(self, inputs: Sequence[BlockInput], scratch: Sequence[Vector]) -> None:
        """Loads what all columns need."""

    @abstractmethod
    def load(
        self, inputs: Sequence[BlockInput], column: int, change: Vector, scratch: Sequence[Vector]
    ) -> None:
        """Fills `change` with a column's values, all ≥ 0 or nan."""

    @abstractmethod
    def result(self, parameters: Parameters, found: Sequence[Sequence[Threshold]]) -> Any:
        """The statistic, given the thresholds of each column."""

    def is_sampled(self, parameters: Parameters) -> bool:
        """Whether runs of neighbours can be loaded as a block."""
        return bool(parameters.get("is_sampled", True))

    def is_located(self, parameters: Parameters) -> bool:
        """Whether it matters which of equal elements survive."""
        return True

    def keeps_last(self, parameters: Parameters) -> bool:
        """Whether the last of equal elements survive, not the first."""
        return False

    def extra_scratch(self) -> int:
        """Vectors besides the values and room for the count."""
        return 0

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=self.extra_scratch() + 2, stores=sum(self.wanted(parameters)))

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        wanted = sum(self.wanted(parameters))
        candidates = min(element_count, _quota(wanted, block_count) * block_count)
        # those of all searches as collected, those of one joined; samples are smaller
        values = (wanted + 1) * candidates
        if element_count > _candidates(wanted):
            # a block's before they are thinned out, and what a second bracket is guessed from
            values += 2 * element_count // max(1, block_count) + 6 * NARROWING_SAMPLE
        return values * item_bytes + wanted * block_count * COUNTS_BYTES

    def expected_passes(self, parameters: Parameters) -> int:
        return 1 if self.is_sampled(parameters) else 2

    def sample(self, parameters: Parameters, element_count: int) -> Sample | None:
        wanted = sum(self.wanted(parameters))
        if element_count <= _candidates(wanted) or not self.is_sampled(parameters):
            return None
        runs = SAMPLE_RUNS_LARGE if element_count > 1 << 24 else SAMPLE_RUNS
        return Sample(runs, SAMPLE_RUN_ELEMENTS)

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass | Done[Any]:
        keep = self.keep(parameters, statistics)
        entries = tuple(tuple(map(Search, counts)) for counts in keep)
        wanted = sum(self.wanted(parameters))
        quota = _quota(wanted, block_count)
        if not any(entries):
            return Done(self.result(parameters, [() for _ in entries]))
        sample = self.sample(parameters, element_count)
        return Pass(State(entries, quota, is_sample=sample is not None), sample=sample)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: State,
        scratch: Sequence[Vector],
        start: int,
    ) -> tuple[Any, ...]:
        *others, change, room = scratch
        self.prepare(inputs, others)
        partials: list[Any] = []
        for column, entries in enumerate(state.entries):
            if any(isinstance(entry, Search) or _is_due(entry, state) for entry in entries):
                self.load(inputs, column, change, others)
            if state.is_sample:
                partials.append(copy_of(change) if entries else None)
                continue
            found: list[Any] = []
            for entry in entries:
                partial: Any = None
                if isinstance(entry, Search):
                    partial = count_inside(change, entry.low, entry.high, state.quota, room)
                elif isinstance(entry, Locate) and _is_due(entry, state):
                    partial = find_equal(change, entry.value, entry.rank, start)
                found.append(partial)
            partials.append(tuple(found))
        return tuple(partials)

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: State,
        partials: Sequence[tuple[Any, ...]],
    ) -> Pass | Done[Any]:
        is_located, keeps_last = self.is_located(parameters), self.keeps_last(parameters)
        columns: list[tuple[Entry, ...]] = []
        for column, before in enumerate(state.entries):
            entries: list[Entry] = []
            for place, entry in enumerate(before):
                if isinstance(entry, Search) and state.is_sample:
                    entry = bracket_from_sample(entry, partials[0][column], element_count)
                elif isinstance(entry, Search):
                    counts = [partial[column][place] for partial in partials]
                    entry = narrow(entry, counts, element_count, keeps_last=keeps_last)
                    if isinstance(entry, Locate) and not is_located:
                        entry = Threshold(entry.value, entry.below, element_count)
                elif isinstance(entry, Locate) and _is_due(entry, state):
                    entry = entry.settled(partials[0][column][place])
                entries.append(entry)
            columns.append(tuple(entries))
        following = State(tuple(columns), state.quota)
        every = [entry for entries in columns for entry in entries]
        if any(isinstance(entry, Search) for entry in every):
            return Pass(following)
        for entry in every:
            if isinstance(entry, Locate):
                return Pass(replace(following, only_block=entry.block), only_block=entry.block)
        return Done(self.result(parameters, cast("Any", columns)))


@register
class MagnitudeThresholds(_Selection):
    """For inputs x₀, x₁ … xₙ: the thresholds that the kᵢ largest |xᵢ − x₀| reach, for each i ≥ 1.

    Parameters:
        keep: n entries: a count kᵢ (1 ≤ kᵢ ≤ element count), several in a tuple, or None where no
            threshold is wanted.
        keeps_last: of equal magnitudes the last survive (False where it is left out).
        is_sampled: whether the inputs can be computed for runs of neighbours (True where it is left
            out).

    Result: n entries, a Threshold, a tuple of them, or None.
    """

    name = "magnitude_thresholds"
    is_recordable = True

    def keep(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[Sequence[int]]:
        entries = cast("tuple[int | tuple[int, ...] | None, ...]", parameters["keep"])
        return [
            () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            for entry in entries
        ]

    def keeps_last(self, parameters: Parameters) -> bool:
        return bool(parameters.get("keeps_last", False))

    def extra_scratch(self) -> int:
        return 1

    def prepare(self, inputs: Sequence[BlockInput], scratch: Sequence[Vector]) -> None:
        inputs[0].read_into(scratch[0])

    def load(
        self, inputs: Sequence[BlockInput], column: int, change: Vector, scratch: Sequence[Vector]
    ) -> None:
        inputs[1 + column].read_into(change)
        change.sub_(scratch[0]).abs_()

    def result(self, parameters: Parameters, found: Sequence[Sequence[Threshold]]) -> Any:
        entries = cast("tuple[int | tuple[int, ...] | None, ...]", parameters["keep"])
        return tuple(
            None
            if entry is None
            else tuple(thresholds)
            if isinstance(entry, tuple)
            else thresholds[0]
            for entry, thresholds in zip(entries, found, strict=True)
        )


@register
class LargestValues(_Selection):
    """The kⱼ-th largest values of one input, all of whose elements are ≥ 0 or nan.

    Parameters:
        keep: the counts kⱼ (1 ≤ kⱼ ≤ element count).
        share: in place of `keep`; k is this share of the count that is the only statistic.
        is_sampled: whether the input can be computed for runs of neighbours.

    Result: a Threshold for each k; with `share`, None where k is 0. Of equal elements the first
    survive; with `keep` it does not matter which.
    """

    name = "largest_values"
    is_recordable = True

    def wanted(self, parameters: Parameters) -> tuple[int, ...]:
        return (1 if "share" in parameters else len(self.keep(parameters, ())[0]),)

    def keep(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[Sequence[int]]:
        if "share" in parameters:
            if not statistics or statistics[0] is None:  # in a walk that computes nothing
                return [(1,)]
            count = int(cast(float, parameters["share"]) * statistics[0])
            return [(count,) if count else ()]
        return [cast("tuple[int, ...]", parameters["keep"])]

    def is_located(self, parameters: Parameters) -> bool:
        return "share" in parameters

    def prepare(self, inputs: Sequence[BlockInput], scratch: Sequence[Vector]) -> None:
        pass

    def load(
        self, inputs: Sequence[BlockInput], column: int, change: Vector, scratch: Sequence[Vector]
    ) -> None:
        inputs[0].read_into(change)

    def result(self, parameters: Parameters, found: Sequence[Sequence[Threshold]]) -> Any:
        if "share" in parameters:
            return found[0][0] if found[0] else None
        return tuple(found[0])


def _candidates(wanted: int) -> int:
    """Values kept of one of so many searches."""
    return min(CANDIDATES, ALL_CANDIDATES // max(1, wanted))


def _quota(wanted: int, block_count: int) -> int:
    """Values kept for one search of a block."""
    return max(MIN_BLOCK_CANDIDATES, _candidates(wanted) // max(1, block_count))


def _is_due(entry: Entry, state: State) -> bool:
    return isinstance(entry, Locate) and entry.block == state.only_block


def bracket_from_sample(search: Search, sample: Magnitudes, element_count: int) -> Search:
    """The first bracket, from runs of neighbours taken all over the tensor.

    sample: shape (runs * SAMPLE_RUN_ELEMENTS,), magnitudes; nan counts as 0.
    """
    import numpy

    sample = numpy.where(numpy.isnan(sample), 0, sample)
    ascending = numpy.sort(sample)
    share = search.keep / element_count
    rank = share * len(sample)
    pivot = ascending[min(len(sample) - 1, max(0, len(sample) - round(rank)))]
    run_shares = (sample.reshape(-1, SAMPLE_RUN_ELEMENTS) >= pivot).mean(axis=1)
    standard_error = max(
        float(run_shares.std()) / math.sqrt(len(run_shares)),
        math.sqrt(share * (1 - share) / len(sample)),
    )
    margin = MARGIN_DEVIATIONS * standard_error * len(sample) + 1
    reaching = numpy.arange(len(sample), 0, -1)
    low, high = _bracket(search, ascending, reaching, rank, margin)
    return replace(search, low=low, high=high)


def narrow(
    search: Search, counts: Sequence[Counts], element_count: int, *, keeps_last: bool = False
) -> Search | Locate | Threshold:
    """What one full pass has taught about a threshold.

    counts: one per block, in block order. keeps_last: of equal elements the last survive.
    """
    import numpy

    search = replace(search, passes=search.passes + 1)
    above = sum(block.above for block in counts)
    inside = sum(block.inside for block in counts)
    number = counts[0].values.dtype.type
    if search.keep <= above:  # missed: it lies higher
        low = numpy.nextafter(number(search.high), number(math.inf))
        return _look_at(search, low, number(search.known_high))
    if search.keep > above + inside:  # missed: it lies lower
        if search.low <= search.known_low:  # the rest is nan, so every number survives
            return Threshold(0.0, 0.0, element_count)
        high = numpy.nextafter(number(search.low), number(-math.inf))
        return _look_at(search, number(search.known_low), high)
    rank = search.keep - above  # the threshold is the rank-th largest of those inside
    if search.low == search.high:
        ties = [block.inside for block in counts]
        return _settle(number(search.low), rank, ties, element_count, keeps_last)
    if sum(len(block.values) for block in counts) < inside:
        return _narrower(search, counts, rank, inside)
    values = numpy.concatenate([block.values for block in counts])
    values.partition(len(values) - rank)
    value = values[len(values) - rank]
    ties_kept = rank - int(numpy.count_nonzero(values > value))
    ties = [int(numpy.count_nonzero(block.values == value)) for block in counts]
    return _settle(value, ties_kept, ties, element_count, keeps_last)


def _look_at(search: Search, low: numpy.floating[Any], high: numpy.floating[Any]) -> Search:
    """The threshold is now known to lie in [low, high]: look at all of it, or at its upper half."""
    seen_low = low if search.passes < GUESSES else _middle(low, high)
    return replace(
        search,
        known_low=float(low),
        known_high=float(high),
        low=float(seen_low),
        high=float(high),
    )


def _narrower(search: Search, counts: Sequence[Counts], rank: int, inside: int) -> Search:
    """A smaller bracket, after one that held more candidates than could be kept.

    rank: of the threshold among the `inside` elements, counted from the largest.

    A kept value stands for as many elements as its block had inside for each that it kept.
    """
    import numpy

    number = counts[0].values.dtype.type
    known = _look_at(search, number(search.low), number(search.high))
    if known.passes >= GUESSES:
        return known
    stride = -(-sum(len(block.values) for block in counts) // NARROWING_SAMPLE)
    kept = [(block.values[::stride], block.inside) for block in counts if block.inside]
    values = numpy.concatenate([part for part, _ in kept])
    weights = numpy.concatenate([numpy.full(len(part), n / len(part)) for part, n in kept])
    order = numpy.argsort(values, kind="stable")
    reaching = numpy.cumsum(weights[order][::-1])[::-1]
    share = rank / inside
    deviation = math.sqrt(share * (1 - share) * float(weights.dot(weights)))
    margin = MARGIN_DEVIATIONS * deviation + float(weights.max())
    low, high = _bracket(known, values[order], reaching, rank, margin)
    if (low, high) == (known.low, known.high):
        low = float(_middle(number(low), number(high)))
    return replace(known, low=low, high=high)


def _bracket(
    search: Search, ascending: Magnitudes, reaching: NDArray[Any], rank: float, margin: float
) -> tuple[float, float]:
    """Values of a sorted sample around the `rank`-th largest; the known bounds beyond its ends.

    reaching: for each of the values, how many elements are estimated to reach it.
    """
    import numpy

    upper = int(numpy.count_nonzero(reaching > rank - margin))
    lower = int(numpy.count_nonzero(reaching >= rank + margin)) - 1
    high = float(ascending[upper]) if upper < len(ascending) else search.known_high
    low = float(ascending[lower]) if lower >= 0 else search.known_low
    return max(low, search.known_low), min(high, search.known_high)


def most_passes(item_bytes: int) -> int:
    """Bound of the full passes that one search takes, whatever the data.

    item_bytes: of the working dtype. Its magnitudes, 0 to infinity, are fewer than
    2^(8 * item_bytes − 1): after so many halvings one is left, and one pass counts it.
    """
    return GUESSES + 8 * item_bytes


def _middle(low: numpy.floating[Any], high: numpy.floating[Any]) -> numpy.floating[Any]:
    """The float halfway between two in the order of the floats (both ≥ 0), upwards if none is."""
    import numpy

    bits = numpy.dtype(f"i{low.dtype.itemsize}")
    first, last = int(low.view(bits)), int(high.view(bits))
    middle = numpy.array([(first + last + 1) // 2], dtype=bits).view(low.dtype)
    return cast("numpy.floating[Any]", middle[0])


def _settle(
    value: numpy.floating[Any],
    ties_kept: int,
    ties_by_block: Sequence[int],
    element_count: int,
    keeps_last: bool,
) -> Threshold | Locate:
    """The threshold is `value`; the first (or last) `ties_kept` elements equal to it survive."""
    import numpy

    below = float(numpy.nextafter(value, value.dtype.type(0)))
    if ties_kept == sum(ties_by_block):
        return Threshold(float(value), below, element_count)
    rank = sum(ties_by_block) - ties_kept if keeps_last else ties_kept
    before = 0
    for block, ties in enumerate(ties_by_block):
        if before + ties >= rank:
            return Locate(float(value), below, block, rank - before, keeps_last)
        before += ties
    raise AssertionError(f"{ties_kept} ties to keep, {before} counted")
