"""Small models under the names that the documentation uses.

Those of `models/` are fine-tunes of one Llama model with 32 thin layers, but for `whisper` and its
`tuned`; `bilingual` has tokens of its own. `adapters/` are LoRA adapters of `models/base`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from conftest import write_adapter, write_checkpoint
from make_synthetic_checkpoint import LlamaShape, make_checkpoint, perturb_checkpoint

SHAPE = LlamaShape(hidden=16, intermediate=32, layers=32, heads=4, kv_heads=4, vocabulary=320)

TUNED = ("platypus", "orca", "wizard", "a", "b", "c", "chat", "maths", "stories")
"""Fine-tunes of models/base."""

DEMO = {"base": "base", "reverse": "a", "caesar": "b"}
"""Stand-ins for the models that `make demo` trains."""

ADDED_TOKENS = ("<|im_start|>", "<|im_end|>", "straße")
"""Of `bilingual`."""

RANK = 4


def make_models(folder: Path) -> None:
    """Makes models/, adapters/ and demo/models/ in a folder."""
    models = folder / "models"
    base = models / "base"
    make_checkpoint(base, SHAPE, shards=3, tokenizer=True, seed=1)
    for number, name in enumerate(TUNED):
        perturb_checkpoint(models / name, base, scale=0.002, seed=number + 2)
    for name, source in DEMO.items():
        perturb_checkpoint(
            folder / "demo" / "models" / name,
            models / source,
            dtype="bfloat16",
            scale=0.002,
            seed=7,
        )
    _make_bilingual(models / "bilingual")
    _make_whisper(models / "whisper", seed=1)
    _make_whisper(models / "tuned", seed=2)
    for number, name in enumerate(("maths", "code")):
        _make_adapter(folder / "adapters" / name, seed=number)


def _make_bilingual(folder: Path) -> None:
    """A model of the same shape, with tokens that the others lack."""
    make_checkpoint(folder, SHAPE, tokenizer=True, seed=1)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    first = max(tokenizer["model"]["vocab"].values()) + 1
    tokenizer["added_tokens"] += [
        {
            "id": first + number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(ADDED_TOKENS)
    ]
    path.write_text(json.dumps(tokenizer), "utf-8")


def _make_whisper(folder: Path, *, seed: int) -> None:
    """Encoder and decoder, two layers each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.decoder.embed_tokens.weight": (64, 16), "proj_out.weight": (64, 16)}
    for part in ("encoder", "decoder"):
        tensors[f"model.{part}.layer_norm.weight"] = (16,)
        for layer in range(2):
            for name in ("self_attn.q_proj", "self_attn.k_proj", "fc1", "fc2"):
                tensors[f"model.{part}.layers.{layer}.{name}.weight"] = (16, 16)
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "encoder_layers": 2,
        "decoder_layers": 2,
        "d_model": 16,
        "vocab_size": 64,
    }
    made = {
        name: torch.randn(shape, generator=generator).half()
        for name, shape in tensors.items()
        if name != "proj_out.weight"
    }
    write_checkpoint(folder, made, config)


def _make_adapter(folder: Path, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(SHAPE.layers):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for letter, shape in (("A", (RANK, SHAPE.hidden)), ("B", (SHAPE.hidden, RANK))):
                factors[f"{prefix}.lora_{letter}.weight"] = (
                    torch.randn(shape, generator=generator) * 0.02
                )
    write_adapter(
        folder,
        factors,
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj"],
        base_model_name_or_path="models/base",
        bias="none",
        task_type="CAUSAL_LM",
    )
