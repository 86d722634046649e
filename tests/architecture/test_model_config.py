"""output_config and config_conflicts."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.architecture import Conflict, config_conflicts, output_config

LLAMA_4 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "vocab_size": 32000,
    "my_own_key": {"kept": [1, 2]},
}
LLAMA_5 = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float16",
    "hidden_size": 4096,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "vocab_size": 32000,
}
LLAVA = {
    "model_type": "llava",
    "text_config": {"torch_dtype": "float16", "vocab_size": 32000, "hidden_size": 4096},
    "vision_config": {"torch_dtype": "float32", "vocab_size": 49408, "hidden_size": 1024},
    "torch_dtype": "float16",
}


# output_config


def test_dtype_under_the_key_of_transformers_4() -> None:
    config = output_config(LLAMA_4, "bfloat16", None)
    assert config == {**LLAMA_4, "torch_dtype": "bfloat16"}
    assert list(config) == list(LLAMA_4)


def test_dtype_under_the_key_of_transformers_5() -> None:
    config = output_config(LLAMA_5, "bfloat16", None)
    assert config == {**LLAMA_5, "dtype": "bfloat16"}
    assert list(config) == list(LLAMA_5)


def test_dtype_under_both_keys() -> None:
    config = output_config({"dtype": "float32", "torch_dtype": None}, "bfloat16", None)
    assert config == {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_dtype_is_added_where_there_is_none() -> None:
    assert output_config({"a": 1}, "bfloat16", None) == {"a": 1, "torch_dtype": "bfloat16"}


def test_dtype_of_configs_within() -> None:
    config = output_config(LLAVA, "bfloat16", None)
    assert config["text_config"] == {**LLAVA["text_config"], "torch_dtype": "bfloat16"}
    assert config["vision_config"] == {**LLAVA["vision_config"], "torch_dtype": "bfloat16"}
    assert config["torch_dtype"] == "bfloat16"


def test_dtype_only_within() -> None:
    config = output_config({"text_config": {"dtype": "float32"}}, "bfloat16", None)
    assert config == {"text_config": {"dtype": "bfloat16"}}


def test_dtype_of_other_things_is_left_alone() -> None:
    config = {
        "torch_dtype": "float16",
        "quantization_config": {"dtype": "int8", "inner_config": {"dtype": "int8"}},
        "my_settings": {"dtype": "int8"},
        "text_config": "not a mapping",
    }
    assert output_config(config, "bfloat16", 7) == {
        **config,
        "torch_dtype": "bfloat16",
        "vocab_size": 7,
    }


def test_vocabulary_rows() -> None:
    assert output_config(LLAMA_4, None, 32001) == {**LLAMA_4, "vocab_size": 32001}
    assert output_config({"vocab_size": 5, "padded_vocab_size": 8}, None, 6) == {
        "vocab_size": 6,
        "padded_vocab_size": 6,
    }
    assert output_config({}, None, 6) == {"vocab_size": 6}


def test_vocabulary_rows_of_the_text_config_alone() -> None:
    config = output_config(LLAVA, None, 32064)
    assert config["text_config"] == {**LLAVA["text_config"], "vocab_size": 32064}
    assert config["vision_config"] == LLAVA["vision_config"]
    assert "vocab_size" not in config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "torch_dtype", "vocab_size", "text_config", "decoder"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
json_mappings = st.dictionaries(
    st.sampled_from(["a", "b", "dtype", "vocab_size", "text_config", "x_config"]), json_values
)


@given(json_mappings, st.sampled_from([None, "bfloat16"]), st.sampled_from([None, 7]))
def test_the_base_config_is_not_touched(
    config: dict[str, object], dtype: str | None, rows: int | None
) -> None:
    before = copy.deepcopy(config)
    result = output_config(config, dtype, rows)
    assert config == before
    # Known keys aside, nothing changed, and the order is kept.
    assert [key for key in result if key in config] == list(config)
    assert result.get("a") == config.get("a")
    assert set(result) - set(config) <= {"torch_dtype", "vocab_size"}
    assert output_config(result, dtype, rows) == result
    if dtype is None and rows is None:
        assert result == config


# config_conflicts


def conflicts(**configs: dict[str, object]) -> dict[str, dict[str, object]]:
    return {conflict.key: dict(conflict.values) for conflict in config_conflicts(configs)}


def test_equal_configs_have_no_conflict() -> None:
    assert conflicts(a=LLAMA_4, b=copy.deepcopy(LLAMA_4)) == {}
    assert conflicts(a=LLAVA, b=LLAVA) == {}
    assert conflicts(a=LLAMA_4) == {}
    assert conflicts() == {}


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("rope_theta", 10000.0, 1000000.0),
        ("max_position_embeddings", 4096, 32768),
        ("vocab_size", 32000, 32001),
        ("hidden_size", 4096, 5120),
        ("intermediate_size", 11008, 14336),
        ("num_hidden_layers", 32, 40),
        ("num_key_value_heads", 8, 32),
        ("hidden_act", "silu", "gelu"),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("tie_word_embeddings", True, False),
        ("model_type", "llama", "mistral"),
        ("sliding_window", None, 4096),
    ],
)
def test_keys_that_matter(key: str, ours: object, theirs: object) -> None:
    assert conflicts(a={key: ours}, b={key: theirs}) == {key: {"a": ours, "b": theirs}}


def test_keys_that_do_not_matter() -> None:
    assert (
        conflicts(
            a={"torch_dtype": "float16", "_name_or_path": "x", "use_cache": True},
            b={"torch_dtype": "bfloat16", "transformers_version": "5.0", "eos_token_id": 3},
        )
        == {}
    )


def test_a_key_that_only_some_state_is_compared_among_those() -> None:
    assert conflicts(a={"head_dim": 128}, b={}, c={"head_dim": 128}) == {}
    assert conflicts(a={"head_dim": 128}, b={}, c={"head_dim": 64}) == {
        "head_dim": {"a": 128, "c": 64}
    }


def test_no_scaling_and_absent_scaling_are_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert conflicts(a={"rope_scaling": None}, b={}) == {}
    assert conflicts(a={}, b={"rope_scaling": scaling}) == {
        "rope_scaling": {"a": None, "b": scaling}
    }


def test_both_forms_of_rotary_positions_compare_equal() -> None:
    assert conflicts(four=LLAMA_4, five=LLAMA_5) == {}
    old = {"rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}}
    both = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4}}
    assert conflicts(old=old, new=new, both=both) == {}
    new["rope_parameters"]["rope_theta"] = 20000.0
    assert conflicts(old=old, new=new) == {"rope_theta": {"old": 10000, "new": 20000.0}}
    new["rope_parameters"].update(rope_theta=1e4, factor=8.0)
    assert list(conflicts(old=old, new=new)) == ["rope_scaling"]


def test_configs_within() -> None:
    other = copy.deepcopy(LLAVA)
    other["text_config"]["hidden_size"] = 5120
    assert conflicts(a=LLAVA, b=other) == {"text_config.hidden_size": {"a": 4096, "b": 5120}}
    assert conflicts(a=LLAVA, b={"model_type": "llava"}) == {}


def test_conflicts_are_in_words_and_in_order() -> None:
    found = config_conflicts(
        {"base": {"rope_theta": 1e4, "vocab_size": 5}, "code": {"vocab_size": 6, "rope_theta": 1e6}}
    )
    assert [conflict.key for conflict in found] == ["rope_theta", "vocab_size"]
    assert isinstance(found[0], Conflict)
    assert str(found[0]) == (
        "rope_theta: 10000.0 in base, 1000000.0 in code (the models encode positions differently)"
    )


@given(json_mappings, json_mappings)
def test_any_configs_can_be_compared(ours: dict[str, object], theirs: dict[str, object]) -> None:
    for conflict in config_conflicts({"a": ours, "b": theirs}):
        assert len(conflict.values) == 2
        assert str(conflict)
    assert config_conflicts({"a": ours, "b": ours}) == []
