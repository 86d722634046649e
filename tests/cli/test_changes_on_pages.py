"""Statistics as the page of a report draws them: the numbers that the terminal shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TASK_ARITHMETIC, llama_tensors, write_models, write_recipe
from lazymerge import diff, plan, report, run
from lazymerge.engine.statistics import change_of
from lazymerge.page.changes import comparison_document, merge_document


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, TASK_ARITHMETIC)
    run(plan("recipe.yml", statistics=True), "out", statistics=True, fsync=False)
    return tmp_path


def test_a_merge(merged: Path) -> None:
    found = report("out")
    assert found.statistics is not None
    document = merge_document(found)
    assert document.reference == "base"
    assert document.models == ("base", "one", "two")
    assert [tensor.name for tensor in document.tensors] == list(found.statistics.tensors)
    names = {series.name: series.remarkable for series in document.series}
    assert names["cosine of the changes: one and two"] == "low"
    assert names["sign agreement of two and the result"] == "low"
    for tensor in document.tensors:
        change = change_of([found.statistics.tensors[tensor.name]])
        assert change is not None
        assert tensor.values["relative change of the result"] == change.relative
        assert tensor.values["fraction changed"] == change.fraction
        assert tensor.values["kept of the change of one"] == change.models["one"].kept
        assert set(tensor.values) == set(names)


def test_a_merge_without_statistics(merged: Path) -> None:
    run(plan("recipe.yml"), "plain", fsync=False)
    document = merge_document(report("plain"))
    assert (document.tensors, document.series) == ((), ())
    assert "--stats" in document.notes[0]


def test_a_comparison(merged: Path) -> None:
    document = comparison_document(diff("one", "two"))
    assert document.reference == "one"
    assert {tensor.name for tensor in document.tensors} == set(llama_tensors(0))
    series = {each.name for each in document.series}
    assert {"relative change of two", "fraction changed", "cosine of two to one"} <= series
    same = comparison_document(diff("one", "one"))
    assert f"{len(llama_tensors(0))} tensors are equal" in same.notes
