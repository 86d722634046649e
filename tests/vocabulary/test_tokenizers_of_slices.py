"""Tokenizers where a recipe has slices or modules: whose rows the embedding and the head have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import plan_recipe_file
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError
from safetensors.torch import load_file
from tokenizer_cases import WIDTH, WORDS, add_special, bpe, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """a, b and c, which have tokens of their own, and some that two of them have; d, of which no
    other has tokens."""
    special = {"a": ["<ab>", "<a>"], "b": ["<ab>", "<bc>"], "c": ["<bc>", "<c>"], "d": ["<d>"]}
    return {
        name: make_model(
            tmp_path / name, add_special(bpe(WORDS.get(name, ["unlike"])), *more), seed=seed
        )
        for seed, (name, more) in enumerate(special.items())
    }


def sources(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [{"model": str(folder / name), "layer_range": [0, 1]} for name in names]


def plan_of(folder: Path, **keys: Any) -> Plan:
    document = {"dtype": "float32", "tokenizer_source": "union", **keys}
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(document))
    return plan_recipe_file(path, Resources(1 << 30, workers=2))


def merged(plan: Plan, output: Path) -> dict[str, torch.Tensor]:
    run_plan(plan, output, fsync=False)
    return load_file(output / "model.safetensors")


def vocabulary(folder: Path) -> dict[str, int]:
    numbers: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return numbers


def check(
    name: str, output: Path, tensors: Tensors, models: Sequence[str], base: str | None
) -> None:
    """That a tensor is the mean of these models' rows, with gaps filled as documented."""
    numbers = vocabulary(output)
    vocabularies = {model: vocabulary(output.parent / model) for model in models}
    values = load_file(output / "model.safetensors")[name]
    assert values.shape == (len(numbers), WIDTH)
    for token, number in numbers.items():
        having = {
            model: tensors[model][name][vocabularies[model][token]].double()
            for model in models
            if token in vocabularies[model]
        }
        filled = torch.zeros(WIDTH, dtype=torch.float64)
        if having:
            filled = having.get(base or "", sum(having.values()) / len(having))
        wanted = sum(having.get(model, filled) for model in models) / len(models)
        torch.testing.assert_close(values[number].double(), wanted, atol=1e-6, rtol=1e-6)


def test_a_frankenmerge_has_rows_of_its_first_and_its_last_slice(
    tensors: Tensors, tmp_path: Path
) -> None:
    slices = [{"sources": sources(tmp_path, name)} for name in "acb"]
    plan = plan_of(tmp_path, merge_method="passthrough", slices=slices)
    values = merged(plan, tmp_path / "out")
    numbers = vocabulary(tmp_path / "out")
    every = {name: vocabulary(tmp_path / name) for name in "abc"}
    assert set(numbers) == set().union(*every.values())
    for name, model in ((EMBEDDING, "a"), (HEAD, "b")):
        check(name, tmp_path / "out", tensors, [model], None)
        unknown = len(numbers) - len(every[model])
        said = f"{unknown} of its rows hold zeros: {tmp_path / model}, which it is merged from"
        assert [f": {name}" in notice for notice in plan.notices if said in notice] == [True]
    assert not values[EMBEDDING][numbers["<c>"]].any()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded(torch.tensor([[0, len(numbers) - 1]])).logits.shape[-1] == len(numbers)
    assert loaded.config.num_hidden_layers == 3


def test_tokens_may_say_where_the_rows_of_a_frankenmerge_are_from(
    tensors: Tensors, tmp_path: Path
) -> None:
    slices = [{"sources": sources(tmp_path, name)} for name in "ab"]
    tokenizer = {
        "source": "union",
        "pad_to_multiple_of": 64,
        "tokens": {"<a>": {"source": {"kind": "zero"}, "force": True}},
    }
    keys = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": None}
    plan = plan_of(tmp_path, tokenizer=tokenizer, **keys)
    values = merged(plan, tmp_path / "out")
    number = vocabulary(tmp_path / "out")["<a>"]
    for name in (EMBEDDING, HEAD):
        assert values[name].shape[0] % 64 == 0
        assert not values[name][number].any()
    tokenizer["tokens"] = {"<a>": {"source": str(tmp_path / "a")}}
    with pytest.raises(
        InputError, match=r"lm_head\.weight: token '<a>' is to get its row from .*/a"
    ):
        plan_of(tmp_path, tokenizer=tokenizer, **keys)


@pytest.mark.parametrize("base", [None, "a", "b", "c"])
@pytest.mark.parametrize("bases", [(None, None), ("b", None), (None, "c"), ("b", "c"), ("c", "b")])
def test_gaps_are_filled_from_the_base_of_the_slice(
    tensors: Tensors, base: str | None, bases: Sequence[str | None], tmp_path: Path
) -> None:
    slices: list[dict[str, Any]] = [{"sources": sources(tmp_path, *"abc")} for _ in bases]
    for piece, own in zip(slices, bases, strict=True):
        if own is not None:
            piece["base_model"] = str(tmp_path / own)
    keys = {} if base is None else {"base_model": str(tmp_path / base)}
    plan = plan_of(tmp_path, merge_method="linear", parameters={"weight": 1}, slices=slices, **keys)
    merged(plan, tmp_path / "out")
    check(EMBEDDING, tmp_path / "out", tensors, "abc", bases[0] or base)
    check(HEAD, tmp_path / "out", tensors, "abc", bases[1] or base)
    first = vocabulary(tmp_path / (base or "a"))
    numbers = vocabulary(tmp_path / "out")
    assert {token: numbers[token] for token in first} == first


def test_the_base_of_a_slice_that_has_no_part_in_it_adds_no_tokens(
    tensors: Tensors, tmp_path: Path
) -> None:
    slices = [{"sources": sources(tmp_path, *"ab"), "base_model": str(tmp_path / "d")}]
    plan = plan_of(tmp_path, merge_method="linear", parameters={"weight": 1}, slices=slices)
    merged(plan, tmp_path / "out")
    assert "<d>" not in vocabulary(tmp_path / "out")
    check(EMBEDDING, tmp_path / "out", tensors, "ab", None)


def test_a_base_that_is_no_source_gives_the_vocabulary_and_no_rows(
    tensors: Tensors, tmp_path: Path
) -> None:
    slices = [{"sources": sources(tmp_path, *"ab")}]
    keys = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": slices}
    plan = plan_of(tmp_path, base_model=str(tmp_path / "c"), **keys)
    values = merged(plan, tmp_path / "out")
    check(EMBEDDING, tmp_path / "out", tensors, "ab", None)
    numbers, first = vocabulary(tmp_path / "out"), vocabulary(tmp_path / "c")
    assert {token: numbers[token] for token in first} == first
    assert not values[EMBEDDING][numbers["<c>"]].any()


def test_modules(tensors: Tensors, tmp_path: Path) -> None:
    slices = [{"sources": sources(tmp_path, *"ab"), "base_model": str(tmp_path / "b")}] * 2
    for place, content in enumerate(
        ({"slices": slices}, {"models": [{"model": str(tmp_path / name)} for name in "ab"]})
    ):
        output = tmp_path / f"out {place}"
        plan = plan_of(
            tmp_path,
            merge_method="linear",
            parameters={"weight": 1},
            modules={"model.layers": content},
        )
        values = merged(plan, output)
        base = "b" if "slices" in content else None
        for name in (EMBEDDING, HEAD):
            check(name, output, tensors, "ab", base)
        assert all(len(values[name]) == len(vocabulary(output)) for name in (EMBEDDING, HEAD))
