#!/usr/bin/env python3
"""Compare what lazymerge and mergekit make of random recipes of every form, over many families.

    python scripts/compare_forms_with_mergekit.py --recipes 40
    python scripts/compare_forms_with_mergekit.py --seed 7 --forms slices modules --only 13

compare_with_mergekit.py compares the methods' arithmetic; this one what a recipe's form decides:
which tensors there are, from which layers of which models, under which of several parameters, and
what config.json says. mergekit is the real one, in a virtual environment of its own. Models are
tiny and made by transformers; `dtype` is float64, so that mergekit rounds once, as lazymerge does;
`out_dtype` varies.

    frankenmerge  passthrough of slices: layers left out, repeated, put in another order
    slices        slices merged from several sources, parameters at every level
    modules       models with several layer stacks, part by part
    models        whole models, with gradients and filters
    documents     merges that use other merges of the same file; mergekit makes one after the other
    adapters      models with LoRA adapters; mergekit has peft merge those first, in float32
    torch         models in torch files

Names, shapes and dtypes must be equal, elements no more than an ulp of the output's dtype apart,
and of config.json the entries that a form decides. Recipes that mergekit does not merge are counted
and not compared. Exit 1 if anything is wrong; then examples and their recipes follow.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from lazymerge.errors import LazymergeError
from lazymerge.version import __version__
from safetensors.torch import load_file, save_file

from benchmarking.processes import BenchError
from benchmarking.programs import PEERS, make_venv, peer_facts
from benchmarking.report import markdown_table
from comparing.programs import Mergekit, Refused, merge_with_lazymerge
from families import FAMILIES, Family, perturbed

MOST_EXAMPLES = 5

LAYERS = {"a": 3, "b": 3, "c": 5}
"""Layers of a family's models; `c` has more."""

DECODERS = ("llama", "llama, tied", "mistral", "qwen2", "qwen3", "gemma 2", "phi 3")
WHOLE = (*DECODERS, "gemma 3", "gpt2", "mamba", "roberta", "t5, gated")
WITH_MODULES = ("t5, gated",)
"""Families that mergekit merges as they are. Of others it leaves tensors out (biases of llama,
experts of deepseek-v3), asks for some that there are not (whisper, falcon, gpt-neox), or writes
other names (mixtral, llava); that their merges load is shown by tests/test_families.py."""

CONFIG_KEYS = (
    *("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers", "depth", "layer_types", "vocab_size", "model_type"),
    *("hidden_size", "tie_word_embeddings", "architectures"),
)
"""Of config.json and the configs in it."""

Models = Mapping[str, Path]


def random_setting(random: Random, low: float, high: float, *, is_condition: bool = True) -> Any:
    """A value, a gradient, or conditions, as recipes write them."""

    def number() -> float:
        return round(random.uniform(low, high), 3)

    kind = random.random()
    if kind < 0.5:
        return number()
    if kind < 0.75 or not is_condition:
        return [number() for _ in range(random.randint(2, 4))]
    filters = random.sample(["mlp", "attn", "norm", ".1.", "up_proj"], 2)
    conditions: list[Any] = [
        {"filter": text, "value": random_setting(random, low, high, is_condition=False)}
        for text in filters
    ]
    return [*conditions, {"value": number()}]


def maybe(random: Random, low: float, high: float, name: str, share: float = 0.5) -> dict[str, Any]:
    """A `parameters` block with one parameter, or none."""
    if random.random() >= share:
        return {}
    return {"parameters": {name: random_setting(random, low, high)}}


def random_range(random: Random, model: str, length: int | None = None) -> list[int]:
    count = LAYERS[model]
    length = random.randint(1, count) if length is None else length
    start = random.randint(0, count - length)
    return [start, start + length]


