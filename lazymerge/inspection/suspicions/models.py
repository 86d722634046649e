"""Models whose configs say that they do not belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...architecture.config import Conflict, config_conflicts
from ...engine.plan import Plan
from .suspicion import MOST_NAME, Suspicion, listed, short

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
    conflicts = [each for each in config_conflicts(configs) if not _is_meant(plan, each)]
    conflicts.sort(key=lambda conflict: not _is_unrelated(conflict))
    alike: dict[tuple[int, ...], list[str]] = {}
    for model in configs:
        differing = [n for n, each in enumerate(conflicts) if _differs(each, main, model)]
        if differing:
            alike.setdefault(tuple(differing), []).append(model)
    for numbers, models in alike.items():
        yield _unrelated(main, models, [conflicts[number] for number in numbers])


def _reference(conflict: Conflict, main: str) -> str:
    """The model that others are compared with: where the main one says nothing of the key, the
    first that does."""
    return main if main in conflict.values else next(iter(conflict.values))


def _differs(conflict: Conflict, main: str, model: str) -> bool:
    values = conflict.values
    return model in values and values[model] != values[_reference(conflict, main)]


def _unrelated(main: str, models: list[str], conflicts: Sequence[Conflict]) -> Suspicion:
    """What is to be said of models that differ in the same keys."""
    told = []
    for conflict in conflicts[:MOST_DIFFERENCES]:
        reference = _reference(conflict, main)
        as_in = "" if reference == main else f" as in {short(reference)}"
        values = dict.fromkeys(_shown(conflict.values[model]) for model in models)
        told.append(
            f"{short(conflict.key)} is {listed(list(values))} and not "
            f"{_shown(conflict.values[reference])}{as_in}"
        )
    if len(conflicts) > MOST_DIFFERENCES:
        told.append(f"{len(conflicts) - MOST_DIFFERENCES} more keys differ")
    is_one = len(models) == 1
    if any(map(_is_unrelated, conflicts)):
        return Suspicion(
            "unrelated-model",
            f"{listed(models)} look{'s' * is_one} unrelated to {short(main)}: {', '.join(told)}; "
            "equal weights compute different things in them, so merge models of one family, or "
            "correct the config.json that is wrong",
            "mistake",
        )
    return Suspicion(
        "unrelated-model",
        f"{listed(models)} differ{'s' * is_one} from {short(main)} in config.json: "
        f"{', '.join(told)}; the output has what {short(main)} says",
        "note",
    )


def _is_meant(plan: Plan, conflict: Conflict) -> bool:
    """Whether a difference is none, or is what the recipe's tokenizer takes care of."""
    is_matched = plan.tokenizer is not None and plan.tokenizer.is_matched
    return (is_matched and conflict.key.endswith("vocab_size")) or _is_one_function(conflict)


def _is_unrelated(conflict: Conflict) -> bool:
    if conflict.key.rpartition(".")[2] not in UNRELATED:
        return False
    return not all(str(value).startswith(LIKE_GELU) for value in conflict.values.values())


def _is_one_function(conflict: Conflict) -> bool:
    return any({str(v) for v in conflict.values.values()} <= names for names in ACTIVATIONS)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_NAME else f"{text[: MOST_NAME - 1]}…"
