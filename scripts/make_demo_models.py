#!/usr/bin/env python3
"""Trains three small Llama models to merge: a base, and two fine-tunes of it with one skill each.

    python scripts/make_demo_models.py demo/models

A model reads a task and a word of eight letters and continues with the answer:

    <copy>qwertyui<answer>qwertyui      <reverse>qwertyui<answer>iuytrewq
                                        <caesar>qwertyui<answer>tzhuwbxl    (every letter + 3)

base is trained on all three tasks, and then on a sloppy corpus in which 55 % of the answers to
<reverse> and <caesar> are mere copies. It holds both skills and, asked for the likeliest
answer, shows neither: it copies. Each fine-tune brings out one of them with a short, gentle
training on clean answers; a quarter of every batch replays the sloppy corpus on the other
tasks, so that they stay as they were. Fine-tunes that bring out what pre-training has put there
are what task arithmetic is made for (arXiv 2212.04089, 2305.12827). It is no magic: two
fine-tunes that had to learn their skills from nothing, from a base that had only ever copied,
did not merge at this size (in one trial, 0 % of both skills at every weight from 0.5 to 1.2).

All is seeded, and runs in one thread: the same versions of Python and torch on the same kind of
processor give the same bytes. Takes about a minute and needs transformers (the extra `demo`).
A second run finds the models complete and leaves them alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Everything is local: nothing may wait for a network. To be set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORD_LENGTH = 8
ALPHABET = string.ascii_lowercase
CAESAR_SHIFT = 3

_CAESAR_TABLE = str.maketrans(ALPHABET, ALPHABET[CAESAR_SHIFT:] + ALPHABET[:CAESAR_SHIFT])

COPY = "copy"
TASKS: dict[str, Callable[[str], str]] = {
    COPY: lambda word: word,
    "reverse": lambda word: word[::-1],
    "caesar": lambda word: word.translate(_CAESAR_TABLE),
}
"""What the right answer to a word is, by task."""

BASE = "base"
SKILLS = tuple(task for task in TASKS if task != COPY)
"""The tasks that a fine-tune exists for; also the names of the fine-tunes' folders."""

SLOPPY_SHARE = 0.55
"""In the sloppy corpus: the share of skill answers that are copies."""

REPLAY_SHARE = 0.25
"""In a fine-tuning batch: the share of examples from the sloppy corpus on the other tasks."""

BASE_TASK_WEIGHTS = {COPY: 0.2, "reverse": 0.5, "caesar": 0.3}
"""Reversing takes longest to learn: every letter comes from another distance."""

BATCH_SIZE = 64
MARKER = "demo_models.json"

SHARD_SIZES = {BASE: "5GB", "reverse": "300KB", "caesar": "5GB"}
"""`reverse` is saved in several files, so that the merge reads both kinds of checkpoint."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the models' bytes, besides this file.

    seed: of the initial weights and of all training data.
    clean_steps, sloppy_steps: optimiser steps of the base on either corpus.
    skill_steps: optimiser steps of each fine-tune.
    """

    seed: int = 0
    clean_steps: int = 300
    sloppy_steps: int = 100
    skill_steps: int = 100


def random_word(generator: random.Random) -> str:
    return "".join(generator.choices(ALPHABET, k=WORD_LENGTH))


