"""`run --stats`, `report` and `diff` as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import CONFIG, TASK_ARITHMETIC, Command, llama_tensors, write_recipe
from lazymerge.cli.change_view import bar, cosine, percent, spark
from lazymerge.output.manifest import STATISTICS_NAME

from conftest import write_checkpoint

pytest_plugins = ["command_fixtures"]


@pytest.fixture
def merged(lazymerge: Command, place: Path) -> Path:
    write_recipe(place, TASK_ARITHMETIC)
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--stats", "--no-fsync")
    assert answer.code == 0
    assert f"lazymerge report {place / 'out'}" in answer.err
    return place / "out"


@pytest.mark.parametrize("width", [80, 140])
def test_report(
    lazymerge: Command, merged: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    answer = lazymerge("report", "out")
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.splitlines())) <= width
    for text in ("compared with base", "model.layers.0", "self_attn.q_proj", "kept", "projected"):
        assert text in answer.out
    for model in ("one", "two"):
        (row,) = [line for line in answer.out.splitlines() if line.startswith(f" {model} ")]
        assert row.count("%") == 4


def test_report_as_json(lazymerge: Command, merged: Path) -> None:
    document = lazymerge("report", "out", "--json").document
    statistics = document["statistics"]
    assert document["format"] == 1
    assert [layer["name"] for layer in statistics["layers"]][:2] == [
        "model.layers.0",
        "model.layers.1",
    ]
    assert statistics["whole"]["models"]["one"]["kept"] == pytest.approx(1.0, abs=0.5)
    assert set(statistics["tensors"]) == set(llama_tensors(0))
    assert document["models"] == ["base", "one", "two"]


def test_report_without_statistics(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    assert lazymerge("run", "recipe.yml", "-o", "out", "--no-fsync").code == 0
    answer = lazymerge("report", "out")
    assert answer.code == 0
    assert "run it with --stats" in answer.out
    assert "statistics" not in lazymerge("report", "out", "--json").document


def test_report_of_nothing(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("report", "base")
    assert answer.code == 2
    assert "is no output of lazymerge" in answer.message()


def test_statistics_of_another_merge(lazymerge: Command, merged: Path) -> None:
    path = merged / STATISTICS_NAME
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "fingerprint": "x"}))
    answer = lazymerge("report", "out")
    assert answer.code == 2
    assert "another merge" in answer.message()


def test_names_that_would_steer_the_terminal(lazymerge: Command, merged: Path) -> None:
    path = merged / STATISTICS_NAME
    document = json.loads(path.read_text())
    evil = "\x1b[31m</script><script>\x07"
    document["models"][1] = evil
    document["tensors"][evil] = document["tensors"]["model.norm.weight"]
    document["tensors"]["gone"] = {"elements": 1, "left_out": evil}
    path.write_text(json.dumps(document))
    answer = lazymerge("report", "out")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    assert "\x07" not in answer.out


def test_an_output_with_statistics_is_verified_and_replaced(
    lazymerge: Command, merged: Path
) -> None:
    assert lazymerge("verify", "out").code == 0
    before = (merged / STATISTICS_NAME).read_text()
    again = lazymerge("run", "recipe.yml", "-o", "out", "--stats", "--overwrite", "--no-fsync")
    assert again.code == 0
    assert (merged / STATISTICS_NAME).read_text() == before


@pytest.mark.parametrize("width", [80, 140])
def test_diff(lazymerge: Command, place: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    answer = lazymerge("diff", "base", "one", "--memory", "1GiB")
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.splitlines())) <= width
    for text in ("31 of 31 differ", "model.layers.3", "mlp.up_proj", "most changed", "projected"):
        assert text in answer.out


def test_diff_of_equal_models(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("diff", "base", "base", "--exit-code")
    assert answer.code == 0
    assert "all 31 are equal" in answer.out


def test_exit_code_says_that_they_differ(lazymerge: Command, place: Path) -> None:
    assert lazymerge("diff", "base", "one").code == 0
    assert lazymerge("diff", "base", "one", "--exit-code").code == 1


def test_diff_as_json(lazymerge: Command, place: Path) -> None:
    document = lazymerge("diff", "base", "one", "--json", "--tensor", "norm").document
    assert document["models"] == ["base", "one"]
    assert not document["same"]
    assert all("norm" in name for name in document["statistics"]["tensors"])
    assert document["run"]["bytes_read"] > 0


def test_diff_names_what_only_one_has(lazymerge: Command, place: Path) -> None:
    tensors = llama_tensors(0)
    tensors["\x1b[2Jevil"] = torch.zeros(3)
    write_checkpoint(place / "other", tensors, {**CONFIG, "rope_theta": 5e5, "bad": "\x1b[2J"})
    answer = lazymerge("diff", "base", "other")
    assert "only in B" in answer.out
    assert "rope_theta: absent → 500000.0" in answer.out
    assert "tokenizer.json only in A" in answer.out
    assert "\x1b" not in answer.out


def test_a_wrong_expression(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("diff", "base", "one", "--tensor", "(")
    assert answer.code == 2
    assert "no regular expression" in answer.err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.12345, "12.3 %"),
        (0.00345, "0.34 %"),
        (1e-7, "<0.01 %"),
        (12.5, "1250 %"),
    ],
)
def test_shares(value: float, shown: str) -> None:
    assert percent(value) == shown


def test_no_number() -> None:
    nan = float("nan")
    assert percent(nan) == cosine(nan) == "–"
    assert bar(nan, 1.0, 8) == ""
    assert spark([nan, 0.0, 1.0], 0.0, 1.0) == "·▁█"


def test_cosines_near_one_and_zero() -> None:
    assert (cosine(0.99999), cosine(0.5), cosine(-1e-9)) == ("0.999990", "0.500", "0.000")


def test_pages(lazymerge: Command, merged: Path, place: Path) -> None:
    assert lazymerge("report", "out", "--html", "report.html").code == 0
    assert lazymerge("diff", "one", "two", "--html", "diff.html").code == 0
    for name in ("report.html", "diff.html"):
        text = (place / name).read_text()
        assert text.startswith("<!DOCTYPE html>")
        assert "lazymerge report" in text
    answer = lazymerge("report", "out", "--html", "nowhere/report.html")
    assert answer.code == 2
    assert "cannot write nowhere/report.html" in answer.message()


def test_a_diff_of_nothing_is_an_error(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("diff", "one", "two", "--tensor", "nomatch", "--exit-code")
    assert answer.code == 2
    assert "no tensor of one or two is asked for" in answer.message()
