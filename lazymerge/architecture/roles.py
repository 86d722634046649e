"""What a tensor is for, as far as a merge must know: which rows are tokens, what may be absent.

Everything is read from names; the tables below are the whole knowledge. A pattern matches the
end of a name at a dot: `wte.weight` matches `transformer.wte.weight` and not `my_wte.weight`.
A pattern that begins with `=` matches the whole name only.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Role(Enum):
    """What a tensor is for."""

    INPUT_EMBEDDING = "input embedding"
    """One row per token, looked up by the model's input."""

    OUTPUT_HEAD = "output head"
    """One row (of a bias: one element) per token, the model's output."""

    PLAIN = "plain"


_INPUT_EMBEDDINGS = (
    "embed_tokens.weight",  # llama, mistral, qwen, gemma, phi; whisper and bart in the decoder
    "embed_tokens_per_layer.weight",  # gemma 3n: its rows are tokens too
    "wte.weight",  # gpt2, falcon-like, mpt, qwen 1, phi-msft
    "word_embeddings.weight",  # bloom, falcon, chatglm, bert, roberta
    "word_embedding.weight",  # xlnet
    "embed_in.weight",  # gpt-neox, pythia
    "shared.weight",  # t5, bart
    "tok_embeddings.weight",  # llama as released, internlm2, modernbert
    "token_embedding.weight",  # clip, siglip, openclip (and through them sdxl)
    "token_embd.weight",  # gguf names
    "embeddings.weight",  # mamba, rwkv; not bert's embeddings.position_embeddings.weight
    "=embedding.weight",  # mamba-ssm and small research models
    "=emb.weight",  # rwkv as released
    "=transformer.embedding.weight",  # chatglm variants
)

_OUTPUT_HEADS = (
    "lm_head.weight",  # nearly all causal models
    "lm_head.bias",  # phi 1 and 2, gpt-j, roberta
    "lm_head.decoder.weight",  # roberta masked lm
    "lm_head.decoder.bias",
    "lm_head.linear.weight",  # phi-msft
    "lm_head.linear.bias",
    "embed_out.weight",  # gpt-neox, pythia
    "embed_out.bias",
    "output_layer.weight",  # chatglm
    "predictions.decoder.weight",  # bert (cls.predictions) and albert masked lm
    "predictions.decoder.bias",
    "predictions.bias",
    "lm_loss.weight",  # xlnet
    "lm_loss.bias",
    "vocab_projector.weight",  # distilbert masked lm
    "vocab_projector.bias",
    # Common words inside layers, so only where they are the head:
    "=output.weight",  # llama as released, internlm2, gguf names
    "=language_model.output.weight",  # internvl
    "=decoder.output.weight",  # torchtune
    "=proj_out.weight",  # whisper; the attention blocks of diffusion models have one too
    "=head.weight",  # rwkv
    "=decoder.weight",  # modernbert masked lm
    "=decoder.bias",
    "=model.transformer.ff_out.weight",  # olmo 1; its layers hold an ff_out of their own
)

_OPTIONAL = (
    # Copies of the shared embedding that some writers of t5 and bart leave out.
    "=encoder.embed_tokens.weight",
    "=decoder.embed_tokens.weight",
    "=model.encoder.embed_tokens.weight",
    # Buffers that older versions of transformers wrote and newer ones compute.
    "inv_freq",
    "position_ids",
    "token_type_ids",
    "masked_bias",
    "cos_cached",
    "sin_cached",
    # A linear layer's bias, which some fine-tunes add; and attn.bias, gpt2's causal mask.
    "bias",
)


class _Names:
    """A set of patterns as this module's docstring defines them.

    One regular expression of them all took 2 s of planning a model of 90,000 tensors, this 0.3.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        every = list(patterns)
        self._names = {pattern[1:] for pattern in every if pattern.startswith("=")}
        self._ends = {pattern for pattern in every if not pattern.startswith("=")}
        self._most_words = max(pattern.count(".") + 1 for pattern in self._ends)

    def __contains__(self, name: str) -> bool:
        if name in self._names:
            return True
        dot = len(name)
        for _ in range(self._most_words):
            dot = name.rfind(".", 0, dot)
            if name[dot + 1 :] in self._ends:
                return True
            if dot < 0:
                break
        return False


_INPUT_EMBEDDING_NAMES = _Names(_INPUT_EMBEDDINGS)
_OUTPUT_HEAD_NAMES = _Names(_OUTPUT_HEADS)
_OPTIONAL_NAMES = _Names(_OPTIONAL)


def tensor_role(name: str, shape: tuple[int, ...]) -> Role:
    """What a tensor is for.

    shape: a weight must have two dimensions to have tokens as rows, a bias one.
    """
    if len(shape) == (1 if name.endswith(".bias") else 2):
        if name in _INPUT_EMBEDDING_NAMES:
            return Role.INPUT_EMBEDDING
        if name in _OUTPUT_HEAD_NAMES:
            return Role.OUTPUT_HEAD
    return Role.PLAIN


def is_vocabulary(name: str) -> bool:
    """Whether the tensor's rows (first dimension) are tokens: input embedding or output head.

    Position embeddings are not: their rows are positions.
    """
    return name in _INPUT_EMBEDDING_NAMES or name in _OUTPUT_HEAD_NAMES


def is_optional(name: str) -> bool:
    """Whether a sound model may lack the tensor while others of its kind have it.

    An output head is absent where it is tied to the input embedding, a bias where a fine-tune
    did not add one, a buffer where the writer's version computes it.
    """
    return name in _OPTIONAL_NAMES or name in _OUTPUT_HEAD_NAMES
