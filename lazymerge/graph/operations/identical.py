"""Copying a tensor that must be the same in every model (integers and booleans)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ...errors import InputAtFaultError
from ..operation import ApplyOperation, BlockInput, Cost, Parameters, register
from ..vector import same_bytes


@register
class Identical(ApplyOperation):
    """The first input's bytes, after checking that every other input has the same bytes.

    Parameters:
        tensor: the output tensor's name, for the error.
        models: the inputs' model references, for the error.
    """

    name = "identical"
    is_raw = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return input_dtypes[0]

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=0, raw=min(2, input_count))

    def run_raw(self, inputs: Sequence[BlockInput], prepared: Any, start: int) -> memoryview:
        first = inputs[0].raw(0)
        for index, other in enumerate(inputs[1:], start=1):
            if not same_bytes(first, other.raw(1)):
                models = cast("tuple[str, ...]", prepared["models"])
                raise InputAtFaultError(
                    f"tensor {prepared['tensor']} holds integers or booleans, which cannot be "
                    f"merged, and differs between {models[0]} and {models[index]}; "
                    "make them equal, or leave one of the two models out"
                )
        return first
