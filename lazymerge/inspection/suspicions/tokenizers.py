"""Models whose tokenizers differ, where the recipe says nothing of tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...checkpoint.tensor import Checkpoint
from ...checkpoint.wording import shown
from ...engine.plan import Plan
from ...engine.tokenizer import vocabulary_size
from ...errors import InputError
from ...vocabulary.files import TEMPLATE_KEY, TEMPLATE_NAME
from ...vocabulary.reading import CONFIG_NAME, has_file, read_mapping
from ..vocabularies import Comparison, compare_vocabularies
from .suspicion import Suspicion, listed, short

FEW = 0.01
"""Reserved tokens that fine-tunes give a meaning are fewer than this share of a vocabulary."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_suspicions(plan: Plan) -> Iterator[Suspicion]:
    """Differences from the model whose tokenizer files are copied."""
    recipe = plan.recipe
    if recipe.asks_for_tokenizer:
        return
    main = recipe.main_model
    folder = plan.checkpoints[main].local_folder
    settings = {model: _settings(each) for model, each in plan.checkpoints.items()}
    templates = [
        model
        for model, checkpoint in plan.checkpoints.items()
        if _has_template(checkpoint, settings[model])
    ]
    for model, checkpoint in plan.checkpoints.items():
        if model == main or checkpoint.local_folder == folder:
            continue
        compared = compare_vocabularies(folder, checkpoint.local_folder)
        if compared is not None:
            yield from _differing(plan, main, model, compared)
        yield from _special(main, model, settings[main], settings[model])
    if templates and main not in templates:
        yield Suspicion(
            "chat-template",
            f"{listed(templates)} {'has' if len(templates) == 1 else 'have'} a chat template, and "
            f"{short(main)}, whose tokenizer files the output gets, has none; chat_template: auto "
            "gives the output one",
            "note",
        )


def _differing(plan: Plan, main: str, model: str, compared: Comparison) -> Iterator[Suspicion]:
    """Numbers that stand for other tokens, and tokens that one model alone has."""
    if compared.differing > FEW * compared.shared:
        yield Suspicion(
            "tokenizer-mismatch",
            f"{compared.differing:,} of {compared.shared:,} token numbers stand for other tokens "
            f"in {short(model)} than in {short(main)}, and the recipe merges rows by number; match "
            "them by token: `tokenizer: {source: base}`, or union",
            "mistake",
        )
    elif compared.differing:
        yield Suspicion(
            "tokenizer-mismatch",
            f"{compared.differing:,} of {compared.shared:,} token numbers (the first is "
            f"{compared.first:,}) stand for other tokens in {short(model)} than in {short(main)}, "
            "and rows are merged by number; `tokenizer: {source: base}` matches them by token",
            "note",
        )
    elif vocabulary_size(plan.checkpoints[main]) == vocabulary_size(plan.checkpoints[model]):
        ours, theirs = compared.sizes
        yield Suspicion(
            "tokenizer-mismatch",
            f"{short(model)} has {theirs:,} tokens and {short(main)}, whose tokenizer files the "
            f"output gets, has {ours:,}; `tokenizer: {{source: union}}` keeps them all",
            "note",
        )


def _special(
    main: str, model: str, ours: Mapping[str, object], theirs: Mapping[str, object]
) -> Iterator[Suspicion]:
    """Special tokens of another name."""
    differing = [
        f"{key} is {shown(_content(theirs[key]))} and not {shown(_content(ours[key]))}"
        for key in SPECIAL_TOKENS
        if key in ours
        and key in theirs
        and None not in (ours[key], theirs[key])
        and _content(ours[key]) != _content(theirs[key])
    ]
    if differing:
        yield Suspicion(
            "special-tokens",
            f"in {short(model)} {', '.join(differing)}; the output has the tokens of "
            f"{short(main)}, and what {short(model)} has learnt of its own may not show",
            "note",
        )


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _settings(checkpoint: Checkpoint) -> Mapping[str, object]:
    """tokenizer_config.json, empty where it is not there or broken."""
    try:
        if has_file(checkpoint.local_folder, CONFIG_NAME):
            return read_mapping(checkpoint.local_folder, CONFIG_NAME)
    except InputError:
        pass  # the files are copied as they are
    return {}


def _has_template(checkpoint: Checkpoint, settings: Mapping[str, object]) -> bool:
    return bool(settings.get(TEMPLATE_KEY)) or has_file(checkpoint.local_folder, TEMPLATE_NAME)
