"""Loaded by every Dask worker of the matrix (`dask worker --preload`): makes it slow enough to be
met at work, and has it wait where a trial wants to strike. Nothing of this is in lazymerge.

    TRIAL/workers/PID            a worker: its name, address and parent
    TRIAL/groups                 a line for every group that a worker has begun or ended
    TRIAL/given/PID              the group that it has, as JSON: its shard and its tensors
    TRIAL/gates/MOMENT           put there by a trial: the next worker that comes to this moment, of
                                 a shard if it names one
    TRIAL/gates/MOMENT.PID       …has renamed the gate so, and waits
    TRIAL/gates/MOMENT.PID.open  …until this is there

    opening   before the shard is opened
    opened    between that and looking for the run's token
    half      a tensor is written in part
    written   all of the group is written, and nobody has been told
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

TRIAL_VARIABLE = "LAZYMERGE_TRIAL"

MOMENTS = ("opening", "opened", "half", "written")

PACE_VARIABLE = "LAZYMERGE_MATRIX_BYTES_PER_S"

LOOK_SECONDS = 0.01


def dask_setup(worker: Any) -> None:
    """Called by Dask when the worker starts."""
    trial = Path(os.environ[TRIAL_VARIABLE])
    with suppress(ImportError):  # a worker that has no lazymerge
        install(trial)
    record = {"name": str(worker.name), "address": worker.address, "parent": os.getppid()}
    new = trial / "workers" / f".{os.getpid()}"
    new.write_text(json.dumps(record))
    new.rename(trial / "workers" / str(os.getpid()))


def pass_gate(trial: Path, moment: str, shard: str = "") -> None:
    """Waits at a gate, if there is one that no other worker waits at. shard: that the worker is
    at."""
    gate = trial / "gates" / moment
    waiting = gate.with_name(f"{moment}.{os.getpid()}")
    try:
        if gate.read_text() not in ("", shard):
            return
        gate.rename(waiting)
    except FileNotFoundError:
        return
    while not waiting.with_name(f"{waiting.name}.open").exists():
        time.sleep(LOOK_SECONDS)


def install(trial: Path) -> None:
    """Puts the hooks into lazymerge, in this process."""
    from lazymerge.cluster import destination
    from lazymerge.cluster import worker as module
    from lazymerge.engine.finite import MASKS
    from lazymerge.engine.worker import Worker

    class GatedWriter(destination.RangeWriter):
        def __init__(self, folder: Path, file: str, *others: Any) -> None:
            pass_gate(trial, "opening", file)
            super().__init__(folder, file, *others)

        def write(self, tensor: str, data: memoryview, offset: int) -> None:
            if (trial / "gates" / "half").exists():
                half = len(data) // 2 | 1  # bytes: in the middle of an element
                super().write(tensor, data[:half], offset)
                pass_gate(trial, "half")
                super().write(tensor, data[half:], offset + half)
            else:
                super().write(tensor, data, offset)

    bytes_per_s = float(os.environ[PACE_VARIABLE])

    class SlowTold(module._Told):
        def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
            super().moved(bytes_read, bytes_written, tensor)
            time.sleep(bytes_written / bytes_per_s)

    write_at_once = Worker._write_at_once

    def write_half_first(
        self: Any, frame: Any, job: Any, stage: Any, start: int, stop: int
    ) -> list[Any]:
        """Native kernels write a whole tensor, or a span of it, at once."""
        if (trial / "gates" / "half").exists() and stop - start > 1:
            descriptor, first_byte = self._writer.place(stage.name)
            begin = first_byte + self._bytes_of(stage, 0, start)
            self._sink.begin(descriptor, begin, MASKS[stage.dtype])
            frame.write(start, (start + stop) // 2, self._sink)
            pass_gate(trial, "half")
        return write_at_once(self, frame, job, stage, start, stop)

    Worker._write_at_once = write_half_first  # type: ignore[method-assign]
    names: dict[str, Any] = vars(module)
    of_destination: dict[str, Any] = vars(destination)
    open_own, make = of_destination["open_own"], module._make

    def open_and_wait(*arguments: Any) -> int:
        descriptor: int = open_own(*arguments)
        pass_gate(trial, "opened")
        return descriptor

    def make_and_tell(group: Any) -> Any:
        _note(trial, f"begins {group.number} {group.token}")
        given = {"shard": group.file, "tensors": [tensor.name for tensor in group.placements]}
        (trial / "given" / str(os.getpid())).write_text(json.dumps(given))
        try:
            told = make(group)
        except BaseException as error:
            _note(trial, f"fails {group.number} {group.token} {' '.join(str(error).split())[:300]}")
            raise
        _note(trial, f"ends {group.number} {group.token}")
        pass_gate(trial, "written")
        return told

    names.update(RangeWriter=GatedWriter, _Told=SlowTold, _make=make_and_tell)
    of_destination["open_own"] = open_and_wait
    from cluster_faults.mutations import mutate_worker

    mutate_worker(names)


def _note(trial: Path, text: str) -> None:
    line = f"{time.time():.3f} {os.getpid()} {text}\n"
    with (trial / "groups").open("a") as file:
        file.write(line)
