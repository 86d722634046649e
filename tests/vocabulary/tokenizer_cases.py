"""Small tokenizers and models that have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = {
    "a": ["hello world", "the quick brown fox", "merging models of language"],
    "b": ["hello there", "the lazy dog sleeps", "tokens and vocabularies differ"],
    "c": ["hello world", "zebras eat grass", "the lazy fox"],
}


def bpe(texts: Iterable[str], special: Sequence[str] = ("<unk>", "<s>")) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts) * 5, trainer)
    return tokenizer


def word_piece(texts: Iterable[str], special: Sequence[str] = ("[UNK]", "[CLS]")) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=80, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(list(texts) * 5, trainer)
    return tokenizer


def unigram(texts: Iterable[str], special: Sequence[str] = ("<unk>", "<s>")) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(list(texts) * 5, trainer)
    return tokenizer


KINDS = {"bpe": bpe, "word_piece": word_piece, "unigram": unigram}

WIDTH = 8


def add_special(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def make_model(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    has_head: bool = True,
) -> dict[str, torch.Tensor]:
    """A llama of one layer with a tokenizer; returns its tensors.

    rows: of its embeddings; None: as many as it has tokens. config: of the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    rows = rows or tokenizer.get_vocab_size()
    tensors = make_tensors(rows, seed=seed, dtype=dtype, has_head=has_head)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(llama_config(rows, has_head=has_head)))
    return tensors


def make_tensors(
    rows: int, *, seed: int, dtype: torch.dtype, has_head: bool = True
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": random(rows, WIDTH),
        "model.norm.weight": random(WIDTH),
        f"{layer}input_layernorm.weight": random(WIDTH),
        f"{layer}post_attention_layernorm.weight": random(WIDTH),
        f"{layer}mlp.down_proj.weight": random(WIDTH, 2 * WIDTH),
        f"{layer}mlp.gate_proj.weight": random(2 * WIDTH, WIDTH),
        f"{layer}mlp.up_proj.weight": random(2 * WIDTH, WIDTH),
        **{f"{layer}self_attn.{p}_proj.weight": random(WIDTH, WIDTH) for p in "kqvo"},
    }
    if has_head:
        tensors["lm_head.weight"] = random(rows, WIDTH)
    return tensors


def llama_config(rows: int, *, has_head: bool = True) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "vocab_size": rows,
        "tie_word_embeddings": not has_head,
        "torch_dtype": "bfloat16",
    }
