"""The random recipes with tokenizers that are compared with mergekit's."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import yaml
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.recipe import parse_recipe
from tokenizer_cases import KINDS
from tokenizers import Tokenizer

from comparing.random_tokenizers import METHODS, make_tokenizer, tokenizer_recipe


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_can_be_planned(kind: str, tmp_path: Path) -> None:
    forms = set()
    for number in range(2 * len(METHODS)):
        recipe = tokenizer_recipe(tmp_path / str(number), kind, number, Random(number))
        forms |= {key for key in recipe if recipe[key]}
        text = yaml.safe_dump_all([*recipe.pop("before"), recipe], sort_keys=False)
        parsed = parse_recipe(text, "recipe.yml", signatures())
        assert make_plan(parsed, Resources(1 << 30)).tokenizer is not None
    assert {"slices", "models", "before", "tokenizer", "tokenizer_source", "chat_template"} <= forms


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_number_their_tokens_in_unlike_order(kind: str) -> None:
    one, other = (make_tokenizer(kind, Random(seed)).get_vocab() for seed in (1, 2))
    shared = one.keys() & other.keys()
    assert len(shared) > 10
    assert any(one[token] != other[token] for token in shared)
    again = make_tokenizer(kind, Random(1))
    assert Tokenizer.from_str(again.to_str()).get_vocab() == one
