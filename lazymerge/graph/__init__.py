"""How a merge is represented: a DAG of four kinds of node.

node.py       Read, Reduce, Apply, Write: frozen values, identified by what they compute
graph.py      the DAG itself; as a networkx graph on request
operation.py  what an operation is: cost and run, on buffers that the caller owns
operations/   the operations that several methods share
compile.py    recipe + checkpoints → graph
verify.py     what is legal in a graph
export.py     the graph as JSON and back
"""
