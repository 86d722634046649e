"""What the benchmarks are made of; scripts/bench.py runs them.

processes: run a command and measure it.
inputs: checkpoints and recipes, and what the page cache holds of them.
programs: lazymerge and its peers: where they are installed, how each is told to merge.
turns: contestants that take turns.
report: claims and tables, as Markdown and JSON.
sections: the benchmarks themselves.

A process that measures imports neither torch nor numpy. A child's peak memory, as the kernel
counts it, starts from that of the process that forked it, so a large parent would be charged to
the child.
"""
