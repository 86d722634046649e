"""Which embedding a model that ties its head has for it, and what its config says of it."""

from __future__ import annotations

from typing import Any

import pytest
from lazymerge.architecture.tying import embedding_of_head, heads, is_tied, untied

ROWS, WIDTH = 50, 8
DECODER = "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    ("head", "names", "embedding"),
    [
        ("lm_head.weight", ["model.embed_tokens.weight"], "model.embed_tokens.weight"),
        (
            "lm_head.weight",
            ["transformer.wte.weight", "transformer.wpe.weight"],
            "transformer.wte.weight",
        ),
        ("embed_out.weight", ["gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        ("proj_out.weight", ["model.decoder.embed_tokens.weight"], DECODER),
        (
            "lm_head.weight",
            ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
            "shared.weight",
        ),
        (
            "lm_head.weight",
            ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"],
            DECODER,
        ),
        (
            "lm_head.weight",
            [
                "model.language_model.embed_tokens.weight",
                "model.language_model.embed_tokens_per_layer.weight",
                "model.text_tower.embeddings.token_embedding.weight",
            ],
            "model.language_model.embed_tokens.weight",
        ),
        (
            "talker.lm_head.weight",
            ["talker.model.embed_tokens.weight", "thinker.model.embed_tokens.weight"],
            "talker.model.embed_tokens.weight",
        ),
        ("lm_head.weight", ["a.embed_tokens.weight", "b.embed_tokens.weight"], None),
        ("lm_head.weight", ["model.norm.weight"], None),
    ],
)
def test_the_embedding_of_a_head(head: str, names: list[str], embedding: str | None) -> None:
    shapes = dict.fromkeys(names, (ROWS, WIDTH))
    assert embedding_of_head(head, shapes, WIDTH) == embedding
    assert embedding_of_head(head, shapes, WIDTH + 1) is None


def test_heads_are_matrices() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (ROWS, WIDTH),
        "lm_head.bias": (ROWS,),
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "embed_out.weight": (ROWS,),
    }
    assert heads(shapes) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, None),
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, None),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, None),
        ({"tie_word_embeddings": False, "vision_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_what_a_config_says(config: dict[str, Any] | None, said: bool | None) -> None:
    assert is_tied(config) is said


def test_untied() -> None:
    config = {"a": 1, "tie_word_embeddings": True, "text_config": {"b": [2]}, "vision_config": {}}
    assert untied(config) == {
        "a": 1,
        "tie_word_embeddings": False,
        "text_config": {"b": [2], "tie_word_embeddings": False},
        "vision_config": {},
    }
    assert config["tie_word_embeddings"] is True
    assert config["text_config"] == {"b": [2]}
