"""Methods of your own: a function of torch tensors, and a line that says what it is.

    import torch
    from lazymerge.methods.own import Inputs, elementwise, model_parameter

    @elementwise("median", "Takes the median of the models, element by element.")
    def median(inputs: Inputs) -> torch.Tensor:
        return torch.stack(inputs.models).median(dim=0).values

    lazymerge run recipe.yml -o merged --plugin median.py

The function is given the tensors of all models and returns one of the same shape. How much of a
tensor it sees at a time is its kind:

    elementwise   blocks of 262,144 elements, as vectors; nothing it does may mix elements
    rowwise       whole rows (vectors along the last dimension), as a matrix
    tensorwise    the whole tensor in its shape: memory for all models' is needed at once

Blocks come in any order and in several threads. A function must give the same result for the same
inputs, change nothing outside itself, and leave its inputs as they are. What it allocates is not
seen by lazymerge: `temporaries` says how many tensors as large as its inputs it makes besides, and
that is what the plan reckons with.

Methods are found in files that `--plugin FILE.py` (or `lazymerge.load_plugin`) names, and in
installed packages that have an entry point in the group `lazymerge.methods`, whose modules are
imported. The text of their module is part of the plan: change it, and it is another merge.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import LazymergeError
from ..graph.operation import ApplyOperation, BlockInput, Cost, Parameters, register
from ..recipe.signature import BaseModel, Parameter, Scalar, Scope, Signature
from .merge import Contribution, TensorMerge, merge_method

if TYPE_CHECKING:
    from torch import Tensor

    from ..graph.vector import Vector

__all__ = [
    "BaseModel",
    "Inputs",
    "elementwise",
    "model_parameter",
    "parameter",
    "rowwise",
    "tensorwise",
]

Kind = Literal["elementwise", "rowwise", "tensorwise"]

TEMPORARIES = 4
"""Tensors as large as an input that a function is believed to make, if it does not say."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a method of your own is given.

    tensor: name of the output tensor.
    base: x₀, None where the method has none.
    models: x₁ … xₙ, in recipe order, without the base where it has one.
    parameters: the recipe's values of the method's parameters, by name.
    model_parameters: those of each model.

    Tensors are float32 (float64 where an input is float64). Their shape is (n,) for elementwise
    functions, (rows, row length) for rowwise ones, that of the tensor for tensorwise ones.
    """

    tensor: str
    base: Tensor | None
    models: Sequence[Tensor]
    parameters: Mapping[str, Scalar | None]
    model_parameters: Sequence[Mapping[str, Scalar | None]]


Function = Callable[[Inputs], "Tensor"]
Decorator = Callable[[Function], Function]


def parameter(
    name: str,
    help: str,
    default: Scalar | None = None,
    *,
    type: type[float] | type[int] | type[bool] | type[str] = float,
    required: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Parameter:
    """A parameter with one value per tensor. See lazymerge.recipe.signature.Parameter."""
    return Parameter(name, type, Scope.GLOBAL, help, default, required, minimum, maximum)


def model_parameter(
    name: str,
    help: str,
    default: Scalar | None = None,
    *,
    type: type[float] | type[int] | type[bool] | type[str] = float,
    required: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Parameter:
    """A parameter with a value for every model but the base."""
    return Parameter(name, type, Scope.NON_BASE, help, default, required, minimum, maximum)


def elementwise(name: str, summary: str, **options: Any) -> Decorator:
    """Makes a function of vectors a merge method.

    name: as written in `merge_method`. summary: one line. options:
        formula, source: for `lazymerge methods NAME`.
        parameters: a tuple of `parameter` and `model_parameter`.
        base: BaseModel.REQUIRED, OPTIONAL or UNUSED (the default).
        min_models, max_models: as of Signature; 1 and any number by default.
        temporaries: tensors as large as an input that the function makes besides its result.

    Raises:
        ValueError: there is a method of that name.
    """
    return _decorator("elementwise", name, summary, **options)


def rowwise(name: str, summary: str, **options: Any) -> Decorator:
    """Makes a function of matrices, some rows of the tensor, a merge method; see `elementwise`."""
    return _decorator("rowwise", name, summary, **options)


def tensorwise(name: str, summary: str, **options: Any) -> Decorator:
    """Makes a function of whole tensors a merge method; see `elementwise`."""
    return _decorator("tensorwise", name, summary, **options)


class OwnOperation(ApplyOperation):
    """A function of somebody else's, block by block.

    Parameters: tensor, shape, shared and own (pairs of name and value), has_base, code (a hash of
    the module it stands in).
    """

    is_positional = True
    is_for_host = True

    def __init__(self) -> None:
        """Made by `register`; what it calls is set by the class that `_operation` makes."""

    kind: Kind
    function: Function
    temporaries: int

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count, temporaries=self.temporaries + 1)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        own = cast("Sequence[Any]", parameters["own"])
        return (
            parameters,
            dict(cast("Any", parameters["shared"])),
            [dict(values) for values in own],
        )

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        parameters, shared, own = prepared
        tensors: list[Any] = list(scratch)
        for source, vector in zip(inputs, scratch, strict=True):
            source.read_into(vector)
        shape = self._shape(tensors[0], parameters["shape"])
        tensors = [tensor.view(shape) for tensor in tensors]
        base = tensors.pop(0) if parameters["has_base"] else None
        given = Inputs(str(parameters["tensor"]), base, tensors, shared, own)
        try:
            result: Any = type(self).function(given)
        except Exception as error:
            raise LazymergeError(
                f"tensor {given.tensor}: merge method {self.name.partition(' ')[2]} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        target: Any = out
        if tuple(getattr(result, "shape", ())) != tuple(shape):
            raise LazymergeError(
                f"tensor {given.tensor}: merge method {self.name.partition(' ')[2]} was given "
                f"tensors of shape {tuple(shape)} and returned "
                f"{tuple(result.shape) if hasattr(result, 'shape') else type(result).__name__}"
            )
        target.view(shape).copy_(result)

    def _shape(self, vector: Any, shape: Sequence[int]) -> tuple[int, ...]:
        if self.kind == "elementwise":
            return (len(vector),)
        if self.kind == "rowwise":
            row = prod(shape[-1:])
            return (len(vector) // row, row)
        return tuple(shape)


def _operation(kind: Kind, name: str, function: Function, temporaries: int) -> str:
    """Registers an operation; returns its name, which no operation of lazymerge's has."""
    operation_name = f"own {name}"
    made = type(
        f"Own_{name}",
        (OwnOperation,),
        {
            "name": operation_name,
            "kind": kind,
            "function": staticmethod(function),
            "temporaries": temporaries,
            "is_by_rows": kind == "rowwise",
            "is_whole": kind == "tensorwise",
        },
    )
    register(made)
    return operation_name


