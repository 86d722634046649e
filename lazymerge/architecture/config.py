"""A model's config.json: the output's, made from the base's, and where models' configs disagree.

Configs are data here: mappings of which a few keys are known and every other key is left alone.
A config may hold others (`text_config` of a model that sees), and both functions look into them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

_DTYPE_KEYS = ("torch_dtype", "dtype")
"""What transformers 4 and transformers 5 call the dtype of the weights. Both read the former."""

_VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size")
"""Rows of the embeddings; chatglm keeps the rows apart from the tokenizer's size."""

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Where a multimodal model keeps the config of its language model."""

_INNER_CONFIGS = frozenset({"encoder", "decoder", "generator", "question_encoder", "backbone"})
"""Configs within a config whose key does not end in `_config`."""

_NOT_MODEL_CONFIGS = frozenset({"quantization_config", "compression_config", "generation_config"})
"""Mappings whose key ends in `_config` and which do not describe a model."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Compared:
    """A config key that models must agree on.

    reason: why a difference matters.
    absent_is_null: an absent key says the same as null; otherwise it says nothing, because the
        default differs by architecture.
    """

    reason: str
    absent_is_null: bool = False


_POSITIONS = "the models encode positions differently"
_SHAPES = "the models' tensors differ in shape or number"
_VOCABULARY = "the models' embeddings have rows for different tokens"
_LAYERS = "the models differ in their number of layers"
_ARITHMETIC = "equal weights compute different things"
_TYING = "some models use the input embedding as output head, others hold both"

_COMPARED: Mapping[str, _Compared] = {
    "model_type": _Compared("the models are of different architectures"),
    # positions; rope_theta and rope_scaling are compared in one form, see _rope
    "rope_theta": _Compared(_POSITIONS),
    "rope_scaling": _Compared(_POSITIONS, absent_is_null=True),
    "partial_rotary_factor": _Compared(_POSITIONS),
    "rotary_pct": _Compared(_POSITIONS),
    "rotary_emb_base": _Compared(_POSITIONS),
    "alibi": _Compared(_POSITIONS),
    "position_embedding_type": _Compared(_POSITIONS),
    "max_position_embeddings": _Compared("the models were made for different lengths of text"),
    "n_positions": _Compared("the models were made for different lengths of text"),
    "sliding_window": _Compared("the models' attention reaches differently far"),
    # vocabulary
    "vocab_size": _Compared(_VOCABULARY),
    "padded_vocab_size": _Compared(_VOCABULARY),
    "tie_word_embeddings": _Compared(_TYING),
    # sizes
    "hidden_size": _Compared(_SHAPES),
    "n_embd": _Compared(_SHAPES),
    "d_model": _Compared(_SHAPES),
    "intermediate_size": _Compared(_SHAPES),
    "n_inner": _Compared(_SHAPES, absent_is_null=True),
    "d_ff": _Compared(_SHAPES),
    "head_dim": _Compared(_SHAPES),
    "num_experts": _Compared(_SHAPES),
    "num_local_experts": _Compared(_SHAPES),
    "n_routed_experts": _Compared(_SHAPES),
    # layer counts
    "num_hidden_layers": _Compared(_LAYERS),
    "n_layer": _Compared(_LAYERS),
    "num_layers": _Compared(_LAYERS),
    "num_decoder_layers": _Compared(_LAYERS),
    "encoder_layers": _Compared(_LAYERS),
    "decoder_layers": _Compared(_LAYERS),
    # same shapes, other meaning: these would go unnoticed
    "num_attention_heads": _Compared(_ARITHMETIC),
    "n_head": _Compared(_ARITHMETIC),
    "num_heads": _Compared(_ARITHMETIC),
    "num_key_value_heads": _Compared(_ARITHMETIC),
    "num_experts_per_tok": _Compared(_ARITHMETIC),
    "hidden_act": _Compared(_ARITHMETIC),
    "hidden_activation": _Compared(_ARITHMETIC),
    "activation_function": _Compared(_ARITHMETIC),
    "feed_forward_proj": _Compared(_ARITHMETIC),
    "rms_norm_eps": _Compared(_ARITHMETIC),
    "layer_norm_eps": _Compared(_ARITHMETIC),
    "layer_norm_epsilon": _Compared(_ARITHMETIC),
    "norm_eps": _Compared(_ARITHMETIC),
}


@dataclass(frozen=True, slots=True)
class Conflict:
    """A config key that models disagree on.

    key: dotted where it lies in a config within the config ("text_config.rope_theta").
    values: by model, in the order the models were given; models that do not state the key are
        left out.
    reason: why it matters.
    """

    key: str
    values: Mapping[str, object]
    reason: str

    def __str__(self) -> str:
        values = ", ".join(f"{value!r} in {model}" for model, value in self.values.items())
        return f"{self.key}: {values} ({self.reason})"


