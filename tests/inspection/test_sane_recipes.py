"""No recipe that people merge well by is called a mistake: those of plans/, of the documents, and
in the manner of well-known models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.inspection.suspicions import suspicions
from lazymerge.recipe import parse_recipe
from small_models import CONFIG, model_tensors, write_tokenizer

from conftest import write_checkpoint

ROOT = Path(__file__).parent.parent.parent
PLANS = sorted((ROOT / "plans").glob("*.yml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED_YAML = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)

RECIPES = {
    # whoever merges by hand writes them like this
    "orca mini plus platypus and wizard": """
merge_method: task_arithmetic
base_model: platypus
models:
  - {model: orca, parameters: {weight: 1.0}}
  - {model: wizard, parameters: {weight: 0.3}}
dtype: float16
""",
    "ties of three": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - model: c
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - {value: 0}
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "ties with the base listed": """
merge_method: ties
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {density: 0.5, weight: 0.5}}
  - {model: b, parameters: {density: 0.5, weight: 0.3}}
parameters: {normalize: true}
dtype: bfloat16
""",
    "dare ties": """
merge_method: dare_ties
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {density: 0.53, weight: 0.4}}
  - {model: b, parameters: {density: 0.53, weight: 0.3}}
  - {model: c, parameters: {density: 0.53, weight: 0.3}}
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "slerp with opposite gradients": """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 8]}
      - {model: b, layer_range: [0, 8]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: bfloat16
""",
    "two models alternating (goliath)": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [2, 6]}]
  - sources: [{model: a, layer_range: [4, 8]}]
  - sources: [{model: b, layer_range: [6, 10]}]
dtype: float16
""",
    "a model on top of itself (solar)": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 24]}]
  - sources: [{model: a, layer_range: [8, 32]}]
dtype: bfloat16
""",
    "doubled layers that begin as identity": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources:
      - model: a
        layer_range: [3, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources: [{model: a, layer_range: [4, 8]}]
dtype: bfloat16
""",
    "layers pruned": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 21]}]
  - sources: [{model: a, layer_range: [29, 32]}]
dtype: bfloat16
""",
    "soup of any weights": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 5}}
  - {model: b, parameters: {weight: 3}}
  - {model: c, parameters: {weight: 1.5}}
""",
    "soup of thirds": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.33}}
  - {model: b, parameters: {weight: 0.33}}
  - {model: c, parameters: {weight: 0.33}}
parameters: {normalize: false}
""",
    "layer by layer, weights in gradients": """
merge_method: linear
models:
  - {model: a, parameters: {weight: [1, 0.75, 0.5, 0.25]}}
  - {model: b, parameters: {weight: [0, 0.25, 0.5, 0.75]}}
parameters: {normalize: false}
""",
    "a task for each of eight": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: m0, parameters: {weight: 0.4}}
  - {model: m1, parameters: {weight: 0.4}}
  - {model: m2, parameters: {weight: 0.4}}
  - {model: m3, parameters: {weight: 0.4}}
  - {model: m4, parameters: {weight: 0.4}}
  - {model: m5, parameters: {weight: 0.4}}
  - {model: m6, parameters: {weight: 0.4}}
  - {model: m7, parameters: {weight: 0.4}}
""",
    "extrapolation of one": """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: 1.3}}]
""",
    "forgetting a task": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: toxic, parameters: {weight: -0.5}}
""",
    "the difference of two, by linear": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 1.0}}
  - {model: base, parameters: {weight: -1.0}}
parameters: {normalize: false}
""",
    "model stock": """
merge_method: model_stock
base_model: base
models: [{model: a}, {model: b}, {model: c}]
dtype: bfloat16
""",
    "della": """
merge_method: della
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.7, epsilon: 0.2}}
  - {model: b, parameters: {weight: 0.5, density: 0.7, epsilon: 0.2}}
parameters: {lambda: 1.1, normalize: true}
""",
    "nuslerp": """
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: [0, 1]}}
  - {model: b, parameters: {weight: [1, 0]}}
""",
}


def planned(text: str, name: str, folder: Path) -> Plan:
    """The plan of a recipe; every model that it names is a small one of one family."""
    recipe = parse_recipe(text, name, signatures())
    stops = [stop for entry in recipe.entries for _, stop in [entry.layer_range or (0, 4)]]
    layers = max(stops, default=4)
    paths = {}
    for number, reference in enumerate(recipe.models_read):
        model = folder / str(number)
        config = {**CONFIG, "num_hidden_layers": layers}
        write_checkpoint(model, model_tensors(number, layers=layers), config)
        if recipe.asks_for_tokenizer:
            write_tokenizer(model, [f"word{n}" for n in range(16)])
        paths[reference] = str(model)
    return make_plan(recipe, Resources(limit_bytes=1 << 30), paths=paths)


def mistakes(plan: Plan) -> list[str]:
    return [each.message for each in suspicions(plan) if each.severity == "mistake"]


@pytest.mark.parametrize("name", RECIPES)
def test_well_known_ways_to_merge(name: str, tmp_path: Path) -> None:
    assert mistakes(planned(RECIPES[name], name, tmp_path)) == []


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans(path: Path, tmp_path: Path) -> None:
    assert mistakes(planned(path.read_text("utf-8"), path.name, tmp_path)) == []


PLANNED_ELSEWHERE = re.compile(r"<!-- planned: .*? -->\n```yaml\n.*?```", re.DOTALL)
"""Recipes with models at addresses, methods of one's own, words in place of numbers."""


def test_recipes_in_the_documents(tmp_path: Path) -> None:
    found = [
        block
        for document in DOCUMENTS
        for block in FENCED_YAML.findall(PLANNED_ELSEWHERE.sub("", document.read_text("utf-8")))
        if re.search(r"^merge_method:", block, re.MULTILINE)
        and not re.search(r"^modules:|^tokens", block, re.MULTILINE)  # of other architectures
    ]
    assert len(found) >= 4
    for number, block in enumerate(found):
        assert mistakes(planned(block, "recipe", tmp_path / str(number))) == []