def _decorator(
    kind: Kind,
    name: str,
    summary: str,
    *,
    formula: str = "",
    source: str = "",
    parameters: tuple[Parameter, ...] = (),
    base: BaseModel = BaseModel.UNUSED,
    min_models: int = 1,
    max_models: int | None = None,
    temporaries: int = TEMPORARIES,
) -> Decorator:
    signature = Signature(
        name=name,
        summary=summary,
        formula=formula,
        parameters=parameters,
        base=base,
        min_models=min_models,
        max_models=max_models,
        source=source,
    )

    def decorate(function: Function) -> Function:
        code = _hash_of_module(function)
        operation: list[str] = []

        def build(merge: TensorMerge) -> str:
            members: list[Contribution] = [
                *([merge.base] if merge.base is not None else []),
                *merge.models,
            ]
            return merge.apply(
                operation[0],
                [member.node for member in members],
                tensor=merge.name,
                shape=merge.shape,
                shared=tuple(merge.parameters.items()),
                own=tuple(tuple(model.parameters.items()) for model in merge.models),
                has_base=merge.base is not None,
                code=code,
            )

        merge_method(signature)(build)
        operation.append(_operation(kind, name, function, temporaries))
        return function

    return decorate


def _hash_of_module(function: Function) -> str:
    """Of the file that a function stands in; of its own code where there is none."""
    file = inspect.getsourcefile(function)
    if file is not None and Path(file).is_file():
        data = Path(file).read_bytes()
    else:
        data = function.__code__.co_code
    return blake2b(data, digest_size=16).hexdigest()
