"""What a merge leaves on disk.

layout.py    every tensor's place, decided before the first byte is read
writer.py    preallocated shards, renamed when complete
journal.py   what is finished, a line for every tensor
recovery.py  what of an unfinished output can be used
lock.py      one process at a time
folder.py    what may be in the output folder before, and what is left after a failure
sidecars.py  config and tokenizer files beside the weights
card.py      the model card
manifest.py  lazymerge.json: provenance and checksums
checksum.py  a tensor's checksum, from the file that holds it
status.py    how far an output is
"""
