"""What a merge did to its models, or how two models differ: numbers that were gathered in one pass.

    OUT/lazymerge-statistics.json      of a merge that was run with --stats

Everything here follows from sums over elements (graph/operations/statistics.py), so the same
quantities can be had of one tensor, a layer, or a whole model. For a reference x₀, models xᵢ and a
result y, with δᵢ = xᵢ − x₀ and δ = y − x₀:

    norm, relative       ‖δ‖, ‖δ‖ / ‖x₀‖
    fraction             share of elements where δ is not 0
    cosine, of a model   ⟨δᵢ, δ⟩ / ‖δᵢ‖ ‖δ‖
    kept                 ⟨δᵢ, δ⟩ / ‖δᵢ‖²: how much of the model's change is in the result
    agreement            of the elements that the model changes, the share that the result moves the
                         same way
    conflict             of the elements that any model changes, the share where two models pull in
                         opposite directions
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.json_file import read_json_mapping
from ..errors import InputError, brief
from ..graph.operations.gram import exact_sum
from ..graph.operations.statistics import Moments
from ..output.manifest import STATISTICS_NAME

STATISTICS_FORMAT = 1

MAX_FILE_BYTES = 500_000_000
"""As of a manifest: of 90,000 tensors of three models it has 60 MB."""

MAX_FILE_VALUES = 20_000_000
MOST_MODELS = 256

_REMEDY = "It was damaged after lazymerge wrote it; the weights beside it are not concerned."


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What is known of one tensor.

    elements: how many it has.
    models: the reference, then the others, as the recipe writes them; each as often as a tensor of
        its has part.
    moments: of the others' changes and, last, of the result's; None: nothing was gathered.
    reason: why not.
    """

    name: str
    elements: int
    models: tuple[str, ...] = ()
    moments: Moments | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of all tensors of an output, in its order.

    fingerprint: of the merge. models: all of them, as the recipe writes them.
    """

    fingerprint: str
    models: tuple[str, ...]
    tensors: Mapping[str, TensorStatistics]


@dataclass(frozen=True, slots=True)
class ModelChange:
    """One model's change, and what became of it; nan where that is 0 / 0.

    norm: ‖δᵢ‖. relative: to ‖x₀‖. fraction: share of the elements that it changes.
    largest: |δᵢ|. cosine: to the result's change. kept: how much of it is in the result.
    agreement: share of the elements that it changes where the result moves the same way.
    """

    norm: float
    relative: float
    fraction: float
    largest: float
    cosine: float
    kept: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Change:
    """How the result differs from the reference, over one tensor or several; nan where that is 0/0.

    elements: of them. reference_norm: ‖x₀‖. norm: ‖δ‖. relative: ‖δ‖ / ‖x₀‖.
    fraction: share of elements that differ. largest: |δ|.
    conflict: of the elements that any model changes, the share where two contradict each other.
    cosines: of the result itself to the reference and to every model, by name.
    models: every model but the reference, by name.
    between: cosines of the changes of two models.
    """

    elements: int
    reference_norm: float
    norm: float
    relative: float
    fraction: float
    largest: float
    conflict: float
    cosines: Mapping[str, float]
    models: Mapping[str, ModelChange]
    between: Mapping[tuple[str, str], float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; null where a number is none."""
        return {
            "elements": self.elements,
            "reference_norm": number_or_none(self.reference_norm),
            "norm": number_or_none(self.norm),
            "relative": number_or_none(self.relative),
            "fraction": number_or_none(self.fraction),
            "largest": number_or_none(self.largest),
            "conflict": number_or_none(self.conflict),
            "cosines": {name: number_or_none(value) for name, value in self.cosines.items()},
            "models": {
                name: {
                    field: number_or_none(getattr(change, field)) for field in ModelChange.__slots__
                }
                for name, change in self.models.items()
            },
            "between": [
                {"models": list(pair), "cosine": number_or_none(value)}
                for pair, value in self.between.items()
            ],
        }


def number_or_none(value: float) -> float | None:
    """A number for JSON, which knows no inf and no nan."""
    return value if math.isfinite(value) else None


