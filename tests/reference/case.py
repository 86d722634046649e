"""One merge of one tensor, as the references see it: x₀, x₁…xₙ, δᵢ and the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[np.float64]
Mask = NDArray[np.bool_]

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Case:
    """The operands of a reference.

    base_or_none: x₀, or None.
    models: x₁…xₙ, all of one shape, in recipe order.
    parameters: global parameters, and values that hold for every model without its own.
    model_parameters: one mapping per model.
    keep_or_none: for random methods, one mask per model (True survives).
    difference_dtype: what δᵢ is rounded to, once, before it is used.
    """

    base_or_none: Tensor | None
    models: tuple[Tensor, ...]
    parameters: Mapping[str, Any]
    model_parameters: tuple[Mapping[str, Any], ...]
    keep_or_none: tuple[Mask, ...] | None
    difference_dtype: type[np.floating[Any]]

    @property
    def base(self) -> Tensor:
        """x₀. Raises ValueError where the case has none."""
        if self.base_or_none is None:
            raise ValueError("this method needs a base")
        return self.base_or_none

    @property
    def keep(self) -> tuple[Mask, ...]:
        """The random masks. Raises ValueError where the case has none."""
        if self.keep_or_none is None:
            raise ValueError("this method needs keep masks, one per model")
        return self.keep_or_none

    @cached_property
    def deltas(self) -> list[Tensor]:
        """δᵢ = xᵢ − x₀."""
        return [
            (model - self.base).astype(self.difference_dtype).astype(np.float64)
            for model in self.models
        ]

    def number(self, name: str, default: float | None = None) -> float:
        """A global number; without a default it is required."""
        value = self.parameters.get(name, default)
        if value is None:
            raise ValueError(f"parameter {name!r} is required")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A global switch."""
        return bool(self.parameters.get(name, default))

    def per_model(self, name: str, default: Any = _REQUIRED) -> list[Any]:
        """A parameter's value for each model, in recipe order."""
        shared = self.parameters.get(name, default)
        values = [own.get(name, shared) for own in self.model_parameters]
        if any(value is _REQUIRED for value in values):
            raise ValueError(f"parameter {name!r} is required for every model")
        return values


def as_rows(tensor: NDArray[Any]) -> NDArray[Any]:
    """The tensor as [rows, last dimension]; a 1-D tensor is one row, a scalar one row of one."""
    shape = tensor.shape or (1,)
    return tensor.reshape(prod(shape[:-1]), shape[-1])


def by_row(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function of vectors to the corresponding rows of equally shaped tensors."""
    result = np.zeros_like(as_rows(tensors[0]))
    for index, vectors in enumerate(zip(*map(as_rows, tensors), strict=True)):
        result[index] = function(*vectors)
    return result.reshape(tensors[0].shape)


def by_column(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function of vectors along the first dimension, to corresponding columns."""
    if tensors[0].ndim < 2:
        return by_row(function, *tensors)
    turned = [np.ascontiguousarray(np.moveaxis(tensor, 0, -1)) for tensor in tensors]
    return np.moveaxis(by_row(function, *turned), -1, 0)
