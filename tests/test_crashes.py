"""Real processes under injected faults: a share of what scripts/crash_matrix.py does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import yaml

from conftest import needs_kernels
from crash_matrix import KINDS, Trials
from faults.harness import Bench, Ended, complaints, contents


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("crashes"), count_calls=False)
    if not made.can_inject:
        pytest.skip("faults are injected by a library that needs Linux and a C compiler")
    return made


SHARES = {
    "kill": range(2, 132, 9),
    "tear": range(6, 132, 20),
    "again": range(3),
    "replace": range(3),
    "late": range(3),
    "signal": range(4),
    "journal": range(4),
    "fail": range(4, 132, 13),
    "once": range(5, 132, 13),
    "sync": range(4),
    "read": range(1, 4),
    "power": range(10),
}


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, numbers in SHARES.items() for number in numbers]
)
def test_every_byte_is_there_afterwards(bench: Bench, seed: int, kind: str, number: int) -> None:
    _, trial = KINDS[kind]
    assert trial(Trials(bench, Random(f"{seed}/{kind}/{number}")), number) == []


@pytest.mark.parametrize("number", range(5, 260, 42))
def test_a_merge_that_others_use_is_there_too(bench: Bench, seed: int, number: int) -> None:
    """Killed anywhere in the two outputs: the same command goes on, and each is whole."""
    folder = bench.folder / "two"
    for name in ("out", "out-inner"):
        shutil.rmtree(folder / name, ignore_errors=True)
    documents = list(yaml.safe_load_all(bench.recipe.read_text()))
    inner = {"name": "inner", **documents[0], "merge_method": "dare_ties"}
    entries = [{**documents[0]["models"][0], "model": "inner"}, documents[0]["models"][1]]
    recipe = bench.folder / "two.yml"
    recipe.write_text(yaml.safe_dump_all([inner, {**documents[0], "models": entries}]))

    def run(out: str, faults: dict[str, str] | None = None) -> Ended:
        asked = ["-o", f"{folder / out}", "--write-intermediate", "inner"]
        options = ["--max-shard-size", "25000", "--workers", "2"]
        return bench.lazymerge("run", str(recipe), *asked, *options, faults=faults)

    struck = bench.folder / "struck-two"
    faults = {"ROOT": str(folder), "STRUCK": str(struck), "KILL_AT": str(number)}
    struck.unlink(missing_ok=True)
    assert complaints(run("out", faults), [0, -signal.SIGKILL]) == []
    assert struck.exists()
    assert complaints(run("out"), [0]) == []
    assert complaints(run("new"), [0]) == []
    for name in ("", "-inner"):
        assert contents(folder / f"out{name}") == {
            # the card has the folder's name
            **contents(folder / f"new{name}"),
            "README.md": (folder / f"out{name}" / "README.md").read_bytes(),
        }
    verified = bench.lazymerge("verify", str(folder / "out-inner"), "--recompute", "5")
    assert complaints(verified, [0]) == []


def test_every_kind_has_its_share() -> None:
    assert SHARES.keys() == KINDS.keys()


def test_a_filesystem_that_cannot_reserve(bench: Bench) -> None:
    bench.clear()
    faults = bench.faults(FAIL_AT=1, FAIL_CALL="fallocate", ERRNO=95)
    assert bench.problems(bench.run(faults=faults)) == []


@pytest.mark.parametrize("number", [28, 122])
def test_a_disk_that_fills_where_nothing_can_be_reserved(bench: Bench, number: int) -> None:
    """ENOSPC and EDQUOT from the 20th write on."""
    bench.clear()
    faults = bench.faults(FAIL_AT=20, FAIL_CALL="pwrite", ERRNO=number)
    ended = bench.run(faults=faults)
    assert complaints(ended, [3]) == []
    assert "no room for" in ended.err
    assert f"go on with: lazymerge resume {bench.output}" in ended.err
    assert bench.problems(bench.lazymerge("resume", str(bench.output))) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("filesystems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small(bench: Bench, small_disk: Path) -> None:
    ended = bench.lazymerge("run", str(bench.recipe), "-o", str(small_disk / "out"))
    assert complaints(ended, [3]) == []
    assert "free some space" in ended.err
    assert [*small_disk.iterdir()] == []


def test_a_disk_that_cannot_be_written_to(bench: Bench, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk, small_disk / "out"):
        ended = bench.lazymerge("run", str(bench.recipe), "-o", str(out))
        assert complaints(ended, [1, 2]) == []
        assert "writ" in ended.err
        assert "Read-only file system" in ended.err or "not writable" in ended.err


@pytest.mark.parametrize(
    "name", ["a name", "it's", 'say "so"', "ü/中/\u202e", "-o", "new\nline", "$(touch x)", "%s{}"]
)
def test_names_that_shells_and_formats_know(bench: Bench, name: str) -> None:
    """The advice can be pasted into a shell: a name is one word there."""
    bench.clear()
    out = bench.output / "names" / name
    faults = bench.faults(FAIL_AT=15, FAIL_CALL="pwrite", ERRNO=5)
    options = ["--max-shard-size", "25000", "--workers", "2"]
    ended = bench.lazymerge("run", str(bench.recipe), "-o", str(out), *options, faults=faults)
    assert complaints(ended, [1]) == []
    if name.isprintable():
        advice = ended.err.splitlines()[-1].partition("go on with: lazymerge ")[2]
        shell = f'exec "$PYTHON" -m lazymerge {advice}'
        environment = {"PYTHON": sys.executable, "PYTHONPATH": ":".join(sys.path)}
        assert subprocess.run(["sh", "-c", shell], env=environment).returncode == 0
    else:
        assert bench.lazymerge("resume", "--", str(out)).code == 0
    assert (out / "lazymerge.json").is_file()


def test_an_output_within_an_input_and_a_model_that_is_a_link(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bench.folder / "a")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(bench.recipe.read_text().replace(f"{bench.folder}/a", f"{tmp_path}/link"))
    before = {p: p.read_bytes() for p in (bench.folder / "a").iterdir() if p.is_file()}
    out = bench.folder / "a" / "merged"
    assert bench.lazymerge("run", str(recipe), "-o", str(out)).code == 0
    assert bench.lazymerge("verify", str(out), "--recompute", "3").code == 0
    assert {p: p.read_bytes() for p in (bench.folder / "a").iterdir() if p.is_file()} == before


BUS_ERROR = """
    import os, sys
    from pathlib import Path
    from lazymerge.checkpoint.tensor import TensorInfo
    from lazymerge.engine.inputs import InputFiles, MappedInput
    from lazymerge.engine.native.bus_error import explained_bus_errors
    from lazymerge.graph.node import Read

    folder, file = os.path.split(sys.argv[1])
    tensor = TensorInfo("w", "U8", (100_000,), file, 0, 100_000)
    files = InputFiles()
    with explained_bus_errors(Path("an output")) as files.watch:
        other = os.open(sys.argv[1], os.O_RDONLY)
        with explained_bus_errors(Path("another output")) as watch:
            watch(other, "a file of a merge that has ended")
        os.close(other)
        source = MappedInput(Read(folder, tensor), files)  # by the number of the other
        source.seek([(0, 100_000)])
        os.truncate(sys.argv[1], 10_000)
        bytes(source.raw())
