"""What looks wrong about a checkpoint, from its headers and small files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..architecture import LayerStacks, is_optional
from ..checkpoint.tensor import DTYPES, Checkpoint
from ..checkpoint.torch_file import is_torch_name
from ..graph.targets import LAYER_COUNT_KEYS
from .facts import Facts
from .parts import whole_number
from .suspicions import Suspicion
from .suspicions.groups import layers_text, runs
from .suspicions.heads import GENERATING
from .suspicions.suspicion import short

STACK_COUNT_KEYS = (
    *LAYER_COUNT_KEYS,
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "state_dict.")
"""Beginnings of names that training programs leave: data parallel, compiled, PEFT, sharded."""

QUANTISED = (".qweight", ".qzeros", ".g_idx", ".SCB", ".weight_format", ".absmax", ".quant_map")
"""Ends of names of GPTQ, AWQ and bitsandbytes."""

IMBALANCE = 4.0
"""Times the median file that the largest has: what is read in parallel then waits for it."""

LEAST_IMBALANCED_BYTES = 1 << 32

ROWS_OF_IMAGES = {"mllama": 8, "mllama_text_model": 8}
"""Rows that embeddings have beyond the vocabulary, by type of model: of tokens never put out."""

_NUMBERED = re.compile(
    r"^(?P<prefix>(?:[^.]+\.)*?(?:layers|layer|blocks|block|h))\.(?P<number>\d{1,6})\."
)


def header_suspicions(
    checkpoint: Checkpoint, stacks: LayerStacks, facts: Facts
) -> Iterator[Suspicion]:
    """Everything that looks wrong, as far as headers tell."""
    layers = _layers(checkpoint, stacks)
    yield from _numbering(checkpoint, stacks)
    yield from _lacking(layers)
    yield from _layer_count(checkpoint.config or {}, stacks)
    yield from _mixed_dtypes(checkpoint, stacks)
    yield from _rows(checkpoint, facts)
    yield from _head(facts)
    yield from _odd_names(checkpoint)
    yield from _files(checkpoint, facts)
    yield from _stated_dtype(checkpoint)


Layers = Mapping[str, Mapping[int, set[str]]]
"""Suffixes of the tensors of every layer, by stack."""


def _layers(checkpoint: Checkpoint, stacks: LayerStacks) -> Layers:
    found: dict[str, dict[int, set[str]]] = {}
    for name in checkpoint.tensors:
        place = stacks.locate(name)
        if place is not None:
            layer = found.setdefault(place.stack.prefix, {}).setdefault(place.index, set())
            layer.add(place.suffix)
    return found


def _numbering(checkpoint: Checkpoint, stacks: LayerStacks) -> Iterator[Suspicion]:
    """Layers whose numbers have gaps."""
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = _NUMBERED.match(name)
        if match:
            numbers.setdefault(match["prefix"], set()).add(int(match["number"]))
    for prefix, found in numbers.items():
        if prefix in stacks.by_prefix or len(found) < 2:
            continue
        missing = sorted(set(range(max(found))) - found) if max(found) < 100_000 else []
        if missing:
            yield Suspicion(
                "layers-missing",
                f"{short(prefix)} has layers {runs(sorted(found))} and no layer {runs(missing)}: "
                "part of the model is not there; download it again, or number the layers anew",
                "mistake",
            )


def _lacking(layers: Layers) -> Iterator[Suspicion]:
    """Layers that are as most of their stack are, but for some tensors."""
    for prefix, by_number in layers.items():
        kinds = Counter(frozenset(suffixes) for suffixes in by_number.values())
        usual, count = kinds.most_common(1)[0]
        if 2 * count <= len(by_number):
            continue  # layers of several kinds
        lacking: dict[frozenset[str], list[int]] = {}
        for number, suffixes in by_number.items():
            missing = usual - suffixes
            if suffixes < usual and not all(is_optional(suffix) for suffix in missing):
                lacking.setdefault(frozenset(missing), []).append(number)
        for missing, where in lacking.items():
            first = min(missing)
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            yield Suspicion(
                "tensors-missing",
                f"{layers_text(where)} of {short(prefix)} "
                f"lack{'s' * (len(where) == 1)} {short(first)}{more}, which {count} of "
                f"{len(by_number)} layers have; download the model again",
                "mistake",
            )


def _layer_count(config: Mapping[str, object], stacks: LayerStacks) -> Iterator[Suspicion]:
    counts = {
        key: count for key in STACK_COUNT_KEYS if (count := whole_number(config, key)) is not None
    }
    if not counts or not len(stacks):
        return
    predicting = whole_number(config, "num_nextn_predict_layers") or 0
    known = set(counts.values()) | {count + predicting for count in counts.values()}
    found = {stack.layer_count for stack in stacks}
    if found & known:
        return
    key, count = next(iter(counts.items()))
    are = ", ".join(f"{s.layer_count} in {short(s.prefix)}" for s in stacks)
    yield Suspicion(
        "layer-count",
        f"config.json says {key}: {count}, and the layers are {are}; correct config.json, or "
        "download the model again",
        "mistake",
    )


def _mixed_dtypes(checkpoint: Checkpoint, stacks: LayerStacks) -> Iterator[Suspicion]:
    """Tensors of one kind, of several dtypes."""
    kinds: dict[tuple[str, str], dict[str, list[int]]] = {}
    for name, tensor in checkpoint.tensors.items():
        place = stacks.locate(name)
        if place is not None:
            of_kind = kinds.setdefault((place.stack.prefix, place.suffix), {})
            of_kind.setdefault(tensor.dtype, []).append(place.index)
    odd: dict[tuple[str, str, str, str], list[str]] = {}
    for (prefix, suffix), by_dtype in kinds.items():
        if len(by_dtype) < 2:
            continue
        ranked = sorted(by_dtype.items(), key=lambda item: -len(item[1]))
        usual = ranked[0][0]
        for dtype, layers in ranked[1:]:
            key = (prefix, usual, dtype, layers_text(layers))
            odd.setdefault(key, []).append(suffix)
    for (prefix, usual, dtype, where), suffixes in odd.items():
        more = f" and {len(suffixes) - 1} more" if len(suffixes) > 1 else ""
        yield Suspicion(
            "mixed-dtypes",
            f"{short(suffixes[0])}{more} of {short(prefix)} {'is' if not more else 'are'} {dtype} "
            f"in {where} and {usual} in the others; convert them to one dtype "
            "(passthrough with dtype)",
            "note",
        )


def _rows(checkpoint: Checkpoint, facts: Facts) -> Iterator[Suspicion]:
    """Vocabularies of several sizes."""
    if facts.embedding_rows is None:
        return
    rows = facts.embedding_rows - ROWS_OF_IMAGES.get(facts.model_type or "", 0)
    if facts.vocabulary is not None and facts.vocabulary != rows:
        yield Suspicion(
            "vocabulary-size",
            f"config.json says vocab_size: {facts.vocabulary:,}, and the embedding has {rows:,} "
            "rows, so that loading it fails; correct config.json",
            "mistake",
        )
    if facts.head_rows not in (None, rows):
        yield Suspicion(
            "head-rows",
            f"the output head has {facts.head_rows:,} rows and the embedding {rows:,}; they are "
            "of different vocabularies",
            "mistake",
        )
    if facts.tokens is not None and facts.tokens > rows:
        yield Suspicion(
            "tokens-without-rows",
            f"the tokenizer has {facts.tokens:,} tokens, and the embedding {rows:,} rows: the last "
            "tokens have none; the tokenizer is another model's, or the rows were not added",
            "mistake",
        )
    elif facts.tokens is not None and facts.tokens < rows:
        yield Suspicion(
            "vocabulary-padded",
            f"{rows - facts.tokens:,} of {rows:,} rows of the embedding belong to no token of the "
            "tokenizer: padding",
            "note",
        )
    for key in ("bos_token_id", "eos_token_id"):
        number = (checkpoint.config or {}).get(key)
        if type(number) is int and number >= rows:
            yield Suspicion(
                "token-without-row",
                f"config.json says {key}: {number:,}, and the embedding has {rows:,} rows; correct "
                "config.json",
                "note",
            )


def _head(facts: Facts) -> Iterator[Suspicion]:
    generates = any(name.endswith(GENERATING) for name in facts.architectures)
    if generates and not facts.has_head and facts.tied is False and facts.embedding_rows:
        yield Suspicion(
            "head-missing",
            "config.json says tie_word_embeddings: false, and no output head is stored: whoever "
            "loads it gets one of random numbers; set the key to true if the head is the embedding",
            "mistake",
        )


def _odd_names(checkpoint: Checkpoint) -> Iterator[Suspicion]:
    """What training, quantisation and adapters leave."""
    names = list(checkpoint.tensors)
    for wrapper in WRAPPERS:
        wrapped = [name for name in names if name.startswith(wrapper)]
        if wrapped:
            yield Suspicion(
                "names-wrapped",
                f"{len(wrapped)} of {len(names)} names begin with {wrapper} "
                f"({short(wrapped[0])}): the model was saved from within a wrapper, and loads "
                "nowhere under these names; save the model itself",
                "mistake",
            )
    quantised = [name for name in names if name.endswith(QUANTISED)]
    if quantised:
        yield Suspicion(
            "quantised",
            f"{len(quantised)} tensors are of a quantised model ({short(quantised[0])}), which "
            "cannot be merged; use the model that it was made from",
            "note",
        )
    factors = [name for name in names if ".lora_" in name]
    if factors:
        yield Suspicion(
            "adapter-inside",
            f"{len(factors)} tensors are an adapter's factors ({short(factors[0])}); name the "
            "adapter beside its model (MODEL+ADAPTER) instead",
            "note",
        )
    empty = [name for name, tensor in checkpoint.tensors.items() if not tensor.element_count]
    if empty:
        yield Suspicion(
            "empty-tensors",
            f"{len(empty)} tensors have no elements ({short(empty[0])}): they were not gathered "
            "when the model was saved; save it again",
            "mistake",
        )


def _files(checkpoint: Checkpoint, facts: Facts) -> Iterator[Suspicion]:
    pickles = [file.path for file in checkpoint.files if is_torch_name(file.path)]
    if pickles:
        yield Suspicion(
            "torch-files",
            f"{len(pickles)} of {len(checkpoint.files)} files are torch's ({short(pickles[0])}), "
            "in whose place other programs may run code; passthrough writes them as safetensors",
            "note",
        )
    sizes = sorted(file.size_bytes for file in checkpoint.files)
    median = sizes[len(sizes) // 2]
    if sizes[-1] > LEAST_IMBALANCED_BYTES and sizes[-1] > IMBALANCE * median:
        yield Suspicion(
            "shards-uneven",
            f"the largest file has {sizes[-1] / median:.0f} times the bytes of the median one; "
            "--max-shard-size of a merge makes them even",
            "note",
        )
    if checkpoint.config is None:
        yield Suspicion(
            "no-config",
            "there is no config.json, so that it loads nowhere, and merges by it have none; take "
            "that of its architecture",
            "note",
        )
    elif not facts.tokenizer_files and facts.embedding_rows is not None:
        yield Suspicion(
            "no-tokenizer",
            "there is no tokenizer beside it; copy that of the model that it was made from",
            "note",
        )


def _stated_dtype(checkpoint: Checkpoint) -> Iterator[Suspicion]:
    config = checkpoint.config or {}
    stated = config.get("torch_dtype", config.get("dtype"))
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if DTYPES[tensor.dtype].is_float:
            sizes[DTYPES[tensor.dtype].torch_name] += tensor.size_bytes
    if isinstance(stated, str) and sizes and "quantization_config" not in config:
        main = sizes.most_common(1)[0][0]
        if stated.removeprefix("torch.") != main and stated != "auto":
            yield Suspicion(
                "stated-dtype",
                f"config.json says {short(stated)}, and most weights are {main}: what loads it by "
                "config.json converts them",
                "note",
            )


def sequence_of(found: Sequence[Suspicion]) -> tuple[Suspicion, ...]:
    """Mistakes first."""
    return tuple(sorted(found, key=lambda each: each.severity != "mistake"))
