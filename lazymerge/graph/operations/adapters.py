"""Adapters folded into a model's tensors, as the first step of a merge.

    Read A ─► Reduce factor ──┐
    Read B ─► Reduce factor ──┤    W + scaling · B @ A, of the rows of a block
    Read W ────────────► Apply adapted ─► whatever the merge does with it

The factors are small and kept whole; their product is never formed but for the elements of a block.
It is computed in the working dtype and not rounded to the model's.

DoRA scales what comes of that to the length that it has learnt for every output: rows, or columns
where the matrix is stored the other way round (as embeddings and gpt-2's layers are).

    Apply adapted (float64) ─► Reduce gram_of_rows ──┐
    Read magnitude ─► Reduce factor ─────────────────┴─► Apply adapted

Sources: Hu et al., LoRA, arXiv:2106.09685; Kalajdzievski, rank-stabilised scaling,
arXiv:2312.03732; Liu et al., DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, cast

from ...errors import InputError
from ..graph import Graph
from ..node import Apply, Read, Reduce, as_parameters
from ..operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    register,
)
from ..vector import load_product, scale_columns, scale_rows
from .collected import Collected

if TYPE_CHECKING:
    from ...checkpoint.tensor import LowRank, TensorInfo
    from ..vector import Numbers, Vector

ROWS, COLUMNS = "rows", "columns"
"""What DoRA scales."""


def add_adapted(graph: Graph, source: str, change: LowRank, *, is_wide: bool) -> str:
    """Adds what yields a tensor with its adapter's change; returns its id.

    source: the node that yields the tensor as the model has it.
    is_wide: in float64, whatever the inputs are.

    Raises:
        InputError: it is some rows of a tensor whose columns DoRA scales.
    """
    node = graph.block_node(source)
    dtypes = {node.dtype, change.first.dtype, change.second.dtype}
    working_dtype = "F64" if is_wide or "F64" in dtypes else "F32"
    plain = _add_product(graph, source, change, working_dtype, ())
    if change.magnitude is None:
        return plain
    scaled = COLUMNS if change.is_transposed else ROWS
    if change.is_transposed and node.shape[0] != change.rows:
        raise InputError(
            f"{change.folder}: the adapter scales the columns of {change.magnitude.name}, and only "
            f"{node.shape[0]} of its {change.rows} rows are merged. Merge the adapter into its "
            "model first."
        )
    wide = _add_product(graph, source, change, "F64", ())
    squares = Reduce(
        operation=f"gram_of_{scaled}",
        parameters=as_parameters(
            {"row_elements": prod(node.shape[1:]), "is_of_changes": False},
        ),
        inputs=(wide,),
        statistics=(),
        # rows are what lies along the first dimension, whatever the tensor's others are
        shape=node.shape,
        working_dtype="F64",
    )
    magnitude = _add_factor(graph, change, change.magnitude, "F64", is_transposed=False)
    return _add_product(
        graph, source, change, working_dtype, (graph.add(squares), magnitude), scaled
    )


def is_computed_wide(graph: Graph, result: str, changed: Collection[str]) -> bool:
    """Whether what uses some tensors computes in float64, though they are float32.

    result: what is computed. changed: the nodes of the tensors.
    """
    narrow = {node for node in changed if graph.block_node(node).dtype == "F32"}
    waiting, seen = [result] if narrow else [], set(narrow)
    while waiting:
        node = graph[waiting.pop()]
        if node.id in seen or not isinstance(node, Apply | Reduce):
            continue
        seen.add(node.id)
        if node.working_dtype == "F64" and not narrow.isdisjoint(node.inputs):
            return True
        waiting += [*node.inputs, *node.statistics]
    return False


def _add_product(
    graph: Graph,
    source: str,
    change: LowRank,
    working_dtype: str,
    lengths: tuple[str, ...],
    scaled: str | None = None,
) -> str:
    """lengths: of DoRA, squares of those that there are and those that there should be."""
    factors = [
        _add_factor(graph, change, factor, working_dtype, is_transposed=change.is_transposed)
        for factor in (change.left, change.right)
    ]
    shape = graph.block_node(source).shape
    return graph.add(
        Apply(
            operation=Adapted.name,
            parameters=as_parameters(
                {
                    "first_row": change.first_row,
                    "rows": shape[0],
                    "row_elements": prod(shape[1:]),
                    "scaling": change.scaling,
                    "scaled": scaled,
                }
            ),
            inputs=(source,),
            statistics=(*factors, *lengths),
            shape=shape,
            working_dtype=working_dtype,
        )
    )


def _add_factor(
    graph: Graph, change: LowRank, stored: TensorInfo, working_dtype: str, *, is_transposed: bool
) -> str:
    """stored: of the adapter; all dimensions but the first are one."""
    shape = (stored.shape[0], prod(stored.shape[1:]))
    return graph.add(
        Reduce(
            operation=Factor.name,
            parameters=as_parameters({"shape": shape, "is_transposed": is_transposed}),
            inputs=(graph.add(Read(change.folder, stored)),),
            statistics=(),
            shape=stored.shape,
            working_dtype=working_dtype,
        )
    )


@register
class Factor(Collected):
    """A small matrix, whole.

    Parameters: shape, as it is stored; is_transposed, whether rows become columns.

    Result: the working dtype, contiguous.
    """

    name = "factor"

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        # blocks, joined, and transposed
        return 3 * item_bytes * element_count + 200 * block_count

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[Numbers],
    ) -> Done[Numbers]:
        import numpy

        shape = cast("tuple[int, int]", parameters["shape"])
        matrix = numpy.concatenate(partials).reshape(shape)
        return Done(numpy.ascontiguousarray(matrix.T) if parameters["is_transposed"] else matrix)


@register
class Adapted(ApplyOperation):
    """A matrix with a change of low rank, W + scaling · left @ right, perhaps scaled.

    Parameters:
        first_row, rows: which rows of `left` are those of the input.
        row_elements: of the input.
        scaling: of the product.
        scaled: "rows" or "columns" whose length DoRA sets, or None.

    Statistics: left; right; of DoRA, gram_of_rows or gram_of_columns of the unscaled result, and
    the lengths that they are scaled to.
    """

    name = "adapted"
    is_recordable = True
    is_for_host = True
    is_positional = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1, stores=1)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        left, right, *lengths = statistics
        first = cast("int", parameters["first_row"])
        rows = cast("int", parameters["rows"])
        factors = None
        if lengths:
            import numpy

            ((squares,), wanted) = lengths
            wanted = wanted.reshape(-1)
            if parameters["scaled"] == ROWS:
                wanted = wanted[first : first + rows]
            with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
                factors = wanted / numpy.sqrt(squares)
        return {"left": left[first : first + rows], "right": right, "factors": factors} | {
            name: parameters[name] for name in ("scaling", "scaled", "row_elements")
        }

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        inputs[0].read_into(out)
        (change,) = scratch
        load_product(change, prepared["left"], prepared["right"], start)
        out.add_(change.mul_(prepared["scaling"]))
        if prepared["scaled"] == ROWS:
            scale_rows(out, prepared["factors"], prepared["row_elements"], start)
        elif prepared["scaled"] == COLUMNS:
            scale_columns(out, prepared["factors"], start)
