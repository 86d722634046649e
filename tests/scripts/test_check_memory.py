"""The memory check: which cases it makes, how it judges, and real processes on small models."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from lazymerge.engine.planning import signatures

import check_memory as check
from method_recipes import model_counts

MIB = check.MIB
SCRIPT = Path(check.__file__)

CASE = check.Case(
    method="linear",
    models=2,
    dtype="BF16",
    limit="1GiB",
    workers=2,
    read_mode="pread",
    kernels="native",
    setting="numbers",
    out_dtype=None,
    content="zeros",
)


def test_the_cases_cover_what_methods_allow() -> None:
    methods = list(signatures())
    cases = check.cases_of(methods, range(1, 9), check.FACTORS, seed=5)
    assert cases == check.cases_of(methods, range(1, 9), check.FACTORS, seed=5)
    assert cases != check.cases_of(methods, range(1, 9), check.FACTORS, seed=6)
    for method in methods:
        own = [case for case in cases if case.method == method]
        assert {case.models for case in own} == set(model_counts(signatures()[method]))
        assert {case.dtype for case in own} == set(check.FACTORS["dtype"])
        assert sum(case.many for case in own) == 1
    few = [case for case in cases if not case.many]
    assert {(case.limit, case.workers) for case in few} == set(
        product(check.FACTORS["limit"], check.FACTORS["workers"])
    )
    assert len(cases) < 15 * len(methods)


def test_no_method_takes_that_many_models() -> None:
    with pytest.raises(ValueError, match="numbers of models"):
        check.cases_of(["slerp"], [3], check.FACTORS, seed=0)


@pytest.mark.parametrize(
    ("projected", "measured", "limit", "words"),
    [
        (300, 290, 400, []),
        (300, 300, 300, []),
        (300, 268, 400, []),
        (300, 301, 400, ["1.0 MiB more than projected"]),
        (300, 267, 400, ["33.0 MiB more than it took"]),
        (1100, 1000, 2000, []),
        (1101, 1000, 2000, ["101.0 MiB more than it took"]),
        (401, 400, 400, ["under a limit of 400.0 MiB"]),
    ],
)
def test_what_is_wrong_with_a_projection(
    projected: int, measured: int, limit: int, words: list[str]
) -> None:
    found = check.disagreements(projected * MIB, measured * MIB, limit * MIB)
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True):
        assert word in text


def outcome(case: check.Case, margin: int, *problems: str) -> check.Outcome:
    return check.Outcome(case, (100 + margin) * MIB, 100 * MIB, 2, 1.0, problems, ("command",))


def test_the_table_shows_the_worst_cases() -> None:
    outcomes = [
        outcome(CASE, 5),
        outcome(CASE, 20),
        outcome(replace(CASE, dtype="F64"), -3, "too much"),
        outcome(replace(CASE, method="ties"), 7),
    ]
    lines = check.margin_table(outcomes, ["BF16", "F64"]).splitlines()
    assert lines[2] == "| linear | 3 | +5 … +20 | **-3 (1 failed)** | 100 |"
    assert lines[3] == "| ties | 1 | +7 | – | 100 |"


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the reserve is measured on Linux")
def test_real_processes(tmp_path: Path) -> None:
    done = script(
        *("--methods", "linear", "--models", "2", "--dtypes", "BF16", "--workers", "1"),
        *("--limits", "smallest", "--read-modes", "pread", "--kernels", "native"),
        *("--settings", "numbers", "--contents", "zeros", "--out-dtypes", "bfloat16"),
        *("--seed", "3", "--only", "1", "--vocabulary", "2000", "--work", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| linear | 1 | +" in done.stdout
    assert "1 processes, 0 failed" in done.stdout
    (kept,) = tmp_path.iterdir()  # --only keeps it
    assert (kept / "1.yml").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the reserve is measured on Linux")
def test_a_wrong_projection_is_shown_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "SLACK_BYTES", -(1 << 40))
    monkeypatch.setattr(check, "SLACK_SHARE", -1000.0)
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    code = check.main(
        [
            *("--large", "--large-shape", "16x8", "--methods", "linear"),
            *("--work", str(tmp_path), "--seed", "1"),
        ]
    )
    printed = capsys.readouterr().out
    assert code == 1
    assert "| linear | 2 | 2 |" in printed
    assert "**failed**" in printed
    assert "-m lazymerge run" in printed
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage(tmp_path: Path) -> None:
    done = script("--methods", "slerp", "--models", "5", "--work", str(tmp_path))
    assert done.returncode == 2
    assert "numbers of models" in done.stderr
