"""A few signatures, as the methods page defines them, for tests that need no real method."""

from __future__ import annotations

from lazymerge.recipe import BaseModel, Parameter, Scope, Signature

_GLOBAL_OF_TASK_VECTORS = (
    Parameter("lambda", float, Scope.GLOBAL, "Scale of the merged task vector.", default=1.0),
    Parameter("int8_mask", bool, Scope.GLOBAL, "Accepted, no effect.", default=False),
)

SIGNATURES: dict[str, Signature] = {
    signature.name: signature
    for signature in (
        Signature(
            name="linear",
            summary="Weighted mean of the models.",
            formula="Σ wᵢxᵢ / Σ wᵢ",
            parameters=(
                Parameter("weight", float, Scope.MODEL, "Share of the model.", required=True),
                Parameter("normalize", bool, Scope.GLOBAL, "Divide by Σ wᵢ.", default=True),
            ),
            source="https://arxiv.org/abs/2203.05482",
        ),
        Signature(
            name="task_arithmetic",
            summary="The base plus weighted task vectors.",
            formula="x₀ + λ Σ wᵢδᵢ",
            parameters=(
                Parameter("weight", float, Scope.NON_BASE, "Share of the model.", required=True),
                Parameter("normalize", bool, Scope.GLOBAL, "Divide by Σ wᵢ.", default=False),
                *_GLOBAL_OF_TASK_VECTORS,
            ),
            base=BaseModel.REQUIRED,
            source="https://arxiv.org/abs/2212.04089",
        ),
        Signature(
            name="ties",
            summary="Task vectors, trimmed and elected by sign.",
            formula="x₀ + λ Σ wᵢδ̃ᵢ / Σ wᵢ",
            parameters=(
                Parameter("weight", float, Scope.NON_BASE, "Share of the model.", required=True),
                Parameter(
                    "density",
                    float,
                    Scope.NON_BASE,
                    "Fraction of the elements kept.",
                    default=1.0,
                    minimum=0.0,
                    maximum=1.0,
                ),
                Parameter("normalize", bool, Scope.GLOBAL, "Divide by Σ wᵢ.", default=True),
                *_GLOBAL_OF_TASK_VECTORS,
            ),
            base=BaseModel.REQUIRED,
            source="https://arxiv.org/abs/2306.01708",
        ),
        Signature(
            name="slerp",
            summary="Spherical interpolation between two models.",
            formula="sin((1−t)θ)/sin θ · x₀ + sin(tθ)/sin θ · x₁",
            parameters=(
                Parameter("t", float, Scope.GLOBAL, "0 is the base, 1 the other.", required=True),
            ),
            base=BaseModel.REQUIRED,
            min_models=2,
            max_models=2,
        ),
        Signature(
            name="nuslerp",
            summary="Spherical interpolation by weights.",
            formula="slerp of x₁ and x₂, or of their task vectors",
            parameters=(
                Parameter("weight", float, Scope.NON_BASE, "Share of the model.", required=True),
                Parameter(
                    "nuslerp_row_wise", bool, Scope.GLOBAL, "Per column of rows.", default=False
                ),
            ),
            base=BaseModel.OPTIONAL,
            min_models=2,
            max_models=2,
        ),
        Signature(
            name="karcher",
            summary="Karcher mean on the sphere.",
            formula="exp and log maps, iterated",
            parameters=(
                Parameter(
                    "max_iter", int, Scope.GLOBAL, "Iterations at most.", default=10, minimum=1
                ),
                Parameter("tol", float, Scope.GLOBAL, "Ends the iteration.", default=1e-5),
            ),
            min_models=2,
        ),
        Signature(
            name="passthrough",
            summary="One model, copied.",
            formula="scale · x₁",
            parameters=(Parameter("scale", float, Scope.MODEL, "Factor."),),
            max_models=1,
        ),
        Signature(
            name="first",
            summary="A method without parameters.",
            formula="x₁",
        ),
        Signature(
            name="labelled",
            summary="A method whose parameter is text and that needs a value for the base too.",
            formula="x₀",
            parameters=(
                Parameter("label", str, Scope.MODEL, "A name.", required=True),
                Parameter("temperature", float, Scope.GLOBAL, "At most two.", maximum=2.0),
            ),
            base=BaseModel.REQUIRED,
            min_models=2,
            max_models=3,
        ),
    )
}
