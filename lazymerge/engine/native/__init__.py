"""Block programs: operations recorded once, run by native kernels in the first-level cache.

program.py   recording an operation as a list of instructions
library.py   finding and calling the kernels
frame.py     a stage bound to a worker's arena, computed natively
kernels.c    the kernels; loops.h their loops, once per working type
"""
