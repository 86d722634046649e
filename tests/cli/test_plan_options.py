"""What `lazymerge plan` shows on request."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import (
    TASK_ARITHMETIC,
    TIES_WITH_GRADIENT_AND_FILTERS,
    Command,
    files_under,
    write_recipe,
)
from lazymerge.cli import plan_time, tensor_names
from lazymerge.cli.tensor_names import matching
from lazymerge.errors import InputError
from lazymerge.inspection import findings, measurement

pytest_plugins = ["command_fixtures"]

PLAN = ["plan", "recipe.yml", "--dry-run"]


@pytest.fixture
def recipe(place: Path) -> Path:
    write_recipe(place, TASK_ARITHMETIC)
    write_recipe(place, TIES_WITH_GRADIENT_AND_FILTERS, "other.yml")
    return place


# names


NAMES = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)] + ["lm_head.weight"]


def test_expressions_find_parts_of_names() -> None:
    assert matching(NAMES, r"layers\.[13]\.") == [NAMES[1], NAMES[3]]
    assert matching(NAMES, "^lm") == [NAMES[4]]


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "*", "a{2,1}", "(?P<n", "a{99999999999999999}"])
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(InputError, match="is not a regular expression: "):
        matching(NAMES, pattern)


def test_nothing_matches() -> None:
    with pytest.raises(InputError, match=r"none of the 5 output tensors; the first is named model"):
        matching(NAMES, "nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such timers")
def test_an_expression_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_names, "MOST_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(InputError, match="backtracks"):
        matching(["a" * 60 + "!"], "(a+)+$")
    assert time.monotonic() - began < 5


def test_beside_the_main_thread_there_is_no_timer() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(matching(NAMES, "lm_head")))
    thread.start()
    thread.join()
    assert found == [NAMES[4]]


# the command


def test_a_long_answer_is_cut_with_its_remedy(lazymerge: Command, recipe: Path) -> None:
    shown = lazymerge(*PLAN, "--tensor", "layers").out
    assert "28 tensors match layers" in shown
    assert "and 25 more that match: give a longer --tensor, or --most 28" in shown
    assert lazymerge(*PLAN, "--tensor", "layers", "--most", "28").out.count("Write model.") == 28


def test_nothing_would_change(lazymerge: Command, recipe: Path) -> None:
    write_recipe(recipe, TASK_ARITHMETIC, "same.yml")
    assert "nothing: both give the same bytes" in lazymerge(*PLAN, "--diff", "same.yml").out
    assert lazymerge("plan", "recipe.yml", "--save", "saved.json").code == 0
    assert "nothing: both" in lazymerge(*PLAN, "--diff", "saved.json").out


@pytest.mark.parametrize("option", ["--dot", "--mermaid"])
def test_pictures_go_where_they_are_asked_to(lazymerge: Command, recipe: Path, option: str) -> None:
    before = files_under(recipe)
    printed = lazymerge(*PLAN, option, "-")
    assert printed.code == 0
    assert printed.out.startswith("digraph" if option == "--dot" else "%% ")
    assert files_under(recipe) == before
    shown = lazymerge(*PLAN, option, "picture")
    assert "goes in" in shown.out
    assert (recipe / "picture").read_text("utf-8") == printed.out
    document = lazymerge(*PLAN, option, "picture", "--json").document
    assert document["format"] == 1
    part = lazymerge(*PLAN, option, "-", "--tensor", r"layers\.0\.mlp")
    assert part.out.count("model.layers.0.mlp.up_proj.weight") == 4


def test_pictures_that_cannot_be(lazymerge: Command, recipe: Path) -> None:
    answer = lazymerge(*PLAN, "--dot", "-", "--mermaid", "-")
    assert "choose one" in answer.message()
    assert "choose one" in lazymerge(*PLAN, "--dot", "-", "--json").message()
    assert "cannot write nowhere/x" in lazymerge(*PLAN, "--dot", "nowhere/x").message()


def test_json_is_not_measured_and_text_is(
    lazymerge: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def measure(plan: object, place: Path, *, touches_files: bool) -> measurement.Measured:
        calls.append(touches_files)
        return measurement.Measured((), 1, None, None, None, None, None, 0.0)

    monkeypatch.setattr(measurement, "measure", measure)
    assert lazymerge(*PLAN).code == 0
    assert calls == []  # too small for that
    monkeypatch.setattr(plan_time, "SMALL_BYTES", 1)
    for options in (["--json"], ["--no-measure"], ["--dot", "-"]):
        lazymerge(*PLAN, *options)
    lazymerge("plan", "recipe.yml", "--save", "plan.json")
    assert calls == []
    lazymerge(*PLAN)
    lazymerge(*PLAN, "--measure")
    lazymerge(*PLAN, "--measure", "--json")
    assert calls == [False, True, True]


def test_mistakes_stand_first_and_what_is_left_out_is_counted(
    lazymerge: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suspicions(plan: object) -> tuple[SimpleNamespace, ...]:
        notes = [("note", f"note number {n}, {'which is long ' * 20}") for n in range(9)]
        found = [*notes, *(("mistake", f"mistake number {n}") for n in range(12))]
        return tuple(SimpleNamespace(kind="k", severity=s, message=m) for s, m in found)

    monkeypatch.setattr(findings, "suspicions", suspicions)
    shown = lazymerge(*PLAN).out
    found = re.findall(r"mistake number (\d+)", shown)
    assert 6 <= len(found) < 12
    assert found == [str(n) for n in range(len(found))]
    assert f"and {12 - len(found)} more mistakes and 9 more notes: --notices" in shown
    everything = lazymerge(*PLAN, "--notices").out
    assert everything.count("note number") == 9
    assert " ".join(everything.split()).count("which is long") == 180
    document = lazymerge(*PLAN, "--json").document
    assert [each["severity"] for each in document["suspicions"]] == ["mistake"] * 12 + ["note"] * 9
    assert json.dumps(document)


def test_values_without_end_are_cut(lazymerge: Command, recipe: Path) -> None:
    models = [f"copy_{number}" for number in range(30)]
    for model in models:
        (recipe / model).symlink_to("one")
    entries = [{"model": model, "parameters": {"weight": 0.123}} for model in models]
    write_recipe(recipe, {**TASK_ARITHMETIC, "models": entries})
    shown = lazymerge(*PLAN).out
    assert "… all of it: --layers" in " ".join(shown.split())
    assert shown.count("\n") < 24


@pytest.mark.parametrize("section", [["--layers"], ["--tensor", "q"], ["--why", "memory"]])
def test_json_has_no_sections(lazymerge: Command, recipe: Path, section: list[str]) -> None:
    answer = lazymerge(*PLAN, "--json", *section)
    assert answer.code == 2
    assert "--json prints all of the plan" in answer.message()
