"""What config.json says of layers that were put together anew."""

from __future__ import annotations

from typing import Any

import pytest
from lazymerge.architecture.layer_config import with_layers
from lazymerge.architecture.layers import LayerStack

ORDER = [0, 1, 1, 2, 0]


def changed(
    config: dict[str, Any], prefix: str = "model.layers", count: int = 3
) -> tuple[dict[str, Any], list[str]]:
    return with_layers(config, LayerStack(prefix, count), [(config, n) for n in ORDER])


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_the_count_stands_where_it_stood(key: str) -> None:
    config = {"a": 3, key: 3, "b": [1, 2]}
    found, said = changed(config)
    assert found == {"a": 3, key: 5, "b": [1, 2]}
    assert [*found] == [*config]
    assert said == []


def test_lists_by_layer() -> None:
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["full", "slides", "full"],
        "sizes": [10, 20, 30],
        "eos_token_id": [1, 2, 3],
        "mrope_section": [2, 1, 1],
        "mlp_only_layers": [0, 2],
        "others": [1, 2],
    }
    found, said = changed(config)
    assert found == {
        **config,
        "num_hidden_layers": 5,
        "layer_types": ["full", "slides", "slides", "full", "full"],
        "sizes": [10, 20, 20, 30, 10],
        "mlp_only_layers": [0, 3, 4],
    }
    assert said == []


def test_lists_of_other_models() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    other = {"num_hidden_layers": 4, "layer_types": ["c", "d", "e", "f"]}
    stack = LayerStack("model.layers", 2)
    found, said = with_layers(config, stack, [(config, 1), (other, 3), (other, 0)])
    assert (found["layer_types"], said) == (["b", "f", "c"], [])
    found, said = with_layers(config, stack, [(config, 1), (None, 3)])
    assert found["layer_types"] == ["a", "b"]
    assert said == ["layer_types in config.json has no entry for some of the layers"]


@pytest.mark.parametrize(
    ("dense", "order", "expected", "is_said"),
    [
        (1, [0, 1, 2], 1, False),
        (2, [0, 0, 1, 2], 3, False),
        (1, [1, 2], 0, False),
        (1, [0, 1, 0], 1, True),
        (3, [0, 1], 2, False),
    ],
)
def test_leading_layers(dense: int, order: list[int], expected: int, is_said: bool) -> None:
    config = {"num_hidden_layers": 3, "first_k_dense_replace": dense}
    found, said = with_layers(config, LayerStack("model.layers", 3), [(config, n) for n in order])
    assert (found["first_k_dense_replace"], bool(said)) == (expected, is_said)


def test_configs_within() -> None:
    config = {
        "num_hidden_layers": 3,
        "text_config": {"num_hidden_layers": 3},
        "vision_config": {"num_hidden_layers": 3, "depth": 3},
        "audio_config": {"num_hidden_layers": 3},
    }
    found, _ = changed(config, "model.language_model.layers")
    assert found == {**config, "text_config": {"num_hidden_layers": 5}}
    found, _ = changed(config, "vision_tower.encoder.layers")
    assert found == {**config, "vision_config": {"num_hidden_layers": 5, "depth": 5}}
    found, _ = changed(config, "audio_tower.layers")
    assert found == {**config, "audio_config": {"num_hidden_layers": 5}}


def test_encoders_and_decoders() -> None:
    whisper = {"encoder_layers": 3, "num_hidden_layers": 3, "decoder_layers": 3}
    assert changed(whisper, "model.encoder.layers")[0] == {
        "encoder_layers": 5,
        "num_hidden_layers": 5,
        "decoder_layers": 3,
    }
    assert changed(whisper, "model.decoder.layers")[0] == {**whisper, "decoder_layers": 5}
    t5 = {"num_layers": 3, "num_decoder_layers": 3}
    assert changed(t5, "encoder.block")[0] == {**t5, "num_layers": 5}
    assert changed(t5, "decoder.block")[0] == {**t5, "num_decoder_layers": 5}


def test_a_config_that_says_nothing() -> None:
    found, said = changed({"num_hidden_layers": 7})
    assert found == {"num_hidden_layers": 7}
    assert said == ["config.json does not say how many layers model.layers has"]
