"""Names of the same tensors that differ between exports of a model.

`AutoModel` writes `layers.0.…` where `AutoModelForCausalLM` writes `model.layers.0.…`; versions of
transformers disagree on where a language model lies within one that sees; torch.compile and
distributed training put a word before everything. The tables below are the whole knowledge: nothing
here knows what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

Renaming = tuple[tuple[str, str], ...]
"""Prefixes and what stands in their place. The first that fits a name counts."""

WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""What torch.compile, distributed training and adapters put before every name."""

LAYOUTS: tuple[tuple[Renaming, Renaming], ...] = (
    # models with a language model within them: llava, gemma 3, mistral 3, …
    (
        (
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
            ("image_newline", "model.image_newline"),
        ),
        (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.image_newline", "image_newline"),
        ),
    ),
    # qwen 2 and 2.5 VL
    (
        (("visual.", "model.visual."), ("model.", "model.language_model.")),
        (("model.visual.", "visual."), ("model.language_model.", "model.")),
    ),
    # clip's vision model, as it was written until transformers 5
    (
        (("vision_tower.vision_model.", "vision_tower."),),
        (("vision_tower.", "vision_tower.vision_model."),),
    ),
    (
        (("model.vision_tower.vision_model.", "model.vision_tower."),),
        (("model.vision_tower.", "model.vision_tower.vision_model."),),
    ),
)
"""Pairs of renamings, each the other's inverse."""

MOST_ROUNDS = 3
"""How often renamings are looked for, one or two at a time: a wrapper and a prefix, a layout, a
part of it."""

MOST = 0.5
"""The share of a model's names that begin with a word which only one export puts before them. What
fewer begin with, `score.` or `lm_head.`, is a part's name and not taken for another's."""

NOTICEABLE = 0.01
"""A word that fewer names begin with is none that names could be meant to stand behind: there are a
hundred others at most, whatever a file holds."""

SAMPLE = 300
"""Names that renamings are tried on; a model may have a hundred thousand."""


def renamed(names: Collection[str], reference: Collection[str]) -> dict[str, str]:
    """Other names for a model's tensors, under which more of them are those of the reference.

    names: of the model's tensors. reference: those of the model whose names the output has.

    Returns new names by old ones; empty if none fit better than their own.
    """
    known = frozenset(reference)
    current = {name: name for name in names}
    for _ in range(MOST_ROUNDS):
        steps = _steps(current.values(), known)
        changed = {old: _renamed(new, steps, known) for old, new in current.items()}
        if not steps or len(set(changed.values())) < len(changed):
            break
        if _matches(changed.values(), known) <= _matches(current.values(), known):
            break
        current = changed
    return {} if all(old == new for old, new in current.items()) else current


def _steps(names: Collection[str], known: frozenset[str]) -> tuple[Renaming, ...]:
    """The renaming, or the two, by which most of some names become known; none if all are, or none
    makes more so."""
    sample = sorted(names)[:: max(1, len(names) // SAMPLE)]
    fixed: list[Renaming] = [((wrapper, ""),) for wrapper in WRAPPERS]
    fixed += [renaming for pair in LAYOUTS for renaming in pair]
    words = [word for word in _common_first_words(names) if word not in WRAPPERS]
    taken: list[Renaming] = [((word, ""),) for word in words]
    put: list[Renaming] = [(("", word),) for word in _words_to_put(sample, known)]
    candidates = [*fixed, *taken, *put]
    singles = [(renaming,) for renaming in candidates]
    pairs = [
        (first, second)
        for first in candidates
        for second in candidates
        # one word for another would make a part of the model another part
        if first != second and not (first in taken and second in put)
    ]
    best: tuple[Renaming, ...] = ()
    matches = _matches(sample, known)
    for steps in (*singles, *pairs):
        if matches == len(sample):
            break
        found = _matches([_renamed(name, steps, known) for name in sample], known)
        if found > matches:
            best, matches = steps, found
    return best


def _matches(names: Collection[str], known: Collection[str]) -> int:
    return sum(name in known for name in names)


def _renamed(name: str, steps: tuple[Renaming, ...], known: Collection[str]) -> str:
    """A name after some steps; one that is known stays, and so does one that does not become known
    by a word put before it."""
    new = name
    for renaming in steps:
        if new in known:
            return new
        new = _rename(new, renaming)
    is_put = any(not before for renaming in steps for before, _ in renaming)
    return new if new in known or not is_put else name


def _rename(name: str, renaming: Renaming) -> str:
    for before, after in renaming:
        if name.startswith(before):
            return after + name[len(before) :]
    return name


def _words_to_put(sample: Collection[str], known: frozenset[str]) -> list[str]:
    """Words that most known names begin with. None if names fit behind another word of theirs as
    well: `encoder.layers` may be of a model that sees, or of the one beside it that reads."""
    bare = [name for name in _without_wrappers(sample) if name not in known]
    firsts = _common_first_words(known, NOTICEABLE)
    fits = {word: sum(word + name in known for name in bare) for word in firsts}
    return [
        word
        for word in _common_first_words(known)
        if all(2 * fits[other] < fits[word] for other in firsts if other != word)
    ]


def _without_wrappers(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        yield name


def _common_first_words(names: Collection[str], share: float = MOST) -> list[str]:
    """The words that such a share of names begin with, the most frequent first, each with its
    dot."""
    counts: dict[str, int] = {}
    for name in names:
        word, dot, _ = name.partition(".")
        if dot:
            counts[word + dot] = counts.get(word + dot, 0) + 1
    common = [word for word, found in counts.items() if found >= share * len(names)]
    return sorted(common, key=lambda word: -counts[word])


def example(names: Mapping[str, str]) -> tuple[str, str]:
    """An old name and its new one, for people."""
    return next((old, new) for old, new in names.items() if old != new)
