"""What statistics say, as the page of a report draws it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..engine.comparison import Comparison
from ..engine.output_report import OutputReport
from ..engine.statistics import Change, TensorStatistics, change_of
from ..engine.statistics_groups import left_out
from .report_document import ReportDocument, ReportTensor, Series

MOST_NAMED = 3
"""Tensors that a note names of those of which nothing is known."""


def merge_document(report: OutputReport) -> ReportDocument:
    """What a merge did to its models. Without statistics only what its run measured is drawn."""
    title = f"{report.method}: {report.output}"
    if report.statistics is None:
        note = (
            "The merge was made without --stats, so nothing is known of what it changed; lazymerge "
            "diff compares it with one of its models."
        )
        return ReportDocument(title, report.models, "", (), (), (note,))
    tensors = [*report.statistics.tensors.values()]
    return _document(title, report.models, tensors, "the result")


def comparison_document(comparison: Comparison) -> ReportDocument:
    """How two models differ."""
    plan = comparison.plan
    notes = [
        f"{count} {what}"
        for count, what in (
            (len(plan.only_first), f"tensors are only in {plan.models[0]}"),
            (len(plan.only_second), f"tensors are only in {plan.models[1]}"),
            (len(plan.shapes), "tensors have different shapes"),
            (len(plan.dtypes), "tensors have different dtypes"),
            (len(plan.config), "keys of the configs differ"),
            (len(comparison.equal), "tensors are equal"),
        )
        if count
    ]
    title = f"{plan.models[1]} against {plan.models[0]}"
    tensors = [*comparison.tensors.values()]
    return _document(title, plan.models, tensors, plan.models[1], notes)


def _document(
    title: str,
    models: Sequence[str],
    tensors: Sequence[TensorStatistics],
    result: str,
    notes: Sequence[str] = (),
) -> ReportDocument:
    """result: what the changes are those of, in words."""
    rows: list[ReportTensor] = []
    named: dict[str, Series] = {}
    references: dict[str, None] = {}
    for tensor in tensors:
        change = change_of([tensor])
        if change is None:
            continue
        references[tensor.models[0]] = None
        values = {}
        for series, value in _values(change, result):
            named.setdefault(series.name, series)
            values[series.name] = value
        rows.append(ReportTensor(tensor.name, tensor.elements, values))
    reference = next(iter(references)) if len(references) == 1 else ""
    said = (*notes, *_left_out(tensors))
    return ReportDocument(title, tuple(models), reference, tuple(named.values()), tuple(rows), said)


def _values(change: Change, result: str) -> Iterable[tuple[Series, float]]:
    """The numbers of a tensor, each with the series that it belongs to."""
    yield Series(f"relative change of {result}"), change.relative
    yield Series(f"delta norm of {result}"), change.norm
    yield Series("fraction changed"), change.fraction
    for name, cosine in change.cosines.items():
        yield Series(f"cosine of {result} to {name}", "low"), cosine
    if len(change.models) > 1:
        yield Series("models that contradict each other"), change.conflict
    for name, model in change.models.items():
        if name == result:
            continue  # it is what the others are compared with
        yield Series(f"delta norm of {name}"), model.norm
        yield Series(f"relative change of {name}"), model.relative
        yield Series(f"cosine of the changes: {name} and {result}", "low"), model.cosine
        yield Series(f"kept of the change of {name}", "low"), model.kept
        yield Series(f"sign agreement of {name} and {result}", "low"), model.agreement
    for (one, other), cosine in change.between.items():
        yield Series(f"cosine of the changes: {one} and {other}", "low"), cosine


def _left_out(tensors: Sequence[TensorStatistics]) -> list[str]:
    notes = []
    for reason, names in left_out(tensors).items():
        more = len(names) - MOST_NAMED
        shown = ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        notes.append(f"Nothing is known of {shown}: {reason}.")
    return notes
