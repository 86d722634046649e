"""The same tensors under other names."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.architecture.layouts import LAYOUTS, example, renamed

DECODER = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{w}.weight" for n in range(3) for w in ("mlp.up", "attn.q")),
    "model.norm.weight",
    "lm_head.weight",
]
HEADLESS = [name.removeprefix("model.") for name in DECODER if name != "lm_head.weight"]
LLAVA_4 = [
    *(f"language_model.{name}" for name in DECODER),
    "multi_modal_projector.linear_1.weight",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
]
LLAVA_5 = [
    *(re.sub("^model", "model.language_model", name) for name in DECODER),
    "model.multi_modal_projector.linear_1.weight",
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
]
QWEN_4 = [*DECODER, "visual.blocks.0.attn.qkv.weight"]
QWEN_5 = [
    *(re.sub("^model", "model.language_model", name) for name in DECODER),
    "model.visual.blocks.0.attn.qkv.weight",
]
BERT = ["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"]


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (HEADLESS, DECODER),
        (LLAVA_4, LLAVA_5),
        (LLAVA_5, LLAVA_4),
        (QWEN_4, QWEN_5),
        (QWEN_5, QWEN_4),
        ([f"_orig_mod.{name}" for name in DECODER], DECODER),
        ([f"module.{name}" for name in HEADLESS], DECODER),
        ([f"module.{name}" for name in LLAVA_4], LLAVA_5),
        (BERT, [f"bert.{name}" for name in BERT] + ["cls.predictions.bias"]),
        ([f"roberta.{name}" for name in BERT], BERT),
    ],
)
def test_all_become_those_of_the_reference(names: list[str], reference: list[str]) -> None:
    found = renamed(names, reference)
    assert found.keys() == set(names)
    assert set(found.values()) <= set(reference)
    old, new = example(found)
    assert old != new


def test_a_head_that_the_reference_lacks_stays() -> None:
    found = renamed(DECODER, HEADLESS)
    assert found["model.norm.weight"] == "norm.weight"
    assert found["lm_head.weight"] == "lm_head.weight"


CLASSIFIER = [*(name for name in DECODER if name != "lm_head.weight"), "score.weight"]
HEADLESS_CLASSIFIER = [name.removeprefix("model.") for name in CLASSIFIER]


def test_a_part_is_not_taken_for_another() -> None:
    assert renamed(CLASSIFIER, DECODER) == {}
    assert renamed(DECODER, CLASSIFIER) == {}
    found = renamed(HEADLESS_CLASSIFIER, DECODER)
    assert found["norm.weight"] == "model.norm.weight"
    assert found["score.weight"] == "score.weight"
    found = renamed([f"module.{name}" for name in HEADLESS_CLASSIFIER], DECODER)
    assert found["module.norm.weight"] == "model.norm.weight"
    assert "lm_head.weight" not in found.values()
    found = renamed(["layers.0.q.weight", "norm.weight"], QWEN_5)
    assert "lm_head.weight" not in found.values()


TOWER = [f"encoder.layers.{n}.{w}.weight" for n in range(3) for w in ("mlp.fc1", "self_attn.q")]
CLIP = [f"{part}_model.{name}" for part in ("vision", "text") for name in TOWER]


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (
            ["bert.a.weight", "bert.b.weight", "classifier.bias"],
            ["bert.a.weight", "qa_outputs.bias"],
        ),
        ([*DECODER[:-1], "v_head.weight"], DECODER),
        ([*DECODER[:-2], "value.norm.weight", "lm_head.weight"], DECODER),
        ([*DECODER, *(f"mtp.layers.3.{w}" for w in "ab")], [*DECODER, "model.layers.3.a"]),
        (["encoder.block.0.q", "decoder.block.0.q"], ["encoder.block.0.q", "encoder.block.1.q"]),
        ([f"vision_model.{name}" for name in TOWER], [f"text_model.{name}" for name in TOWER]),
        (TOWER, CLIP),
        (TOWER, [*CLIP, "vision_model.embeddings.weight", "vision_model.norm.weight"]),
    ],
)
def test_parts_that_look_alike(names: list[str], reference: list[str]) -> None:
    """They stay what they are, whoever lacks them."""
    assert renamed(names, reference) == {}


@pytest.mark.parametrize("names", [DECODER, HEADLESS, LLAVA_4, LLAVA_5, QWEN_4, QWEN_5, BERT, []])
def test_names_that_are_right_stay(names: list[str]) -> None:
    assert renamed(names, names) == {}
    assert renamed(names, []) == {}
    assert renamed(names, ["something.else"]) == {}


def test_layouts_are_each_others_inverse() -> None:
    for there, back in LAYOUTS:
        assert {(b, a) for a, b in there} == set(back)


NAME = st.lists(st.sampled_from(["model", "module", "visual", "lm_head", "0", "x"]), max_size=4)
NAMES = st.sets(NAME.map(".".join), max_size=8)


@given(NAMES, NAMES)
def test_never_two_under_one_name_and_never_fewer_that_fit(
    names: set[str], reference: set[str]
) -> None:
    found = renamed(names, reference)
    if found:
        assert found.keys() == names
        assert len(set(found.values())) == len(names)
        assert len(set(found.values()) & reference) > len(names & reference)


def test_as_many_first_words_as_names_take_no_time() -> None:
    known, names = ([f"{word}{n}.x" for n in range(100_000)] for word in "wv")
    began = time.process_time()
    assert renamed(names, known) == {}
    assert time.process_time() - began < 2