class _Sums:
    """Sums by what they are of, and largest values."""

    def __init__(self) -> None:
        self._terms: dict[object, list[float]] = defaultdict(list)

    def add(self, key: object, value: float) -> None:
        self._terms[key].append(value)

    def __getitem__(self, key: object) -> float:
        return exact_sum(self._terms.get(key, ()))

    def largest(self, key: object) -> float:
        return max(self._terms.get(key, (0.0,)))


def change_of(tensors: Iterable[TensorStatistics]) -> Change | None:
    """What is to be said of some tensors taken together; None where nothing was gathered.

    A model that some of them are not made of counts in the others alone.
    """
    sums = _Sums()
    elements = 0
    names: dict[str, None] = {}
    pairs: dict[tuple[str, str], None] = {}
    references: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.moments is None:
            continue
        elements += tensor.elements
        references[tensor.models[0]] += tensor.elements
        _add(sums, tensor, tensor.moments, names, pairs)
    if not elements:
        return None
    reference = references.most_common(1)[0][0]
    return Change(
        elements=elements,
        reference_norm=_root(sums["reference"]),
        norm=_root(sums["square"]),
        relative=_ratio(_root(sums["square"]), _root(sums["reference"])),
        fraction=sums["count"] / elements,
        largest=sums.largest("largest"),
        conflict=_ratio(sums["mixed"], sums["changed"]),
        cosines={
            name: _cosine(sums["of", name], sums["own", name], sums["with", name])
            for name in (reference, *(name for name in names if name != reference))
        },
        models={name: _model_change(sums, name) for name in names},
        between={
            pair: _cosine(sums["between", pair], sums["left", pair], sums["right", pair])
            for pair in pairs
        },
    )


def _add(
    sums: _Sums,
    tensor: TensorStatistics,
    moments: Moments,
    names: dict[str, None],
    pairs: dict[tuple[str, str], None],
) -> None:
    """One tensor's share. The last change is the result's."""
    *others, last = range(len(moments.products))
    reference, square = moments.reference_square, moments.products[last][last]
    of_result = reference + 2 * moments.reference_products[last] + square
    sums.add("reference", reference)
    sums.add("square", square)
    sums.add("count", moments.agreements[last][last])
    sums.add("largest", moments.largest[last])
    sums.add("changed", moments.changed)
    sums.add("mixed", moments.mixed)
    sums.add(("of", tensor.models[0]), reference + moments.reference_products[last])
    sums.add(("own", tensor.models[0]), reference)
    sums.add(("with", tensor.models[0]), of_result)
    for place in others:
        name = tensor.models[place + 1]
        names.setdefault(name)
        own, product = moments.products[place][place], moments.products[place][last]
        in_place = moments.reference_products[place]
        sums.add(("elements", name), tensor.elements)
        sums.add(("reference", name), reference)
        sums.add(("result", name), square)
        sums.add(("square", name), own)
        sums.add(("product", name), product)
        sums.add(("count", name), moments.agreements[place][place])
        sums.add(("agreements", name), moments.agreements[place][last])
        sums.add(("largest", name), moments.largest[place])
        sums.add(("of", name), reference + in_place + moments.reference_products[last] + product)
        sums.add(("own", name), reference + 2 * in_place + own)
        sums.add(("with", name), of_result)
        for other in others[:place]:
            pair = (tensor.models[other + 1], name)
            pairs.setdefault(pair)
            sums.add(("between", pair), moments.products[place][other])
            sums.add(("left", pair), moments.products[other][other])
            sums.add(("right", pair), own)


def _model_change(sums: _Sums, name: str) -> ModelChange:
    square, product = sums["square", name], sums["product", name]
    return ModelChange(
        norm=_root(square),
        relative=_ratio(_root(square), _root(sums["reference", name])),
        fraction=_ratio(sums["count", name], sums["elements", name]),
        largest=sums.largest(("largest", name)),
        cosine=_cosine(product, square, sums["result", name]),
        kept=_ratio(product, square),
        agreement=_ratio(sums["agreements", name], sums["count", name]),
    )


