"""trimmed_mean: the mean of the models' changes without the largest and the smallest of them."""

import torch
from lazymerge.methods.own import BaseModel, Inputs, elementwise, parameter


@elementwise(
    "trimmed_mean",
    "Averages the changes of each element without the extreme ones.",
    formula="out = x₀ + λ · mean of δ₍₁₊trim₎ … δ₍ₙ₋trim₎, sorted per element",
    parameters=(
        parameter("trim", "changes left out at each end", 1, type=int, minimum=0),
        parameter("lambda", "factor of the mean change", 1.0),
    ),
    base=BaseModel.REQUIRED,
    min_models=4,
    temporaries=8,  # the stacked changes and their sorted copy, and torch's indices
)
def trimmed_mean(inputs: Inputs) -> torch.Tensor:
    trim = int(inputs.parameters["trim"])
    changes = torch.stack([model - inputs.base for model in inputs.models])
    kept = changes.sort(dim=0).values[trim : len(changes) - trim]
    if not len(kept):
        raise ValueError(f"trim {trim} leaves none of {len(changes)} models")
    return inputs.base + inputs.parameters["lambda"] * kept.mean(dim=0)
