"""Runs a reduction over tensors in memory, block by block, and records every pass it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lazymerge.engine.pairs import Pairs
from lazymerge.graph.operation import Done, Parameters, Pass, ReduceOperation


@dataclass
class MemoryInput:
    """A tensor as an operation's input, positioned by the driver."""

    whole: torch.Tensor
    block: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def read_into(self, out: torch.Tensor) -> None:
        out.copy_(self.block)

    def raw(self, slot: int = 0) -> torch.Tensor:
        return self.block.view(torch.uint8)


@dataclass(frozen=True)
class Reduced:
    """What a reduction gave, and the passes it took."""

    result: Any
    passes: tuple[Pass, ...]

    @property
    def full_passes(self) -> int:
        return sum(p.sample is None and p.only_block is None for p in self.passes)


def drive(
    operation: ReduceOperation[Any, Any],
    tensors: Sequence[torch.Tensor],
    parameters: Parameters,
    block_elements: int,
    *,
    statistics: Sequence[Any] = (),
    most_passes: int = 500,
) -> Reduced:
    """Run a reduction to its end over flat tensors of one length and of the working dtype."""
    elements = len(tensors[0])
    dtype = tensors[0].dtype
    starts = list(range(0, elements, block_elements))
    inputs = [MemoryInput(tensor) for tensor in tensors]
    scratch_count = operation.cost(len(tensors), parameters).scratch
    passes: list[Pass] = []
    step = operation.first_pass(parameters, statistics, elements, len(starts))
    while not isinstance(step, Done):
        passes.append(step)
        assert len(passes) <= most_passes, f"no end after {most_passes} passes: {step.state}"
        if step.sample is not None:
            length = step.sample.run_elements
            pieces = [[(s, s + length) for s in step.sample.starts(elements)]]
        else:
            chosen = starts if step.only_block is None else [starts[step.only_block]]
            pieces = [[(s, min(s + block_elements, elements))] for s in chosen]
        partials = []
        for block in pieces:
            for source in inputs:
                parts = [source.whole[a:b] for a, b in block]
                source.block = parts[0] if len(parts) == 1 else torch.cat(parts)
            size = len(inputs[0].block)
            scratch = list(torch.full((scratch_count, size), float("nan"), dtype=dtype))
            partial = operation.run(inputs, parameters, step.state, scratch, start=block[0][0])
            partials.append(operation.summary(partial, parameters))
        if operation.is_joined:
            pairs = Pairs(operation.joined, len(partials))
            for place, partial in enumerate(partials):
                pairs.add(place, partial)
            partials = [pairs.result]
        step = operation.finish(parameters, elements, step.state, partials)
    return Reduced(step.result, tuple(passes))
