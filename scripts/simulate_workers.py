#!/usr/bin/env python3
"""How many workers can Python feed? Simulated, for machines with more cores than this one.

    python scripts/simulate_workers.py --shape tinyllama-1.1b --workers 1,2,4,8,16,32,64

Workers are threads. What they do outside the interpreter lock (kernels, checksums, copies from and
to the page cache) scales with cores; the Python between those calls does not. This script runs the
real engine, scheduler and plan on a checkpoint of that shape, with the work of every block
replaced by a sleep as long as the work takes on one core here: sleeping threads need no core, so
any number of them can be tried.

It prints the blocks per second for each number of workers, and where the lock becomes the limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def seconds_of_work(elements: int) -> float:
    """What one block's kernel, copies and checksum take on one core, Python included."""
    import lazymerge.methods  # noqa: F401  # registers the operations
    import numpy
    from lazymerge.engine.arena import Arena
    from lazymerge.engine.finite import has_nonfinite
    from lazymerge.engine.native.library import Kernel, StreamedInput, encode_program
    from lazymerge.engine.native.program import record_apply
    from lazymerge.engine.stages import Slot
    from lazymerge.graph.operation import apply_operation
    from xxhash import xxh3_128_digest

    size = 2 * elements
    program = record_apply(apply_operation("task_vectors"), [0, 1, 2], 2, {"factors": (0.6, 0.4)})
    slots = [Slot(place * size, "U8", size) for place in range(4)]
    registers = Slot(4 * size, "U8", 3 * 8 * 1024)
    arena = Arena(registers.offset + registers.elements)
    generator = numpy.random.default_rng(0)
    values = numpy.frombuffer(arena.memory, numpy.uint16, 3 * elements)
    values[:] = generator.integers(0x3C00, 0x3F00, 3 * elements)
    kernel = Kernel(
        encode_program(program),
        [StreamedInput("BF16", -1, 0, arena.address(slot)) for slot in slots[:3]],
        working_dtype="F64",
        registers=arena.address(registers),
        stores=[],
        output=arena.address(slots[3]),
        output_dtype="BF16",
    )
    output = arena.bytes(slots[3])
    with tempfile.TemporaryFile() as file:
        file.write(bytes(values.data))
        file.write(bytes(size))
        file.flush()
        best = float("inf")
        for _ in range(50):
            began = time.perf_counter()
            for place in range(3):
                os.preadv(file.fileno(), [arena.bytes(slots[place])], place * size)
            kernel.stream(0, elements, elements)
            xxh3_128_digest(output)
            has_nonfinite(output, "BF16")
            os.pwrite(file.fileno(), output, 3 * size)
            best = min(best, time.perf_counter() - began)
    return best


def simulate(recipe: Path, workers: int, work_s: float, folder: Path) -> float:
    """Seconds of the whole loop with so many workers."""
    import lazymerge as lm
    from lazymerge.engine import readahead, worker
    from lazymerge.engine.native import library
    from lazymerge.output import writer

    class Calls:
        """os, with writes of a single byte that say they were whole."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        @staticmethod
        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            os.pwrite(descriptor, data[:1], offset)
            return len(data)

    def sleep(kernel: library.Kernel, start: int, count: int, block: int) -> None:
        time.sleep(work_s * count / block)

    class Checksum:
        """Of nothing: the time it takes is part of the sleep."""

        def update(self, data: memoryview) -> None:
            pass

        def digest(self) -> bytes:
            return bytes(16)

    is_cached = readahead._is_cached
    checksum, stream = worker.xxh3_128, library.Kernel.stream
    nonfinite = worker.has_nonfinite
    plan = lm.plan(recipe, workers=workers, memory="64GiB")
    try:
        library.Kernel.stream = sleep  # type: ignore[method-assign]
        writer.os = Calls()  # type: ignore[attr-defined]
        readahead._is_cached = lambda descriptor, byte: True  # nothing is to be read at all
        worker.xxh3_128 = Checksum  # type: ignore[assignment, misc]
        worker.has_nonfinite = lambda data, dtype: False
        return lm.run(plan, folder / "out", overwrite=True, fsync=False).seconds
    finally:
        library.Kernel.stream = stream  # type: ignore[method-assign]
        writer.os = os  # type: ignore[attr-defined]
        readahead._is_cached = is_cached
        worker.xxh3_128 = checksum  # type: ignore[misc]
        worker.has_nonfinite = nonfinite


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--workers", default="1,2,4,8,16,32,64", metavar="N,N")
    parsed = parser.parse_args(arguments)
    counts = [int(text) for text in parsed.workers.split(",")]
    work_s = seconds_of_work(1 << 18)
    print(f"one block's work: {work_s * 1e6:.0f} us on one core\n")
    print("| workers | loop s | speed-up | of ideal |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        recipe = make_checkpoints(Path(temporary), parsed.shape)
        first = None
        for count in counts:
            seconds = simulate(recipe, count, work_s, Path(temporary))
            first = first or seconds * counts[0]
            speed_up = first / seconds
            print(f"| {count} | {seconds:.2f} | {speed_up:.1f} | {speed_up / count:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