def _root(square: float) -> float:
    """nan stays; a sum of squares that is below 0 by a rounding is 0."""
    return math.sqrt(square) if square > 0 else square * 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _cosine(product: float, one: float, other: float) -> float:
    found = _ratio(product, _root(one) * _root(other))
    return max(-1.0, min(1.0, found)) if math.isfinite(found) else math.nan


def tensor_document(tensor: TensorStatistics, models: Sequence[str]) -> dict[str, Any]:
    """A tensor of the statistics file. models: of the file, which it names by number."""
    moments = tensor.moments
    if moments is None:
        return {"elements": tensor.elements, "left_out": tensor.reason}
    return {
        "elements": tensor.elements,
        "models": [models.index(name) for name in tensor.models],
        "reference_square": number_or_none(moments.reference_square),
        "reference_products": _row(moments.reference_products),
        "products": [_row(row[: place + 1]) for place, row in enumerate(moments.products)],
        "agreements": [
            [int(count) for count in row[: place + 1]]
            for place, row in enumerate(moments.agreements)
        ],
        "largest": _row(moments.largest),
        "changed": int(moments.changed),
        "mixed": int(moments.mixed),
    }


def _row(numbers: Iterable[float]) -> list[float | None]:
    return [number_or_none(number) for number in numbers]


def load_statistics(folder: Path | str) -> Statistics:
    """What a run with --stats has left in an output folder.

    Raises:
        InputError: there is nothing, or it is not what a run writes.
    """
    path = Path(folder) / STATISTICS_NAME
    if not path.is_file():
        raise InputError(
            f"{folder} holds no statistics: they are gathered by lazymerge run --stats, while the "
            "merge is made"
        )
    document, _ = read_json_mapping(
        path, MAX_FILE_BYTES, limit_values=MAX_FILE_VALUES, remedy=_REMEDY
    )
    if document.get("format") != STATISTICS_FORMAT:
        raise InputError(f"{path} was not written by this version of lazymerge")
    try:
        return _statistics(document)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({brief(error)}). {_REMEDY}") from error


def _statistics(document: Mapping[str, Any]) -> Statistics:
    models = tuple(map(_text, _list(document["models"], MOST_MODELS)))
    tensors = document["tensors"]
    return Statistics(
        _text(document["fingerprint"]),
        models,
        {name: _tensor(name, entry, models) for name, entry in tensors.items()},
    )


def _tensor(name: str, entry: Mapping[str, Any], models: Sequence[str]) -> TensorStatistics:
    elements = _count(entry["elements"])
    if "left_out" in entry:
        return TensorStatistics(name, elements, reason=_text(entry["left_out"]))
    numbers = [_count(number) for number in _list(entry["models"], MOST_MODELS)]
    size = len(numbers)
    if size < 2:
        raise ValueError(f"{size} models")
    return TensorStatistics(
        name,
        elements,
        tuple(models[number] for number in numbers),
        Moments(
            reference_square=_number(entry["reference_square"]),
            reference_products=_numbers(entry["reference_products"], size),
            products=_square(entry["products"], size),
            agreements=_square(entry["agreements"], size),
            largest=_numbers(entry["largest"], size),
            changed=_number(entry["changed"]),
            mixed=_number(entry["mixed"]),
        ),
    )


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise TypeError("a list expected, or a shorter one")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    if len(value.splitlines()) > 1:
        raise ValueError("a line break in a name")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError("a count expected")
    return value


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise TypeError("a number expected")
    return float(value)


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    if len(_list(value, count)) != count:
        raise ValueError(f"{count} numbers expected")
    return tuple(map(_number, value))


def _square(value: Any, size: int) -> tuple[tuple[float, ...], ...]:
    """The symmetric matrix of a lower triangle."""
    rows = [_numbers(row, place + 1) for place, row in enumerate(_list(value, size))]
    if len(rows) != size:
        raise ValueError(f"{size} rows expected")
    return tuple(
        tuple(rows[max(row, column)][min(row, column)] for column in range(size))
        for row in range(size)
    )
