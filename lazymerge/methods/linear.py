"""Methods whose result is a linear combination with coefficients known from the recipe."""

from __future__ import annotations

from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .merge import TensorMerge, merge_method

SMALLEST_DIVISOR = 1e-8
"""A sum of weights below this is taken as 1 instead of divided by."""


@merge_method(
    Signature(
        name="linear",
        summary="Weighted average of the models (model soup).",
        formula="out = Σ wᵢ xᵢ / (normalize ? Σ wᵢ : 1)",
        parameters=(
            Parameter("weight", float, Scope.MODEL, "weight of the model", required=True),
            Parameter("normalize", bool, Scope.GLOBAL, "divide by the sum of weights", True),
        ),
        source="https://arxiv.org/abs/2203.05482",
    )
)
def linear(merge: TensorMerge) -> str:
    weights = [model.number("weight") for model in merge.models]
    divisor = 1.0
    if merge.flag("normalize"):
        divisor = sum(weights)
        if abs(divisor) < SMALLEST_DIVISOR:
            merge.fail(
                f"the weights {weights} sum to zero, so they cannot be normalized; "
                "change them or set `normalize: false`"
            )
    return merge.apply(
        "linear_combination",
        [model.node for model in merge.models],
        coefficients=tuple(weight / divisor for weight in weights),
    )


@merge_method(
    Signature(
        name="passthrough",
        summary="One model's tensors, optionally scaled.",
        formula="out = scale · x₁",
        parameters=(Parameter("scale", float, Scope.MODEL, "factor; without it bytes are copied"),),
        max_models=1,
    )
)
def passthrough(merge: TensorMerge) -> str:
    (model,) = merge.models
    scale = model.optional_number("scale")
    if scale is None:
        return model.node
    return merge.apply("linear_combination", [model.node], coefficients=(scale,))


@merge_method(
    Signature(
        name="task_arithmetic",
        summary="Adds weighted task vectors (differences from the base) to the base.",
        formula="out = x₀ + λ Σ wᵢ (xᵢ − x₀) / (normalize ? Σ wᵢ : 1)",
        parameters=(
            Parameter("weight", float, Scope.NON_BASE, "weight of the task vector", required=True),
            Parameter("lambda", float, Scope.GLOBAL, "factor of the summed task vectors", 1.0),
            Parameter("normalize", bool, Scope.GLOBAL, "divide by the sum of weights", False),
            Parameter("int8_mask", bool, Scope.GLOBAL, "accepted, without effect", False),
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        source="https://arxiv.org/abs/2212.04089",
    )
)
def task_arithmetic(merge: TensorMerge) -> str:
    weights = [model.number("weight") for model in merge.models]
    divisor = 1.0
    if merge.flag("normalize") and abs(sum(weights)) >= SMALLEST_DIVISOR:
        divisor = sum(weights)
    return merge.apply(
        "task_vectors",
        [merge.required_base.node, *(model.node for model in merge.models)],
        factors=tuple(merge.number("lambda") * weight / divisor for weight in weights),
    )
