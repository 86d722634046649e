#!/usr/bin/env python3
"""Compare what lazymerge and mergekit make of models with different tokenizers.

    python scripts/compare_tokenizers.py
    python scripts/compare_tokenizers.py --mergekit-venv VENV --kinds bpe --only union
    python scripts/compare_tokenizers.py --random 60 --seed 3
    python scripts/compare_tokenizers.py --random 60 --seed 3 --number 17

Without --random it makes three small models for each kind of tokenizer (BPE, WordPiece, Unigram),
whose vocabularies overlap, and merges them by recipes with every form of `tokenizer` and
`tokenizer_source`. Both programs' outputs are loaded with transformers. For each recipe the table
says how many tokens there are and how many only one of the two has, and of embedding and output
head the largest distance between rows of the same token, and between rows of none, in steps of
float32 (of numbers of at least 1/8: smaller ones are what is left of larger ones).

Exit 1 if vocabularies, numbers of rows or `vocab_size` differ, or rows by more than 32 steps.

With --random there are as many recipes of each kind of tokenizer, each with four models of its
own: random vocabularies, methods and forms of `tokenizer`, whole models or slices, now and then one
of them what another merge of the file gives (mergekit makes that one first). `dtype` is float64, so
that mergekit rounds once, as lazymerge does. Names, shapes and dtypes of all tensors must be equal,
and elements no more than an ulp of the output's dtype apart, rows of the same token against each
other; so must vocabularies, `vocab_size`, what chat templates make of a conversation, and the
tokens of a few texts, where mergekit does not choose by the order of a hash table. Recipes that
mergekit does not merge are counted and not compared. Exit 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "vocabulary")]

import torch  # noqa: E402
import yaml  # noqa: E402
from lazymerge.errors import LazymergeError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizer_cases import KINDS, WORDS, add_special, make_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarking.programs import PEERS, make_venv, peer_facts  # noqa: E402
from benchmarking.report import markdown_table  # noqa: E402
from compare_forms_with_mergekit import (  # noqa: E402
    COLUMNS,
    Found,
    compare_configs,
    merge_in_steps,
)
from compare_forms_with_mergekit import (  # noqa: E402
    compare as compare_tensors,
)
from comparing.programs import Mergekit, Refused, merge_with_lazymerge  # noqa: E402
from comparing.random_tokenizers import TEXTS, tokenizer_recipe  # noqa: E402

NAMES = ("model.embed_tokens.weight", "lm_head.weight")

MOST_STEPS = 32.0

ROUNDING = 2.0**-48
"""What float64 leaves where numbers of about 1 cancel."""


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
    parser.add_argument("--mergekit-venv", type=Path, metavar="DIR", help="one that exists")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", help="recipes whose name contains this")
    parser.add_argument("--random", type=int, metavar="N", help="random recipes of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of random recipes")
    parser.add_argument("--number", type=int, help="of the one random recipe to compare")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="compare-tokenizers-") as name:
        if arguments.mergekit_venv is None:
            arguments.mergekit_venv = Path(name) / "mergekit-venv"
            make_venv(arguments.mergekit_venv, PEERS["mergekit"])
        print(peer_facts(PEERS["mergekit"], arguments.mergekit_venv))
        return compare_fixed(arguments) if arguments.random is None else compare_random(arguments)


def compare_fixed(arguments: argparse.Namespace) -> int:
    """Every form of tokenizer."""
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


def compare_random(arguments: argparse.Namespace) -> int:
    """Random recipes; a recipe depends on the seed, the kind and its number."""
    numbers = range(arguments.random) if arguments.number is None else [arguments.number]
    results = []
    with tempfile.TemporaryDirectory(prefix="compare-tokenizers-") as name:
        work = Path(name)
        with Mergekit(arguments.mergekit_venv, work / "mergekit.log") as mergekit:
            for kind in arguments.kinds:
                found = Found(kind)
                for number in numbers:
                    random = Random(f"{arguments.seed} {kind} {number}")
                    folder = work / f"{kind} {number}"
                    recipe = tokenizer_recipe(folder, kind, number, random)
                    compare_recipe(found, mergekit, recipe, folder, number)
                    shutil.rmtree(folder)
                results.append(found)
    print(f"seed {arguments.seed}\n\n{markdown_table(COLUMNS, [found.row() for found in results])}")
    for found in results:
        for refusal, count in Counter(found.refusals).most_common():
            print(f"{found.form}, refused by mergekit, {count} times: {refusal}", file=sys.stderr)
        for problem in found.problems:
            print(problem)
    return int(any(found.wrong for found in results))


def compare_recipe(
    found: Found, mergekit: Mergekit, recipe: dict[str, Any], folder: Path, number: int
) -> None:
    found.recipes += 1
    ours, theirs = folder / "lazymerge", folder / "mergekit"
    recipe = dict(recipe)
    before = recipe.pop("before")
    try:
        merge_in_steps(mergekit, recipe, before, folder / "between", theirs)
    except Refused as error:
        found.refused += 1
        found.refusals.append(str(error).replace(str(folder), "")[:200])
        return
    try:
        merge_with_lazymerge(recipe, ours, 0, before)
        said = compare_vocabularies(ours, theirs, recipe, before)
        if not said:
            said = [*compare_tensors(found, ours, theirs, ROUNDING), *compare_configs(ours, theirs)]
    except LazymergeError as error:
        said = [f"lazymerge: {error}"]
    if said:
        found.wrong += 1
        text = yaml.safe_dump_all([*before, recipe], sort_keys=False)
        found.problems.append("\n".join([f"{found.form} {number}:", *said[:8], "", text]))


def tokenizer_source(recipe: Mapping[str, Any]) -> str:
    source: str = recipe.get("tokenizer_source") or recipe["tokenizer"].get("source", "union")
    return source


def compare_vocabularies(
    ours: Path, theirs: Path, recipe: Mapping[str, Any], before: Sequence[object]
) -> list[str]:
    """What differs. Texts are not compared where a model is a union itself: what it has added are
    pieces of words, and mergekit splits texts at them even where the base knows them.

    Puts mergekit's rows in the order of lazymerge's tokens: those that a union adds, mergekit
    numbers in the order of a hash table.
    """
    # mergekit begins a union without a base with any model's tokenizer, and takes any of the
    # templates that equally many models have
    is_same_start = "base_model" in recipe or "union" not in tokenizer_source(recipe)
    template = recipe.get("chat_template")
    is_same_template = is_same_start if template is None else template != "auto"
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (ours, theirs))
    one, other = first.get_vocab(), second.get_vocab()
    if one.keys() != other.keys():
        more, less = sorted(one.keys() - other.keys()), sorted(other.keys() - one.keys())
        return [f"tokens differ: lazymerge has also {more[:5]}, mergekit {less[:5]}"]
    said = [
        f"tokens of {text!r}: {first.tokenize(text)}, mergekit's {second.tokenize(text)}"
        for text in (TEXTS if is_same_start and not before else ())
        if first.tokenize(text) != second.tokenize(text)
    ]
    if is_same_template and rendered(first) != rendered(second):
        said.append(f"a conversation: {rendered(first)!r}, mergekit's {rendered(second)!r}")
    tensors = load(theirs)
    for name in NAMES:
        if name not in tensors:
            continue
        rows = torch.arange(len(tensors[name]))
        for token, number in one.items():
            rows[number] = other[token]
        tensors[name] = tensors[name][rows]
    for path in theirs.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, theirs / "model.safetensors")
    return said


def rendered(tokenizer: Any) -> str | None:
    """A conversation as text; None where there is no template."""
    if tokenizer.chat_template is None:
        return None
    turns = [("user", "Hello?"), ("assistant", "Hi."), ("user", "Bye.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, bos_token="<s>"
    )
    return text


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
