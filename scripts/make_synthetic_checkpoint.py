#!/usr/bin/env python3
"""Make Llama checkpoints of any size out of nothing, for tests and benchmarks.

    python scripts/make_synthetic_checkpoint.py base --shape tinyllama-1.1b --dtype bfloat16 \
        --random --seed 1
    python scripts/make_synthetic_checkpoint.py tuned --perturb-of base --scale 0.002 --seed 2
    python scripts/make_synthetic_checkpoint.py huge --shape llama2-13b --shards 3 --sparse

The folders have the tensor names, shapes, files, index and config.json of real Llama models.

- `--sparse`: the data section of every file is a hole. A 26 GB checkpoint takes a few kilobytes
  of disk and milliseconds to make; every element reads as zero.
- `--random`: normal deviates, different for every tensor and seed. Weights have mean 0, norms
  mean 1, so that a forward pass stays finite.
- `--perturb-of DIR`: a "fine-tune" of any checkpoint: each float element plus a normal deviate.

config.json is written last: a folder that has one is complete. Equal arguments give equal bytes,
for one version of torch and one kind of processor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAFETENSORS_NAMES: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""Name of each float dtype in safetensors headers, by its name in torch."""

TORCH_NAMES = {name: torch_name for torch_name, name in SAFETENSORS_NAMES.items()}

