"""find_layer_stacks over the names of real models, and as a rule over made-up ones."""

from __future__ import annotations

import random
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.architecture import LayerPlace, LayerStack, LayerStacks, find_layer_stacks
from model_names import MODELS


def found(*names: str) -> dict[str, int]:
    return {stack.prefix: stack.layer_count for stack in find_layer_stacks(names)}


@pytest.mark.parametrize("model", MODELS)
def test_real_models(model: str) -> None:
    assert found(*MODELS[model].names) == MODELS[model].stacks


@pytest.mark.parametrize("model", MODELS)
def test_order_of_names_does_not_matter(model: str) -> None:
    names = list(MODELS[model].names)
    random.Random(0).shuffle(names)
    assert found(*names) == MODELS[model].stacks


def test_stacks_come_in_order_of_first_appearance() -> None:
    names = ["z.layers.0.w", "a.layers.0.w", "z.layers.1.w", "a.layers.1.w"]
    assert [stack.prefix for stack in find_layer_stacks(names)] == ["z.layers", "a.layers"]
    assert [stack.prefix for stack in find_layer_stacks(names[::-1])] == ["a.layers", "z.layers"]


def test_no_stacks() -> None:
    assert found() == {}
    assert found("wte.weight", "", ".", "..", "0", "0.w", ".0.w", "layers.0", "layers.0.") == {
        "layers": 1
    }
    assert found("layers.0", "layers.1") == {}
    assert found("0.w", "1.w") == {}
    assert len(LayerStacks()) == 0


def test_a_run_of_one_needs_a_word_for_layers() -> None:
    assert found("model.layers.0.w", "h.0.w", "to_out.0.w") == {"model.layers": 1, "h": 1}


def test_gaps_make_no_stack() -> None:
    assert found("mlp.0.w", "mlp.2.w") == {}
    assert found("layers.1.w", "layers.2.w") == {}
    assert found("layers.0.w", "layers.2.w") == {}


def test_nothing_inside_layers_with_a_gap_is_a_stack() -> None:
    """A part of a mixtral: its experts must not be taken for layers."""
    names = [f"model.layers.{i}.experts.{j}.w" for i in (5, 6) for j in range(8)]
    assert found(*names) == {}


def test_a_stack_inside_a_sequence_with_a_gap() -> None:
    assert found("net.0.layers.0.w", "net.0.layers.1.w", "net.2.w") == {"net.0.layers": 2}


def test_the_outermost_number_wins() -> None:
    assert found("layers.0.layers.0.w", "layers.0.layers.1.w", "layers.1.layers.0.w") == {
        "layers": 2
    }
    assert found("a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w", "a.1.b.1.w") == {"a": 2}


def test_a_sequence_of_unlike_members_is_no_stack() -> None:
    assert found("parts.0.text.layers.0.w", "parts.0.text.layers.1.w", "parts.1.layers.0.w") == {
        "parts.0.text.layers": 2,
        "parts.1.layers": 1,
    }
    assert found("parts.0.a", "parts.1.b") == {}
    assert found("parts.0.a", "parts.0.b", "parts.1.b") == {"parts": 2}


def test_layers_under_a_word_for_layers_may_be_unlike() -> None:
    assert found("layers.0.attention.w", "layers.1.mamba.w") == {"layers": 2}


def test_a_name_given_twice_counts_once() -> None:
    assert found("parts.0.a", "parts.0.a", "parts.1.b") == {}


def test_names_may_come_from_a_generator() -> None:
    stacks = find_layer_stacks(f"parts.{i}.a" for i in range(3))
    assert [stack.layer_count for stack in stacks] == [3]


def test_numbers_are_plain_decimals() -> None:
    assert found("layers.00.w", "layers.01.w") == {}
    assert found("layers.٠.w", "layers.-1.w", "layers.0x0.w", "layers.1e0.w") == {}
    assert found("layers." + "9" * 10_000 + ".w", "layers.0.w") == {"layers": 1}


