"""The low-memory proof with small models: what it prints, when it fails, what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prove_low_memory.sh"
SMALL = ("--shape", "llama-0.1b", "--no-fsync")
SIZES = ("--", "--layers", "1", "--vocabulary", "4000")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cgroups and /proc are Linux's")


def prove(work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), "--work", str(work), *options],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def cells(stdout: str) -> list[list[str]]:
    """The rows of the table."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_merge_within_its_limits(tmp_path: Path) -> None:
    done = prove(tmp_path, *SMALL, "--methods", "slerp", *SIZES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama-0.1b-shaped (--layers 1 --vocabulary 4000)" in done.stdout
    ((method, seconds, limit, projected, resident, peak, _reached, kills, verdict),) = cells(
        done.stdout
    )
    assert (method, limit, kills, verdict) == ("slerp", "700.0", "0", "ok")
    assert 0 < float(resident) <= float(projected) <= 700
    assert 0 < float(seconds) < 60
    if done.stdout.startswith("Memory cgroup v"):
        assert 20 < float(peak) <= 1024
    else:
        assert "judged by the peak resident set alone" in done.stdout
        assert peak == "–"
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_limit_fails(tmp_path: Path) -> None:
    done = prove(
        tmp_path, *SMALL, "--without-cgroup", "--limit", "20", "--methods", "slerp", *SIZES
    )
    assert done.returncode == 1
    assert "judged by the peak resident set alone" in done.stdout
    ((*_, verdict),) = cells(done.stdout)
    assert verdict == "**more than 20 MiB**"
    assert list(tmp_path.iterdir()) == []


def test_a_refused_merge_fails_and_says_why(tmp_path: Path) -> None:
    options = ("--without-cgroup", "--memory", "1MiB", "--methods", "slerp")
    done = prove(tmp_path, *SMALL, *options, *SIZES)
    assert done.returncode == 1
    ((*_, verdict),) = cells(done.stdout)
    assert verdict == "**exit 3**"
    assert "slerp: " in done.stderr
    assert "smallest limit that works" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--colour"], "unknown option --colour"),
        (["--limit", "1GiB"], "--limit is a number of MiB, not 1GiB"),
        (["--limit"], "--limit needs a value"),
    ],
)
def test_wrong_usage(tmp_path: Path, options: list[str], message: str) -> None:
    done = prove(tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_options(tmp_path: Path) -> None:
    done = prove(tmp_path, "--help")
    assert done.returncode == 0
    for option in ("--shape", "--methods", "--limit", "--memory", "--work", "--without-cgroup"):
        assert option in done.stdout


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(SCRIPT), "--work", str(tmp_path), *SMALL],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/merged")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert list(tmp_path.iterdir()) == []