ITEM_BYTES: dict[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

BLOCK_ELEMENTS = 1 << 18
"""Elements generated at a time by each thread: a few blocks of that size stay in the cache."""

INDEX_FILE = "model.safetensors.index.json"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


class CheckpointError(Exception):
    """The checkpoint cannot be made as asked."""


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes that decide the shape of every tensor of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES: dict[str, LlamaShape] = {
    "llama-0.1b": LlamaShape(768, 2048, 12, 12, 12, 32000),
    "tinyllama-1.1b": LlamaShape(2048, 5632, 22, 32, 4, 32000),
    "llama-3b": LlamaShape(3200, 8640, 26, 32, 32, 32000),
    "llama2-7b": LlamaShape(4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": LlamaShape(4096, 14336, 32, 32, 8, 128256),
    "llama2-13b": LlamaShape(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": LlamaShape(8192, 28672, 80, 64, 8, 32000),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write.

    dtype: safetensors name.
    size_bytes: bytes of its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of an existing checkpoint lies: absolute byte offset in its file."""

    tensor: Tensor
    file: Path
    start: int


def float_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a float dtype, its size worked out; dtype is a safetensors name."""
    return Tensor(name, dtype, shape, prod(shape) * ITEM_BYTES[dtype])


def llama_tensors(shape: LlamaShape, dtype: str) -> list[Tensor]:
    """Every tensor of a Llama model, in the order of the network; dtype is torch's name.

    Raises CheckpointError for sizes that make no model.
    """
    for size in fields(shape):
        if getattr(shape, size.name) < 1:
            raise CheckpointError(f"{size.name} must be at least 1")
    if shape.hidden % shape.heads:
        raise CheckpointError(f"hidden ({shape.hidden}) is no multiple of heads ({shape.heads})")
    if shape.heads % shape.kv_heads:
        raise CheckpointError(
            f"heads ({shape.heads}) is no multiple of kv_heads ({shape.kv_heads})"
        )
    hidden, intermediate = shape.hidden, shape.intermediate
    kv_rows = hidden // shape.heads * shape.kv_heads
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (shape.vocabulary, hidden)}
    for number in range(shape.layers):
        for suffix, tensor_shape in layer.items():
            shapes[f"model.layers.{number}.{suffix}"] = tensor_shape
    shapes["model.norm"] = (hidden,)
    shapes["lm_head"] = (shape.vocabulary, hidden)
    stored_dtype = SAFETENSORS_NAMES[dtype]
    return [
        float_tensor(f"{name}.weight", stored_dtype, tensor_shape)
        for name, tensor_shape in shapes.items()
    ]


def llama_config(shape: LlamaShape, dtype: str) -> dict[str, object]:
    """The config.json of a Llama model; dtype is torch's name."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def split_into_shards(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Consecutive runs of tensors, about equal in bytes and none empty.

    Raises CheckpointError when there are fewer tensors than shards.
    """
    if not 1 <= count <= len(tensors):
        raise CheckpointError(f"shards must be between 1 and {len(tensors)}, the number of tensors")
    shards: list[list[Tensor]] = []
    taken = 0
    remaining_bytes = sum(tensor.size_bytes for tensor in tensors)
    for shards_left in range(count, 0, -1):
        target_bytes = remaining_bytes / shards_left
        last_stop = len(tensors) - (shards_left - 1)
        shard: list[Tensor] = []
        shard_bytes = 0
        while taken < last_stop and (not shard or shards_left == 1 or shard_bytes < target_bytes):
            shard.append(tensors[taken])
            shard_bytes += tensors[taken].size_bytes
            taken += 1
        shards.append(shard)
        remaining_bytes -= shard_bytes
    return shards


def safetensors_header(tensors: Sequence[Tensor]) -> tuple[bytes, dict[str, int]]:
    """The length prefix and header of a file, and each tensor's absolute byte offset.

    Source: the format's description, https://github.com/huggingface/safetensors#format.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    relative: dict[str, int] = {}
    for tensor in tensors:
        relative[tensor.name] = offset
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size_bytes],
        }
        offset += tensor.size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data section starts aligned
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: start + offset for name, offset in relative.items()
    }


def read_layout(folder: Path) -> list[StoredTensor]:
    """Every tensor of a safetensors checkpoint, in the order of files and offsets.

    Raises CheckpointError when the folder holds no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file there")
    stored: list[StoredTensor] = []
    for file in files:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(header_bytes))
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            tensor = Tensor(name, entry["dtype"], tuple(entry["shape"]), stop - start)
            stored.append(StoredTensor(tensor, file, 8 + header_bytes + start))
    return stored


def tensor_seed(seed: int, name: str) -> int:
    """A seed of its own for each tensor. torch's CPU generator uses 32 bits of it."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def mean_of(name: str) -> float:
    """Norm weights lie around 1, all others around 0."""
    return 1.0 if name.endswith("norm.weight") else 0.0


def write_random_tensor(
    descriptor: int,
    offset: int,
    tensor: Tensor,
    *,
    scale: float,
    seed: int,
    source: StoredTensor | None = None,
) -> None:
    """Write one tensor of normal deviates with standard deviation `scale`, block by block.

    descriptor, offset: the open file and the absolute offset of the tensor's data.
    source: a stored tensor of the same shape that the deviates are added to; None: they are
        added to the mean of that kind of tensor.
    """
    import torch

    generator = torch.Generator().manual_seed(tensor_seed(seed, tensor.name))
    element_count = prod(tensor.shape)
    block_elements = max(1, min(BLOCK_ELEMENTS, element_count))
    item_bytes = ITEM_BYTES[tensor.dtype]
    # Tensors over bytearrays: the bytes go to the file without a copy and without numpy.
    out_bytes = bytearray(block_elements * item_bytes)
    out = torch.frombuffer(out_bytes, dtype=_torch_dtype(tensor.dtype))
    working_dtype = torch.float64 if tensor.dtype == "F64" else torch.float32
    block = torch.empty(block_elements, dtype=working_dtype)
    source_descriptor = None if source is None else os.open(source.file, os.O_RDONLY)
    try:
        if source is not None:
            source_item_bytes = ITEM_BYTES[source.tensor.dtype]
            source_bytes = bytearray(block_elements * source_item_bytes)
            stored = torch.frombuffer(source_bytes, dtype=_torch_dtype(source.tensor.dtype))
            widened = torch.empty_like(block)
        for first in range(0, element_count, block_elements):
            count = min(block_elements, element_count - first)
            values = block[:count]
            if source is None or source_descriptor is None:
                values.normal_(mean_of(tensor.name), scale, generator=generator)
            else:
                view = memoryview(source_bytes)[: count * source_item_bytes]
                _read_exactly(
                    source_descriptor, view, source.start + first * source_item_bytes, source.file
                )
                values.normal_(0.0, scale, generator=generator)
                values.add_(widened[:count].copy_(stored[:count]))
            out[:count].copy_(values)
            _write_all(
                descriptor, memoryview(out_bytes)[: count * item_bytes], offset + first * item_bytes
            )
    finally:
        if source_descriptor is not None:
            os.close(source_descriptor)


def copy_tensor(descriptor: int, offset: int, source: StoredTensor) -> None:
    """Copy a stored tensor's bytes to an absolute offset of an open file."""
    buffer = bytearray(min(source.tensor.size_bytes, BLOCK_ELEMENTS))
    with source.file.open("rb") as stream:
        for first in range(0, source.tensor.size_bytes, BLOCK_ELEMENTS):
            view = memoryview(buffer)[: min(BLOCK_ELEMENTS, source.tensor.size_bytes - first)]
            _read_exactly(stream.fileno(), view, source.start + first, source.file)
            _write_all(descriptor, view, offset + first)


def make_checkpoint(
    out: Path,
    shape: LlamaShape,
    *,
    dtype: str = "float16",
    shards: int = 1,
    sparse: bool = False,
    scale: float = 0.02,
    seed: int = 0,
    tokenizer: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> int:
    """Write a Llama checkpoint of zeros that take no disk (sparse) or of normal deviates.

    dtype: torch name of the dtype of every tensor.
    scale: standard deviation of the random elements.
    tokenizer: also write a byte-level tokenizer.

    Returns the bytes of tensor data. Raises CheckpointError when `out` holds a model already
    and overwrite is false, or when the model asked for makes no sense.
    """
    tensors = llama_tensors(shape, dtype)
    tokenizer_files = byte_tokenizer_files(shape.vocabulary) if tokenizer else {}
    _write_folder(
        out,
        split_into_shards(tensors, shards),
        sources={},
        sparse=sparse,
        scale=scale,
        seed=seed,
        overwrite=overwrite,
        threads=threads,
    )
    for name, content in tokenizer_files.items():
        _write_json(out / name, content)
    _write_json(out / "config.json", llama_config(shape, dtype))
    return sum(tensor.size_bytes for tensor in tensors)


def perturb_checkpoint(
    out: Path,
    base: Path,
    *,
    dtype: str | None = None,
    shards: int = 1,
    scale: float = 0.002,
    seed: int = 0,
    overwrite: bool = False,
    threads: int | None = None,
) -> int:
    """Write a copy of any safetensors checkpoint with a normal deviate added to each float.

    dtype: torch name of the dtype of every float tensor; None: as in the base.
    scale: standard deviation of what is added.

    Integer tensors, config.json (but for its dtype) and the tokenizer's files are copied.
    Returns the bytes of tensor data. Raises CheckpointError as make_checkpoint, and for a base
    that is the output, has no config.json, or holds no safetensors file.
    """
    if out.resolve() == base.resolve():
        raise CheckpointError(f"{out}: the output would overwrite the checkpoint it is made from")
    if not (base / "config.json").is_file():
        raise CheckpointError(f"{base}: no config.json there")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    sources = {stored.tensor.name: stored for stored in read_layout(base)}
    tensors = [
        float_tensor(stored.tensor.name, SAFETENSORS_NAMES[dtype], stored.tensor.shape)
        if dtype is not None and stored.tensor.dtype in ITEM_BYTES
        else stored.tensor
        for stored in sources.values()
    ]
    _write_folder(
        out,
        split_into_shards(tensors, shards),
        sources=sources,
        sparse=False,
        scale=scale,
        seed=seed,
        overwrite=overwrite,
        threads=threads,
    )
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if dtype is not None:
        config["torch_dtype"] = dtype
        config.pop("dtype", None)  # the newer name of the same entry
    _write_json(out / "config.json", config)
    return sum(tensor.size_bytes for tensor in tensors)


def byte_tokenizer_files(vocabulary: int) -> dict[str, dict[str, object]]:
    """Content of the files of a tokenizer whose tokens are three special ones and the 256 bytes.

    Raises CheckpointError when the vocabulary has no room for them.
    """
    # Byte-level BPE writes each byte as a printable character: itself where it is one, else
    # the next free one from U+0100 on (GPT-2's alphabet).
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet: list[str] = []
    replaced = 0
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(0x100 + replaced))
            replaced += 1
    tokens = [*SPECIAL_TOKENS, *alphabet]
    if vocabulary < len(tokens):
        raise CheckpointError(
            f"a vocabulary of {vocabulary} has no room for the tokenizer's {len(tokens)} tokens"
        )
    unknown, begin, end = SPECIAL_TOKENS
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    named = {"unk_token": unknown, "bos_token": begin, "eos_token": end}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": number,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for number, token in enumerate(SPECIAL_TOKENS)
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {token: number for number, token in enumerate(tokens)},
                "merges": [],
            },
        },
        "tokenizer_config.json": {**named, "tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {**named},
    }