def output_config(
    base_config: Mapping[str, object],
    dtype_torch_name: str | None,
    vocabulary_rows: int | None,
) -> dict[str, object]:
    """The config of a merged model: a deep copy of the base's, with what the merge changed.

    dtype_torch_name: the dtype that all tensors of the output have; None: leave as it is. Written
        under the key or keys that the config has (`torch_dtype`, `dtype`), in configs within it
        too; where it has none at all, `torch_dtype` is added.
    vocabulary_rows: rows of the output's embeddings; None: leave as they are. Written under the
        keys that the config and its text config have; `vocab_size` is added where there is none.

    Every other key keeps its value, and all keep their order.
    """
    config = copy.deepcopy(dict(base_config))
    if dtype_torch_name is not None:
        changed = [
            _replace(inner, _DTYPE_KEYS, dtype_torch_name) for _, inner in configs_within(config)
        ]
        if not any(changed):
            config[_DTYPE_KEYS[0]] = dtype_torch_name
    if vocabulary_rows is not None:
        inner_configs = [config, *(config.get(key) for key in TEXT_CONFIGS)]
        changed = [
            _replace(cast(dict[str, object], inner), _VOCABULARY_KEYS, vocabulary_rows)
            for inner in inner_configs
            if isinstance(inner, dict)
        ]
        if not any(changed):
            config[_VOCABULARY_KEYS[0]] = vocabulary_rows
    return config


def config_conflicts(configs: Mapping[str, Mapping[str, object]]) -> list[Conflict]:
    """The keys that matter to a merge and differ between models, in the order of the tables.

    configs: by model, in recipe order.

    Spellings of one thing compare equal: 1e4 and 10000.0, and the two forms in which transformers
    4 and 5 write rotary positions. A key that only some models state is compared among those.
    """
    stated: dict[str, dict[str, object]] = {}
    reasons: dict[str, str] = {}
    paths = dict.fromkeys(path for config in configs.values() for path, _ in configs_within(config))
    for path in paths:
        for key, compared in _COMPARED.items():
            dotted = f"{path}.{key}" if path else key
            reasons[dotted] = compared.reason
            for model, config in configs.items():
                inner = dict(configs_within(config)).get(path)
                if inner is None:
                    continue
                value = _stated(inner, key)
                if value is _ABSENT and compared.absent_is_null:
                    value = None
                if value is not _ABSENT:
                    stated.setdefault(dotted, {})[model] = value
    return [
        Conflict(dotted, values, reasons[dotted])
        for dotted, values in stated.items()
        if any(value != next(iter(values.values())) for value in values.values())
    ]


def configs_within(
    config: Mapping[str, object], path: str = ""
) -> Iterator[tuple[str, dict[str, object]]]:
    """A config and those within it, each with its dotted path ("" for the config itself)."""
    yield path, cast(dict[str, object], config)
    for key, value in config.items():
        is_config = key in _INNER_CONFIGS or (
            key.endswith("_config") and key not in _NOT_MODEL_CONFIGS
        )
        if is_config and isinstance(value, dict):
            yield from configs_within(value, f"{path}.{key}" if path else key)


def rotary_positions(config: Mapping[str, object]) -> tuple[object, object]:
    """A config's theta and scaling of rotary positions, as transformers 4 writes them; None where
    it says nothing of one."""
    theta, scaling = _rope(config)
    return None if theta is _ABSENT else theta, None if scaling is _ABSENT else scaling


def _replace(config: dict[str, object], keys: tuple[str, ...], value: object) -> bool:
    """Give the keys that the config has a new value; whether there was one."""
    present = [key for key in keys if key in config]
    for key in present:
        config[key] = value
    return bool(present)


def _stated(config: Mapping[str, object], key: str) -> object:
    """What a config says about a key, in one form for all versions of transformers."""
    if key in ("rope_theta", "rope_scaling"):
        theta, scaling = _rope(config)
        return theta if key == "rope_theta" else scaling
    return config.get(key, _ABSENT)


def _rope(config: Mapping[str, object]) -> tuple[object, object]:
    """Rotary positions as (theta, scaling), in the form of transformers 4.

    transformers 4: {"rope_theta": 1e4, "rope_scaling": null or {"type" or "rope_type": …, …}}
    transformers 5: {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", …}}

    A model with several kinds of layers has one mapping for each; these are compared as they are.
    """
    theta: object = config.get("rope_theta", _ABSENT)
    scaling: object = config.get("rope_scaling", _ABSENT)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        scaling = dict(parameters)
        theta = scaling.pop("rope_theta", theta)
    if isinstance(scaling, dict):
        scaling = dict(scaling)
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling["type"])
            del scaling["type"]
        if scaling in ({}, {"rope_type": "default"}):
            scaling = None
    return theta, scaling
