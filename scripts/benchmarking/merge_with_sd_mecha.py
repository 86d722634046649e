#!/usr/bin/env python3
"""Merge safetensors files with sd-mecha, for a comparison; runs in sd-mecha's environment.

    python merge_with_sd_mecha.py METHOD OUTPUT FILE... --weights W...

METHOD is task_arithmetic (a weight for every file but the first, which is the base) or slerp (one
weight: how far from the first file to the second). Arithmetic in float32, output in bfloat16,
everything else as sd-mecha has it by default. It knows the files by their tensors: any model whose
files have the same names and shapes will do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sd_mecha
import torch
from sd_mecha.extensions import merge_methods


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("task_arithmetic", "slerp"))
    parser.add_argument("output", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", required=True)
    parsed = parser.parse_args()

    base, *others = (sd_mecha.model(file) for file in parsed.files)
    if parsed.method == "slerp":
        recipe = sd_mecha.slerp(base, *others, alpha=parsed.weights[0])
    else:
        # The method itself: sd_mecha.add_difference wraps it and cannot be nested.
        add_difference = merge_methods.resolve("add_difference")
        recipe = base
        for other, weight in zip(others, parsed.weights, strict=True):
            recipe = add_difference(recipe, sd_mecha.subtract(other, base), alpha=weight)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    sd_mecha.merge(
        recipe,
        merge_dtype=torch.float32,
        output_dtype=torch.bfloat16,
        output=parsed.output,
    )


if __name__ == "__main__":
    main()