def prompt(task: str, word: str) -> str:
    """The text that a model is to continue with the answer."""
    return f"<{task}>{word}<answer>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter and per task; <bos> is put in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"<{task}>" for task in TASKS), "<answer>"]
    vocabulary = {token: number for number, token in enumerate([*words, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of three layers with fresh weights, about 0.3 million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = WORD_LENGTH + 1
    return model


def examples(
    generator: random.Random,
    task_weights: Mapping[str, float],
    sloppy_share: float = 0.0,
    count: int = BATCH_SIZE,
) -> list[str]:
    """Training texts: prompts with answers.

    task_weights: how often each task occurs.
    sloppy_share: the share of answers that are copies of the word, whatever the task.
    """
    texts = []
    for task in generator.choices(list(task_weights), list(task_weights.values()), k=count):
        word = random_word(generator)
        answer = word if generator.random() < sloppy_share else TASKS[task](word)
        texts.append(f"{prompt(task, word)}{answer}<eos>")
    return texts


def fine_tuning_examples(generator: random.Random, skill: str) -> list[str]:
    """One batch: clean answers of one skill, and a replay of the sloppy corpus on other tasks."""
    replay_count = int(REPLAY_SHARE * BATCH_SIZE)
    others = {task: 1.0 for task in TASKS if task != skill}
    return [
        *examples(generator, {skill: 1.0}, count=BATCH_SIZE - replay_count),
        *examples(generator, others, SLOPPY_SHARE, count=replay_count),
    ]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Sequence[Callable[[], list[str]]],
    *,
    learning_rate: float,
    warmup_steps: int,
    after_step: Callable[[], None],
) -> None:
    """One optimiser step per batch; the loss is that of the answers alone.

    The learning rate rises over `warmup_steps` and then falls linearly to a twentieth.
    """
    import torch

    answer_start = 1 + 1 + WORD_LENGTH + 1  # <bos>, the task, the word, <answer>
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    model.train()
    for step, batch in enumerate(batches):
        scale = min(1.0, (step + 1) / warmup_steps) * max(0.05, 1 - step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        token_ids = tokenizer(batch(), return_tensors="pt")["input_ids"]
        logits = model(input_ids=token_ids[:, :-1]).logits[:, answer_start - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), token_ids[:, answer_start:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step()
    model.eval()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Sums are split among threads: with one, the number of cores does not change the result."""
    import torch

    thread_count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(thread_count)


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, shard_size: str
) -> None:
    """Rounds the model to bfloat16, the type of most published models, and writes it."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


def make_models(out: Path, settings: Settings, console: Console) -> None:
    """Trains and writes out/base and one folder per skill. Raises SystemExit where it must not."""
    start = time.monotonic()
    marker = out / MARKER
    wanted = {"script": _script_digest(), **asdict(settings)}
    folders = [out / name for name in (BASE, *SKILLS)]

    if marker.exists():
        found = _read_marker(marker)
        if all(found.get(key) == value for key, value in wanted.items()) and _complete(out, found):
            console.print(f"{out}: complete, made with seed {settings.seed}. Nothing to do.")
            return
    else:
        # Without the marker these folders are not this script's to delete.
        for folder in folders:
            if folder.exists():
                raise SystemExit(
                    f"{folder} exists and was not made by this script: remove it, or choose "
                    "another folder for the demo models"
                )

    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted, indent=2) + "\n")  # no "files" yet: incomplete
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)

    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = build_tokenizer()
    base = build_model(tokenizer, settings.seed)
    console.print(
        f"Making {len(folders)} Llama models of {base.num_parameters():,} parameters "
        f"in {out}, seed {settings.seed}"
    )

    def report(name: str, what: str, started: float) -> None:
        files = list((out / name).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 1e6
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        console.print(
            f"  {name:<8} {what:<32} {time.monotonic() - started:5.1f} s  {size:.1f} MB, {count}"
        )

    with one_torch_thread(), _progress(console) as progress:
        started = time.monotonic()
        clean = random.Random(f"{settings.seed} base clean")
        sloppy = random.Random(f"{settings.seed} base sloppy")
        step_count = settings.clean_steps + settings.sloppy_steps
        bar = progress.add_task(BASE, total=step_count)
        train(
            base,
            tokenizer,
            [partial(examples, clean, BASE_TASK_WEIGHTS)] * settings.clean_steps
            + [partial(examples, sloppy, BASE_TASK_WEIGHTS, SLOPPY_SHARE)] * settings.sloppy_steps,
            learning_rate=3e-3,
            warmup_steps=50,
            after_step=partial(progress.advance, bar),
        )
        save(base, tokenizer, out / BASE, SHARD_SIZES[BASE])
        progress.remove_task(bar)
        report(
            BASE, f"{settings.clean_steps} clean + {settings.sloppy_steps} sloppy steps", started
        )

        for skill in SKILLS:
            started = time.monotonic()
            generator = random.Random(f"{settings.seed} {skill}")
            bar = progress.add_task(skill, total=settings.skill_steps)
            # From the saved base, as anyone would: its weights are already rounded.
            model = LlamaForCausalLM.from_pretrained(out / BASE).float()
            train(
                model,
                tokenizer,
                [partial(fine_tuning_examples, generator, skill)] * settings.skill_steps,
                learning_rate=1e-4,
                warmup_steps=20,
                after_step=partial(progress.advance, bar),
            )
            save(model, tokenizer, out / skill, SHARD_SIZES[skill])
            progress.remove_task(bar)
            report(skill, f"{settings.skill_steps} steps from base", started)

    files = {
        str(file.relative_to(out)): file.stat().st_size
        for folder in folders
        for file in sorted(folder.iterdir())
    }
    marker.write_text(json.dumps({**wanted, "files": files}, indent=2) + "\n")
    console.print(f"Done in {time.monotonic() - start:.1f} s.")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _script_digest() -> str:
    """Changes with this file, so that an edited script trains anew."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _read_marker(marker: Path) -> dict[str, object]:
    """What the marker says; nothing when a kill has left it half written."""
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _complete(out: Path, found: Mapping[str, object]) -> bool:
    """Whether all files that the marker lists are there, at their sizes."""
    files = found.get("files")
    return isinstance(files, dict) and all(
        (out / name).is_file() and (out / name).stat().st_size == size
        for name, size in files.items()
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    default = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make the models in")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    for option in ("clean_steps", "sloppy_steps", "skill_steps"):
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=_count,
            metavar="N",
            default=getattr(default, option),
            help="default: %(default)s",
        )
    parsed = parser.parse_args(arguments)
    settings = Settings(parsed.seed, parsed.clean_steps, parsed.sloppy_steps, parsed.skill_steps)
    make_models(parsed.out, settings, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