def frankenmerge(models: Models, random: Random) -> dict[str, Any]:
    slices = []
    for _ in range(random.randint(1, 4)):
        name = random.choice([*models])
        source = {
            "model": str(models[name]),
            "layer_range": random_range(random, name),
            **maybe(random, 0.5, 1.5, "scale", 0.4),
        }
        slices.append({"sources": [source], **maybe(random, 0.5, 1.5, "scale", 0.2)})
    return {
        "merge_method": "passthrough",
        "slices": slices,
        **maybe(random, 0.5, 1.5, "scale", 0.2),
    }


def merged_slice(
    models: Models, random: Random, method: str, base: str | None, count: int
) -> dict[str, Any]:
    """A slice of several sources.

    count: of sources. Of the last slice's mergekit takes as many as the first slice has for what
        stands after the layers, so all slices have as many.
    """
    names = random.sample([*models], count)
    piece: dict[str, Any] = {}
    if base is not None:
        if base not in names:
            names[0] = base
        if random.random() < 0.3:
            piece["base_model"] = str(models[random.choice(names)])
    length = random.randint(1, min(LAYERS[name] for name in names) - 1)
    parameter = {"slerp": "t", "linear": "weight", "task_arithmetic": "weight"}[method]
    piece["sources"] = [
        {
            "model": str(models[name]),
            "layer_range": random_range(random, name, length),
            **({} if method == "slerp" else maybe(random, 0.2, 1.0, parameter)),
        }
        for name in names
    ]
    return {**piece, **maybe(random, 0.2, 0.8, parameter)}


def slices(models: Models, random: Random) -> dict[str, Any]:
    method = random.choice(["linear", "slerp", "task_arithmetic"])
    base = None if method == "linear" else random.choice([*models])
    parameter = "t" if method == "slerp" else "weight"
    count = 2 if method == "slerp" else random.randint(2, 3)
    document: dict[str, Any] = {
        "merge_method": method,
        "slices": [
            merged_slice(models, random, method, base, count) for _ in range(random.randint(1, 3))
        ],
        "parameters": {parameter: random_setting(random, 0.2, 0.8)},
    }
    return document if base is None else {**document, "base_model": str(models[base])}


def whole(models: Models, random: Random) -> dict[str, Any]:
    method = random.choice(["linear", "slerp", "task_arithmetic"])
    names = ["a", "b"]
    parameter = "t" if method == "slerp" else "weight"
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {
                "model": str(models[name]),
                **({} if method == "slerp" else maybe(random, 0.2, 1.0, parameter)),
            }
            for name in names
        ],
        "parameters": {parameter: random_setting(random, 0.2, 0.8)},
    }
    return document if method == "linear" else {**document, "base_model": str(models["a"])}


MODULES = {"t5, gated": {"encoder": True, "decoder": True, "shared": False}}
"""By family: what mergekit calls its modules, and whether their layers may be sliced here."""


def modules(models: Models, random: Random, family: str) -> dict[str, Any]:
    method = random.choice(["linear", "slerp"])
    parameter = "t" if method == "slerp" else "weight"
    found: dict[str, Any] = {}
    for module, has_layers in MODULES[family].items():
        if has_layers and random.random() < 0.5:
            content: dict[str, Any] = {
                "slices": [
                    merged_slice(models, random, method, "a" if method == "slerp" else None, 2)
                    for _ in range(random.randint(1, 2))
                ]
            }
            for number, piece in enumerate(content["slices"]):
                # t5's first layers hold what all use; mergekit does not know
                for source in piece["sources"]:
                    start, stop = source["layer_range"]
                    shift = -start if number == 0 else max(0, 1 - start)
                    source["layer_range"] = [start + shift, stop + shift]
        else:
            content = {"models": [{"model": str(models[name])} for name in ("a", "b")]}
        found[module] = {**content, **maybe(random, 0.2, 0.8, parameter, 0.4)}
    document = {
        "merge_method": method,
        "modules": found,
        "parameters": {parameter: random_setting(random, 0.2, 0.8)},
    }
    # without a base mergekit takes any model's config
    return {**document, "base_model": str(models["a"])}


