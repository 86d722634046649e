"""Random tokenizers, models that have them, and recipes that match their vocabularies.

The vocabularies of a recipe's models overlap, and number what they share in unlike order. Some
models have added tokens, special ones among them, of which others lack some; some have longer
embeddings than vocabularies, and some BPE ones tokens without rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from lazymerge.engine.planning import signatures
from tokenizer_cases import KINDS, add_special, make_model
from tokenizers import Tokenizer, pre_tokenizers

from comparing.recipes import random_recipe

METHODS = (
    "linear",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "slerp",
    "nuslerp",
    "multislerp",
    "model_stock",
    "nearswap",
    "passthrough",
)
"""Without chance, and without sums that mergekit computes in float32 whatever the dtype."""

UNDECIDED = ("rescale", "nuslerp_flatten")
"""Parameters that recipes leave out. For the first, mergekit sums norms in float32. Where nuslerp
goes row by row, two models' rows of a token that the base lacks differ from the mean, which is its
row, in opposite directions, and rounding decides what lies between them."""

BY_RANK = ("ties", "breadcrumbs", "nearswap")
"""Methods where equal magnitudes, of which 16 bits have many, are told apart by their places, and
which lazymerge computes in float32 unless an input is float64."""

WORDS = (
    *("hello", "world", "the", "quick", "brown", "fox", "lazy", "dog", "sleeps", "merging"),
    *("models", "of", "language", "tokens", "and", "vocabularies", "differ", "zebras", "eat"),
    *("grass", "embedding", "rows", "order", "union", "padding", "special", "there", "river"),
)

ADDED = ("<|im_start|>", "<|im_end|>", "<tool>", "<pad>", "[MASK]", "plainword", "another one")

TEMPLATES = (
    "{{ messages[0]['content'] }} of one",
    "{% for message in messages %}{{ message.content }}{% endfor %}",
)

TEXTS = (
    "hello world",
    "the lazy dog sleeps<|im_end|>",
    "plainword and zebras",
    "<tool>rows of [MASK]",
)

Models = Mapping[str, Path]


def make_tokenizer(kind: str, random: Random) -> Tokenizer:
    """A tokenizer of some words and parts of them. It is not trained: what comes of that depends on
    the order of hash tables."""
    document = json.loads(KINDS[kind](["skeleton"]).to_str())
    special = [added["content"] for added in document["added_tokens"]]
    words = random.sample(WORDS, random.randint(8, 20))
    is_shuffled = random.random() < 0.7
    model = document["model"]
    if kind == "bpe":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = _merges([("Ġ" if random.random() < 0.5 else "") + word for word in words])
        tokens = [*letters, *("".join(pair) for pair in merges)]
        model["merges"] = [list(pair) for pair in merges]
    else:
        letters = sorted(set("".join(words)))
        parts = [word[: random.randint(2, len(word))] for word in words if len(word) > 1]
        before, after = ("", "##") if kind == "word_piece" else ("▁", "")
        tokens = [before + part for part in (*letters, *words, *parts)]
        tokens += [after + part for part in (*letters, *parts)]
    tokens = list(dict.fromkeys([*special, *tokens]))
    if is_shuffled:
        random.shuffle(tokens)
    numbers = {token: number for number, token in enumerate(tokens)}
    if kind == "unigram":
        model["vocab"] = [[token, -1.0 - random.random()] for token in tokens]
        model["unk_id"] = numbers["<unk>"]
    else:
        model["vocab"] = numbers
    for added in document["added_tokens"]:
        added["id"] = numbers[added["content"]]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    for token in random.sample(ADDED, random.randint(0, 4)):
        if random.random() < 0.7:
            add_special(tokenizer, token)
        else:
            tokenizer.add_tokens([token])
    return tokenizer


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that lead to these words, a letter after the other."""
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    return list(merges)


def make_models(folder: Path, kind: str, dtypes: Sequence[torch.dtype], random: Random) -> Models:
    """Four models with tokenizers of a kind; all of them with a head, or all without."""
    has_head = random.random() < 0.7
    models = {}
    for seed, name in enumerate("abcd"):
        tokenizer = make_tokenizer(kind, random)
        size = tokenizer.get_vocab_size()
        more = random.choice([0, 0, 0, 3, 64 - size % 64])
        if kind == "bpe" and random.random() < 0.05:
            more = -2
        config: dict[str, Any] = {}
        if random.random() < 0.5:
            config["chat_template"] = random.choice(TEMPLATES)
        models[name] = folder / name
        make_model(
            folder / name,
            tokenizer,
            rows=size + more,
            dtype=random.choice(dtypes),
            config=config,
            seed=seed + 10 * random.randint(0, 10**6),
            has_head=has_head,
        )
    return models


def vocabulary(folder: Path) -> dict[str, int]:
    numbers: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return numbers


def token_setting(models: Models, merged: Sequence[str], token: str, random: Random) -> Any:
    """What a recipe says of a token. merged: names of models that are merged."""
    having = [name for name in merged if token in vocabulary(models[name])]
    name = random.choice(merged)
    kinds = ["zero", "token", "token_id", *(["model"] * 4 if having else [])]
    source: Any
    match random.choice(kinds):
        case "zero":
            source = {"kind": "zero"}
        case "model":
            source = str(models[random.choice(having)])
        case "token":
            numbers = vocabulary(models[name])
            source = {"kind": "model_token", "model": str(models[name])}
            source["token"] = random.choice(sorted(numbers))
        case _:
            source = {"kind": "model_token", "model": str(models[name])}
            source["token_id"] = random.randint(0, 20)
    setting = {"source": source}
    if random.random() < 0.4:
        setting["force"] = random.random() < 0.8
    return setting


