#!/usr/bin/env python3
"""Shows what the demo's merge has gained: base, specialists and merged model on both skills.

    python scripts/evaluate_demo.py demo/models demo/merged

Every model is loaded by transformers, with its own tokenizer, and answers the same 1000 random
words per skill greedily. An answer counts when the whole of it is right. Of 26^8 words a
training saw about 32,000: the words asked here are new to all models.

Exit code: 0 when the merged model beats each specialist on the other's skill, 1 when it does
not, 2 when a model cannot be loaded.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from make_demo_models import BASE, SKILLS, TASKS, one_torch_thread, prompt, random_word

MERGED = "merged"


def accuracies(folder: Path, word_count: int) -> dict[str, float]:
    """The share of words (0 to 1) that the model in `folder` answers exactly right, by skill."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    result = {}
    for skill in SKILLS:
        # A seed that no training uses; equal for all models, so that they answer the same words.
        generator = random.Random(f"evaluation {skill}")
        words = [random_word(generator) for _ in range(word_count)]
        inputs = tokenizer(
            [prompt(skill, word) for word in words],
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            generated = model.generate(**inputs, do_sample=False)
        answers = tokenizer.batch_decode(
            generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right = sum(
            answer == TASKS[skill](word) for answer, word in zip(answers, words, strict=True)
        )
        result[skill] = right / word_count
    return result


def table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """rows: accuracies by skill, by model."""
    view = Table(title="Exactly right answers", title_justify="left", title_style="bold")
    view.add_column("model", no_wrap=True)
    for skill in SKILLS:
        view.add_column(skill, justify="right", no_wrap=True)
    view.add_column("mean", justify="right", no_wrap=True)
    for name, by_skill in rows.items():
        if name == MERGED:
            view.add_section()
        mean = sum(by_skill.values()) / len(by_skill)
        cells = [_percent(by_skill[skill]) for skill in SKILLS]
        view.add_row(name, *cells, _percent(mean), style="bold" if name == MERGED else None)
    return view


def verdict(rows: Mapping[str, Mapping[str, float]]) -> tuple[bool, str]:
    """Whether the merged model beats each specialist on the other's skill, and a sentence."""
    merged = rows[MERGED]
    beaten: list[str] = []
    not_beaten: list[str] = []
    for specialist in SKILLS:
        for other in SKILLS:
            if other == specialist:
                continue
            comparison = (
                f"the {specialist} specialist on {other} "
                f"({_percent(merged[other])} to {_percent(rows[specialist][other])})"
            )
            beats = merged[other] > rows[specialist][other]
            (beaten if beats else not_beaten).append(comparison)
    own = " and ".join(
        f"{100 * (merged[skill] - rows[skill][skill]):+.1f} points on {skill}" for skill in SKILLS
    )
    parts = []
    if beaten:
        parts.append(f"beats {' and '.join(beaten)}")
    if not_beaten:
        parts.append(f"does not beat {' and '.join(not_beaten)}")
    sentence = (
        f"The merged model {', but '.join(parts)}; against each specialist on its own skill "
        f"it stands at {own}."
    )
    return not not_beaten, sentence


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", type=Path, metavar="MODELS_DIR", help="of make_demo_models.py")
    parser.add_argument("merged", type=Path, metavar="MERGED_DIR", help="the merged model")
    parser.add_argument(
        "--words", type=int, default=1000, metavar="N", help="per skill; default: %(default)s"
    )
    parsed = parser.parse_args(arguments)
    folders = {name: parsed.models / name for name in (BASE, *SKILLS)} | {MERGED: parsed.merged}
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for folder in folders.values():
        if not (folder / "config.json").is_file():
            errors.print(f"{folder}: no model here (config.json is missing)", markup=False)
            return 2

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    console = Console(highlight=False)
    rows = {}
    with one_torch_thread(), console.status("") as status:
        for name, folder in folders.items():
            status.update(f"asking {name}")
            try:
                rows[name] = accuracies(folder, parsed.words)
            except (OSError, ValueError, RuntimeError) as error:
                errors.print(f"{folder}: transformers cannot use it: {error}", markup=False)
                return 2
    success, sentence = verdict(rows)
    console.print(table(rows))
    console.print(sentence)
    return 0 if success else 1


if __name__ == "__main__":
    sys.exit(main())
