#!/usr/bin/env python3
"""Compare what lazymerge and mergekit make of models with different tokenizers.

    python scripts/compare_tokenizers.py --mergekit-venv VENV
    python scripts/compare_tokenizers.py --mergekit-venv VENV --kinds bpe --only union

Makes three small models for each kind of tokenizer (BPE, WordPiece, Unigram), whose vocabularies
overlap, and merges them by recipes with every form of `tokenizer` and `tokenizer_source`. Both
programs' outputs are loaded with transformers. For each recipe the table says how many tokens there
are and how many only one of the two has, and of embedding and output head the largest distance
between rows of the same token, and between rows of none, in steps of float32 (of numbers of at
least 1/8: smaller ones are what is left of larger ones).

Exit 1 if vocabularies, numbers of rows or `vocab_size` differ, or rows by more than 32 steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "vocabulary")]

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizer_cases import KINDS, WORDS, add_special, make_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarking.report import markdown_table  # noqa: E402
from comparing.programs import Mergekit, merge_with_lazymerge  # noqa: E402

NAMES = ("model.embed_tokens.weight", "lm_head.weight")

MOST_STEPS = 32.0


def recipes(folder: Path, token: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes by name. token: one that a and b have."""
    a, b, c = (str(folder / name) for name in "abc")
    linear = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in ((a, 1), (b, 2), (c, 1))
        ],
    }
    arithmetic = {
        "merge_method": "task_arithmetic",
        "dtype": "float32",
        "base_model": a,
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in (b, c)],
    }
    tokens = {
        "<zero>": {"source": {"kind": "zero"}},
        "<like>": {"source": {"kind": "model_token", "model": b, "token": token}},
        "<seventh>": {"source": {"kind": "model_token", "model": c, "token_id": 7}, "force": True},
        "<|im_start|>": {"source": c, "force": True},
        token: {"source": b, "force": True},
    }
    yield "union", {**linear, "base_model": a, "tokenizer_source": "union"}
    yield "union of the second", {**linear, "base_model": b, "tokenizer_source": "union"}
    yield "task arithmetic, union", {**arithmetic, "tokenizer_source": "union"}
    yield "base", {**arithmetic, "tokenizer_source": "base"}
    yield "a model", {**arithmetic, "tokenizer": {"source": c}}
    yield "padded", {**arithmetic, "tokenizer": {"source": "union", "pad_to_multiple_of": 64}}
    yield (
        "tokens",
        {
            **linear,
            "base_model": a,
            "tokenizer": {"source": "union", "tokens": tokens, "pad_to_multiple_of": 32},
            "chat_template": "auto",
        },
    )


def make_models(folder: Path, kind: str) -> str:
    """Three models; returns a token of its own vocabulary that a and b have."""
    vocabularies = []
    for seed, (name, words) in enumerate(WORDS.items()):
        tokenizer = KINDS[kind](words)
        if name != "a":
            add_special(tokenizer, "<|im_start|>")
        if name == "b":
            add_special(tokenizer, "<only_b>")
            tokenizer.add_tokens(["plainb"])
        rows = tokenizer.get_vocab_size() + (5 if name == "c" else 0)
        make_model(folder / name, tokenizer, seed=seed, rows=rows)
        vocabularies.append(tokenizer.get_vocab(with_added_tokens=False))
    return max(set(vocabularies[0]) & set(vocabularies[1]), key=lambda token: (len(token), token))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mergekit-venv", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", help="recipes whose name contains this")
    arguments = parser.parse_args()
    lines, is_equal = [], True
    with tempfile.TemporaryDirectory(prefix="compare-tokenizers-") as name:
        work = Path(name)
        with Mergekit(arguments.mergekit_venv, work / "mergekit.log") as mergekit:
            for kind in arguments.kinds:
                token = make_models(work / kind, kind)
                for title, recipe in recipes(work / kind, token):
                    if arguments.only and arguments.only not in title:
                        continue
                    folder = work / kind / title.replace(" ", "-").replace(",", "")
                    mergekit.merge(recipe, folder / "mergekit", 0)
                    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
                    merge_with_lazymerge(recipe, folder / "lazymerge", 0)
                    line, is_same = compare(folder / "lazymerge", folder / "mergekit")
                    lines.append([kind, title, *line])
                    is_equal &= is_same
    columns = ["tokenizer", "recipe", "tokens", "in one only", "rows", "embedding", "head"]
    print(markdown_table(columns, lines))
    return int(not is_equal)


def compare(ours: Path, theirs: Path) -> tuple[list[str], bool]:
    """A line of the table, and whether all is the same."""
    one, other = (AutoTokenizer.from_pretrained(each).get_vocab() for each in (ours, theirs))
    values, others = load(ours), load(theirs)
    sizes = [
        json.loads((each / "config.json").read_text())["vocab_size"] for each in (ours, theirs)
    ]
    rows = [len(tensors[NAMES[0]]) for tensors in (values, others)]
    distances = [distance(values[n], others[n], one, other) for n in NAMES]
    is_same = (
        set(one) == set(other)
        and len({*sizes, *rows}) == 1
        and all(steps <= MOST_STEPS for steps in distances)
    )
    line = [str(len(one)), str(len(set(one) ^ set(other))), " / ".join(map(str, rows))]
    return [*line, *(f"{steps:.1f}" for steps in distances)], is_same


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def distance(
    one: torch.Tensor, other: torch.Tensor, numbers: Mapping[str, int], others: Mapping[str, int]
) -> float:
    """The largest between rows of the same token, and those of none, in steps of float32."""
    tokens = sorted(set(numbers) & set(others))
    left = torch.cat([one[[numbers[token] for token in tokens]], one[len(numbers) :]]).double()
    right = torch.cat([other[[others[token] for token in tokens]], other[len(others) :]]).double()
    larger = torch.maximum(left.abs(), right.abs())
    steps = torch.exp2(torch.floor(torch.log2(larger.clamp_min(0.125))) - 23)
    return float(((left - right).abs() / steps).max())


if __name__ == "__main__":
    sys.exit(main())