def tokenizer_keys(
    models: Models, merged: Sequence[str], random: Random, base: str | None, *, may_pad: bool
) -> dict[str, Any]:
    """`tokenizer` or `tokenizer_source`, and sometimes `chat_template`. base: name of the model.
    may_pad: padding's rows are equal."""
    # without a base model, mergekit takes any model's for the base
    others = random.sample([*models], 2)
    source = random.choice(["union", "union", "union" if base is None else "base", *others])
    place = str(models[source]) if source in models else source
    keys: dict[str, Any] = {}
    if random.random() < 0.4:
        keys["tokenizer_source"] = place
    else:
        is_said = source != "union" or random.random() < 0.8
        tokenizer: dict[str, Any] = {"source": place} if is_said else {}
        if merged and random.random() < 0.7:
            every = sorted(set().union(*(vocabulary(models[name]) for name in merged)))
            tokens = ["<new>", "<newer>", *ADDED, *random.sample(every, 4)]
            if source == "base" and base is not None:
                # mergekit takes those that it adds for the base's own, whatever their rows hold
                known = sorted(vocabulary(models[base]))
                tokens = [token for token in tokens if token in known] + random.sample(known, 3)
            chosen = dict.fromkeys(random.sample(tokens, random.randint(1, min(5, len(tokens)))))
            tokenizer["tokens"] = {
                token: token_setting(models, merged, token, random) for token in chosen
            }
        if may_pad and random.random() < 0.5:
            tokenizer["pad_to_multiple_of"] = random.choice([8, 32, 64, 7])
        keys["tokenizer"] = tokenizer
    if random.random() < 0.4:
        keys["chat_template"] = random.choice(["auto", "auto", "chatml", TEMPLATES[0]])
    return keys


def in_slices(document: dict[str, Any], models: Models, random: Random) -> dict[str, Any]:
    """The same models merged in several slices, each with a base of its own now and then."""
    entries = document.pop("models")
    listed = [entry["model"] for entry in entries]
    base = document.get("base_model")
    if base is not None and base not in listed:
        entries.append({"model": base})
        listed.append(base)
    slices = []
    for _ in range(random.randint(1, 3)):
        order = random.sample(entries, len(entries))
        piece: dict[str, Any] = {"sources": [{**entry, "layer_range": [0, 1]} for entry in order]}
        if document["merge_method"] in ("linear", "passthrough") and random.random() < 0.6:
            piece["base_model"] = random.choice(listed)
        slices.append(piece)
    if document["merge_method"] == "passthrough":
        others = [str(path) for path in models.values()]
        for piece in slices:
            piece["sources"][0]["model"] = random.choice(others)
            piece.pop("base_model", None)
    return {**document, "slices": slices}


def leave_out(value: Any, key: str) -> None:
    """Takes a key out of every mapping."""
    if isinstance(value, dict):
        value.pop(key, None)
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            leave_out(inner, key)


def using_a_merge(document: dict[str, Any], models: Models, random: Random) -> dict[str, Any]:
    """The recipe with a merge in place of one of its models; that one is in its entry `before`."""
    text = json.dumps(document)
    named = [str(path) for path in models.values() if json.dumps(str(path)) in text]
    replaced = random.choice(named)
    other = random.choice([str(path) for path in models.values() if str(path) != replaced])
    inner = {
        "name": "first",
        "merge_method": "linear",
        "base_model": replaced,
        "models": [
            {"model": model, "parameters": {"weight": round(random.uniform(0.2, 1.0), 3)}}
            for model in (replaced, other)
        ],
        "dtype": "float64",
        "out_dtype": "float64",
        "tokenizer_source": random.choice(["union", "union", other]),
    }
    document = json.loads(text.replace(json.dumps(replaced), json.dumps("first")))
    return {**document, "before": [inner]}


def tokenizer_recipe(folder: Path, kind: str, number: int, random: Random) -> dict[str, Any]:
    """A recipe, and its models in a folder. number: says which method. What another document of the
    recipe merges is in the entry `before`."""
    method = METHODS[number % len(METHODS)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if method in BY_RANK:
        dtypes = [torch.float64]
    models = make_models(folder, kind, dtypes, random)
    order = random.sample([*models.values()], len(models))
    document = random_recipe(signatures()[method], order, random, 3)
    if method == "passthrough":
        document.pop("base_model", None)
    if random.random() < 0.3:
        document = in_slices(document, models, random)
    before = []
    if random.random() < 0.25:
        document = using_a_merge(document, models, random)
        before = document.pop("before")
    text = json.dumps(document)
    merged = [name for name, path in models.items() if json.dumps(str(path)) in text]
    base = next((name for name in models if str(models[name]) == document.get("base_model")), None)
    for key in UNDECIDED:
        leave_out(document, key)
    document |= {"dtype": "float64", "out_dtype": random.choice(["float32", "bfloat16", "float16"])}
    keys = tokenizer_keys(models, merged, random, base, may_pad=method not in BY_RANK)
    return {**document, **keys, "before": before}