"""


@needs_kernels
def test_a_file_that_shrinks_under_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100_000))
    script = textwrap.dedent(BUS_ERROR)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    first, second = done.stderr.strip().splitlines()
    assert first == f"lazymerge: {path} became shorter while it was being read"
    assert second.endswith("go on with: lazymerge resume 'an output'")


SENT_BUS_ERROR = """
    import os, signal
    from pathlib import Path
    from lazymerge.engine.native.bus_error import explained_bus_errors

    with explained_bus_errors(Path("an output")):
        with explained_bus_errors(Path("another")):  # two merges in one process
            pass
        os.kill(os.getpid(), signal.SIGBUS)
"""


@needs_kernels
def test_a_bus_error_that_is_not_of_an_input() -> None:
    """It is left to whoever handles those."""
    script = textwrap.dedent(SENT_BUS_ERROR)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == ""


@needs_kernels
def test_names_in_last_words_do_not_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred.safetensors"
    path.write_bytes(bytes(100_000))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BUS_ERROR), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "\\x1b[31mred.safetensors became shorter" in done.stderr
    assert "\x1b" not in done.stderr


WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Root, for whom permissions count."""


def test_permission_denied(bench: Bench, tmp_path: Path) -> None:
    prefix = WITHOUT_PRIVILEGES if os.geteuid() == 0 else []
    if prefix and (shutil.which("setpriv") is None or subprocess.run([*prefix, "true"]).returncode):
        pytest.skip("root cannot be made to obey permissions here")
    for model in ("base", "a", "b"):
        shutil.copytree(bench.folder / model, tmp_path / model)
    text = bench.recipe.read_text().replace(str(bench.folder), str(tmp_path))
    (tmp_path / "recipe.yml").write_text(text)

    def run(out: Path) -> Ended:
        command = [*prefix, sys.executable, "-m", "lazymerge", "run", "recipe.yml", "-o", str(out)]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    (tmp_path / "closed").mkdir(0o555)
    for out in (tmp_path / "closed", tmp_path / "closed" / "out"):
        ended = run(out)
        assert complaints(ended, [2]) == []
        assert "not writable" in ended.err
    weights = tmp_path / "a" / "model.safetensors"
    weights.chmod(0o000)
    ended = run(tmp_path / "out")
    assert complaints(ended, [2]) == []
    assert str(weights) in ended.err
    assert "Permission denied" in ended.err
    weights.chmod(0o644)
    assert run(tmp_path / "out").code == 0


def test_two_processes_at_once(bench: Bench) -> None:
    """One merges, the other is refused and told by whom, or finds it done."""
    for _ in range(3):
        bench.clear()
        command = [sys.executable, "-m", "lazymerge", *bench.command]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        both = [
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        ended = [(process.communicate(timeout=60)[1], process.returncode) for process in both]
        codes = sorted(code for _, code in ended)
        assert codes in ([0, 0], [0, 2]), ended
        for err, code in ended:
            if code == 2:
                other = both[0 if err is ended[1][0] else 1].pid
                assert f"is being written by process {other} on " in err
        assert bench.problems(bench.run()) == []
