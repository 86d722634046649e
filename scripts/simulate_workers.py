#!/usr/bin/env python3
"""How many workers can Python feed? Simulated, for machines with more cores than this one.

    python scripts/simulate_workers.py --shape tinyllama-1.1b --workers 1,2,4,8,16,32,64

Workers are threads. What they do outside the interpreter lock (kernels, checksums, copies from and
to the page cache) scales with cores; the Python between those calls does not. This script runs the
real engine, scheduler and plan on a checkpoint of that shape, with every call of the kernels
replaced by a sleep as long as its blocks take on one core here: sleeping threads need no core, so
any number of them can be tried. The pages of arenas, made once, are slept for as well.

It prints the shortest loop of some rounds for each number of workers, and how many times faster it
is than with the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent

RECIPE = """\
merge_method: task_arithmetic
base_model: {0}
models:
  - model: {1}
    parameters: {{weight: 0.6}}
  - model: {2}
    parameters: {{weight: 0.4}}
dtype: bfloat16
"""


def make_checkpoints(folder: Path, shape: str) -> Path:
    """Three sparse checkpoints, and a recipe that merges them."""
    paths = [folder / name for name in ("base", "a", "b")]
    script = str(SCRIPTS / "make_synthetic_checkpoint.py")
    for path in paths:
        command = [sys.executable, script, str(path), "--shape", shape, "--dtype", "bfloat16"]
        subprocess.run([*command, "--sparse"], check=True, stdout=subprocess.DEVNULL)
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(*paths))
    return recipe


BLOCK = 1 << 18

TOUCHING_S_PER_BYTE = 0.2e-3 / (1 << 20)
"""What the system takes to make the pages of an arena, without the lock."""


def seconds_of_work() -> float:
    """What the kernels take for one block on one core, in one call: they read it, merge it, look
    for inf and nan, make the checksum, and write it."""
    import lazymerge.methods  # noqa: F401  # registers the operations
    import numpy
    from lazymerge.engine.arena import Arena
    from lazymerge.engine.finite import MASKS
    from lazymerge.engine.native.library import Kernel, Sink, StreamedInput, encode_program
    from lazymerge.engine.native.program import record_apply
    from lazymerge.engine.stages import Slot
    from lazymerge.graph.operation import apply_operation

    size = 2 * BLOCK
    program = record_apply(apply_operation("task_vectors"), [0, 1, 2], 2, {"factors": (0.6, 0.4)})
    slots = [Slot(place * size, "U8", size) for place in range(4)]
    registers = Slot(4 * size, "U8", 3 * 8 * 1024)
    arena = Arena(registers.offset + registers.elements)
    generator = numpy.random.default_rng(0)
    sink = Sink()
    with tempfile.TemporaryFile() as file:
        file.write(generator.integers(0x3C00, 0x3F00, 3 * BLOCK, numpy.uint16).data)
        file.write(bytes(size))
        file.flush()
        kernel = Kernel(
            encode_program(program),
            [
                StreamedInput("BF16", file.fileno(), place * size, arena.address(slot))
                for place, slot in enumerate(slots[:3])
            ],
            working_dtype="F64",
            registers=arena.address(registers),
            stores=[],
            output=arena.address(slots[3]),
            output_dtype="BF16",
        )
        best = float("inf")
        for _ in range(50):
            began = time.perf_counter()
            sink.begin(file.fileno(), 3 * size, MASKS["BF16"])
            if kernel.stream(0, BLOCK, BLOCK, sink) is not None:
                raise OSError("a temporary file cannot be read or written")
            best = min(best, time.perf_counter() - began)
    return best


def simulate(recipe: Path, workers: int, work_s: float, folder: Path) -> float:
    """Seconds of the whole loop with so many workers."""
    import lazymerge as lm
    from lazymerge.engine import readahead
    from lazymerge.engine.arena import Arena
    from lazymerge.engine.native import library

    def sleep(
        kernel: library.Kernel,
        start: int,
        count: int,
        block: int,
        sink: library.Sink | None = None,
    ) -> None:
        time.sleep(work_s * count / block)

    def touch(arena: Arena) -> None:
        time.sleep(TOUCHING_S_PER_BYTE * len(arena.memory))

    is_cached, stream, touched = readahead._is_cached, library.Kernel.stream, Arena.touch
    plan = lm.plan(recipe, workers=workers, memory="64GiB")
    try:
        library.Kernel.stream = sleep  # type: ignore[method-assign, assignment]
        Arena.touch = touch  # type: ignore[method-assign]
        # nothing is to be read from the disk: the answer, yes, takes as long as ever
        readahead._is_cached = lambda descriptor, byte: is_cached(descriptor, 0)
        return lm.run(plan, folder / "out", overwrite=True, fsync=False).seconds
    finally:
        library.Kernel.stream = stream  # type: ignore[method-assign]
        Arena.touch = touched  # type: ignore[method-assign]
        readahead._is_cached = is_cached


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--workers", default="1,2,4,8,16,32,64", metavar="N,N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="the shortest counts")
    parsed = parser.parse_args(arguments)
    counts = [int(text) for text in parsed.workers.split(",")]
    work_s = seconds_of_work()
    print(f"one block's work: {work_s * 1e6:.0f} us on one core\n")
    print("| workers | loop s | speed-up | of ideal |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        recipe = make_checkpoints(Path(temporary), parsed.shape)
        shortest = dict.fromkeys(counts, float("inf"))
        for _ in range(parsed.rounds):  # in turns: the machine may have other things to do
            for count in counts:
                seconds = simulate(recipe, count, work_s, Path(temporary))
                shortest[count] = min(shortest[count], seconds)
    first = shortest[counts[0]] * counts[0]
    for count, seconds in shortest.items():
        speed_up = first / seconds
        print(f"| {count} | {seconds:.3f} | {speed_up:.1f} | {speed_up / count:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