def test_numbers_beside_each_other() -> None:
    assert found("label_emb.0.0.w", "label_emb.0.1.w") == {"label_emb.0": 2}
    assert found("blocks.0.0.w", "blocks.1.0.w") == {"blocks": 2}


def test_locate() -> None:
    stacks = find_layer_stacks(MODELS["mixtral"].names)
    stack = LayerStack("model.layers", 4)
    assert stacks.locate("model.layers.2.block_sparse_moe.experts.7.w1.weight") == LayerPlace(
        stack, 2, "block_sparse_moe.experts.7.w1.weight"
    )
    assert stacks.locate("model.layers.0.new.weight") == LayerPlace(stack, 0, "new.weight")
    for outside in ("model.norm.weight", "model.layers.4.w", "layers.0.w", "model.layers.0", ""):
        assert stacks.locate(outside) is None


def test_depth() -> None:
    stacks = find_layer_stacks(MODELS["llava"].names)
    assert stacks.depth("language_model.model.layers.0.mlp.up_proj.weight") == 0.0
    assert stacks.depth("language_model.model.layers.31.mlp.up_proj.weight") == 1.0
    assert stacks.depth("language_model.model.layers.8.mlp.up_proj.weight") == 8 / 31
    assert stacks.depth("vision_tower.vision_model.encoder.layers.8.layer_norm1.bias") == 8 / 23
    for outside in ("language_model.lm_head.weight", "language_model.model.norm.weight"):
        assert stacks.depth(outside) == 0.0


def test_depth_of_a_single_layer_is_that_of_mergekit() -> None:
    stacks = find_layer_stacks(["model.layers.0.w", "model.norm.weight"])
    assert stacks.depth("model.layers.0.w") == 1.0
    assert stacks.depth("model.norm.weight") == 0.0


components = st.sampled_from(["layers", "h", "experts", "mlp", "w", "0", "1", "2", "3", "00", ""])
name_lists = st.lists(st.lists(components, min_size=1, max_size=6).map(".".join), max_size=30)


@given(name_lists)
def test_stacks_are_complete_runs_and_never_inside_each_other(names: list[str]) -> None:
    stacks = find_layer_stacks(names)
    for stack in stacks:
        for index in range(stack.layer_count):
            assert any(name.startswith(f"{stack.prefix}.{index}.") for name in names)
        assert not any(name.startswith(f"{stack.prefix}.{stack.layer_count}.") for name in names)
        for other in stacks:
            for index in range(stack.layer_count):
                assert not other.prefix.startswith(f"{stack.prefix}.{index}.")


@given(name_lists)
def test_locate_takes_a_name_apart(names: list[str]) -> None:
    stacks = find_layer_stacks(names)
    for name in names:
        place = stacks.locate(name)
        assert 0.0 <= stacks.depth(name) <= 1.0
        if place is None:
            assert not any(name.startswith(f"{stack.prefix}.0.") for stack in stacks)
        else:
            assert f"{place.stack.prefix}.{place.index}.{place.suffix}" == name
            assert place.index < place.stack.layer_count


@given(st.integers(1, 40), st.text("abc", min_size=1), st.sampled_from(["layers", "h", "block"]))
def test_a_plain_model(count: int, suffix: str, word: str) -> None:
    names = [f"model.{word}.{i}.{suffix}" for i in range(count)] + ["model.norm.weight"]
    assert found(*names) == {f"model.{word}": count}


def test_many_names_are_fast() -> None:
    """90,000 names: about 0.3 s of CPU time each; the bounds leave room for slow machines."""
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{w}.weight"
        for i in range(60)
        for j in range(500)
        for w in ("w1", "w2", "w3")
    ]
    start = time.process_time()
    stacks = find_layer_stacks(names)
    depths = {stacks.depth(name) for name in names}
    elapsed = time.process_time() - start
    assert len(depths) == 60
    if sys.gettrace() is None:
        assert elapsed < 4.0
