"""Models whose configs say that they do not belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...architecture.config import Conflict, config_conflicts
from ...engine.plan import Plan
from .suspicion import MOST_NAME, Severity, Suspicion, listed, short

UNRELATED = frozenset(
    {
        "rope_theta",
        "rotary_emb_base",
        "partial_rotary_factor",
        "rotary_pct",
        "alibi",
        "position_embedding_type",
        "num_attention_heads",
        "n_head",
        "num_heads",
        "num_key_value_heads",
        "hidden_act",
        "hidden_activation",
        "activation_function",
    }
)
"""Keys in which no fine-tune differs from its base: with another value, equal weights compute
something else. (Norm epsilons, lengths of text, scaled positions and names of architectures do
differ between files of one family.)"""

ACTIVATIONS = ({"silu", "swish"},)
"""Names of one function."""

LIKE_GELU = "gelu"
"""Forms of it differ by a thousandth, and configs of one family by their names for it."""

MOST_DIFFERENCES = 6


def model_suspicions(plan: Plan) -> Iterator[Suspicion]:
    """Models that look unrelated to the one that gives the output its config."""
    main = plan.recipe.main_model
    configs = {
        reference: checkpoint.config
        for reference, checkpoint in plan.checkpoints.items()
        if checkpoint.config is not None
    }
    if plan.config is None:
        yield Suspicion(
            "no-config",
            f"{short(main)} has no config.json, so the output will have none and will not load; "
            "put the one of its architecture beside the weights",
            "note",
        )
    if main not in configs:
        return
    alike: dict[tuple[str, Severity], list[str]] = {}
    for model, config in configs.items():
        if model != main:
            found = _differences(plan, main, model, {main: configs[main], model: config})
            if found is not None:
                alike.setdefault(found, []).append(model)
    for (differences, severity), models in alike.items():
        is_unrelated = severity == "mistake"
        verb = "looks" if len(models) == 1 else "look"
        differ = "differs" if len(models) == 1 else "differ"
        yield Suspicion(
            "unrelated-model",
            f"{listed(models)} {verb} unrelated to {short(main)}: {differences}; equal weights "
            "compute different things in them, so merge models of one family, or correct the "
            "config.json that is wrong"
            if is_unrelated
            else f"{listed(models)} {differ} from {short(main)} in config.json: {differences}; "
            f"the output has what {short(main)} says",
            severity,
        )


def _differences(
    plan: Plan, main: str, model: str, configs: Mapping[str, Mapping[str, object]]
) -> tuple[str, Severity] | None:
    """How a model's config differs from the main model's, and how bad that is."""
    is_matched = plan.tokenizer is not None and plan.tokenizer.is_matched
    conflicts = [
        conflict
        for conflict in config_conflicts(configs)
        if not (is_matched and conflict.key.endswith("vocab_size"))
        and not _is_one_function(conflict)
    ]
    if not conflicts:
        return None
    conflicts.sort(key=lambda conflict: not _is_unrelated(conflict))
    shown = [
        f"{short(c.key)} is {_shown(c.values[model])} and not {_shown(c.values[main])}"
        for c in conflicts[:MOST_DIFFERENCES]
    ]
    if len(conflicts) > MOST_DIFFERENCES:
        shown.append(f"{len(conflicts) - MOST_DIFFERENCES} more keys differ")
    return ", ".join(shown), "mistake" if _is_unrelated(conflicts[0]) else "note"


def _is_unrelated(conflict: Conflict) -> bool:
    if conflict.key.rpartition(".")[2] not in UNRELATED:
        return False
    return not all(str(value).startswith(LIKE_GELU) for value in conflict.values.values())


def _is_one_function(conflict: Conflict) -> bool:
    return any({str(v) for v in conflict.values.values()} <= names for names in ACTIVATIONS)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_NAME else f"{text[: MOST_NAME - 1]}…"
