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
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--inputs", "2000", "--seed", str(seed)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"seed {seed}" in done.stdout
    assert not (tmp_path / "fuzz-failures").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("Path('/tmp/lazymerge-fuzz-test').open('w').close()", "opens /tmp/lazymerge-fuzz-test"),
        ("Path('/etc/hostname').open().close()", "opens /etc/hostname"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("1 / 0", "ZeroDivisionError"),
        ("[None for _ in iter(int, 1)]", "takes more than"),
        ("bytearray(1 << 31)", "MemoryError"),
    ],
)
def test_harm_is_noticed(tmp_path: Path, harm: str, said: str) -> None:
    """The fuzzer itself: what an input must not lead to is seen."""
    program = f"""
import signal, subprocess, sys, fuzz
from pathlib import Path
fuzz.SECONDS = 0.5
signal.signal(signal.SIGALRM, fuzz._alarm)
sys.addaudithook(fuzz._audit)
fuzz.limit_memory()
target = fuzz.Target([b""], lambda _: {harm}, 1)
print(fuzz.attempt(target, b"", Path({str(tmp_path)!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{SCRIPT.parent}:{SCRIPT.parents[1]}"},
        capture_output=True,
        text=True,
    )
    Path("/tmp/lazymerge-fuzz-test").unlink(missing_ok=True)
    assert said in done.stdout, done.stderr


def test_inputs_follow_from_the_seed() -> None:
    valid = [b'{"a": [1, 2, {"b": "c"}], "d": null}' * 3, b"x: [1, 2]\n"]
    first, second = ([fuzz.damaged(valid, Random(n)) for n in range(200)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 150
