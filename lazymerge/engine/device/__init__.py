"""Merging on an accelerator.

interface.py   what a device is: memory, queues of work, events
host.py        the processor as such a device: what tests run everywhere
cuda.py        NVIDIA GPUs by way of torch
vector.py      a block on a device, and its reductions
rounding.py    one rounding from float64, on a device
frame.py       a stage bound to a worker's buffers; copies overlap with computation
memory.py      what a run allocates there, added up before it starts; each worker's share of it

                pread           copy           compute          copy        checksum, pwrite
    files ───────────► staging ──────► device ──────────► device ──────► staging ─────────► shard
                        (pinned)         raw    kernels    encoded        received

    worker 1   read 0 │ read 1 │ read 2 │ write 0, read 3 │ ...        its own thread, its own
    bus               │ in 0   │ in 1   │ in 2, out 0     │            streams, its own share of
    device                     │ comp 0 │ comp 1          │            the one device arena

Only cuda.py knows CUDA. It has not run on hardware yet (docs/design.md says what that means).
"""
