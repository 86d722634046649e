"""Recipes that are right, each showing some of the language."""

from __future__ import annotations

GOOD: dict[str, str] = {
    "linear": """\
merge_method: linear
models:
  - model: org/a
    parameters: {weight: 0.7}
  - model: org/b@main
    parameters: {weight: 3e-1}
parameters: {normalize: false}
dtype: float32
out_dtype: bfloat16
""",
    "ties, every form of setting": """\
# ties over two models
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight: [0, 0.5, 1]
      density:
        - filter: mlp
          value: [0.2, "8e-1"]
        - filter: self_attn
          value: 0.5
        - value: 1
  - model: b
    parameters:
      weight: {value: 0.5, filter: "*"}
      density: {value: 0.5, filter: ~}
parameters:
  weight: 1
  lambda: 1.5
  normalize: [true, false]
  int8_mask: 1
""",
    "slerp, base not listed": """\
merge_method: slerp
base_model: a
models: [{model: b}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: torch.bfloat16
""",
    "slerp, base listed": """\
merge_method: slerp
base_model: a
models: [{model: b}, {model: a}]
parameters: {t: 0.5}
""",
    "nuslerp with a base": """\
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 2}}
parameters: {nuslerp_row_wise: "yes"}
""",
    "nuslerp with its base listed": """\
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: base}
  - {model: b, parameters: {weight: 2}}
""",
    "nuslerp without a base": """\
merge_method: nuslerp
models: [{model: a}, {model: b}]
parameters: {weight: 1}
""",
    "karcher with a base for its config": """\
merge_method: karcher
base_model: somewhere/else
models: [{model: a}, {model: b}, {model: c}]
parameters: {max_iter: "20", tol: 1e-6}
""",
    "passthrough": """\
merge_method: passthrough
models: [{model: a}]
""",
    "anchors, merge keys, nulls": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: &usual {weight: 0.5}
  - model: b
    parameters: *usual
  - model: c
    parameters: {<<: *usual, weight: 0.25}
parameters:
dtype:
out_dtype: ~
slices:
tokenizer:
""",
    "references spelt out": """\
merge_method: slerp
base_model: {model: {path: a, revision: main}, lora: null}
models:
  - model: {model: {path: org/b, revision: v1}, lora: {path: c}, override_architecture: ~}
parameters: {t: 0.5}
""",
    "adapters": """\
merge_method: slerp
base_model: a
models: [{model: org/b@v1+c}]
parameters: {t: 0.5}
""",
    "frankenmerge": """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 16]}]
  - sources: [{model: b, layer_range: [8, 24], parameters: {scale: 0.5}}]
""",
    "slices": """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: a, layer_range: [2, 6], parameters: {weight: [0, 1]}}
    parameters: {lambda: 0.5}
  - base_model: a
    sources:
      - {model: a, layer_range: [0, 1]}
      - {model: b, layer_range: [7, 8]}
parameters: {weight: 1}
""",
    "modules": """\
merge_method: linear
models:
modules:
  encoder:
    slices:
      - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
    parameters: {weight: {filter: mlp, value: 0.5}}
  decoder:
    models: [{model: a}, {model: b}]
parameters: {weight: 1}
""",
    "text parameters": """\
merge_method: labelled
base_model: base
models:
  - {model: a, parameters: {label: [one, two]}}
  - {model: base, parameters: {label: zero}}
parameters: {temperature: 2}
""",
    "tokenizer_source": """\
merge_method: linear
models: [{model: a, parameters: {weight: 1}}]
tokenizer_source: union
chat_template: auto
""",
    "tokenizer": """\
merge_method: linear
models: [{model: a, parameters: {weight: 1}}]
tokenizer:
  source: a
  pad_to_multiple_of: 64
  tokens:
    <one>: {source: a, force: true}
    <two>: {source: {kind: zero}}
    <three>: {source: {kind: model_token, model: a, token: x}}
    <four>: {source: {kind: model_token, model: a, token_id: 3}}
    <five>:
chat_template: |
  {% for message in messages %}{{ message['content'] }}{% endfor %}
""",
}