def _write_folder(
    out: Path,
    shards: Sequence[Sequence[Tensor]],
    *,
    sources: dict[str, StoredTensor],
    sparse: bool,
    scale: float,
    seed: int,
    overwrite: bool,
    threads: int | None,
) -> None:
    """Write the safetensors files and, for more than one, their index."""
    out.mkdir(parents=True, exist_ok=True)
    stale = [*out.glob("*.safetensors"), out / INDEX_FILE, out / "config.json"]
    stale += [out / name for name in TOKENIZER_FILES]
    stale = [path for path in stale if path.exists()]
    if (out / "config.json").exists() and not overwrite:
        raise CheckpointError(f"{out}: holds a model already; --overwrite replaces it")
    for path in stale:  # without config.json: what an interrupted earlier call left
        path.unlink()
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = (
            "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        header, offsets = safetensors_header(shard)
        with (out / file_name).open("wb") as stream:
            stream.write(header)
            stream.flush()
            stream.truncate(len(header) + sum(tensor.size_bytes for tensor in shard))
            if not sparse:
                _fill(stream.fileno(), offsets, shard, sources, scale, seed, threads)
        weight_map.update({tensor.name: file_name for tensor in shard})
    if not single:
        total_bytes = sum(tensor.size_bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(out / INDEX_FILE, index)


def _fill(
    descriptor: int,
    offsets: dict[str, int],
    tensors: Sequence[Tensor],
    sources: dict[str, StoredTensor],
    scale: float,
    seed: int,
    threads: int | None,
) -> None:
    """Fill one file's tensors, several at a time, the largest first."""
    import torch

    def fill(tensor: Tensor) -> None:
        source = sources.get(tensor.name)
        offset = offsets[tensor.name]
        if source is not None and tensor.dtype not in ITEM_BYTES:
            copy_tensor(descriptor, offset, source)
        else:
            write_random_tensor(descriptor, offset, tensor, scale=scale, seed=seed, source=source)

    intra_operation_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread per tensor; torch's own would only compete with them
    pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))
    try:
        by_size = sorted(tensors, key=lambda tensor: tensor.size_bytes, reverse=True)
        for _ in pool.map(fill, by_size):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C need not wait for the rest
        torch.set_num_threads(intra_operation_threads)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _read_exactly(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: the file ends before its last tensor does")
        done += count


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="sizes given one by one override those of --shape",
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shape", choices=SHAPES, help="the sizes of a known model")
    for size in fields(LlamaShape):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument(
        "--dtype", choices=SAFETENSORS_NAMES, help="default: float16, or that of the base"
    )
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="default: 1")
    content = parser.add_mutually_exclusive_group(required=True)
    content.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    content.add_argument("--random", action="store_true", help="normal deviates")
    content.add_argument(
        "--perturb-of", type=Path, metavar="DIR", help="this checkpoint plus normal deviates"
    )
    parser.add_argument(
        "--scale",
        type=float,
        help="standard deviation (default: 0.02 for --random, 0.002 for --perturb-of)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--tokenizer", action="store_true", help="also write a byte tokenizer")
    parser.add_argument("--threads", type=int, metavar="N", help="default: cores, at most 8")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in OUT")
    parsed = parser.parse_args(arguments)

    sizes = {size.name: getattr(parsed, size.name) for size in fields(LlamaShape)}
    given = {name: value for name, value in sizes.items() if value is not None}
    if parsed.perturb_of is not None:
        if parsed.shape or given or parsed.tokenizer:
            parser.error("--perturb-of takes shape and tokenizer from the folder it names")
        return parsed
    if parsed.shape is None and len(given) < len(sizes):
        missing = ", ".join(f"--{name.replace('_', '-')}" for name in sizes if name not in given)
        parser.error(f"give --shape, or else also {missing}")
    parsed.llama_shape = (
        replace(SHAPES[parsed.shape], **given) if parsed.shape else LlamaShape(**given)
    )
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parsed = _arguments(arguments)
    try:
        if parsed.perturb_of is not None:
            data_bytes = perturb_checkpoint(
                parsed.out,
                parsed.perturb_of,
                dtype=parsed.dtype,
                shards=parsed.shards,
                scale=0.002 if parsed.scale is None else parsed.scale,
                seed=parsed.seed,
                overwrite=parsed.overwrite,
                threads=parsed.threads,
            )
        else:
            data_bytes = make_checkpoint(
                parsed.out,
                parsed.llama_shape,
                dtype=parsed.dtype or "float16",
                shards=parsed.shards,
                sparse=parsed.sparse,
                scale=0.02 if parsed.scale is None else parsed.scale,
                seed=parsed.seed,
                tokenizer=parsed.tokenizer,
                overwrite=parsed.overwrite,
                threads=parsed.threads,
            )
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {parsed.out} is incomplete, as it has no config.json", file=sys.stderr)
        return 130
    print(f"{parsed.out}: {data_bytes / 1e9:.2f} GB of tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
