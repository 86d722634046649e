"""2,000 damaged files, in a process of its own: it bounds its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import fuzz

SCRIPT = Path(fuzz.__file__)


def test_nothing_that_is_read_does_harm(seed: int, tmp_path: Path) -> None:
    done = _fuzz(tmp_path, "--inputs", "1000", "--seed", str(seed))
    assert done.returncode == 0, done.stderr
    assert f"seed {seed}" in done.stdout
    assert not (tmp_path / "fuzz-failures").exists()


def _fuzz(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("Path('/tmp/lazymerge-fuzz-test').open('w').close()", "opens /tmp/lazymerge-fuzz-test"),
        ("Path(PLACE, 'base').write_text('')", "base (w) for writing"),
        ("os.mkdir(PLACE + '/new')", "os.mkdir"),
        ("os.rename(PLACE + '/old', PLACE + '/out/old')", "os.rename"),
        ("os.rename(PLACE + '/out/old', PLACE + '/old')", "os.rename"),
        ("os.symlink('/etc', PLACE + '/link')", "os.symlink"),
        ("os.remove(PLACE + '/old')", "os.remove"),
        ("os.truncate(PLACE + '/old', 0)", "os.truncate"),
        ("Path('/etc/hostname').open().close()", "opens /etc/hostname"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("1 / 0", "ZeroDivisionError"),
        ("[None for _ in iter(int, 1)]", "takes more than"),
        ("bytearray(1 << 31)", "MemoryError"),
        ("refuse('x' * 30_001)", "an error of 30,001 characters"),
        ("refuse(' ')", "an error without a word"),
    ],
)
def test_harm_is_noticed(tmp_path: Path, harm: str, said: str) -> None:
    """The fuzzer itself: what an input must not lead to is seen."""
    assert said in _attempt(tmp_path, harm)


@pytest.mark.parametrize(
    "harmless",
    [
        "None",
        "refuse('a message')",
        "Path(PLACE, 'old').read_bytes()",
        "Path(PLACE, 'out', 'new').write_text('')",
        "os.rename(PLACE + '/out/old', PLACE + '/out/new')",
        "shutil.rmtree(PLACE + '/out')",
        "fuzz.put(Path(PLACE, 'input'), b'')",
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, harmless: str) -> None:
    assert _attempt(tmp_path, harmless) in ("(True, None)\n", "(False, None)\n")


def _attempt(folder: Path, reading: str) -> str:
    """What the fuzzer says of an input that leads to this."""
    (folder / "out").mkdir()
    (folder / "out" / "old").touch()
    (folder / "old").touch()
    program = f"""
import os, shutil, signal, subprocess, sys, fuzz
from pathlib import Path
from lazymerge.errors import LazymergeError
PLACE = {str(folder)!r}
def refuse(message):
    raise LazymergeError(message)
fuzz.SECONDS = 0.5
signal.signal(signal.SIGALRM, fuzz._alarm)
signal.signal(signal.SIGPROF, fuzz._alarm)
sys.addaudithook(fuzz._audit)
fuzz.limit_memory()
target = fuzz.Target([b""], lambda _: {reading}, 1)
print(fuzz.attempt(target, b"", Path(PLACE)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{SCRIPT.parent}:{SCRIPT.parents[1]}"},
        capture_output=True,
        text=True,
    )
    Path("/tmp/lazymerge-fuzz-test").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kept_input_is_read_again(tmp_path: Path) -> None:
    """Also where it names the folder of models, which has another name every time."""
    recipe = "models: [{model: {FOLDER}/a, parameters: {weight: 1}}]\nmerge_method: linear\n"
    inputs = {"recipe-1-1": recipe, "header-1-2": "no header", "lock-1-3": "{}"}
    said = []
    for name, text in inputs.items():
        (tmp_path / name).write_text(text)
        done = _fuzz(tmp_path, "--replay", name)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said == ["accepted\n", "refused\n", "accepted\n"]


def test_inputs_follow_from_the_seed() -> None:
    valid = [b'{"a": [1, 2, {"b": "c"}], "d": null}' * 3, b"x: [1, 2]\n"]
    first, second = ([fuzz.damaged(valid, Random(n)) for n in range(200)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 150
