"""From a graph to bytes: what runs, in which order, in which memory.

blocks.py        the unit of work
stages.py        what one output tensor needs done, and its buffers
memory.py        what a run occupies, decided before it starts
plan.py          all of that as one value
inputs.py        reading byte ranges, mapped or by pread
rounding.py      float64 to a narrow dtype in one rounding
frame.py         a stage bound to a worker's arena
scheduler.py     who does what next
worker.py        a thread that does it
preparing.py     an output before a run: empty, complete, or to be gone on with
run.py           from a plan to a finished folder
finishing.py     the small files and the manifest
report.py        what a run tells
unfinished.py    the plan of an output that is not complete, or what has changed
verification.py  a complete output against its manifest and its inputs
"""
