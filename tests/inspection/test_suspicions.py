"""Every kind of suspicion: what raises it, and what comes close and does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.engine.planning import plan_recipe_file
from lazymerge.engine.resources import Resources
from lazymerge.inspection.suspicions import influence, suspicions
from small_models import (
    CONFIG,
    LAYERS,
    WIDTH,
    found,
    merge,
    model_tensors,
    plan_of,
    write_model,
    write_tokenizer,
)

from conftest import write_adapter, write_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models base, a, b and c of one family."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_model(folder / name, seed)
    return folder


def weighted(*weights: float, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(name, {"weight": w, **more}) for name, w in zip("abc", weights, strict=False)]


Case = tuple[Mapping[str, Any], str | None, str]

CASES: dict[str, Case] = {
    # recipe, the kind it must raise or None, a part of the message
    "linear beyond 1": (
        merge("linear", *weighted(0.8, 0.5), parameters={"normalize": False}),
        "weights-sum mistake",
        "sum to 1.3 in all tensors",
    ),
    "linear to 1": (
        merge("linear", *weighted(0.7, 0.3), parameters={"normalize": False}), None, ""),
    "linear in thirds": (
        merge("linear", *weighted(0.33, 0.33, 0.33), parameters={"normalize": False}),
        "weights-sum note",
        "0.99",
    ),
    "linear in better thirds": (
        merge("linear", *weighted(0.333, 0.333, 0.334), parameters={"normalize": False}), None, ""),
    "linear normalized": (merge("linear", *weighted(3, 5)), None, ""),
    "linear, gradient": (
        merge(
            "linear",
            ("a", {"weight": [0.0, 1.0]}),
            ("b", {"weight": [1.0, 0.5]}),
            parameters={"normalize": False},
        ),
        "weights-sum mistake",
        "sum to 1.167 to 1.5 in layers 1–3 of 4",
    ),
    "linear far outside": (
        merge("linear", *weighted(1.0, -0.8)),
        "weights-extrapolate mistake",
        "coefficients 5 and -4",
    ),
    "linear outside": (
        merge("linear", *weighted(1.2, -0.2)),
        "weights-extrapolate note",
        "b has the coefficient -0.2",
    ),
    "multislerp beyond 1": (
        merge("multislerp", *weighted(0.8, 0.8), parameters={"normalize_weights": False}),
        "weights-sum mistake",
        "normalize_weights: true",
    ),
    "slerp beyond": (
        merge("slerp", "a", base="base", parameters={"t": 1.2}),
        "interpolation-range mistake",
        "t is 1.2",
    ),
    "slerp, gradient beyond": (
        merge("slerp", "a", base="base", parameters={"t": [0.5, 0.5, 0.5, 1.5]}),
        "interpolation-range mistake",
        "in layer 3 of 4",
    ),
    "slerp, filter beyond": (
        merge(
            "slerp",
            "a",
            base="base",
            parameters={"t": [{"filter": "self_attn", "value": -0.1}, {"value": 0.5}]},
        ),
        "interpolation-range mistake",
        "in self_attn of layers 0–3 of 4",
    ),
    "slerp to its ends": (
        merge("slerp", "a", base="base", parameters={"t": [0, 0.5, 1]}), None, ""),
    "nuslerp beyond": (
        merge("nuslerp", *weighted(1.0, -0.2)), "interpolation-range mistake", "-0.25"),
    "nuslerp": (merge("nuslerp", *weighted(3, 1)), None, ""),
    "scaled as a whole": (
        merge("passthrough", ("a", {"scale": 1.1})), "scale-everything mistake", "scale is 1.1"),
    "one part scaled": (
        merge("passthrough", ("a", {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1}]})),
        None,
        "",
    ),
    "orca and wizard": (
        merge("task_arithmetic", *weighted(1.0, 0.3), base="base"), None, ""),
    "percent": (
        merge("task_arithmetic", *weighted(70, 30), base="base"),
        "weight-large mistake",
        "by 70 and 30",
    ),
    "percent, normalized": (
        merge("task_arithmetic", *weighted(70, 40), base="base", parameters={"normalize": True}),
        "base-cancels note",
        "cancels",
    ),
    "lambda": (
        merge("task_arithmetic", *weighted(1.0, 0.3), base="base", parameters={"lambda": 4}),
        "weight-large mistake",
        "by 4",
    ),
    "much": (
        merge("task_arithmetic", *weighted(1.5, 1.0), base="base"), "weights-sum note", "2.5"),
    "very much": (
        merge("dare_ties", *weighted(2.5, 2.5, density=0.5), base="base"),
        "weights-sum mistake",
        "5",
    ),
    "many at 1": (
        merge("dare_linear", *weighted(1, 1, 1, density=0.5), base="base"), None, ""),
    "subtracted": (
        merge("task_arithmetic", *weighted(1.0, -0.5), base="base"), "weight-negative note", "b"),
    "ties, one half each": (
        merge("ties", *weighted(0.5, 0.3, density=0.5), base="base"), None, ""),
    "ties, large weights": (
        merge("ties", *weighted(5, 3, density=0.5), base="base"), None, ""),
    "ties, negative": (
        merge("ties", *weighted(1, -0.5, density=0.5), base="base"),
        "weight-sign-lost mistake",
        "normalize: false",
    ),
    "dare drops nothing": (
        merge("dare_linear", *weighted(0.5, 0.4), base="base"),
        "density-keeps-all note",
        "what task_arithmetic does",
    ),
    "dare drops of one": (
        merge(
            "dare_linear",
            ("a", {"weight": 0.5}),
            ("b", {"weight": 0.4, "density": 0.5}),
            base="base",
        ),
        None,
        "",
    ),
    "dare of nearly nothing": (
        merge("dare_linear", *weighted(0.5, 0.4, density=0.01), base="base"),
        "density-low note",
        "up to 100",
    ),
    "dare of a tenth": (
        merge("dare_linear", *weighted(0.5, 0.4, density=0.1), base="base"), None, ""),
    "della to the edge": (
        merge("della", *weighted(0.5, 0.4, density=0.3, epsilon=0.29), base="base"),
        "epsilon-large note",
        "0.01",
    ),
    "della without ranks": (
        merge("della", *weighted(0.5, 0.4, density=0.3, epsilon=0), base="base"),
        "epsilon-zero note",
        "dare",
    ),
    "della": (
        merge("della", *weighted(0.5, 0.4, density=0.5, epsilon=0.1), base="base"), None, ""),
    "gamma": (
        merge("breadcrumbs", *weighted(0.5, 0.4, density=0.9, gamma=0.2), base="base"),
        "gamma-large note",
        "0.2",
    ),
    "breadcrumbs": (
        merge("breadcrumbs", *weighted(0.5, 0.4, density=0.9, gamma=0.1), base="base"), None, ""),
    "nearswap": (
        merge("nearswap", "a", base="base", parameters={"t": 0.5}),
        "nearswap-distance note",
        "distance",
    ),
    "nearswap, near": (merge("nearswap", "a", base="base", parameters={"t": 0.001}), None, ""),
    "ram": (
        merge("ram", "a", "b", base="base", parameters={"epsilon": 0.1}), "epsilon-large note", ""),
    "karcher": (merge("karcher", "a", "b", parameters={"max_iter": 0}), "no-iteration note", ""),
    "weight 0": (
        merge("linear", *weighted(1, 0)), "no-influence mistake", "b has no influence"),
    "weight 0 in some layers": (
        merge("linear", ("a", {"weight": 1}), ("b", {"weight": [0, 0, 1]})), None, ""),
    "weight 0, added": (
        merge("task_arithmetic", *weighted(1.2, 0), base="base"), "no-influence mistake", "b has"),
    "lambda 0": (
        merge("ties", *weighted(1, 1, density=0.5), base="base", parameters={"lambda": 0}),
        "no-influence mistake",
        "lambda is 0",
    ),
    "density 0": (
        merge("dare_ties", ("a", {"weight": 1, "density": 0.5}),
              ("b", {"weight": 1, "density": 0}), base="base"),
        "no-influence mistake",
        "its density is 0",
    ),
    "slerp at its start": (
        merge("slerp", "a", base="base", parameters={"t": 0}), "no-influence mistake", "a has no"),
    "slerp at its end": (
        merge("slerp", "a", base="base", parameters={"t": 1}), "no-influence mistake", "base has"),
    "sce of nothing": (
        merge("sce", "a", "b", base="base", parameters={"select_topk": 0}),
        "no-influence mistake",
        "select_topk",
    ),
    "unused base": (
        merge("linear", *weighted(1, 1), base="base"), "base-unused note", "linear has no base"),
    "the model itself": (
        merge("task_arithmetic", *weighted(1), base="base"), "base-cancels mistake", "a itself"),
    "base cancels": (
        merge("task_arithmetic", *weighted(0.6, 0.4), base="base"), "base-cancels note", "linear"),
    "gradient": (
        merge("slerp", "a", base="base", parameters={"t": [0, 0.2, 0.4, 0.6, 0.8, 1, 1]}),
        "gradient-long note",
        "7 values for 4 layers",
    ),
    "gradient of one for each": (
        merge("slerp", "a", base="base", parameters={"t": [0, 0.2, 0.4, 0.6]}), None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_recipes(place: Path, name: str) -> None:
    recipe, expected, part = CASES[name]
    shown = found(recipe, place)
    assert {f"{s.kind} {s.severity}" for s in shown.values()} == (
        set() if expected is None else {expected}
    )
    if expected is not None:
        assert part in shown[expected.split()[0]].message


def sliced(*ranges: tuple[str, int, int], method: str = "passthrough") -> dict[str, Any]:
    return {
        "merge_method": method,
        "slices": [
            {"sources": [{"model": model, "layer_range": [start, stop]}]}
            for model, start, stop in ranges
        ],
    }


@pytest.mark.parametrize(
    ("ranges", "layer"),
    [
        ((("a", 0, 1), ("a", 2, 4)), "layer 1 is in no slice"),
        ((("a", 0, 1), ("b", 2, 4)), "layer 1 is in no slice"),
        ((("a", 0, 3),), "the last layer, 3 of a,"),
        ((("a", 0, 2), ("b", 2, 4)), None),
        ((("a", 0, 3), ("b", 1, 4)), None),
        ((("a", 0, 4), ("a", 2, 4)), None),
        ((("a", 0, 1), ("a", 3, 4)), None),  # two layers left out: pruned on purpose
        ((("a", 0, 2),), None),
        ((("a", 0, 1), ("b", 2, 4), ("a", 1, 2)), None),
    ],
)
def test_layers_left_out_by_one(
    place: Path, ranges: tuple[tuple[str, int, int], ...], layer: str | None
) -> None:
    shown = found(sliced(*ranges), place)
    assert [s.severity for s in shown.values()] == ([] if layer is None else ["mistake"])
    if layer is not None:
        assert layer in shown["layer-left-out"].message


@pytest.mark.parametrize(
    ("ranges", "is_reversed"),
    [
        ((("a", 2, 4), ("a", 0, 2)), True),
        ((("a", 3, 4), ("b", 1, 3), ("a", 0, 1)), True),
        ((("a", 0, 2), ("a", 2, 4)), False),
        ((("a", 0, 3), ("a", 1, 4)), False),
        ((("a", 0, 4), ("b", 0, 4)), False),
        ((("a", 0, 1), ("b", 2, 4), ("a", 1, 2)), False),
        ((("a", 0, 4),), False),
    ],
)
def test_layers_in_reverse(
    place: Path, ranges: tuple[tuple[str, int, int], ...], is_reversed: bool
) -> None:
    shown = found(sliced(*ranges), place)
    assert ("layers-reversed" in shown) == is_reversed


def test_one_model_under_two_names(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink(place / "a", tmp_path / "again")
    os.symlink(place / "base", tmp_path / "base")
    (tmp_path / "linked").mkdir()
    for file in (place / "a").iterdir():
        os.link(file, tmp_path / "linked" / file.name)
    for name in ("again", "linked"):
        recipe = merge("linear", (str(place / "a"), {"weight": 1}), (name, {"weight": 1}))
        assert found(recipe, tmp_path)["same-model"].severity == "mistake"
    shutil.copytree(place / "a", tmp_path / "copied", copy_function=shutil.copy2)
    recipe = merge("linear", (str(place / "a"), {"weight": 1}), ("copied", {"weight": 1}))
    assert found(recipe, tmp_path) == {}  # small files may have equal times by chance
    monkeypatch.setattr(influence, "LEAST_COPY_BYTES", 0)
    assert found(recipe, tmp_path)["same-model"].severity == "note"
    # a model put on top of itself is upscaling
    assert found(sliced(("again", 0, 4), (str(place / "a"), 2, 4)), tmp_path) == {}


def test_an_adapter_of_what_is_not_in_the_output(place: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": torch.ones(2, WIDTH),
        f"{name}.lora_B.weight": torch.ones(WIDTH, 2),
    }
    write_adapter(place / "adapter", factors, r=2, lora_alpha=2)
    model = "a+adapter"
    shown = found(sliced((model, 1, 4), ("b", 0, 1)), place)
    assert shown["adapter-without-effect"].severity == "mistake"
    assert found(sliced((model, 0, 4)), place) == {}


@pytest.mark.parametrize(
    ("changed", "severity", "part"),
    [
        ({"rope_theta": 1e6}, "mistake", "rope_theta is 1000000.0 and not 10000.0"),
        ({"num_attention_heads": 4}, "mistake", "num_attention_heads is 4 and not 2"),
        ({"hidden_act": "gelu"}, "mistake", "hidden_act is 'gelu'"),
        ({"hidden_act": "swish"}, None, ""),
        ({"rms_norm_eps": 1e-6}, "note", "rms_norm_eps is 1e-06"),
        ({"model_type": "mistral"}, "note", "model_type"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "note", "rope_scaling"),
        ({"tie_word_embeddings": None}, None, ""),
        ({"rope_theta": 10000}, None, ""),
        ({"rope_theta": ["\x1b[31m", {"a": None}]}, "mistake", "rope_theta"),
    ],
)
def test_configs(
    place: Path, tmp_path: Path, changed: dict[str, Any], severity: str | None, part: str
) -> None:
    write_model(tmp_path / "base")
    write_model(tmp_path / "other", 1, **changed)
    recipe = merge("linear", ("base", {"weight": 1}), ("other", {"weight": 1}))
    shown = found(recipe, tmp_path)
    assert [s.severity for s in shown.values()] == ([] if severity is None else [severity])
    if severity is not None:
        assert part in shown["unrelated-model"].message


def test_every_model_is_said_once(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    for seed, name in enumerate(("other", "another"), 1):
        write_model(tmp_path / name, seed, rope_theta=5e5, rms_norm_eps=1e-6)
    entries = [(name, {"weight": 1}) for name in ("base", "other", "another")]
    plan = plan_of(merge("linear", *entries), tmp_path)
    assert plan.notices == ()
    (found_,) = suspicions(plan)
    for part in ("another", "look unrelated", "rope_theta", "rms_norm_eps"):
        assert part in found_.message


def test_models_that_differ_where_the_base_says_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "base", rope_theta=None)
    for seed, theta in enumerate((1e4, 1e4, 5e5), 1):
        write_model(tmp_path / f"m{seed}", seed, rope_theta=theta)
    entries = [(name, {"weight": 1}) for name in ("base", "m1", "m2", "m3")]
    shown = found(merge("linear", *entries), tmp_path)["unrelated-model"]
    assert shown.severity == "mistake"
    assert shown.message.startswith(
        "m3 looks unrelated to base: rope_theta is 500000.0 and not 10000.0 as in m1;"
    )


def test_an_output_without_config(tmp_path: Path) -> None:
    write_model(tmp_path / "a", config=None)
    write_model(tmp_path / "b", 1, config=None)
    assert found(merge("linear", *weighted(1, 1)), tmp_path).keys() == {"no-config"}


@pytest.mark.parametrize(
    ("before", "asked", "kinds", "part"),
    [
        (torch.bfloat16, "float16", {"dtype-range"}, "65504"),
        (torch.float32, "bfloat16", {"dtype-precision"}, "8 of 24"),
        (torch.float32, "float16", {"dtype-range"}, "11 of 24"),
        (torch.float16, "bfloat16", {"dtype-precision"}, "8 of 11"),
        (torch.bfloat16, "float32", set(), ""),
        (torch.bfloat16, None, set(), ""),
        (torch.bfloat16, "float8_e4m3fn", {"dtype-range", "float8-output"}, "448"),
        (torch.float8_e4m3fn, "bfloat16", {"float8-input"}, "31 tensors"),
    ],
)
def test_dtypes(
    tmp_path: Path, before: torch.dtype, asked: str | None, kinds: set[str], part: str
) -> None:
    for seed, name in enumerate("ab"):
        write_checkpoint(tmp_path / name, model_tensors(seed, before), CONFIG)
    recipe = merge("linear", *weighted(1, 1))
    shown = found(recipe if asked is None else {**recipe, "out_dtype": asked}, tmp_path)
    assert shown.keys() == kinds
    assert {s.severity for s in shown.values()} <= {"note"}
    assert part in "".join(s.message for s in shown.values())


def test_a_head_that_is_not_there(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        tensors = model_tensors(seed)
        del tensors["lm_head.weight"]
        write_checkpoint(tmp_path / name, tensors, CONFIG)
    recipe = merge("linear", *weighted(1, 1))
    assert found(recipe, tmp_path)["head-missing"].severity == "mistake"
    for name in "ab":
        shutil.rmtree(tmp_path / name)
        write_checkpoint(tmp_path / name, tensors, {**CONFIG, "architectures": ["LlamaModel"]})
    assert found(recipe, tmp_path) == {}


WORDS = [f"word{number}" for number in range(1000)]


@pytest.mark.parametrize(
    ("theirs", "added", "expected"),
    [
        (WORDS, None, None),
        ([*WORDS[1:], WORDS[0]], None, "mistake"),
        (["other", *WORDS[1:]], None, "note"),
        ([*WORDS, "more"], None, "note"),
        (WORDS, {"<|im_start|>": 999}, "note"),
        ([*WORDS[:-1], "wo\u00e9\n"], None, "note"),
    ],
)
def test_tokenizers(
    tmp_path: Path, theirs: list[str], added: dict[str, int] | None, expected: str | None
) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed)
    write_tokenizer(tmp_path / "a", WORDS)
    write_tokenizer(tmp_path / "b", theirs, added)
    shown = found(merge("linear", *weighted(1, 1)), tmp_path)
    assert [(s.kind, s.severity) for s in shown.values()] == (
        [] if expected is None else [("tokenizer-mismatch", expected)]
    )


def test_one_vocabulary_written_in_two_ways(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed)
    tokens = ["\u0120the", 'quo"te', "back\\slash", "</script>", "\U0001f600"]
    write_tokenizer(tmp_path / "a", tokens)
    text = (tmp_path / "a" / "tokenizer.json").read_text()
    assert "\\u0120" in text
    write_tokenizer(tmp_path / "b", tokens)
    (tmp_path / "b" / "tokenizer.json").write_text(
        text.replace("\\u0120", "\u0120").replace(", ", ",\n  "), encoding="utf-8"
    )
    assert found(merge("linear", *weighted(1, 1)), tmp_path) == {}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model": {"vocab": {"a": ', '{"model": 3, "vocab": [[1]]}', "\0" * 99]
)
def test_broken_tokenizers_are_passed_over(tmp_path: Path, content: str) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed)
    write_tokenizer(tmp_path / "a", WORDS)
    (tmp_path / "b" / "tokenizer.json").write_text(content)
    (tmp_path / "b" / "tokenizer_config.json").write_text(content)
    assert found(merge("linear", *weighted(1, 1)), tmp_path) == {}


def test_special_tokens_and_chat_templates(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed)
    write_tokenizer(tmp_path / "a", WORDS, eos_token="</s>", pad_token=None)
    eos = {"content": "<|im_end|>"}
    write_tokenizer(tmp_path / "b", WORDS, eos_token=eos, pad_token="x", chat_template="{{ x }}")
    recipe = merge("linear", *weighted(1, 1))
    shown = found(recipe, tmp_path)
    assert {(s.kind, s.severity) for s in shown.values()} == {
        ("special-tokens", "note"),
        ("chat-template", "note"),
    }
    assert 'eos_token is "<|im_end|>" and not "</s>"' in shown["special-tokens"].message
    write_tokenizer(tmp_path / "a", WORDS, eos_token="<|im_end|>", chat_template="{{ y }}")
    assert found(recipe, tmp_path) == {}


def test_merges_within_a_merge(place: Path) -> None:
    a, b, c = (str(place / name) for name in "abc")
    entries = [(a, {"weight": 0.9}), (b, {"weight": 0.9})]
    inner = merge("linear", *entries, parameters={"normalize": False}, name="inner")
    outer = merge("linear", ("inner", {"weight": 1}), (c, {"weight": 1}))
    placed = [inner, outer]
    path = place / "several.yml"
    path.write_text(yaml.safe_dump_all(placed, sort_keys=False))
    (said,) = suspicions(plan_recipe_file(path, Resources(limit_bytes=1 << 30)))
    assert said.kind == "weights-sum"
    assert said.message.startswith("inner: the weights sum to 1.8 in all tensors")


def test_mistakes_come_first(place: Path) -> None:
    recipe = merge("linear", *weighted(1, 0), base="base", dtype="float16")
    severities = [each.severity for each in suspicions(plan_of(recipe, place))]
    assert severities == sorted(severities)
    assert set(severities) == {"mistake", "note"}


def test_names_are_shown_in_short(tmp_path: Path) -> None:
    long = "x" * 5000
    for seed, name in enumerate("ab"):
        tensors = {f"{n}{long}": t for n, t in model_tensors(seed, torch.float32).items()}
        write_checkpoint(tmp_path / name, tensors, CONFIG)
    shown = found(merge("linear", *weighted(1, 1), dtype="float16"), tmp_path)
    assert all(len(each.message) < 2000 for each in shown.values())
    assert LAYERS == 4
