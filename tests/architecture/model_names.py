"""Tensor names of real models, as their checkpoints hold them, with the layer stacks they have.

Each model is cut to a few layers where the number of layers changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """names: of the tensors. stacks: layer counts by prefix."""

    names: tuple[str, ...]
    stacks: dict[str, int]


def under(prefix: str, suffixes: str) -> list[str]:
    return [f"{prefix}.{suffix}" for suffix in suffixes.split()]


def weight_and_bias(prefix: str, modules: str) -> list[str]:
    return [f"{prefix}.{m}.{kind}" for m in modules.split() for kind in ("weight", "bias")]


def layers(prefix: str, count: int, suffixes: Iterable[str]) -> list[str]:
    suffixes = list(suffixes)
    return [f"{prefix}.{i}.{suffix}" for i in range(count) for suffix in suffixes]


LLAMA_LAYER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]
BERT_LAYER = [
    f"{module}.{kind}"
    for module in [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ]
    for kind in ("weight", "bias")
]
CLIP_LAYER = [
    f"{module}.{kind}"
    for module in [
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.q_proj",
        "self_attn.out_proj",
        "layer_norm1",
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm2",
    ]
    for kind in ("weight", "bias")
]

llama = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *layers("model.layers", 32, [*LLAMA_LAYER, "self_attn.rotary_emb.inv_freq"]),
]

gpt2 = [
    "wte.weight",
    "wpe.weight",
    "ln_f.weight",
    "ln_f.bias",
    *layers(
        "h",
        12,
        [
            "attn.bias",
            *weight_and_bias("attn", "c_attn c_proj"),
            "ln_1.weight",
            "ln_1.bias",
            "ln_2.weight",
            "ln_2.bias",
            *weight_and_bias("mlp", "c_fc c_proj"),
        ],
    ),
]

T5_ATTENTION = "k.weight o.weight q.weight v.weight"
t5 = [
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "encoder.final_layer_norm.weight",
    "decoder.final_layer_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    *layers(
        "encoder.block",
        6,
        [
            *under("layer.0.SelfAttention", T5_ATTENTION),
            "layer.0.layer_norm.weight",
            *under("layer.1.DenseReluDense", "wi.weight wo.weight"),
            "layer.1.layer_norm.weight",
        ],
    ),
    *layers(
        "decoder.block",
        4,
        [
            *under("layer.0.SelfAttention", T5_ATTENTION),
            "layer.0.layer_norm.weight",
            *under("layer.1.EncDecAttention", T5_ATTENTION),
            "layer.1.layer_norm.weight",
            *under("layer.2.DenseReluDense", "wi.weight wo.weight"),
            "layer.2.layer_norm.weight",
        ],
    ),
]

mixtral = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *layers(
        "model.layers",
        4,
        [
            *(suffix for suffix in LLAMA_LAYER if not suffix.startswith("mlp.")),
            "block_sparse_moe.gate.weight",
            *layers("block_sparse_moe.experts", 8, ["w1.weight", "w2.weight", "w3.weight"]),
        ],
    ),
]

WHISPER_ATTENTION = "k_proj.weight q_proj.weight q_proj.bias v_proj.weight v_proj.bias " + (
    "out_proj.weight out_proj.bias"
)
whisper = [
    *weight_and_bias("model.encoder", "conv1 conv2 layer_norm"),
    "model.encoder.embed_positions.weight",
    "model.decoder.embed_tokens.weight",
    "model.decoder.embed_positions.weight",
    "model.decoder.layer_norm.weight",
    "model.decoder.layer_norm.bias",
    "proj_out.weight",
    *layers("model.encoder.layers", 4, under("self_attn", WHISPER_ATTENTION)),
    *layers(
        "model.decoder.layers",
        2,
        [*under("self_attn", WHISPER_ATTENTION), *under("encoder_attn", WHISPER_ATTENTION)],
    ),
]

bert = [
    *under(
        "bert.embeddings",
        "position_ids word_embeddings.weight position_embeddings.weight "
        "token_type_embeddings.weight LayerNorm.weight LayerNorm.bias",
    ),
    *layers("bert.encoder.layer", 12, BERT_LAYER),
    *weight_and_bias("bert.pooler", "dense"),
    "cls.predictions.bias",
    *weight_and_bias("cls.predictions.transform", "dense LayerNorm"),
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
]

llava = [
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    *layers("language_model.model.layers", 32, LLAMA_LAYER),
    *under(
        "vision_tower.vision_model",
        "embeddings.class_embedding embeddings.patch_embedding.weight "
        "embeddings.position_embedding.weight embeddings.position_ids pre_layrnorm.weight "
        "pre_layrnorm.bias post_layernorm.weight post_layernorm.bias",
    ),
    *layers("vision_tower.vision_model.encoder.layers", 24, CLIP_LAYER),
    *weight_and_bias("multi_modal_projector", "linear_1 linear_2"),
]

llava_first_release = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    *layers("model.layers", 4, LLAMA_LAYER),
    # nn.Sequential(Linear, GELU, Linear)
    *weight_and_bias("model.mm_projector", "0 2"),
]

sdxl = [
    # UNet, in the names of the first release
    *weight_and_bias("model.diffusion_model", "time_embed.0 time_embed.2"),
    *weight_and_bias("model.diffusion_model", "label_emb.0.0 label_emb.0.2"),
    *weight_and_bias("model.diffusion_model.input_blocks", "0.0 3.0.op 6.0.op"),
    *(
        name
        for i in (1, 2, 4, 5, 7, 8)
        for name in weight_and_bias(
            f"model.diffusion_model.input_blocks.{i}.0",
            "in_layers.0 in_layers.2 emb_layers.1 out_layers.0 out_layers.3",
        )
    ),
    *(
        f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.{j}.attn1.to_q.weight"
        for i in (4, 5, 7, 8)
        for j in range(2 if i < 6 else 10)
    ),
    *weight_and_bias("model.diffusion_model.middle_block", "0.in_layers.0 2.in_layers.0"),
    *(
        f"model.diffusion_model.middle_block.1.transformer_blocks.{j}.attn1.to_out.0.weight"
        for j in range(10)
    ),
    *weight_and_bias("model.diffusion_model", "out.0 out.2"),
    # text encoders
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    *layers("conditioner.embedders.0.transformer.text_model.encoder.layers", 12, CLIP_LAYER),
    "conditioner.embedders.1.model.token_embedding.weight",
    "conditioner.embedders.1.model.positional_embedding",
    "conditioner.embedders.1.model.text_projection",
    *layers(
        "conditioner.embedders.1.model.transformer.resblocks",
        32,
        ["attn.in_proj_weight", "attn.in_proj_bias", "ln_1.weight", "mlp.c_fc.weight"],
    ),
    # image encoder and decoder
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.encoder.mid.block_1.conv1.weight",
    *layers("first_stage_model.encoder.down", 4, ["block.0.conv1.weight", "block.1.conv1.weight"]),
]

gpt_neox = [
    "gpt_neox.embed_in.weight",
    "embed_out.weight",
    *layers(
        "gpt_neox.layers",
        6,
        [
            *under("attention", "bias masked_bias rotary_emb.inv_freq"),
            *weight_and_bias("attention", "dense query_key_value"),
        ],
    ),
]

diffusers_unet = [
    *weight_and_bias("time_embedding", "linear_1 linear_2"),
    *layers("down_blocks", 3, ["resnets.0.conv1.weight", "resnets.1.conv1.weight"]),
    *layers("up_blocks", 3, ["resnets.0.conv1.weight", "upsamplers.0.conv.weight"]),
    *layers("mid_block.attentions.0.transformer_blocks", 10, ["attn1.to_out.0.weight"]),
    "mid_block.resnets.0.conv1.weight",
    "mid_block.resnets.1.conv1.weight",
]

MODELS = {
    "llama": Model(tuple(llama), {"model.layers": 32}),
    "gpt2": Model(tuple(gpt2), {"h": 12}),
    "gpt2 with head": Model(
        ("lm_head.weight", *(f"transformer.{name}" for name in gpt2)), {"transformer.h": 12}
    ),
    "t5": Model(tuple(t5), {"encoder.block": 6, "decoder.block": 4}),
    "mixtral": Model(tuple(mixtral), {"model.layers": 4}),
    "whisper": Model(tuple(whisper), {"model.encoder.layers": 4, "model.decoder.layers": 2}),
    "bert": Model(tuple(bert), {"bert.encoder.layer": 12}),
    "llava": Model(
        tuple(llava),
        {"language_model.model.layers": 32, "vision_tower.vision_model.encoder.layers": 24},
    ),
    "llava, first release": Model(tuple(llava_first_release), {"model.layers": 4}),
    "sdxl": Model(
        tuple(sdxl),
        {
            "model.diffusion_model.input_blocks": 9,
            "model.diffusion_model.middle_block": 3,
            "conditioner.embedders.0.transformer.text_model.encoder.layers": 12,
            "conditioner.embedders.1.model.transformer.resblocks": 32,
            "first_stage_model.encoder.down": 4,
        },
    ),
    "gpt-neox": Model(tuple(gpt_neox), {"gpt_neox.layers": 6}),
    "diffusers unet": Model(
        tuple(diffusers_unet),
        {
            "down_blocks": 3,
            "up_blocks": 3,
            "mid_block.attentions.0.transformer_blocks": 10,
            "mid_block.resnets": 2,
        },
    ),
}
