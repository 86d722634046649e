"""From recipe and headers to a graph: which tensors, from which models, with which values.

Checkpoints are made up of tensor infos alone: compiling opens no file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import yaml
from lazymerge.checkpoint import DTYPES, Checkpoint, TensorInfo
from lazymerge.errors import InputErrors
from lazymerge.graph.compile import (
    MOST_PROBLEMS_SHOWN,
    CompiledMerge,
    compile_recipe,
)
from lazymerge.graph.node import Apply, Read, Reduce
from lazymerge.graph.random_bits import stream_key
from lazymerge.graph.targets import natural_order
from lazymerge.graph.verify import verify_graph
from lazymerge.methods import METHODS
from lazymerge.recipe import parse_recipe

SIGNATURES = {name: method.signature for name, method in METHODS.items()}

Shapes = Mapping[str, "tuple[int, ...] | tuple[str, tuple[int, ...]]"]
"""By tensor name: a shape, or dtype and shape; bfloat16 where only a shape is given."""


def checkpoint(reference: str, shapes: Shapes) -> Checkpoint:
    tensors = {}
    position = 100
    for name, entry in shapes.items():
        dtype, shape = entry if entry and isinstance(entry[0], str) else ("BF16", entry)
        assert isinstance(dtype, str)
        size = prod(shape) * DTYPES[dtype].item_bytes
        tensors[name] = TensorInfo(
            name, dtype, tuple(shape), "model.safetensors", position, position + size
        )
        position += size
    return Checkpoint(reference, f"/models/{reference}", (), tensors, None, 0)


def compiled(recipe: dict[str, Any], models: Mapping[str, Shapes], **options: Any) -> CompiledMerge:
    parsed = parse_recipe(yaml.safe_dump(recipe), "recipe.yml", SIGNATURES)
    checkpoints = {name: checkpoint(name, shapes) for name, shapes in models.items()}
    merge = compile_recipe(parsed, checkpoints, **options)
    verify_graph(merge.graph)
    return merge


def problems(recipe: dict[str, Any], models: Mapping[str, Shapes], **options: Any) -> list[str]:
    with pytest.raises(InputErrors) as raised:
        compiled(recipe, models, **options)
    return list(raised.value.messages)


def linear(*models: str, **more: Any) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": entries, **more}


def task_arithmetic(*models: str, base: str = "base", **more: Any) -> dict[str, Any]:
    return {**linear(*models), "merge_method": "task_arithmetic", "base_model": base, **more}


def slerp(t: Any, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"t": t},
        **more,
    }


def names(merge: CompiledMerge) -> list[str]:
    assert [write.name for write in merge.graph.writes] == [t.name for t in merge.tensors]
    return [write.name for write in merge.graph.writes]


def dtypes(merge: CompiledMerge) -> dict[str, str]:
    return {write.name: write.dtype for write in merge.graph.writes}


def source_of(merge: CompiledMerge, name: str) -> Read | Apply:
    write = next(write for write in merge.graph.writes if write.name == name)
    return merge.graph.block_node(write.source)


def layers(count: int, shape: tuple[int, ...] = (2, 2)) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.w.weight": shape for layer in range(count)}


# ------------------------------------------------------------------------ what comes out


def test_outputs_stand_in_natural_order_whatever_the_order_of_files() -> None:
    shapes = {"z": (1,), **layers(11), "model.embed_tokens.weight": (3, 2)}
    expected = ["model.embed_tokens.weight", *layers(11), "z"]
    assert names(compiled(linear("a"), {"a": shapes})) == expected
    backwards = dict(reversed(shapes.items()))
    assert names(compiled(linear("a", "b"), {"a": shapes, "b": backwards})) == expected


def test_natural_order() -> None:
    names = ["x2", "x0", "x", "h.10.b", "h.10.a", "h.10", "h.2"]
    assert sorted(names, key=natural_order) == names[::-1]
    assert sorted(["a.b", "a.1", "1", "a"], key=natural_order) == ["1", "a", "a.1", "a.b"]


def test_natural_order_of_odd_names() -> None:
    """Names that are equal as numbers have one order; digits that are no numbers do no harm."""
    assert sorted(["h.1", "h.01"], key=natural_order) == sorted(["h.01", "h.1"], key=natural_order)
    odd = ["1" + "0" * 5000, "9" * 5000, "٣", "²", "1²2", ""]
    assert sorted(odd, key=natural_order)[-4:-2] == ["9" * 5000, "1" + "0" * 5000]


def test_stacks_are_those_of_the_output() -> None:
    stacks = compiled(linear("a"), {"a": layers(4)}).stacks
    assert stacks.depth("model.layers.3.w.weight") == 1.0


def test_work_is_shared_between_like_recipes() -> None:
    """The id of an output does not depend on what else is merged."""
    both = compiled(linear("a", "b"), {"a": layers(2), "b": layers(2)})
    one = compiled(linear("a", "b"), {"a": layers(1), "b": layers(1)})
    assert one.graph.writes[0].id == both.graph.writes[0].id


def test_compiling_needs_no_torch() -> None:
    script = "import sys, lazymerge.graph.compile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# --------------------------------------------------------------------------- presence


def test_a_tensor_that_some_lack_is_an_error_that_names_them() -> None:
    models = {"a": {"x": (2,), "y": (2,)}, "b": {"x": (2,)}, "c": {"x": (2,)}}
    (problem,) = problems(linear("a", "b", "c"), models)
    assert "tensor y is missing from b, c, present in a" in problem


def test_an_optional_tensor_is_merged_over_those_that_have_it() -> None:
    models = {
        "a": {"x": (2,), "lm_head.weight": (4, 2)},
        "b": {"x": (2,)},
        "c": {"x": (2,), "lm_head.weight": (4, 2)},
    }
    merge = compiled(linear("a", "b", "c"), models)
    assert merge.notices == ("merged without b, which lack the tensor: lm_head.weight",)
    source = source_of(merge, "lm_head.weight")
    assert dict(source.parameters)["coefficients"] == (0.5, 0.5)  # type: ignore[union-attr]
    assert list(merge.tensors[0].by_model) == ["a", "c"]


def test_an_optional_tensor_that_the_base_lacks_is_left_out() -> None:
    models = {"base": {"x": (2,)}, "a": {"x": (2,), "x.bias": (2,)}}
    merge = compiled(task_arithmetic("a"), models)
    assert names(merge) == ["x"]
    assert merge.notices == ("left out, since the base model base has no such tensor: x.bias",)


def test_an_optional_tensor_that_too_few_have_is_copied() -> None:
    models = {"base": {"x": (2,), "x.bias": (2,)}, "a": {"x": (2,)}}
    merge = compiled(slerp(0.5), models)
    assert isinstance(source_of(merge, "x.bias"), Read)
    assert [t.method for t in merge.tensors] == ["slerp", "copy"]
    assert "copied from base alone: x.bias" in merge.notices


def test_one_notice_covers_many_tensors() -> None:
    biases = {f"model.layers.{layer}.w.bias": (2,) for layer in range(5)}
    models = {"base": layers(5), "a": {**layers(5), **biases}}
    (notice,) = compiled(task_arithmetic("a"), models).notices
    assert notice.endswith(
        "model.layers.0.w.bias, model.layers.1.w.bias, model.layers.2.w.bias and 2 more"
    )


def test_a_base_without_influence_contributes_no_tensors() -> None:
    """linear does not look at base_model unless it is listed."""
    models = {"a": {"x": (2,)}, "b": {"x": (2,)}, "base": {"other": (7,)}}
    assert names(compiled(linear("a", "b", base_model="base"), models)) == ["x"]
    listed = compiled(linear("a", "b", base_model="a"), {"a": {"x": (2,)}, "b": {"x": (2,)}})
    assert list(listed.tensors[0].by_model) == ["a", "b"]


def test_the_base_may_be_listed_and_is_no_task_vector() -> None:
    models = {"base": {"x": (2,)}, "a": {"x": (2,)}}
    unlisted = compiled(task_arithmetic("a"), models)
    recipe = task_arithmetic("a")
    recipe["models"].insert(0, {"model": "base"})
    listed = compiled(recipe, models)
    assert listed.graph.writes[0].id == unlisted.graph.writes[0].id


def test_no_tensors_at_all() -> None:
    assert problems(linear("a"), {"a": {}}) == ["the models hold no tensors that can be merged"]


def test_empty_tensors_are_copied() -> None:
    shape = {"x": (0, 3), "y": (1,)}
    merge = compiled(linear("a", "b", dtype="float32"), {"a": shape, "b": shape})
    assert isinstance(source_of(merge, "x"), Read)
    assert dtypes(merge) == {"x": "F32", "y": "F32"}


# ----------------------------------------------------------------------------- shapes


def test_shapes_that_differ_are_named_for_every_model() -> None:
    models = {"a": {"x": (2, 3)}, "b": {"x": (2, 3)}, "c": {"x": (3, 2)}}
    (problem,) = problems(linear("a", "b", "c"), models)
    assert "tensor x has different shapes: [2, 3] in a, [2, 3] in b, [3, 2] in c" in problem


def test_truncation_is_for_vocabularies_alone() -> None:
    models = {"a": {"x": (2, 3)}, "b": {"x": (3, 3)}}
    assert "different shapes" in problems(linear("a", "b"), models, truncate_embeddings=True)[0]
    models = {"a": {"lm_head.weight": (2, 3)}, "b": {"lm_head.weight": (2, 4)}}
    assert "different shapes" in problems(linear("a", "b"), models, truncate_embeddings=True)[0]


VOCABULARIES = {
    "a": {"model.embed_tokens.weight": (32_000, 8), "lm_head.weight": (32_000, 8)},
    "b": {"model.embed_tokens.weight": (32_001, 8), "lm_head.weight": (32_001, 8)},
}


def test_vocabularies_that_differ_are_an_error_that_names_rows_and_remedies() -> None:
    for problem in problems(linear("a", "b"), VOCABULARIES):
        assert "32000 in a, 32001 in b" in problem
        assert "tokenizer: {source: base}" in problem
        assert "--unsafe-truncate-embeddings" in problem


def test_vocabularies_are_cut_to_the_common_rows_if_asked_for() -> None:
    merge = compiled(linear("b", "a"), VOCABULARIES, truncate_embeddings=True)
    assert {write.shape for write in merge.graph.writes} == {(32_000, 8)}
    reads = [node for node in merge.graph if isinstance(node, Read)]
    assert {read.tensor.size_bytes for read in reads} == {32_000 * 8 * 2}
    (notice,) = merge.notices
    assert notice.startswith("cut to the 32000 leading rows that all models have: ")


def test_leading_rows() -> None:
    info = TensorInfo("x", "F32", (4, 3), "f", 100, 148)
    assert info.leading_rows(4) is info
    assert info.leading_rows(1) == TensorInfo("x", "F32", (1, 3), "f", 100, 112)
    assert TensorInfo("x", "F32", (4,), "f", 100, 116).leading_rows(0).size_bytes == 0


# ----------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "F16"),
        ({"dtype": "float32"}, "F32"),
        ({"out_dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float32", "out_dtype": "float8_e4m3fn"}, "F8_E4M3"),
    ],
)
def test_output_dtype(asked: dict[str, str], expected: str) -> None:
    models = {"base": {"x": ("F16", (2,))}, "a": {"x": ("F32", (2,))}}
    assert dtypes(compiled(task_arithmetic("a", **asked), models)) == {"x": expected}


def test_without_base_the_first_model_decides() -> None:
    models = {"a": {"x": ("F16", (2,))}, "b": {"x": ("F32", (2,))}}
    assert dtypes(compiled(linear("b", "a"), models)) == {"x": "F32"}
    assert dtypes(compiled(linear("a", "b"), models)) == {"x": "F16"}


def test_the_base_decides_even_if_listed_last() -> None:
    models = {"base": {"x": ("BF16", (2,))}, "a": {"x": ("F32", (2,))}}
    recipe = task_arithmetic("a")
    recipe["models"].append({"model": "base"})
    assert dtypes(compiled(recipe, models)) == {"x": "BF16"}


def test_integers_are_copied_whatever_dtype_is_asked_for() -> None:
    models = {name: {"x": (2,), "steps": ("I64", (3,)), "on": ("BOOL", (1,))} for name in "ab"}
    merge = compiled(linear("a", "b", dtype="float32"), models)
    assert dtypes(merge) == {"x": "F32", "steps": "I64", "on": "BOOL"}
    steps = source_of(merge, "steps")
    assert isinstance(steps, Apply)
    assert steps.operation == "identical"
    assert dict(steps.parameters) == {"tensor": "steps", "models": ("a", "b")}
    assert isinstance(source_of(compiled(linear("a"), {"a": models["a"]}), "steps"), Read)


def test_integers_of_unlike_kinds_and_floats_among_integers_are_errors() -> None:
    models = {"a": {"n": ("I64", (3,))}, "b": {"n": ("I32", (3,))}}
    (problem,) = problems(linear("a", "b"), models)
    assert "I64 in a, I32 in b" in problem
    models = {"a": {"n": ("I64", (3,))}, "b": {"n": ("F32", (3,))}}
    (problem,) = problems(linear("a", "b"), models)
    assert "tensor n has dtypes that cannot be combined: I64 in a, F32 in b" in problem


def test_float64_inputs_are_computed_in_float64() -> None:
    ties = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1, "density": 0.5}}],
    }
    for dtype, working in (("F64", "F64"), ("BF16", "F32")):
        models = {"base": {"x": (2,)}, "a": {"x": (dtype, (2,))}}
        nodes = [n for n in compiled(ties, models).graph if isinstance(n, Reduce | Apply)]
        assert [node.working_dtype for node in nodes] == [working, working]


# ----------------------------------------------------------------------------- values


def resolved(merge: CompiledMerge, name: str) -> list[Any]:
    return [dict(tensor.parameters)[name] for tensor in merge.tensors]


def test_gradients_run_over_the_layers() -> None:
    models = {name: {**layers(5), "model.embed_tokens.weight": (3, 2)} for name in ("base", "a")}
    merge = compiled(slerp([0.0, 1.0]), models)
    assert names(merge)[0] == "model.embed_tokens.weight"
    assert resolved(merge, "t") == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]


def test_filters_are_tried_in_order_for_every_tensor() -> None:
    shapes = {
        "model.layers.0.mlp.weight": (2,),
        "model.layers.0.self_attn.weight": (2,),
        "model.layers.1.mlp.weight": (2,),
        "model.layers.1.self_attn.weight": (2,),
        "model.norm.weight": (2,),
    }
    t = [
        {"filter": "self_attn", "value": [0.0, 1.0]},
        {"filter": "layers.1", "value": 0.3},
        {"value": 0.9},
    ]
    merge = compiled(slerp(t), {"base": shapes, "a": shapes})
    assert resolved(merge, "t") == [0.9, 0.0, 0.3, 1.0, 0.9]
    assert merge.notices == ()


def test_a_models_own_value_comes_before_the_shared_one_and_both_before_the_default() -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.1}},
            {
                "model": "b",
                "parameters": {"density": [{"filter": "y", "value": 0.5}]},
            },
        ],
        "parameters": {"weight": 0.7, "density": [{"filter": "x", "value": 0.2}]},
    }
    shapes = {"x": (4,), "y": (4,), "z": (4,)}
    merge = compiled(recipe, {"base": shapes, "a": shapes, "b": shapes})
    by_tensor = {tensor.name: tensor.by_model for tensor in merge.tensors}
    assert {n: m["a"] for n, m in by_tensor.items()} == {
        "x": {"weight": 0.1, "density": 0.2},
        "y": {"weight": 0.1, "density": 1.0},
        "z": {"weight": 0.1, "density": 1.0},
    }
    assert {n: m["b"] for n, m in by_tensor.items()} == {
        "x": {"weight": 0.7, "density": 0.2},
        "y": {"weight": 0.7, "density": 0.5},
        "z": {"weight": 0.7, "density": 1.0},
    }
    assert by_tensor["x"]["base"] == {}  # weight and density are for the models other than it
    assert dict(merge.tensors[0].parameters)["lambda"] == 1.0


def test_a_required_parameter_without_value_for_one_tensor() -> None:
    recipe = linear("a", "b")
    recipe["models"][1]["parameters"]["weight"] = [{"filter": "x", "value": 0.5}]
    shapes = {"x": (4,), "y": (4,)}
    (problem,) = problems(recipe, {"a": shapes, "b": shapes})
    assert problem.startswith("recipe.yml: parameter weight of model b has no value for tensor y")
    assert "without a filter" in problem
    (problem,) = problems(slerp([{"filter": "x", "value": 0.5}]), {"base": shapes, "a": shapes})
    assert problem.startswith("recipe.yml: parameter t has no value for tensor y")


def test_filters_that_match_nothing_are_noticed() -> None:
    recipe = slerp([{"filter": "self_atn", "value": 0.5}, {"filter": "*", "value": 0.1}])
    models = {name: layers(2) for name in ("base", "a")}
    assert compiled(recipe, models).notices == (
        "filter 'self_atn' of parameter t matches no tensor",
    )
    recipe = linear("a")
    recipe["models"][0]["parameters"]["weight"] = [
        {"filter": "nowhere", "value": 0.5},
        {"value": 1.0},
    ]
    assert compiled(recipe, {"a": layers(1)}).notices == (
        "filter 'nowhere' of parameter weight of model a matches no tensor",
    )


# ----------------------------------------------------------------------- the methods' nodes


def test_nodes_of_each_method() -> None:
    models = {name: {"x": (8,)} for name in ("base", "a", "b")}

    def kinds(recipe: dict[str, Any]) -> dict[str, int]:
        return compiled(recipe, models).graph.count_by_kind()

    one_write = {"Write": 1}
    assert kinds(linear("a", "b")) == {"Read": 2, "Apply linear_combination": 1} | one_write
    passthrough = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    assert kinds(passthrough) == {"Read": 1} | one_write
    assert kinds(slerp(0.5)) == {"Read": 2, "Reduce gram": 1, "Apply slerp": 1} | one_write

    def ties(*densities: float, **parameters: Any) -> dict[str, Any]:
        entries = [
            {"model": model, "parameters": {"weight": 1.0, "density": density}}
            for model, density in zip("ab", densities, strict=True)
        ]
        recipe = {"merge_method": "ties", "base_model": "base", "models": entries}
        return {**recipe, "parameters": parameters} if parameters else recipe

    mixed = {"Read": 3, "Apply sign_consensus": 1} | one_write
    assert kinds(ties(1.0, 1.0)) == mixed
    assert kinds(ties(1.0, 1.0, rescale=True)) == mixed
    assert kinds(ties(0.5, 1.0)) == mixed | {"Reduce magnitude_thresholds": 1}
    assert kinds(ties(0.5, 1.0, rescale=True)) == mixed | {
        "Reduce magnitude_thresholds": 1,
        "Reduce surviving_norms": 1,
    }
    # of a model of density 0 nothing survives: it is not even read
    assert kinds(ties(0.0, 1.0)) == mixed | {"Read": 2}
    assert kinds(ties(0.0, 0.0)) == {"Read": 1, "Apply linear_combination": 1} | one_write


def test_the_number_kept_of_a_density() -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1.0, "density": 0.29}}],
    }
    for size, expected in ((100, 28), (1, 1), (3, 1), (7, 2)):  # int(0.29 · 100) is 28
        merge = compiled(recipe, {"base": {"x": (size,)}, "a": {"x": (size,)}})
        reduce = merge.graph.reductions_of(merge.graph.writes[0].id)[0]
        assert dict(reduce.parameters)["keep"] == (expected,)


def merge_of(method: str, *models: str, base: str | None = "base", **parameters: Any) -> Any:
    """A recipe of a method whose models have the same parameters; those of the whole merge are
    given as `top`."""
    top = parameters.pop("top", {})
    entries = [{"model": m, **({"parameters": parameters} if parameters else {})} for m in models]
    recipe: dict[str, Any] = {"merge_method": method, "models": entries}
    if base is not None:
        recipe["base_model"] = base
    return {**recipe, "parameters": top} if top else recipe


THINNED = {"weight": 1.0, "density": 0.5}
BY_VECTOR = {"nuslerp_flatten": False}
BY_COLUMN = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
NODES: list[tuple[dict[str, Any], dict[str, int]]] = [
    (merge_of("breadcrumbs", "a", "b", **THINNED), {"magnitude_thresholds": 1, "sparse_sum": 1}),
    (
        merge_of("breadcrumbs_ties", "a", "b", **THINNED, top={"rescale": True}),
        {"magnitude_thresholds": 1, "surviving_norms": 1, "sign_consensus": 1},
    ),
    (merge_of("dare_linear", "a", "b", **THINNED), {"random_sum": 1}),
    (merge_of("dare_ties", "a", "b", **THINNED), {"sign_consensus": 1}),
    (merge_of("dare_linear", "a", "b", weight=1.0, density=1.0), {"task_vectors": 1}),
    (merge_of("della_linear", "a", "b", **THINNED), {"ranked_sum": 1}),
    (merge_of("della", "a", "b", **THINNED), {"ranked_sign_consensus": 1}),
    (merge_of("sce", "a", "b"), {"selected_energies": 1, "selected_consensus": 1}),
    (
        merge_of("sce", "a", "b", top={"select_topk": 0.5}),
        {
            "variance": 1,
            "count_positive": 1,
            "largest_values": 1,
            "selected_energies": 1,
            "selected_consensus": 1,
        },
    ),
    (merge_of("ram", "a", "b"), {"active_mean": 1}),
    (merge_of("ramplus_tl", "a", "b"), {"active_counts": 1, "active_mean": 1}),
    (merge_of("nearswap", "a", top={"t": 0.1}), {"bounded_change": 1}),
    (
        merge_of("arcee_fusion", "a"),
        {"row_divergence": 1, "importance": 1, "largest_values": 1, "important_changes": 1},
    ),
    (merge_of("karcher", "a", "b", base=None), {"gram": 1, "karcher": 1}),
    (merge_of("multislerp", "a", "b", base=None, weight=1.0), {"gram": 1, "multislerp": 1}),
    (merge_of("nuslerp", "a", "b", base=None, weight=1.0), {"gram": 1, "nuslerp": 1}),
    (
        merge_of("nuslerp", "a", "b", base=None, weight=1.0, top=BY_VECTOR),
        {"gram_of_rows": 1, "nuslerp_by_vector": 1},
    ),
    (
        merge_of("nuslerp", "a", "b", weight=1.0, top=BY_COLUMN),
        {"gram_of_columns": 1, "nuslerp_by_vector_of_changes": 1},
    ),
    (merge_of("model_stock", "a", "b"), {"gram_of_changes": 1, "model_stock": 1}),
    (
        merge_of("model_stock", "a", "b", top={"filter_wise": True}),
        {"gram_of_rows": 1, "model_stock_by_row": 1},
    ),
]


@pytest.mark.parametrize(("recipe", "expected"), NODES)
def test_nodes_of_the_other_methods(recipe: dict[str, Any], expected: dict[str, int]) -> None:
    """Of a matrix; each node once, however many there are that use it."""
    models = {name: {"x": (4, 6)} for name in ("base", "a", "b")}
    kinds = compiled(recipe, models).graph.count_by_kind()
    found = {kind.split(" ")[1]: count for kind, count in kinds.items() if " " in kind}
    assert found == expected
    assert kinds["Read"] == len(recipe["models"]) + ("base_model" in recipe)


def test_one_vector_is_no_matrix_of_one_row() -> None:
    """What is asked for each row of a vector is asked for all of it."""
    for shape in ((6,), (1, 6), ()):
        models = {name: {"x": shape} for name in ("base", "a", "b")}
        for recipe, expected in (
            (merge_of("nuslerp", "a", "b", base=None, weight=1.0, top=BY_VECTOR), "gram"),
            (merge_of("model_stock", "a", "b", top={"filter_wise": True}), "gram_of_changes"),
        ):
            assert f"Reduce {expected}" in compiled(recipe, models).graph.count_by_kind()


def mixing(merge: CompiledMerge, name: str) -> dict[str, Any]:
    """Parameters of the node that a tensor is written of."""
    node = source_of(merge, name)
    assert isinstance(node, Apply)
    return dict(node.parameters)


def test_random_numbers_go_with_the_models_place_in_the_recipe() -> None:
    """Whatever other models lack the tensor, wherever the base is listed, and whatever the models
    are called."""
    every = {"x": (4, 6), "lm_head.weight": (8, 6)}
    models = {"base": every, "a": {"x": (4, 6)}, "b": every, "c": every}
    for method in ("dare_ties", "della_linear"):
        recipe = merge_of(method, "a", "base", "b", "c", **THINNED)
        merge = compiled({**recipe, "seed": 7}, models)
        assert mixing(merge, "x")["keys"] == tuple(stream_key(7, place, "x") for place in range(3))
        assert mixing(merge, "lm_head.weight")["keys"] == (
            stream_key(7, 1, "lm_head.weight"),
            stream_key(7, 2, "lm_head.weight"),
        )
        without = compiled(recipe, models)
        assert mixing(without, "x")["keys"] == tuple(
            stream_key(0, place, "x") for place in range(3)
        )
        assert without.graph.writes[0].id != merge.graph.writes[0].id


def test_the_numbers_kept_of_a_band() -> None:
    """By hand, of 100: those of rank γ·100 to (γ + density)·100 from above survive."""
    for density, gamma, keep, bounds in (
        (0.5, 0.1, (60, 10), (True, True)),
        (0.9, 0.1, (10,), (False, True)),  # nothing below is dropped
        (0.5, 0.0, (50,), (True, False)),
        (0.5, 0.7, (50,), (False, True)),  # γ is more than there is to drop
        (1.0, 0.3, None, (False, False)),
    ):
        recipe = merge_of("breadcrumbs", "a", weight=1.0, density=density, gamma=gamma)
        merge = compiled(recipe, {name: {"x": (10, 10)} for name in ("base", "a")})
        write = merge.graph.writes[0]
        reductions = merge.graph.reductions_of(write.id)
        if keep is None:
            assert reductions == ()
            continue
        parameters = dict(reductions[0].parameters)
        assert parameters["keep"] == (keep,)
        assert parameters["keeps_last"] is True
        assert mixing(merge, "x")["bounds"] == (bounds,)


# -------------------------------------------------------------------------- all at once


def test_all_problems_are_gathered() -> None:
    models = {
        "a": {"lost": (2,), "n": ("I64", (1,)), "shape": (2, 3), "lm_head.weight": (4, 2)},
        "b": {"n": ("I32", (1,)), "shape": (3, 2), "lm_head.weight": (5, 2), "fine": (1,)},
    }
    models["a"]["fine"] = (1,)
    found = problems(linear("a", "b"), models)
    assert len(found) == 4
    for word, problem in zip(("lm_head", "lost", "tensor n", "shape"), found, strict=True):
        assert word in problem


def test_too_many_problems_are_counted() -> None:
    found = problems(linear("a", "b"), {"a": layers(50), "b": {"x": (1,)}})
    assert len(found) == MOST_PROBLEMS_SHOWN + 1
    assert found[-1] == "… and 31 more problems of this kind"


T5: Shapes = {
    "shared.weight": (8, 4),
    **{f"encoder.block.{n}.q.weight": (4, 4) for n in range(3)},
    "encoder.final_layer_norm.weight": (4,),
    **{f"decoder.block.{n}.q.weight": (4, 4) for n in range(2)},
    "decoder.final_layer_norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
LLAVA: Shapes = {
    "vision_tower.embeddings.patch_embedding.weight": (4, 4),
    **{f"vision_tower.encoder.layers.{n}.fc.weight": (4, 4) for n in range(2)},
    "vision_tower.post_layernorm.weight": (4,),
    "multi_modal_projector.linear.weight": (4, 4),
    "language_model.model.embed_tokens.weight": (8, 4),
    **{f"language_model.model.layers.{n}.q.weight": (4, 4) for n in range(3)},
    "language_model.model.norm.weight": (4,),
    "language_model.lm_head.weight": (8, 4),
}


def read_from(merge: CompiledMerge) -> dict[str, str]:
    """The models that every output tensor is made from."""
    folders = {
        write.name: sorted(
            {read.folder.removeprefix("/models/") for read in merge.graph.reads_of(write.id)}
        )
        for write in merge.graph.writes
    }
    return {name: "+".join(models) for name, models in folders.items()}


def listed(*models: str) -> list[dict[str, Any]]:
    return [{"model": model, "parameters": {"weight": 0.5}} for model in models]


class TestParts:
    """What a recipe's modules or slices do not name is the base's."""

    def test_a_decoder_alone(self) -> None:
        modules = {"decoder": {"models": listed("a", "b")}}
        recipe = {"merge_method": "linear", "base_model": "a", "modules": modules}
        merge = compiled(recipe, {"a": T5, "b": T5})
        found = read_from(merge)
        assert found.pop("shared.weight") == "a"
        assert {n for n, models in found.items() if models == "a+b"} == {
            name for name in T5 if name.startswith(("decoder", "lm_head"))
        }
        assert {n for n, models in found.items() if models == "a"} == {
            name for name in T5 if name.startswith("encoder")
        }
        assert "copied from a, since no module has it" in "".join(merge.notices)

    def test_a_decoder_of_slices(self) -> None:
        slices = [{"sources": [{"model": "b", "layer_range": [0, 2]}]}]
        recipe = {
            "merge_method": "passthrough",
            "base_model": "a",
            "modules": {"decoder": {"slices": slices}},
        }
        found = read_from(compiled(recipe, {"a": T5, "b": T5}))
        assert {name for name, models in found.items() if models == "b"} == {
            name for name in T5 if name.startswith(("decoder", "lm_head"))
        }

    def test_a_language_model_alone(self) -> None:
        modules = {"language_model": {"models": listed("a", "b")}}
        recipe = {"merge_method": "linear", "base_model": "a", "modules": modules}
        found = read_from(compiled(recipe, {"a": LLAVA, "b": LLAVA}))
        assert {name for name, models in found.items() if models == "a+b"} == {
            name for name in LLAVA if name.startswith("language_model")
        }

    def test_of_a_merge_of_the_same_file(self) -> None:
        """What is not named is the merge's, and not the model's that the merge begins from."""
        recipe = [
            {"name": "mix", "merge_method": "linear", "models": listed("a", "b")},
            {
                "merge_method": "linear",
                "base_model": "mix",
                "modules": {"encoder": {"models": listed("mix", "c")}},
            },
        ]
        parsed = parse_recipe(yaml.safe_dump_all(recipe), "recipe.yml", SIGNATURES)
        checkpoints = {name: checkpoint(name, T5) for name in "abc"}
        merge = compile_recipe(parsed, checkpoints)
        found = read_from(merge)
        assert found["decoder.block.0.q.weight"] == found["shared.weight"] == "a+b"
        assert found["encoder.block.0.q.weight"] == "a+b+c"
        assert "copied from mix, since no module has it" in "".join(merge.notices)

    def test_slices_of_a_model_with_two_stacks(self) -> None:
        slices = [
            {"sources": [{"model": "b", "layer_range": [0, 2]}]},
            {"sources": [{"model": "a", "layer_range": [2, 3]}]},
        ]
        recipe = {"merge_method": "passthrough", "base_model": "a", "slices": slices}
        for shapes, config in ((T5, {"num_layers": 3, "is_encoder_decoder": True}), (LLAVA, {})):
            parsed = parse_recipe(yaml.safe_dump(recipe), "recipe.yml", SIGNATURES)
            models = {name: replace(checkpoint(name, shapes), config=config) for name in "ab"}
            with pytest.raises(InputErrors, match="has several layer stacks"):
                compile_recipe(parsed, models)
        models = {
            name: replace(checkpoint(name, LLAVA), config={"num_hidden_layers": 3}) for name in "ab"
        }
        merge = compile_recipe(parsed, models)
        found = read_from(merge)
        assert {name for name, model in found.items() if model == "b"} == {
            "language_model.model.embed_tokens.weight",
            *(f"language_model.model.layers.{n}.q.weight" for n in range(2)),
        } | {"multi_modal_projector.linear.weight"}
        assert "copied from a, since no slice has it" in "".join(merge.notices)