def documents(models: Models, random: Random) -> dict[str, Any]:
    """The last document; the others are in its entry `before`."""
    first = {**whole(models, random), "name": "first", **WIDE}
    second = {
        **whole({"a": Path("first"), "b": models["b"]}, random),
        "name": "second",
        **WIDE,
    }
    last = whole({"a": models["a"], "b": Path("second")}, random)
    return {**last, "before": [first, second] if random.random() < 0.7 else [second, first]}


def adapters(models: Models, random: Random) -> dict[str, Any]:
    """b, and sometimes a too, with an adapter."""
    document = whole(models, random)
    adapted = ["b"] if random.random() < 0.5 else ["a", "b"]
    for name in adapted:
        folder = make_adapter(models[name], random)
        reference = f"{models[name]}+{folder}"
        document = json.loads(
            json.dumps(document).replace(json.dumps(str(models[name])), json.dumps(reference))
        )
    return document


def make_adapter(model: Path, random: Random) -> Path:
    """An adapter of a model with llama's names, beside it."""
    folder = model.with_name(f"{model.name}-adapter-{random.randint(0, 10**9)}")
    folder.mkdir(exist_ok=True)
    rank, generator = random.randint(1, 6), torch.Generator().manual_seed(random.randint(0, 10**9))
    words = random.sample(["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj"], 3)
    tensors = {}
    for name, weight in read_tensors(model).items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(words)):
            rows, columns = weight.shape
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = 0.1 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": random.randint(1, 12),
        "use_rslora": random.random() < 0.3,
        "target_modules": words,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def torch_files(models: Models, random: Random) -> dict[str, Any]:
    """The same models in torch files, of one or two shards' worth of tensors."""
    return whole({name: as_torch_file(folder) for name, folder in models.items()}, random)


def as_torch_file(model: Path) -> Path:
    folder = model.with_name(f"{model.name}-torch")
    if not folder.exists() and model.exists():
        folder.mkdir()
        (folder / "config.json").write_text((model / "config.json").read_text())
        torch.save(read_tensors(model), folder / "pytorch_model.bin")
    return folder


WIDE = {"dtype": "float64", "out_dtype": "float64"}
"""lazymerge does not round between merges."""


@dataclass(frozen=True)
class Form:
    """families: whose models are merged. make: a recipe of some models. out_dtypes: of the output,
    wide enough to show what mergekit does not round before. rounding: what float32 leaves of
    elements of about 1, where something else than mergekit computes in it."""

    families: Sequence[str]
    make: Callable[[Models, Random, str], dict[str, Any]]
    out_dtypes: Sequence[str] = ("float32", "bfloat16", "float16")
    rounding: float = 0.0


FORMS: Mapping[str, Form] = {
    "frankenmerge": Form(DECODERS, lambda models, random, _: frankenmerge(models, random)),
    "slices": Form(DECODERS, lambda models, random, _: slices(models, random)),
    "modules": Form(WITH_MODULES, modules),
    "models": Form(WHOLE, lambda models, random, _: whole(models, random)),
    "documents": Form(WHOLE, lambda models, random, _: documents(models, random)),
    "adapters": Form(
        ("llama", "mistral", "qwen2", "gemma 2"),
        lambda models, random, _: adapters(models, random),
        ("bfloat16", "float16"),
        1e-7,
    ),
    "torch": Form(WHOLE, lambda models, random, _: torch_files(models, random)),
}


def with_layers(family: Family, count: int) -> Family:
    """The family with another number of layers."""
    keys = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
    keys += ("encoder_layers", "decoder_layers")

    def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: changed(value) if key == "text_config" else count if key in keys else value
            for key, value in settings.items()
        }

    inner = {
        key: (name, changed(settings) if key == "text_config" else settings)
        for key, (name, settings) in family.inner.items()
    }
    return Family(family.config, family.model, changed(family.settings), inner)


