"""Which changes of a model survive: rules that zero the elements of a block of δᵢ = xᵢ − x₀.

keep      all of them
none      none of them (nan apart)
largest   the k largest magnitudes; a threshold, found exactly (graph/operations/selection.py)
band      those of middle rank: neither the smallest nor the outliers; two thresholds
random    each with one probability; random bits from (seed, model, tensor, element) alone
ranked    each with a probability that rises with its rank within its row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from ..graph.operation import Parameters
from ..graph.operations.selection import Threshold
from ..graph.vector import draw, drop_largest, keep_largest, zero_from

if TYPE_CHECKING:
    from ..graph.vector import Vector

Kind = Literal["keep", "none", "largest", "band", "random", "ranked"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What survives of one model's changes.

    lower, upper: thresholds (largest, band): what does not reach `lower` is zeroed, and what
        reaches `upper`; None: nothing is.
    key: of the random bits. probability: of an element (random), of the lowest rank (ranked).
    slope: what each rank adds to it.
    is_divided: survivors are divided by their probability.
    """

    kind: Kind
    lower: Threshold | None = None
    upper: Threshold | None = None
    key: int = 0
    probability: float = 1.0
    slope: float = 0.0
    is_divided: bool = False

    def thin(
        self,
        change: Vector,
        start: int,
        draws: Vector | None = None,
        room: Vector | None = None,
        ranks: Vector | None = None,
    ) -> None:
        """Zeroes what does not survive, in place.

        start: flat index of the block's first element.
        draws, room: overwritten (all kinds but keep and largest; band takes room alone).
        ranks: of the magnitudes in their rows (ranked); overwritten.
        """
        if self.lower is not None:
            lower = self.lower
            keep_largest(change, lower.value, lower.below, lower.stop_index, start)
        if self.upper is not None:
            assert room is not None
            upper = self.upper
            drop_largest(change, upper.value, upper.below, upper.stop_index, start, room)
        if self.kind == "random":
            assert draws is not None
            assert room is not None
            draw(draws, self.key, start, room)
            zero_from(change, draws, self.probability, room)
        elif self.kind == "ranked":
            assert draws is not None
            assert room is not None
            assert ranks is not None
            draw(draws, self.key, start, room)
            probabilities = ranks.mul_(self.slope).add_(self.probability)
            zero_from(change, draws, probabilities, room)
            if self.is_divided:
                change.div_(probabilities)

    @property
    def scale(self) -> float:
        """What survivors are multiplied by."""
        return 1 / self.probability if self.kind == "random" and self.is_divided else 1.0


def rules(parameters: Parameters, statistics: Sequence[Any]) -> list[Rule]:
    """The rules of a node's models.

    parameters: kinds, one per model; of random ones also keys, probabilities, slopes and
        is_divided. statistics: the first holds a Threshold (largest) or two (band) per model, or
        None, where any of them is of such a kind.
    """
    kinds = cast("tuple[Kind, ...]", parameters["kinds"])
    made = []
    for index, kind in enumerate(kinds):
        if kind == "largest":
            made.append(Rule(kind, lower=statistics[0][index]))
        elif kind == "band":
            lower, upper = _bounds(statistics[0][index], parameters, index)
            made.append(Rule(kind, lower=lower, upper=upper))
        elif kind == "keep":
            made.append(Rule(kind))
        elif kind == "none":
            made.append(Rule(kind, lower=Threshold(math.inf, math.inf, 0)))
        else:
            made.append(
                Rule(
                    kind,
                    key=_of(parameters, "keys", index),
                    probability=_of(parameters, "probabilities", index),
                    slope=_of(parameters, "slopes", index),
                    is_divided=bool(parameters["is_divided"]),
                )
            )
    return made


def _of(parameters: Parameters, name: str, index: int) -> Any:
    return cast("tuple[Any, ...]", parameters[name])[index]


def _bounds(
    found: Sequence[Threshold], parameters: Parameters, index: int
) -> tuple[Threshold | None, Threshold | None]:
    """The thresholds below and above a band, of those that were searched for it."""
    has_lower, has_upper = _of(parameters, "bounds", index)
    thresholds = iter(found)
    return (
        next(thresholds) if has_lower else None,
        next(thresholds) if has_upper else None,
    )
