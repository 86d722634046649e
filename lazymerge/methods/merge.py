"""What a merge method works with: one output tensor, and the models' tensors that go into it.

A method is a function from a `TensorMerge` to the id of the node that yields the merged tensor.
It adds nodes to the graph and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NoReturn

from ..errors import InputError
from ..graph.graph import Graph
from ..graph.node import Apply, ParameterValue, Reduce, as_parameters
from ..graph.operation import apply_operation, reduce_operation
from ..recipe.signature import Scalar, Signature


@dataclass(frozen=True, slots=True)
class Contribution:
    """One model's tensor.

    model: reference as the recipe writes it.
    node: id of the node that yields it.
    parameters: the method's per-model parameters, resolved for this tensor; None: no value.
    place: of the model among the recipe's, from 0; whatever other models lack the tensor.
    """

    model: str
    node: str
    parameters: Mapping[str, Scalar | None]
    place: int = 0

    def number(self, name: str) -> float:
        """A numeric parameter's value."""
        value = self.parameters[name]
        if value is None:
            raise KeyError(f"{self.model} has no {name}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A numeric parameter's value, None where there is none."""
        value = self.parameters[name]
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """The merge of one output tensor.

    name: of the output tensor.
    shape: of the output tensor and of every input.
    base: x₀, None where the method has no use for it.
    models: the models that have the tensor, in recipe order; for methods with a base, without
        the base (x₁ … xₙ).
    parameters: the method's global parameters, resolved for this tensor.
    graph: where nodes are added.
    seed: of random methods.
    """

    name: str
    shape: tuple[int, ...]
    base: Contribution | None
    models: tuple[Contribution, ...]
    parameters: Mapping[str, Scalar | None]
    graph: Graph
    seed: int = 0

    @property
    def element_count(self) -> int:
        """N."""
        return prod(self.shape)

    @property
    def required_base(self) -> Contribution:
        """x₀ of a method whose signature requires a base."""
        if self.base is None:
            self.fail("has no base model")
        return self.base

    def number(self, name: str) -> float:
        """A numeric global parameter's value."""
        value = self.parameters[name]
        if value is None:
            raise KeyError(f"{self.name} has no {name}")
        return float(value)

    def flag(self, name: str) -> bool:
        """A boolean global parameter's value."""
        return bool(self.parameters[name])

    def apply(
        self,
        operation: str,
        inputs: Sequence[str],
        statistics: Sequence[str] = (),
        **parameters: ParameterValue,
    ) -> str:
        """Adds an Apply node over block-valued nodes of the tensor's shape; returns its id."""
        dtypes = [self.graph.block_node(node).dtype for node in inputs]
        return self.graph.add(
            Apply(
                operation=operation,
                parameters=as_parameters(parameters),
                inputs=tuple(inputs),
                statistics=tuple(statistics),
                shape=self.shape,
                working_dtype=apply_operation(operation).working_dtype(dtypes),
            )
        )

    def reduce(
        self,
        operation: str,
        inputs: Sequence[str],
        statistics: Sequence[str] = (),
        **parameters: ParameterValue,
    ) -> str:
        """Adds a Reduce node over block-valued nodes of the tensor's shape; returns its id."""
        dtypes = [self.graph.block_node(node).dtype for node in inputs]
        if reduce_operation(operation).is_sampling and any(map(self._is_positional, inputs)):
            parameters["is_sampled"] = False
        return self.graph.add(
            Reduce(
                operation=operation,
                parameters=as_parameters(parameters),
                inputs=tuple(inputs),
                statistics=tuple(statistics),
                shape=self.shape,
                working_dtype=reduce_operation(operation).working_dtype(dtypes),
            )
        )

    def _is_positional(self, node_id: str) -> bool:
        """Whether a block-valued node can only be computed at its own place in the tensor."""
        node = self.graph.block_node(node_id)
        return isinstance(node, Apply) and (
            apply_operation(node.operation).is_positional
            or any(map(self._is_positional, node.inputs))
        )

    def fail(self, problem: str) -> NoReturn:
        """Raises an InputError about this tensor."""
        raise InputError(f"tensor {self.name}: {problem}")


Build = Callable[[TensorMerge], str]


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: what it takes, and how it turns one tensor's inputs into nodes."""

    signature: Signature
    build: Build


METHODS: dict[str, Method] = {}
"""Every known method, by name. Importing lazymerge.methods fills it with the built-in ones."""


def merge_method(signature: Signature) -> Callable[[Build], Build]:
    """Decorator: makes a function known as the merge method of that signature.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(build: Build) -> Build:
        if signature.name in METHODS:
            raise ValueError(f"merge method {signature.name!r} is defined twice")
        METHODS[signature.name] = Method(signature, build)
        return build

    return decorate