def make_models(name: str, folder: Path) -> dict[str, Path]:
    """The models of a family, made once."""
    made = {}
    for seed, (model, layers) in enumerate(LAYERS.items()):
        path = folder / f"{name.replace(' ', '-').replace(',', '')}-{model}"
        if not path.exists():
            torch.manual_seed(1)
            tiny = perturbed(with_layers(FAMILIES[name], layers).make(), seed)
            with contextlib.redirect_stderr(io.StringIO()):
                tiny.save_pretrained(path)
            leave_out_layer_types(path / "config.json")
        made[model] = path
    return made


def leave_out_layer_types(path: Path) -> None:
    """As in models that older versions of transformers wrote: with this list, mergekit can set no
    other number of layers."""
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2))


@dataclass
class Found:
    """What the recipes of one form have shown. elements: compared; apart: more than an ulp."""

    form: str
    recipes: int = 0
    refused: int = 0
    tensors: int = 0
    elements: int = 0
    apart: int = 0
    worst: float = 0.0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        return [
            self.form,
            str(self.recipes),
            str(self.refused),
            f"{self.tensors:,}",
            f"{self.elements:,}",
            f"{self.apart:,}",
            f"{self.worst:.2f}",
            str(self.wrong),
        ]


COLUMNS = (
    "form",
    "recipes",
    "refused by mergekit",
    "tensors",
    "elements",
    "apart",
    "worst",
    "wrong",
)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbours of a dtype around float64 values."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.smallest_normal))
    return info.eps * torch.ldexp(torch.ones_like(values), exponent - 1)


def compare(found: Found, ours: Path, theirs: Path, rounding: float = 0.0) -> list[str]:
    """What differs. rounding: more than an ulp that elements may be apart."""
    first, second = read_tensors(ours), read_tensors(theirs)
    if first.keys() != second.keys():
        more, less = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
        return [f"names differ: lazymerge has also {more[:5]}, mergekit {less[:5]}"]
    said = []
    for name, tensor in first.items():
        other = second[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            said.append(
                f"{name}: {tensor.dtype} {list(tensor.shape)}, mergekit's {other.dtype} "
                f"{list(other.shape)}"
            )
            continue
        found.tensors += 1
        found.elements += tensor.numel()
        if not tensor.is_floating_point():
            if not torch.equal(tensor, other):
                said.append(f"{name} differs")
            continue
        exact = tensor.double()
        unit = ulp(exact, tensor.dtype)
        distance = (exact - other.double()).abs()
        found.apart += int((distance > unit).sum())
        if tensor.numel():
            found.worst = max(found.worst, float((distance / unit).max()))
        if bool((distance > unit + rounding).any()):
            said.append(f"{name}: up to {float(distance.max()):.3g} apart")
    return said


def config_entries(folder: Path) -> dict[str, Any]:
    """The entries of config.json, and of configs in it, that a form decides."""
    document = json.loads((folder / "config.json").read_text())
    configs = {"": document}
    configs |= {f"{k}.": v for k, v in document.items() if isinstance(v, dict)}
    return {
        f"{path}{key}": config[key]
        for path, config in configs.items()
        for key in CONFIG_KEYS
        if key in config
    }


def compare_configs(ours: Path, theirs: Path) -> list[str]:
    first, second = config_entries(ours), config_entries(theirs)
    return [
        f"config.json: {key} is {first[key]}, mergekit's {second[key]}"
        for key in first.keys() & second.keys()
        if first[key] != second[key]
    ]


def compare_recipe(
    found: Found, mergekit: Mergekit, document: dict[str, Any], folder: Path
) -> None:
    ours, theirs = folder / "ours", folder / "theirs"
    for path in (*theirs.glob("*"), *ours.glob("*")):
        if path.is_file():
            path.unlink()
    found.recipes += 1
    document = copy.deepcopy(document)
    before = document.pop("before", [])
    try:
        # mergekit remembers the files of a folder, so each recipe has its own
        between = folder / f"between {found.recipes}"
        merge_in_steps(mergekit, document, before, between, theirs)
    except Refused as error:
        found.refused += 1
        found.refusals.append(str(error).splitlines()[0])
        return
    try:
        merge_with_lazymerge(document, ours, 0, before)
    except LazymergeError as error:
        said = [f"lazymerge: {error}"]
    else:
        said = [
            *compare(found, ours, theirs, FORMS[found.form].rounding),
            *compare_configs(ours, theirs),
        ]
    if said:
        found.wrong += 1
        recipe = yaml.safe_dump_all([*before, document], sort_keys=False)
        found.problems.append("\n".join([f"{found.form}:", *said[:8], "", recipe]))


def merge_in_steps(
    mergekit: Mergekit,
    document: dict[str, Any],
    before: Sequence[dict[str, Any]],
    between: Path,
    output: Path,
) -> None:
    """Merges with mergekit what a recipe needs, and then the recipe.

    between: where the results of the former are to be.

    Raises:
        Refused: mergekit cannot.
    """
    names = {inner["name"]: str(between / inner["name"]) for inner in before}

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(inner) for key, inner in value.items() if key != "name"}
        if isinstance(value, list):
            return [placed(inner) for inner in value]
        return names.get(value, value) if isinstance(value, str) else value

    for inner in sorted(before, key=lambda inner: inner["name"] != "first"):
        mergekit.merge(placed(inner), Path(names[inner["name"]]), 0)
    mergekit.merge(placed(document), output, 0)


