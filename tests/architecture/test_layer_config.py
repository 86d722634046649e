"""What config.json says of layers that were put together anew."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.architecture.layer_config import with_layers
from lazymerge.architecture.layers import LayerStack
from lazymerge.errors import InputError

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


@pytest.mark.parametrize(
    ("said", "order", "expected"),
    [
        # lists with an entry for each layer, in other forms
        (
            {"hybrid_override_pattern": "M-*-"},
            [0, 1, 2, 2, 3],
            {"hybrid_override_pattern": "M-**-"},
        ),
        (
            {"attention_types": [[["global", "local"], 2]]},
            [0, 1, 2, 1, 3],
            {"attention_types": [[["global", "local", "global", "local", "local"], 1]]},
        ),
        ({"block_types": ["r", "r", "a"]}, [0, 1, 2, 0], {"block_types": ["r", "r", "a"]}),
        ({"block_types": ["r", "r", "a"]}, [0, 2, 2], {"block_types": ["r", "a", "a"]}),
        # numbers of layers
        ({"cross_attention_layers": [1, 3]}, [0, 1, 1, 3], {"cross_attention_layers": [1, 2, 3]}),
        ({"full_attn_idxs": [1]}, [1, 0, 1], {"full_attn_idxs": [0, 2]}),
        # how many at either end
        ({"num_kv_shared_layers": 2}, [0, 1, 2, 2, 3], {"num_kv_shared_layers": 3}),
        ({"moe_layer_start_index": 1}, [0, 0, 1], {"moe_layer_start_index": 2}),
        ({"moe_layer_end_index": 2}, [0, 2, 2, 3], {"moe_layer_end_index": 2}),
        ({"moe_layer_end_index": -1}, [0, 1], {"moe_layer_end_index": -1}),
        # periods that hold, or that others take the place of
        (
            {"attn_layer_period": 2, "attn_layer_offset": 1},
            [0, 1, 2, 1],
            {"attn_layer_period": 2, "attn_layer_offset": 1},
        ),
        (
            {"attn_layer_period": 2, "attn_layer_offset": 1},
            [0, 2, 1, 0, 2, 3],
            {"attn_layer_period": 3, "attn_layer_offset": 2},
        ),
        (
            {"expert_layer_period": 2, "expert_layer_offset": 1},
            [0, 1, 0, 0],
            {"expert_layer_period": 3, "expert_layer_offset": 1},
        ),
        ({"sliding_window_pattern": 2}, [0, 0, 1], {"sliding_window_pattern": 3}),
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
            [0, 1, 1, 3],
            {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]},
        ),
        (
            {"interleave_moe_layer_step": 2, "moe_layers": None},
            [0, 1, 1],
            {"interleave_moe_layer_step": 2, "moe_layers": [1, 2]},
        ),
        # periods that lists overrule
        (
            {"sliding_window_pattern": 2, "layer_types": ["s", "full_attention"] * 2},
            [0, 0, 1, 1],
            {"sliding_window_pattern": 2, "layer_types": ["s", "s", *["full_attention"] * 2]},
        ),
        (
            {"interleave_moe_layer_step": 1, "moe_layers": [1]},
            [1, 0, 1],
            {"interleave_moe_layer_step": 1, "moe_layers": [0, 2]},
        ),
    ],
)
def test_forms(said: dict[str, Any], order: list[int], expected: dict[str, Any]) -> None:
    config = {"num_hidden_layers": 4, **said}
    found, notices = with_layers(
        config, LayerStack("model.layers", 4), [(config, n) for n in order]
    )
    assert found == {"num_hidden_layers": len(order), **expected}
    assert notices == []


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sets(st.integers(0, 5)),
)
def test_what_is_said_of_layers_is_right_or_they_are_named(
    order: list[int], period: int, offset: int, numbers: set[int]
) -> None:
    config = {
        "num_hidden_layers": 6,
        "attn_layer_period": period,
        "attn_layer_offset": offset % period,
        "full_attn_idxs": sorted(numbers),
        "first_k_dense_replace": offset,
    }
    stack = LayerStack("model.layers", 6)
    found, said = with_layers(config, stack, [(config, n) for n in order])

    def kinds(config: dict[str, Any], layer: int) -> dict[str, bool]:
        return {
            "attn_layer_period": layer % config["attn_layer_period"] == config["attn_layer_offset"],
            "full_attn_idxs": layer in config["full_attn_idxs"],
            "first_k_dense_replace": layer < config["first_k_dense_replace"],
        }

    for key in kinds(config, 0):
        wrong = [
            place
            for place, n in enumerate(order)
            if kinds(found, place)[key] != kinds(config, n)[key]
        ]
        notices = [notice for notice in said if f" than {key} " in notice]
        assert len(notices) == bool(wrong)
        if 1 < len(wrong) < 7:
            assert notices[0].startswith(
                f"layers {', '.join(map(str, wrong[:-1]))} and {wrong[-1]} of "
            )


def test_a_list_is_added_where_a_period_cannot_say_it() -> None:
    config = {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    stack = LayerStack("model.layers", 4)
    found, notices = with_layers(config, stack, [(config, n) for n in (0, 1, 1)])
    slides, full = "sliding_attention", "full_attention"
    assert found == {**config, "num_hidden_layers": 3, "layer_types": [slides, full, full]}
    (notice,) = notices
    assert "sliding_window_pattern in config.json cannot say" in notice
    # a config of the new form, layers of one of the old
    newer = {"num_hidden_layers": 2, "layer_types": [slides, full]}
    stack = LayerStack("model.layers", 2)
    found, notices = with_layers(newer, stack, [(newer, 1), (config, 2), (config, 3)])
    assert found == {"num_hidden_layers": 3, "layer_types": [full, slides, full]}
    assert notices == []


@pytest.mark.parametrize(
    "said",
    [
        {"attn_layer_period": 2, "attn_layer_offset": 1},
        {"decoder_sparse_step": 2},
        {"moe_layer_interval": 2},
    ],
)
def test_layers_that_a_period_makes_others_of(said: dict[str, int]) -> None:
    config = {"num_hidden_layers": 4, **said}
    stack = LayerStack("model.layers", 4)
    found, notices = with_layers(config, stack, [(config, n) for n in (0, 1, 1, 2, 3)])
    assert found == {**config, "num_hidden_layers": 5}
    key = next(iter(said))
    assert notices == [
        f"layers 2, 3 and 4 of model.layers are of another kind than {key} in config.json makes "
        "of them: loaded with it, the model is another"
    ]


def test_forms_that_are_none() -> None:
    config = {
        "num_hidden_layers": 3,
        "hybrid_override_pattern": "M",
        "attention_types": [["global"], 3],
        "attn_layer_period": None,
        "moe_layer_freq": [0, 1, 1],
        "first_k_dense_replace": None,
        "block_types": [],
    }
    found, notices = changed(config)
    assert found == {**config, "num_hidden_layers": 5, "moe_layer_freq": [0, 1, 1, 1, 0]}
    assert len(notices) == 2


# layers beyond those that the config counts


def test_layers_beyond() -> None:
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1, "layer_types": [*"abc"]}
    stack = LayerStack("model.layers", 4)

    def of(*order: int) -> tuple[dict[str, Any], list[str]]:
        return with_layers(config, stack, [(config, n) for n in order])

    found, said = of(0, 1, 2, 1, 2)
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"], said) == (5, 0, [])
    assert found["layer_types"] == [*"abcbc"]
    found, said = of(0, 1, 2, 1, 2, 3)
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"], said) == (5, 1, [])
    assert found["layer_types"] == [*"abcbc"]
    found, said = of(0, 3, 1, 2)
    assert (found["num_hidden_layers"], found["num_nextn_predict_layers"]) == (4, 0)
    assert said[0].startswith("layer 1 of model.layers are from beyond")


def test_lists_that_have_an_entry_for_layers_beyond() -> None:
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "layer_types": [*"abc"]}
    stack = LayerStack("model.layers", 3)
    found, said = with_layers(config, stack, [(config, n) for n in (0, 1, 0, 1, 2)])
    assert found == {
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "layer_types": [*"ababc"],
    }
    assert said == []


def test_layers_beyond_that_nothing_is_said_of() -> None:
    config = {"num_hidden_layers": 2}
    stack = LayerStack("model.layers", 3)
    found, said = with_layers(config, stack, [(config, n) for n in (0, 1, 0, 1)])
    assert (found, said) == ({"num_hidden_layers": 4}, [])
    found, said = with_layers(config, stack, [(config, n) for n in (0, 1, 2, 1)])
    assert found == {"num_hidden_layers": 4}
    assert len(said) == 1


def test_counts_of_other_parts_are_not_those_of_layers_beyond() -> None:
    config = {
        "text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1},
        "vision_config": {"depth": 3, "num_hidden_layers": 3},
    }
    found, said = changed(config, "model.language_model.layers")
    assert found["text_config"] == {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}
    assert found["vision_config"] == config["vision_config"]
    assert len(said) == 1  # two layers from beyond, one of them in the middle


def test_nothing_but_a_list_says_how_many_layers_there_are() -> None:
    config = {"layers_block_type": [*"abc"], "num_nextn_predict_layers": 0}
    found, said = changed(config)
    assert found == {**config, "layers_block_type": [*"abbca"]}
    assert said == []


def test_a_count_of_another_name() -> None:
    assert changed({"transformer_layer_number": 3, "width": 3})[0] == {
        "transformer_layer_number": 5,
        "width": 3,
    }
    with pytest.raises(InputError):
        changed({"layers_of_one_kind": 3, "layers_of_another": 3})


def test_counts_of_several_stacks() -> None:
    flux = {"num_layers": 2, "num_single_layers": 3}
    assert changed(flux, "single_transformer_blocks") == ({**flux, "num_single_layers": 5}, [])
    with pytest.raises(InputError):
        changed(flux, "transformer_blocks", 4)
    # numbers that are of something else
    config = {"num_hidden_layers": 2, "max_window_layers": 3, "attn_layer_offset": 3}
    found, said = changed(config)
    assert found == {**config, "num_hidden_layers": 5}
    assert len(said) == 1


def test_encoders_and_decoders_have_kinds_of_their_own() -> None:
    nllb = {"encoder_layers": 3, "decoder_layers": 3}
    nllb |= {"encoder_sparse_step": 3, "decoder_sparse_step": 3}
    stack = LayerStack("model.decoder.layers", 3)
    found, said = with_layers(nllb, stack, [(nllb, n) for n in (0, 2)])
    assert found == {**nllb, "decoder_layers": 2, "decoder_sparse_step": 2}
    stack = LayerStack("model.encoder.layers", 3)
    found, said = with_layers(nllb, stack, [(nllb, n) for n in (0, 2)])
    assert found == {**nllb, "encoder_layers": 2, "encoder_sparse_step": 2}
    assert said == []


def test_a_count_that_is_left_to_a_default() -> None:
    found, said = changed({"model_type": "llama", "vocab_size": 3})
    assert found == {"model_type": "llama", "vocab_size": 3, "num_hidden_layers": 5}
    (notice,) = said
    assert notice.startswith("num_hidden_layers, 5, was added to config.json")
    # the other part's is not taken for it
    llava = {"text_config": {"x": 1}, "vision_config": {"num_hidden_layers": 3}}
    found, said = changed(llava, "language_model.model.layers")
    assert found == {**llava, "text_config": {"x": 1, "num_hidden_layers": 5}}
    assert len(said) == 1
    for prefix in ("encoder.block", "vision_tower.layers"):
        with pytest.raises(InputError):
            changed({"model_type": "other"}, prefix)


def test_layers_of_a_document_whose_layers_are_put_together() -> None:
    first = {"num_hidden_layers": 3, "layer_types": [*"abc"]}
    document, _ = changed(first)
    stack = LayerStack("model.layers", 5)
    found, said = with_layers(document, stack, [(document, n) for n in (0, 1, 2, 3, 4, 3, 4)])
    assert found == {"num_hidden_layers": 7, "layer_types": [*"abbcaca"]}
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
    with pytest.raises(InputError, match=r"does not say that model\.layers has 3 layers, .* has 5"):
        changed({"num_hidden_layers": 7})
    # of as many layers as there were there is nothing to say
    config = {"num_hidden_layers": 7}
    stack = LayerStack("model.layers", 3)
    assert with_layers(config, stack, [(config, n) for n in (2, 1, 0)]) == (config, [])


# layers that have other tensors than the config says


def names(*layers: str) -> list[str]:
    """Names of layers whose tensors are letters."""
    return [f"model.layers.{n}.{t}.weight" for n, ts in enumerate(layers) for t in ts]


@pytest.mark.parametrize(
    ("before", "order", "wrong"),
    [
        # nothing in the config says which layers have b and which c
        (["ab", "ac", "ab", "ac"], [0, 1, 2, 3], None),
        (["ab", "ac", "ab", "ac"], [0, 1], None),
        (["ab", "ac", "ab", "ac"], [0, 3, 1, 2], "layers 2 and 3 of model.layers may have"),
        (["ab", "ac", "ab", "ac"], [1, 1, 2, 3], "layer 0 of model.layers may have"),
        (["ab", "ac", "ab", "ac"], [0, 1, 2, 3, 0], "layer 4 of model.layers may have"),
        # layers that are alike
        (["ab", "ab", "ab"], [0, 0, 1, 2, 2], None),
        (["ab"], [0, 0], None),
        # the first is unlike the others
        (["abc", "ab", "ab"], [0, 1, 2, 1, 2], None),
        (["b", "ab", "ab"], [0, 1, 2, 0, 1], "layer 3 of model.layers may have"),
        (["b", "ab", "ab"], [1, 1, 2], "layer 0 of model.layers may have"),
    ],
)
def test_layers_of_other_tensors(before: list[str], order: list[int], wrong: str | None) -> None:
    config = {"num_hidden_layers": len(before), "unknown": 2}
    stack = LayerStack("model.layers", len(before))
    found, said = with_layers(
        config,
        stack,
        [(config, n) for n in order],
        names_before=names(*before),
        names_after=names(*(before[n] for n in order)),
    )
    assert found == {**config, "num_hidden_layers": len(order)}
    assert len(said) == (wrong is not None)
    if wrong is not None:
        assert said[0].startswith(wrong)


def test_layers_of_other_tensors_that_the_config_says() -> None:
    before, order = ["ab", "ac", "ab", "ac"], [0, 3, 1, 2, 0]
    stack = LayerStack("model.layers", 4)
    tensors = {
        "names_before": names(*before),
        "names_after": names(*(before[n] for n in order)),
    }
    for said in (
        {"layer_types": [*"bcbc"]},
        {"attn_layer_indices": [1, 3]},
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
    ):
        config = {"num_hidden_layers": 4, **said}
        _, notices = with_layers(config, stack, [(config, n) for n in order], **tensors)
        assert notices == []
    # what a period cannot say is said once
    config = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    _, notices = with_layers(config, stack, [(config, n) for n in order], **tensors)
    assert len(notices) == 1
    # what is said of something else is not enough
    config = {"num_hidden_layers": 4, "layer_types": [*"xxxx"]}
    _, notices = with_layers(config, stack, [(config, n) for n in order], **tensors)
    assert notices[0].startswith("layers 2, 3 and 4 of model.layers may have other tensors")


def test_layers_of_another_models_tensors() -> None:
    config = {"num_hidden_layers": 2}
    stack = LayerStack("model.layers", 2)
    _, said = with_layers(
        config,
        stack,
        [(config, 0), ({"num_hidden_layers": 2, "biases": True}, 1)],
        names_before=[*names("ab", "ab"), "model.layers.0.attn.bias"],
        names_after=[*names("ab", "ab"), "model.layers.1.a.bias", "model.layers.1.attn.inv_freq"],
    )
    assert len(said) == 1
    assert said[0].startswith("layer 1 of model.layers may have other tensors")
