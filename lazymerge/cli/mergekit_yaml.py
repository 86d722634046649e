"""`lazymerge-yaml`: `lazymerge run` with the arguments of the command `mergekit-yaml`.

    mergekit-yaml  recipe.yml out --cuda --lazy-unpickle --copy-tokenizer
    lazymerge-yaml recipe.yml out --cuda --lazy-unpickle --copy-tokenizer

Scripts change the command's name and nothing else. Most of the options are about speed and memory
and have nothing to do here; those whose wish is not fulfilled are named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import InputError
from . import main as main_module

if TYPE_CHECKING:
    from ..engine.blocks import DeviceClass

NEEDLESS: Mapping[str, str] = {
    "allow-crimes": "Architectures are not compared: tensors are, by name and shape.",
    "low-cpu-memory": "Memory is bounded by --memory.",
    "lazy-unpickle": "Files are always read lazily.",
    "read-to-gpu": "Blocks are copied to the GPU as they are needed.",
    "multi-gpu": "One GPU computes.",
    "async-write": "Blocks are written as they are finished.",
    "clone-tensors": "A layer may be used any number of times.",
}
"""Switches that are taken and change nothing, and why."""

UNFULFILLED: Mapping[str, str] = {
    "trust-remote-code": "no code of a model is ever run; none is needed",
    "no-copy-tokenizer": "tokenizer files are copied all the same; remove what is not wanted",
    "no-write-model-card": "README.md is written all the same",
    "lora-merge-dtype": "adapters are folded in as float32, whatever --lora-merge-dtype says",
}
"""Options that are taken and whose wish is not fulfilled, and what is said then."""

BYTES_PER_PARAMETER = 2
"""--out-shard-size counts parameters, lazymerge bytes; nearly all merges are of 16-bit numbers."""


def parser() -> argparse.ArgumentParser:
    """The options of mergekit-yaml 0.1.5, and some of `lazymerge run`."""
    made = argparse.ArgumentParser(
        prog="lazymerge-yaml",
        description="Merge models by a recipe: `lazymerge run` with mergekit-yaml's arguments.",
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    made.add_argument("config_file", type=Path)
    made.add_argument("out_path")
    used = made.add_argument_group("options that do what they do in mergekit-yaml")
    used.add_argument("--cuda", action=switch, default=False, help="Compute on the GPU.")
    used.add_argument("--device", metavar="NAME", help="cpu or cuda.")
    used.add_argument("--gpu-rich", action="store_true", help="As --cuda.")
    used.add_argument("-j", "--num-threads", type=int, metavar="N", help="Threads that compute.")
    used.add_argument("--random-seed", type=int, metavar="N", help="Of random methods.")
    used.add_argument(
        "--out-shard-size", metavar="SIZE", default="5B", help="Parameters per shard. [5B]"
    )
    used.add_argument(
        "--unsafe-truncate-embeddings",
        action=switch,
        default=False,
        help="Merge the common leading rows where vocabularies differ in size.",
    )
    used.add_argument("--copy-tokenizer", action=switch, default=True, help="Always done.")
    used.add_argument("--write-model-card", action=switch, default=True, help="Always done.")
    used.add_argument("--safe-serialization", action=switch, default=True, help="Always done.")
    used.add_argument(
        "--transformers-cache", metavar="DIR", help="Where downloaded models are kept."
    )
    used.add_argument("--quiet", action=switch, default=False, help="Say nothing but errors.")
    used.add_argument("-v", action="count", help="Changes nothing.")
    needless = made.add_argument_group("options that are taken and change nothing")
    for name, reason in NEEDLESS.items():
        needless.add_argument(f"--{name}", action=switch, default=False, help=reason)
    needless.add_argument("--write-threads", type=int, metavar="N", help="The workers write.")
    needless.add_argument("--lora-merge-cache", metavar="DIR", help="None is needed.")
    needless.add_argument(
        "--lora-merge-dtype", metavar="DTYPE", help="Adapters are folded in as float32."
    )
    needless.add_argument(
        "--trust-remote-code", action=switch, default=False, help="No code is ever run."
    )
    own = made.add_argument_group("options of lazymerge run")
    own.add_argument("--memory", metavar="SIZE", help="Bound of the process's memory.")
    own.add_argument("--vram", metavar="SIZE", help="Bound of the GPU's memory.")
    own.add_argument("--overwrite", action="store_true", help="Replace an earlier merge.")
    own.add_argument(
        "--stream", action="store_true", help="Read models of the Hub over the network."
    )
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        LazymergeError: as `lazymerge run`; an option that cannot be followed is an InputError.
    """
    chosen = parser().parse_args(arguments)
    if not chosen.safe_serialization:
        raise InputError(
            "--no-safe-serialization is not there: merges are written as safetensors alone, since "
            "other files of weights can hold code"
        )
    if chosen.num_threads is not None and chosen.num_threads < 1:
        raise InputError(f"--num-threads {chosen.num_threads}: at least one is needed")
    from .. import api
    from ..output.store.address import place_of
    from .console import messages
    from .running import run_and_report

    if chosen.transformers_cache:
        os.environ["HF_HUB_CACHE"] = chosen.transformers_cache
    if not chosen.quiet:
        for sentence in unfulfilled(chosen):
            messages().print(f"notice {sentence}", soft_wrap=True)
    made = api.plan(
        chosen.config_file,
        memory=chosen.memory,
        vram=chosen.vram,
        workers=chosen.num_threads,
        device=device_of(chosen),
        max_shard_size=parameters(chosen.out_shard_size) * BYTES_PER_PARAMETER,
        truncate_embeddings=chosen.unsafe_truncate_embeddings,
        seed=chosen.random_seed,
        stream=chosen.stream,
    )
    run_and_report(
        made,
        place_of(chosen.out_path),
        overwrite=chosen.overwrite,
        no_fsync=False,
        strict=False,
        quiet=chosen.quiet,
        as_json=False,
    )


def unfulfilled(chosen: argparse.Namespace) -> list[str]:
    """What is to be said of options whose wish is not fulfilled."""
    asked = {
        "trust-remote-code": chosen.trust_remote_code,
        "no-copy-tokenizer": not chosen.copy_tokenizer,
        "no-write-model-card": not chosen.write_model_card,
        "lora-merge-dtype": chosen.lora_merge_dtype is not None,
    }
    return [sentence for name, sentence in UNFULFILLED.items() if asked[name]]


def device_of(chosen: argparse.Namespace) -> DeviceClass | None:
    """Who computes.

    Raises:
        InputError: a device that lazymerge does not know.
    """
    if chosen.device is None:
        return "cuda" if chosen.cuda or chosen.gpu_rich else None
    name: str = chosen.device.partition(":")[0]
    if name == "cuda":
        return "cuda"
    if name == "cpu":
        return "cpu"
    raise InputError(f"--device {chosen.device}: only cpu and cuda are known")


def parameters(size: str) -> int:
    """A number of parameters as mergekit writes it: 5B, 300M, 1000.

    Raises:
        InputError: it is none.
    """
    factors = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    number, factor = size[:-1], factors.get(size[-1:].upper())
    if factor is None:
        number, factor = size, 1
    try:
        count = int(float(number) * factor)
    except (OverflowError, ValueError):
        count = 0
    if count <= 0:
        raise InputError(f"--out-shard-size {size}: a number of parameters is wanted, such as 5B")
    return count


def main() -> NoReturn:
    """Runs the command with the process's arguments and exits."""
    main_module.main(lambda: run(sys.argv[1:]))


def command() -> NoReturn:
    """The console script."""
    main_module.command(main)


if __name__ == "__main__":
    command()