def compare_form(
    name: str, mergekit: Mergekit, folder: Path, numbers: Sequence[int], seed: int
) -> Found:
    """Random recipes of one form; a recipe depends on the seed, the form and its number."""
    found, form = Found(name), FORMS[name]
    for number in numbers:
        random = Random(f"{seed} {name} {number}")
        family = form.families[number % len(form.families)]
        models = make_models(family, folder)
        document = {
            **form.make(models, random, family),
            "dtype": "float64",
            "out_dtype": random.choice(form.out_dtypes),
        }
        compare_recipe(found, mergekit, document, folder)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--mergekit-venv", type=Path, metavar="DIR", help="one that exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", type=int, default=40, metavar="N", help="of each form")
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put files")
    parsed = parser.parse_args(arguments)
    if parsed.work is not None:
        parsed.work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    peer = PEERS["mergekit"]
    numbers = range(parsed.recipes) if parsed.only is None else [parsed.only]
    results = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compare-forms-", dir=parsed.work) as name:
        folder = Path(name)
        venv = parsed.mergekit_venv or (parsed.work or folder).resolve() / "mergekit-venv"
        try:
            if parsed.mergekit_venv is None:
                make_venv(venv, peer)
            facts = peer_facts(peer, venv)
            with Mergekit(venv, folder / "mergekit.log") as mergekit:
                for form in parsed.forms:
                    found = compare_form(form, mergekit, folder, numbers, parsed.seed)
                    results.append(found)
                    print(" ".join(found.row()), file=sys.stderr, flush=True)
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if arguments is None else arguments)])
    print(f"- command: {command}, {time.perf_counter() - began:.0f} s")
    print(f"- lazymerge: {__version__} (torch {importlib.metadata.version('torch')})")
    print(f"- mergekit: {facts}\n")
    print(markdown_table(COLUMNS, [found.row() for found in results]) + "\n")
    for found in results:
        for refusal, count in Counter(found.refusals).most_common(MOST_EXAMPLES):
            print(f"{found.form}, refused by mergekit, {count} times: {refusal}", file=sys.stderr)
        for problem in found.problems[:MOST_EXAMPLES]:
            print(problem)
    return 1 if any(found.wrong for found in results) else 0


if __name__ == "__main__":
    sys.exit(main())
