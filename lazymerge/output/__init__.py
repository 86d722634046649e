"""What a merge leaves on disk.

layout.py    every tensor's place, decided before the first byte is read
writer.py    preallocated shards, renamed when complete
folder.py    what may be in the output folder before, and what is left after a failure
sidecars.py  config and tokenizer files beside the weights
card.py      the model card
manifest.py  lazymerge.json: provenance and checksums
"""
