"""Outputs whose config says otherwise of the head than their tensors do."""

from __future__ import annotations

from collections.abc import Iterator

from ...architecture.roles import Role, tensor_role
from ...architecture.tying import TYING_KEY, embedding_of_head, heads, is_tied
from ...engine.plan import Plan
from .suspicion import Suspicion, short

GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the names of architectures that have an output head."""


def head_suspicions(plan: Plan) -> Iterator[Suspicion]:
    """Heads that loading the output would ignore or make up."""
    config = plan.config
    tied = is_tied(config)
    if config is None or tied is None:
        return
    vocabulary = {
        write.name: write.shape
        for write in plan.graph.writes
        if tensor_role(write.name, write.shape) is not Role.PLAIN
    }
    stored = heads(vocabulary)
    if tied:
        apart = [name for name in stored if embedding_of_head(name, vocabulary) is not None]
        if apart:
            yield Suspicion(
                "head-tied",
                f"config.json says {TYING_KEY}: true, and {short(apart[0])} is merged apart from "
                "the embedding: whoever loads the output ignores it; leave it out, or set the key "
                "to false",
                "mistake",
            )
        return
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not stored and vocabulary and any(str(name).endswith(GENERATING) for name in names):
        yield Suspicion(
            "head-missing",
            f"config.json says {TYING_KEY}: false, and no tensor of the output is an output head: "
            "whoever loads it gets one of random numbers; set the key to true if the head is the "
            "embedding, or merge models that have one",
            "mistake",
        )
