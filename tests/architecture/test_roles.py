"""Roles, vocabulary and optional tensors, over the names of real models."""

from __future__ import annotations

import pytest
from lazymerge.architecture import Role, is_optional, is_vocabulary, tensor_role
from model_names import MODELS

VOCABULARY = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt2": {"wte.weight"},
    "gpt2 with head": {"transformer.wte.weight", "lm_head.weight"},
    "t5": {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"},
    "mixtral": {"model.embed_tokens.weight", "lm_head.weight"},
    "whisper": {"model.decoder.embed_tokens.weight", "proj_out.weight"},
    "bert": {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    },
    "llava": {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"},
    "llava, first release": {"model.embed_tokens.weight", "lm_head.weight"},
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.token_embedding.weight",
    },
    "gpt-neox": {"gpt_neox.embed_in.weight", "embed_out.weight"},
    "diffusers unet": set(),
}


@pytest.mark.parametrize("model", MODELS)
def test_vocabulary_of_real_models(model: str) -> None:
    assert {name for name in MODELS[model].names if is_vocabulary(name)} == VOCABULARY[model]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", Role.INPUT_EMBEDDING),
        ("model.language_model.embed_tokens.weight", Role.INPUT_EMBEDDING),
        ("embed_tokens.weight", Role.INPUT_EMBEDDING),
        ("backbone.embeddings.weight", Role.INPUT_EMBEDDING),
        ("embeddings.tok_embeddings.weight", Role.INPUT_EMBEDDING),
        ("tok_embeddings.weight", Role.INPUT_EMBEDDING),
        ("token_embd.weight", Role.INPUT_EMBEDDING),
        ("transformer.embedding.word_embeddings.weight", Role.INPUT_EMBEDDING),
        ("transformer.embd.wte.weight", Role.INPUT_EMBEDDING),
        ("output.weight", Role.OUTPUT_HEAD),
        ("transformer.output_layer.weight", Role.OUTPUT_HEAD),
        ("lm_head.decoder.weight", Role.OUTPUT_HEAD),
        ("lm_head.linear.weight", Role.OUTPUT_HEAD),
        ("vocab_projector.weight", Role.OUTPUT_HEAD),
        ("line\nbreak.lm_head.weight", Role.OUTPUT_HEAD),
        ("predictions.decoder.weight", Role.OUTPUT_HEAD),
        ("lm_loss.weight", Role.OUTPUT_HEAD),
        ("decoder.weight", Role.OUTPUT_HEAD),
        ("proj_out.weight", Role.OUTPUT_HEAD),
        ("model.transformer.ff_out.weight", Role.OUTPUT_HEAD),
        # Look alike, and are not:
        ("bert.embeddings.position_embeddings.weight", Role.PLAIN),
        ("bert.embeddings.token_type_embeddings.weight", Role.PLAIN),
        ("model.decoder.embed_positions.weight", Role.PLAIN),
        ("wpe.weight", Role.PLAIN),
        ("vision_model.embeddings.patch_embedding.weight", Role.PLAIN),
        ("layers.0.attention.output.weight", Role.PLAIN),
        ("model.transformer.blocks.0.ff_out.weight", Role.PLAIN),
        ("down_blocks.0.attentions.0.proj_out.weight", Role.PLAIN),
        ("first_stage_model.decoder.weight", Role.PLAIN),
        ("cls.predictions.transform.dense.weight", Role.PLAIN),
        ("my_lm_head.weight", Role.PLAIN),
        ("xwte.weight", Role.PLAIN),
        ("wteXweight", Role.PLAIN),
        ("lm_head.weight.extra", Role.PLAIN),
        ("lm_head.weight\n", Role.PLAIN),
        ("model.norm.weight", Role.PLAIN),
        ("", Role.PLAIN),
    ],
)
def test_roles(name: str, role: Role) -> None:
    assert tensor_role(name, (32, 8)) is role
    assert is_vocabulary(name) is (role is not Role.PLAIN)


def test_shape_decides_too() -> None:
    assert tensor_role("lm_head.weight", (32,)) is Role.PLAIN
    assert tensor_role("lm_head.weight", ()) is Role.PLAIN
    assert tensor_role("model.embed_tokens.weight", (2, 32, 8)) is Role.PLAIN
    assert tensor_role("lm_head.bias", (32,)) is Role.OUTPUT_HEAD
    assert tensor_role("lm_head.bias", (32, 8)) is Role.PLAIN


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "output.weight",
        "language_model.lm_head.weight",
        "cls.predictions.decoder.weight",
        "model.layers.3.self_attn.q_proj.bias",
        "h.0.attn.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "bert.embeddings.position_ids",
        "encoder.embed_tokens.weight",
    ],
)
def test_optional(name: str) -> None:
    assert is_optional(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",  # whisper, opt: their only embedding
        "shared.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "layers.0.in_proj_bias",
        "unbias",
        "",
    ],
)
def test_not_optional(name: str) -> None:
    assert not is_optional(name)


def test_optional_tensors_of_real_models() -> None:
    """What llama may lack: its head when tied, and the rotary buffers of old checkpoints."""
    optional = {name.rpartition(".")[2] for name in MODELS["llama"].names if is_optional(name)}
    assert optional == {"weight", "inv_freq"}
    assert sum(is_optional(name) for name in MODELS["llama"].names) == 1 + 32
