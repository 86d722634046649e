"""The benchmark measures what it says, and draws the right conclusions from it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from lazymerge.methods import METHODS
from lazymerge.recipe.parse import load_recipe

import bench
import make_synthetic_checkpoint as synthetic
from benchmarking import inputs, processes, programs, report, sections, turns
from benchmarking.processes import BenchError, Run
from benchmarking.report import Claim, Section
from benchmarking.turns import Contest, Contestant, Rounds, take_turns

MIB = 1 << 20
FOLDERS = [Path("/models") / name for name in ("base", "a", "b")]


def measured(wall_s: float, stdout: str = "", rss_bytes: int = 0) -> Run:
    return Run(wall_s, wall_s, rss_bytes, 0, stdout)


def environment() -> dict[str, str]:
    return dict(os.environ)


def test_a_run_is_measured(tmp_path: Path) -> None:
    program = "import time; held = bytearray(b'x') * (80 << 20); print('done'); time.sleep(0.4)"

    run = processes.run_measured([sys.executable, "-c", program], environment(), tmp_path / "log")

    assert run.stdout == "done\n"
    assert 0.4 < run.wall_s < 10
    assert run.cpu_s < run.wall_s
    assert run.peak_rss_bytes > 80 * MIB
    if sys.platform == "linux":
        assert 80 * MIB < run.peak_anonymous_bytes <= run.peak_rss_bytes


def test_a_failure_shows_what_was_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('half'); sys.exit('a reason')"]

    with pytest.raises(BenchError, match=r"(?s)ended with 1:.*half.*a reason"):
        processes.run_measured(command, environment(), tmp_path / "log")


def test_anonymous_memory_is_read_from_proc_status() -> None:
    status = "VmRSS:\t    5120 kB\nRssAnon:\t    3072 kB\nRssFile:\t    2048 kB\n"

    assert processes.anonymous_bytes(status) == 3 * MIB
    assert processes.anonymous_bytes("Name: x\n") == 0


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "ties", "passthrough"])
def test_recipes_are_recipes(method: str, tmp_path: Path) -> None:
    signatures = {name: known.signature for name, known in METHODS.items()}
    document = inputs.recipe_document(method, FOLDERS)
    path = tmp_path / "recipe.yml"
    inputs.write_recipe(path, document)

    assert load_recipe(path, signatures).merge_method == method
    used = {"slerp": 2, "passthrough": 1}.get(method, 3)
    assert inputs.recipe_inputs(document) == FOLDERS[:used]
    weights = [model.get("parameters", {}).get("weight") for model in document["models"]]
    assert len(set(weights)) == len(weights)
    assert 1.0 not in weights
    if method == "ties":
        assert {model["parameters"]["density"] for model in document["models"]} == {0.5}


def test_too_few_checkpoints_are_refused() -> None:
    with pytest.raises(BenchError, match="task_arithmetic needs 2"):
        inputs.recipe_document("task_arithmetic", FOLDERS[:1])


def test_sizes_are_shapes_of_the_script_that_makes_them() -> None:
    for size, shape in inputs.SIZES.items():
        assert shape[0] in synthetic.SHAPES if len(shape) == 1 else len(shape) == 6, size
    assert inputs.shape_options("1.1b") == ["--shape", "tinyllama-1.1b"]
    assert inputs.shape_options("1m")[:2] == ["--hidden=128", "--intermediate=352"]


def turn_takers(log: Path, failing: str = "") -> list[Contestant]:
    """Contestants a, b and c, which write their names into the log."""
    return [
        Contestant(
            name,
            ["sh", "-c", f"echo {name} >> {log}; test {name} != '{failing}'"],
            environment(),
            prepare=lambda folders: None,
            may_fail=name == failing,
        )
        for name in "abc"
    ]


def test_everyone_begins_a_round(tmp_path: Path) -> None:
    log = tmp_path / "order"

    contest = take_turns(turn_takers(log), Rounds(3, 1, 60), tmp_path, "test")

    assert "".join(log.read_text().split()) == "abcbcacab"
    assert {name: len(runs) for name, runs in contest.runs.items()} == {"a": 3, "b": 3, "c": 3}


def test_long_rounds_are_fewer(tmp_path: Path) -> None:
    contest = take_turns(turn_takers(tmp_path / "order"), Rounds(5, 2, 0.0), tmp_path, "test")

    assert len(contest.runs["a"]) == 2


def test_a_peer_that_fails_is_taken_out_and_named(tmp_path: Path) -> None:
    contestants = turn_takers(tmp_path / "order", failing="b")

    contest = take_turns(contestants, Rounds(2, 1, 60), tmp_path, "test")

    assert set(contest.runs) == {"a", "c"}
    assert list(contest.failures) == ["b"]
    section = Section("x")
    section.add_walls("linear", contest)
    assert section.notes[0].startswith("linear: b failed: ")


def test_one_that_must_not_fail_ends_the_contest(tmp_path: Path) -> None:
    contestant = Contestant("x", ["false"], environment(), prepare=lambda folders: None)

    with pytest.raises(BenchError):
        take_turns([contestant], Rounds(), tmp_path, "test")


def test_an_output_without_tensors_is_a_failure(tmp_path: Path) -> None:
    contestant = Contestant("x", ["true"], environment(), output=tmp_path / "out")

    with pytest.raises(BenchError, match="left no tensors"):
        take_turns([contestant], Rounds(), tmp_path, "test")


def test_medians_and_worst_peaks() -> None:
    runs = [measured(wall, f'{{"seconds": {wall / 2}}}', int(wall)) for wall in (1.0, 9.0, 3.0)]
    contest = Contest(runs={"x": runs})

    assert contest.wall_s("x") == 3.0
    assert contest.loop_s("x") == 1.5
    assert contest.peak_rss_bytes("x") == 9


@pytest.mark.parametrize(
    ("at_least", "theirs_s", "must_be", "met"),
    [(5, 10.0, "at least 5x", True), (5, 9.9, "at least 5x", False), (1, 2.0, "faster", False)],
)
def test_claims_of_speed(at_least: float, theirs_s: float, must_be: str, met: bool) -> None:
    claim = report.speed_claim("peer", "ties", 2.0, theirs_s, at_least)

    assert claim.ratio == theirs_s / 2
    assert (claim.must_be, claim.met) == (must_be, met)


def test_the_slope_is_judged_only_where_both_grow() -> None:
    claim = sections.slope_claim("linear", {"lazymerge": 0.5, "mergekit": 5.0})
    assert (claim.ratio, claim.met) == (10.0, True)
    assert sections.slope_claim("linear", {"lazymerge": 1.0, "mergekit": 5.0}).met is False
    assert sections.slope_claim("linear", {"lazymerge": -0.1, "mergekit": 5.0}).met is None
    assert sections.slope_claim("linear", {"lazymerge": 0.5}).other == "failed"


def test_distance_from_a_line() -> None:
    sizes = [1.0, 8.0, 24.0]
    times = [0.3 + 0.4 * size for size in sizes]

    assert report.distance_from_line(sizes, times) == pytest.approx(0)
    assert report.distance_from_line(sizes, [size**2 for size in sizes]) > 0.2
    for position in range(3):  # noise of 8% on any run, the longest too
        noisy = [time * (1.08 if n == position else 1) for n, time in enumerate(times)]
        assert 0 < report.distance_from_line(sizes, noisy) < 0.08


def test_whether_a_module_was_imported() -> None:
    times = "import time:  12 |  34 |   torchless\nimport time:  1 |  2 | lazymerge.torch\n"

    assert not sections.imports(times, "torch")
    assert sections.imports(times + "import time:   5 |   6 |     torch\n", "torch")


def test_the_report_says_what_was_not_met_and_why_it_ended() -> None:
    section = Section("x", "A title", [Claim("peer", "a|b", "1 s", "0.5 s", 0.5, "faster", False)])
    section.error = "command\nended with 1"

    text = report.markdown({"cores": "2"}, [section])

    assert "- cores: 2" in text
    assert "| peer | a\\|b | 1 s | 0.5 s | 0.50 | faster | **no** |" in text
    assert "Ended early: ended with 1" in text


def test_an_error_ends_one_benchmark_and_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(workplace: object, section: Section) -> None:
        section.notes.append("before")
        raise BenchError("no disk")

    def sound(workplace: object, section: Section) -> None:
        section.notes.append("sound")

    monkeypatch.setattr(sections, "SECTIONS", {"broken": broken, "sound": sound, "other": broken})
    results: list[Section] = []
    workplace = sections.Workplace(Path("unused"))

    sections.run_sections(workplace, ["broken", "sound"], results, lambda: None)

    assert [(result.notes, result.error) for result in results] == [
        (["before"], "no disk"),
        (["sound"], ""),
    ]


def test_peers_are_pinned() -> None:
    for peer in programs.PEERS.values():
        assert any(f"{peer.name}=={peer.version}" in group for group in peer.requirements)


@pytest.mark.parametrize(
    "arguments",
    [["--only", "speed"], ["--workers", "2"], ["--runs", "0"], ["--only", "slope", "--size", "3b"]],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_a_small_benchmark(tmp_path: Path) -> None:
    shape = synthetic.LlamaShape(*map(int, inputs.SIZES["1m"]))
    for role in inputs.ROLES:
        folder = tmp_path / f"1m-{role}"
        synthetic.make_checkpoint(folder, shape, dtype="bfloat16", shards=1, sparse=True)
    command = [sys.executable, str(processes.SCRIPTS / "bench.py"), "--work", str(tmp_path)]
    command += ["--only", "copy,memory", "--size", "1m", "--runs", "1"]

    printed = processes.run_plain([*command, "--json", str(tmp_path / "json")], capture=True)

    document = json.loads((tmp_path / "json").read_text())
    copy, memory = document["sections"]
    assert not copy["error"]
    assert [run["contestant"] for run in copy["runs"]] == ["lazymerge", "cat and cp"]
    claims = {claim["method"]: claim for claim in memory["claims"]}
    assert {"linear", "task_arithmetic", "slerp", "ties"} <= set(claims)
    assert all(claim["met"] and claim["must_be"] == "under 400" for claim in claims.values())
    assert copy["claims"][0]["against"] in printed
    assert sorted(path.name for path in tmp_path.glob("1m-*") if path.is_dir()) == [
        f"1m-{role}" for role in ("a", "b", "base")
    ]
    assert not list(tmp_path.glob("out-*"))


def test_runs_are_forgotten_by_their_maker_only(tmp_path: Path) -> None:
    made, given = tmp_path / "made", tmp_path / "given"
    for folder in (made, given):
        folder.mkdir()
    workplace = sections.Workplace(tmp_path, made=[made])

    workplace.forget([made, given])

    assert (made.exists(), given.exists(), workplace.made) == (False, True, [])


def test_loop_seconds_are_those_that_lazymerge_prints() -> None:
    assert turns.loop_seconds(measured(9.0, '{"seconds": 1.25}')) == 1.25
