"""Small tensors that are wanted whole: read block by block, and joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..operation import BlockInput, Cost, Parameters, Pass, ReduceOperation
from ..vector import copy_of

if TYPE_CHECKING:
    from ..vector import Numbers, Vector


class Collected(ReduceOperation["Numbers", "Numbers"]):
    """What collects its one input in one pass. What becomes of the blocks' numbers, and how much
    memory that takes, is the subclass's to say."""

    is_recordable = True
    is_for_host = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1, stores=1)

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass:
        return Pass(None)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Numbers:
        inputs[0].read_into(scratch[0])
        return copy_of(scratch[0])
