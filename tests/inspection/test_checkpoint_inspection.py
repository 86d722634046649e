"""What inspect finds in models, whole ones and broken ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lazymerge.api import inspect
from lazymerge.checkpoint.tensor import Checkpoint, FileInfo, TensorInfo
from lazymerge.engine.plan import Plan
from lazymerge.inspection.checkpoint import Inspection, inspect_checkpoint
from lazymerge.inspection.parts import part_of
from lazymerge.inspection.suspicions import suspicions
from small_models import (
    CONFIG,
    LAYERS,
    ROWS,
    WIDTH,
    merge,
    model_tensors,
    plan_of,
    write_model,
    write_tokenizer,
)

from conftest import write_checkpoint

Tensors = dict[str, torch.Tensor]


def looked_at(
    folder: Path, tensors: Tensors | None = None, *, scan: bool = False, **changed: Any
) -> Inspection:
    """What is found of a model with these tensors and changes of its config."""
    config = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
    write_checkpoint(folder, model_tensors(3) if tensors is None else tensors, config)
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, [f"word{n}" for n in range(ROWS)])
    return inspect(str(folder), scan=scan)


def kinds(found: Inspection) -> set[str]:
    return {f"{each.kind} {each.severity}" for each in found.suspicions}


def test_a_sound_model(tmp_path: Path) -> None:
    found = looked_at(tmp_path / "m", scan=True, max_position_embeddings=4096)
    assert kinds(found) == set()
    assert {part.name: part.tensors for part in found.parts} == {
        "embeddings": 1,
        "attention": 4 * LAYERS,
        "MLP": 2 * LAYERS,
        "norms": LAYERS + 1,
        "head": 1,
    }
    assert sum(part.parameters for part in found.parts) == found.checkpoint.parameter_count
    assert found.active is None
    facts = found.facts
    assert (facts.architectures, facts.model_type) == (("LlamaForCausalLM",), "llama")
    assert (facts.context_length, facts.rope) == (4096, "theta 10000")
    assert (facts.vocabulary, facts.embedding_rows, facts.head_rows, facts.tokens) == (16,) * 4
    assert (facts.tied, facts.head) == (False, "its own")
    assert facts.tokenizer_files == ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wpe.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("model.layers.3.post_attention_layernorm.weight", "norms"),
        ("transformer.h.0.ln_1.weight", "norms"),
        ("transformer.ln_f.bias", "norms"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "MLP"),
        ("model.layers.3.mlp.gate_proj.weight", "MLP"),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", "MLP"),
        ("model.layers.3.mlp.experts.7.gate_proj.weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "experts"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("bert.encoder.layer.0.attention.self.query.weight", "attention"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "MLP"),
        ("bert.encoder.layer.0.output.dense.weight", "MLP"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "MLP"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "attention"),
        ("backbone.layers.0.mixer.A_log", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name, (4, 4)) == part


def test_active_parameters_of_experts(tmp_path: Path) -> None:
    tensors = model_tensors(3)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(8, WIDTH)
        for expert in range(8):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            tensors[name] = torch.randn(WIDTH, WIDTH)
    experts = LAYERS * 8 * WIDTH * WIDTH
    found = looked_at(tmp_path / "m", tensors, num_experts_per_tok=2)
    assert found.active == found.checkpoint.parameter_count - experts * 6 // 8
    # the layers' own number of experts counts, whatever else config.json says
    for nonsense in (9, 0, -1, "two", None, True, 1e9):
        found = looked_at(tmp_path / "m", tensors, num_experts_per_tok=nonsense)
        assert found.active is None


def with_nan(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = torch.nan
    tensors["lm_head.weight"][0, 0] = torch.inf


def with_zeros(tensors: Tensors) -> None:
    for layer in (1, 2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()


def with_ones(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"].fill_(0.5)


def with_untrained_norms(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1.0)


def with_outlier(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 50


def with_damage(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e30


def with_repeated_layers(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith("model.layers.3."):
            tensors[name] = tensors[name.replace("layers.3.", "layers.1.")]


def with_tied_bytes(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


def without_a_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight"]


def without_a_layer(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith("model.layers.1."):
            del tensors[name]


def with_one_layer_wide(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith("model.layers.2.self_attn"):
            tensors[name] = tensors[name].float()


def wrapped(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def quantised(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.ones(2, 2, dtype=torch.int32)


def without_a_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def with_an_empty_one(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.zeros(0, dtype=torch.bfloat16)


def untouched(tensors: Tensors) -> None:
    pass


@pytest.mark.parametrize(
    ("broken", "expected", "part"),
    [
        (with_nan, "nan mistake", "mlp.up_proj.weight in layer 2 of model.layers"),
        (with_nan, "inf mistake", "1 element is inf: lm_head.weight"),
        (with_zeros, "all-zero mistake", "self_attn.o_proj.weight in layers 1–2"),
        (with_ones, "constant mistake", "self_attn.o_proj.weight in layer 1"),
        (with_untrained_norms, "constant-vectors note", "5 tensors"),
        (with_outlier, "outlier note", "self_attn.o_proj.weight in layer 1 of model.layers"),
        (with_damage, "magnitude mistake", "1e+30"),
        (with_repeated_layers, "layers-repeated note", "layer 3 of model.layers is a copy of 1"),
        (with_tied_bytes, "head-equal note", "tie_word_embeddings"),
        (without_a_tensor, "tensors-missing mistake", "lacks mlp.up_proj.weight"),
        (without_a_layer, "layers-missing mistake", "layers 0, 2–3 and no layer 1"),
        (with_one_layer_wide, "mixed-dtypes note", "self_attn.k_proj.weight and 3 more"),
        (wrapped, "names-wrapped mistake", "begin with module."),
        (quantised, "quantised note", "qweight"),
        (without_a_head, "head-missing mistake", "random numbers"),
        (with_an_empty_one, "empty-tensors mistake", "model.norm.weight"),
    ],
)
def test_broken_tensors(
    tmp_path: Path, broken: Callable[[Tensors], None], expected: str, part: str
) -> None:
    tensors = model_tensors(3)
    broken(tensors)
    found = looked_at(tmp_path / "m", tensors, scan=True)
    assert expected in kinds(found)
    kind = expected.split()[0]
    assert any(part in each.message for each in found.suspicions if each.kind == kind)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"num_hidden_layers": LAYERS + 1}, {"layer-count mistake"}),
        ({"num_hidden_layers": LAYERS - 1, "num_nextn_predict_layers": 1}, set()),
        ({"vocab_size": ROWS + 1}, {"vocabulary-size mistake"}),
        ({"eos_token_id": ROWS}, {"token-without-row note"}),
        ({"eos_token_id": ROWS - 1}, set()),
        ({"eos_token_id": [ROWS, 2]}, set()),
        ({"torch_dtype": "float16"}, {"stated-dtype note"}),
        ({"torch_dtype": "bfloat16"}, set()),
        ({"num_hidden_layers": None, "vocab_size": None}, set()),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, changed: dict[str, Any], expected: set[str]
) -> None:
    assert kinds(looked_at(tmp_path / "m", **changed)) == expected


@pytest.mark.parametrize(
    ("changed", "rope"),
    [
        ({}, "theta 10000"),
        ({"rope_theta": None}, None),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "theta 10000, yarn × 4"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
         "theta 500000"),
        ({"rope_parameters": {"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 1e4}}},
         "theta 10000, several kinds"),
        ({"rope_theta": "\x1b[31m" * 99}, 'theta "\\u001b[31m'),
    ],
)  # fmt: skip
def test_rotary_positions(tmp_path: Path, changed: dict[str, Any], rope: str | None) -> None:
    shown = looked_at(tmp_path / "m", **changed).facts.rope
    assert shown == rope or (shown is not None and shown.startswith(rope or "-"))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (ROWS, set()),
        (ROWS + 3, {"tokens-without-rows mistake"}),
        (ROWS - 3, {"vocabulary-padded note"}),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path: Path, tokens: int, expected: set[str]) -> None:
    (tmp_path / "m").mkdir()
    write_tokenizer(tmp_path / "m", [f"word{n}" for n in range(tokens)])
    assert kinds(looked_at(tmp_path / "m")) == expected


def test_nothing_beside_the_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "m", config=None)
    assert kinds(inspect(str(tmp_path / "m"))) == {"no-config note"}


def test_a_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(model_tensors(1), path)
    found = inspect(str(path), scan=True)
    assert "torch-files note" in kinds(found)
    assert found.scans is not None
    assert all(scan.norm > 0 for scan in found.scans)


def test_the_document_is_json(tmp_path: Path) -> None:
    tensors = model_tensors(3)
    with_nan(tensors)
    tensors["model.norm.weight"] = torch.full((WIDTH,), 3e38, dtype=torch.float32)
    document = looked_at(tmp_path / "m", tensors, scan=True).as_dict()
    text = json.dumps(document, allow_nan=False)
    again = json.loads(text)
    assert again["format"] == 1
    scan = again["scan"]["model.norm.weight"]
    assert scan["norm"] is None
    assert math.isclose(scan["largest"], 3e38, rel_tol=1e-6)
    assert again["scan"].keys() == again["tensors"].keys()
    assert {each["severity"] for each in again["suspicions"]} <= {"mistake", "note"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_theta", "factor", "x", "vocab_size"]), inner)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        *CONFIG,
        "rope_scaling",
        "rope_parameters",
        "text_config",
        "torch_dtype",
        "num_experts_per_tok",
        "num_local_experts",
        "max_position_embeddings",
        "eos_token_id",
        "quantization_config",
        "num_nextn_predict_layers",
        "depth",
    ]
)


@hypothesis_settings(max_examples=50)
@given(first=st.dictionaries(KEYS, VALUES), second=st.dictionaries(KEYS, VALUES))
def test_configs_of_any_kind_do_no_harm_to_plans(
    plan: Plan, first: dict[str, Any], second: dict[str, Any]
) -> None:
    checkpoints = {
        model: replace(checkpoint, config=config)
        for (model, checkpoint), config in zip(
            plan.checkpoints.items(), (first, second), strict=True
        )
    }
    for each in suspicions(replace(plan, checkpoints=checkpoints, config=first)):
        assert len(each.message) < 3000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    for seed, name in enumerate("ab"):
        write_model(folder / name, seed)
    recipe = merge("linear", ("a", {"weight": 1}), ("b", {"weight": 1}))
    return plan_of(recipe, folder)


@hypothesis_settings(max_examples=100)
@given(config=st.dictionaries(KEYS, VALUES, max_size=8))
def test_configs_of_any_kind_do_no_harm(config: dict[str, Any]) -> None:
    tensors = {}
    for number, (name, tensor) in enumerate(model_tensors(0).items()):
        info = TensorInfo(name, "BF16", tuple(tensor.shape), "f", number, number + tensor.nbytes)
        tensors[name] = info
    opened = Checkpoint("m", "/nowhere", (FileInfo("f", 9, 1, ""),), tensors, config, 0)
    json.dumps(inspect_checkpoint(opened).as_dict())
