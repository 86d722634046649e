"""Tiny models of many families, made by transformers: what merges are tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 96
LAYERS = 3

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What most decoders share."""


@dataclass(frozen=True)
class Family:
    """config, model: names of transformers' classes. settings: of the config.

    inner: configs within the config, by key, each with its class's name.
    """

    config: str
    model: str
    settings: Mapping[str, Any]
    inner: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def make(self) -> Any:
        """A model with random weights."""
        inner = {
            key: getattr(transformers, name)(**settings)
            for key, (name, settings) in self.inner.items()
        }
        config = getattr(transformers, self.config)(**self.settings, **inner)
        return getattr(transformers, self.model)(config).eval()

    def load(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """A model from a folder, and what transformers says of the loading."""
        return getattr(transformers, self.model).from_pretrained(folder, output_loading_info=True)


def text(**settings: Any) -> dict[str, Any]:
    return {**TEXT, **settings}


def without(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", text()),
    "llama, tied": Family("LlamaConfig", "LlamaForCausalLM", text(tie_word_embeddings=True)),
    "llama, with biases": Family(
        "LlamaConfig", "LlamaForCausalLM", text(attention_bias=True, mlp_bias=True)
    ),
    "mistral": Family("MistralConfig", "MistralForCausalLM", text(sliding_window=32)),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", text()),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", text(head_dim=8)),
    "gemma 2": Family("Gemma2Config", "Gemma2ForCausalLM", text(head_dim=8)),
    "gemma 3": Family("Gemma3TextConfig", "Gemma3ForCausalLM", text(head_dim=8)),
    "phi 3": Family("Phi3Config", "Phi3ForCausalLM", text()),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    ),
    "gpt-neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", without(TEXT, "num_key_value_heads")),
    "falcon": Family(
        "FalconConfig",
        "FalconForCausalLM",
        without(TEXT, "num_key_value_heads", "intermediate_size", "max_position_embeddings"),
    ),
    "mixtral": Family(
        "MixtralConfig", "MixtralForCausalLM", text(num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3-moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", text(head_dim=8, **EXPERTS)),
    "deepseek-v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        text(
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),
    "mamba": Family(
        "MambaConfig",
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": LAYERS,
            "state_size": 4,
            "time_step_rank": 4,
        },
    ),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        text(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_dt_rank=2,
            mamba_d_state=4,
        ),
    ),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        text(decoder_sparse_step=2, shared_expert_intermediate_size=24, **EXPERTS),
    ),
    "mllama, text": Family(
        "MllamaTextConfig", "MllamaForCausalLM", text(cross_attention_layers=[1])
    ),
    "lfm2": Family("Lfm2Config", "Lfm2ForCausalLM", text(full_attn_idxs=[1])),
    "gpt-neo": Family(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": LAYERS,
            "num_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
            "window_size": 8,
        },
    ),
    "nemotron-h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        without(
            text(
                hybrid_override_pattern="M-*",
                head_dim=8,
                mamba_num_heads=4,
                mamba_head_dim=8,
                ssm_state_size=8,
                n_groups=1,
            ),
            "num_hidden_layers",
        ),
    ),
    "bert": Family("BertConfig", "BertForMaskedLM", without(TEXT, "num_key_value_heads")),
    "roberta": Family("RobertaConfig", "RobertaForMaskedLM", without(TEXT, "num_key_value_heads")),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "t5, gated": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "whisper": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "begin_suppress_tokens": None,
        },
    ),
    "llava": Family(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"image_token_index": 95, "image_seq_length": 4},
        {
            "text_config": ("LlamaConfig", TEXT),
            "vision_config": (
                "CLIPVisionConfig",
                {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 8,
                    "patch_size": 4,
                    "projection_dim": 16,
                },
            ),
        },
    ),
    "qwen2-vl": Family(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "image_token_id": 90,
            "video_token_id": 91,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
            "text_config": {
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
        },
    ),
}


def perturbed(model: Any, seed: int) -> Any:
    """The model, each of its parameters a little different: a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += (0.05 * noise).to(parameter.dtype)
    return model


def outputs(model: Any) -> torch.Tensor:
    """What a model computes for a fixed input: logits, or hidden states."""
    tokens = torch.arange(3, 15).reshape(1, 12)
    with torch.no_grad():
        if model.config.model_type == "whisper":
            sound = torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32)
            return model(input_features=sound, decoder_input_ids=tokens[:, :5]).logits
        if model.config.model_type == "t5":
            return model(input_ids=tokens, decoder_input_ids=tokens[:, :5]).logits
        return model(input_ids=tokens).logits
