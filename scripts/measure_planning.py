#!/usr/bin/env python3
"""Measure what planning costs: wall time and peak memory of `lazymerge plan --dry-run`.

    python scripts/measure_planning.py
    python scripts/measure_planning.py --runs 5 --only moe-671b

The checkpoints are headers, indexes and holes: they take some megabytes of disk. The mixture of
experts has DeepSeek-V3's sizes: 61 layers, 256 experts in each of 58 of them, 671 billion
parameters; as published, in F8 with a scale for every block of 128 × 128 (91,991 tensors), and in
BF16 with twice as many experts of half the size (about 90,000 tensors to merge).

A Markdown table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median

from benchmarking.processes import lazymerge_environment, run_measured

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}
SHARD_BYTES = 5_000_000_000
MIB = 1 << 20

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype (of safetensors), shape."""


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts after DeepSeek-V3 (technical report, 2024, section 4.2).

    layers: all of them; dense: how many at the beginning have no experts.
    """

    layers: int = 61
    dense: int = 3
    experts: int = 256
    width: int = 2048
    hidden: int = 7168
    heads: int = 128
    vocabulary: int = 129_280


def llama_13b() -> Iterator[Tensor]:
    """Llama 2 13B in F16."""
    hidden, width = 5120, 13824
    yield "model.embed_tokens.weight", "F16", (32000, hidden)
    for layer in range(40):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", "F16", (hidden, hidden)
        for name, shape in (
            ("gate", (width, hidden)),
            ("up", (width, hidden)),
            ("down", (hidden, width)),
        ):
            yield f"{prefix}.mlp.{name}_proj.weight", "F16", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", "F16", (hidden,)
    yield "model.norm.weight", "F16", (hidden,)
    yield "lm_head.weight", "F16", (32000, hidden)


def mixture(sizes: Experts, *, is_f8: bool) -> Iterator[Tensor]:
    """The tensors of a mixture of experts."""

    def linear(name: str, *shape: int) -> Iterator[Tensor]:
        if not is_f8:
            yield f"{name}.weight", "BF16", shape
            return
        yield f"{name}.weight", "F8_E4M3", shape
        yield f"{name}.weight_scale_inv", "F32", tuple(-(-length // 128) for length in shape)

    def feed_forward(name: str, width: int) -> Iterator[Tensor]:
        yield from linear(f"{name}.gate_proj", width, sizes.hidden)
        yield from linear(f"{name}.up_proj", width, sizes.hidden)
        yield from linear(f"{name}.down_proj", sizes.hidden, width)

    hidden, heads = sizes.hidden, sizes.heads
    yield "model.embed_tokens.weight", "BF16", (sizes.vocabulary, hidden)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        yield from linear(f"{attention}.q_a_proj", 1536, hidden)
        yield from linear(f"{attention}.q_b_proj", heads * 192, 1536)
        yield from linear(f"{attention}.kv_a_proj_with_mqa", 576, hidden)
        yield from linear(f"{attention}.kv_b_proj", heads * 256, 512)
        yield from linear(f"{attention}.o_proj", hidden, heads * 128)
        yield f"{attention}.q_a_layernorm.weight", "BF16", (1536,)
        yield f"{attention}.kv_a_layernorm.weight", "BF16", (512,)
        yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)
        if layer < sizes.dense:
            yield from feed_forward(f"{prefix}.mlp", 18432)
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", (sizes.experts, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (sizes.experts,)
        for expert in range(sizes.experts):
            yield from feed_forward(f"{prefix}.mlp.experts.{expert}", sizes.width)
        yield from feed_forward(f"{prefix}.mlp.shared_experts", 2048)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (sizes.vocabulary, hidden)


def write_checkpoint(folder: Path, tensors: Sequence[Tensor], config: dict[str, object]) -> None:
    """Writes a checkpoint whose data are holes."""
    folder.mkdir(parents=True)
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = prod(tensor[2]) * ITEM_BYTES[tensor[1]]
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in shard:
            stop = offset + prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
            places[name] = file
            offset = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 40}
DEEPSEEK: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
}
QUANTIZED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
FINE = Experts(experts=512, width=1024)
MODELS: dict[str, tuple[list[Tensor], dict[str, object]]] = {
    "llama2-13b": ([*llama_13b()], LLAMA),
    "moe-671b-f8": (
        [*mixture(Experts(), is_f8=True)],
        {**DEEPSEEK, "quantization_config": QUANTIZED},
    ),
    "moe-671b": ([*mixture(FINE, is_f8=False)], {**DEEPSEEK, "n_routed_experts": FINE.experts}),
}

RECIPE = """\
merge_method: {method}
base_model: {folder}/0
models:
  - model: {folder}/1
    parameters: {{weight: 0.6}}
  - model: {folder}/2
    parameters: {{weight: 0.3}}
dtype: bfloat16
"""


def row(name: str, folder: Path, method: str, runs: int) -> str:
    """The table's row of a model: three of its kind are merged."""
    tensors, config = MODELS[name]
    for number in range(3):
        if not (folder / str(number)).exists():
            write_checkpoint(folder / str(number), tensors, config)
    recipe = folder / f"{method}.yml"
    recipe.write_text(RECIPE.format(method=method, folder=folder))
    command = [sys.executable, "-m", "lazymerge", "plan", str(recipe), "--dry-run"]
    measured = [run_measured(command, lazymerge_environment(), folder / "log") for _ in range(runs)]
    seconds = [run.wall_s for run in measured]
    peak = max(run.peak_rss_bytes for run in measured)
    return (
        f"| {name} | `{method}` | {len(tensors):,} | {median(seconds):.2f} s "
        f"| {max(seconds):.2f} s | {peak / MIB:.0f} MiB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print("| three models | method | tensors of each | median | slowest | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only:
            for method in arguments.methods:
                print(row(name, Path(scratch, name), method, arguments.runs), flush=True)


if __name__ == "__main__":
    main()
