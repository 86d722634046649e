"""lazymerge and its peers: where they are installed, how each is told to merge, the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarking.processes import (
    SCRIPTS,
    delete,
    lazymerge_environment,
    run_plain,
)

TORCH = "torch==2.13.0"
"""The same for all programs; installed first, since the peers alone would bring any torch."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A program that lazymerge is compared with, in its own virtual environment.

    version: of the package of that name.
    requirements: installed one group after the other, torch before them. A group that begins with
        --no-deps is installed without what it depends on.
    executable: in bin of the environment.
    """

    name: str
    version: str
    requirements: tuple[tuple[str, ...], ...]
    executable: str


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("mergekit", "0.1.5", (("mergekit==0.1.5",),), "mergekit-yaml"),
        # Asks for torch 2.10, and fails at its first import of a newer transformers.
        Peer(
            "mergekitty",
            "0.3.1.post2",
            (
                ("--no-deps", "mergekitty==0.3.1.post2"),
                (
                    *("accelerate~=1.13.0", "click==8.3.1", "datasets", "huggingface-hub"),
                    *("immutables==0.21", "peft", "protobuf", "pydantic~=2.12.3", "scipy"),
                    *("safetensors~=0.7.0", "sentencepiece", "tokenizers>=0.22.2"),
                    *("tqdm==4.67.3", "transformers==5.3.0"),
                ),
            ),
            "mergekitty-yaml",
        ),
        Peer("sd-mecha", "1.1.8", (("sd-mecha==1.1.8",),), "python"),
    )
}

BEST_FLAGS = (
    *("--async-write", "--write-threads", "2"),
    *("--num-threads", "2", "--out-shard-size", "1B"),
)
"""mergekit's options that were fastest."""


def make_venv(folder: Path, peer: Peer) -> None:
    """The virtual environment of a peer, made once."""
    if (folder / "bin" / peer.executable).exists():
        return
    print(f"installing {peer.name} {peer.version} in {folder}", file=sys.stderr)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
    try:
        run_plain([sys.executable, "-m", "venv", "--clear", str(folder)])
        for group in ((TORCH,), *peer.requirements):
            run_plain([*install, *group])
    except BaseException:
        delete([folder])
        raise


def lazymerge_command(recipe: Path, output: Path, *options: str) -> list[str]:
    """Merge with the lazymerge of this checkout, without syncing, as its peers do."""
    command = [sys.executable, "-m", "lazymerge", "run", str(recipe), "-o", str(output)]
    return [*command, "--no-fsync", "--overwrite", *options]


def mergekit_command(venv: Path, recipe: Path, output: Path, *options: str) -> list[str]:
    """Merge with mergekit."""
    return [str(venv / "bin" / "mergekit-yaml"), str(recipe), str(output), "--quiet", *options]


def mergekitty_command(venv: Path, recipe: Path, output: Path, *options: str) -> list[str]:
    """Merge with mergekitty."""
    return [str(venv / "bin" / "mergekitty-yaml"), str(recipe), str(output), "--quiet", *options]


def sd_mecha_command(
    venv: Path, method: str, checkpoints: Sequence[Path], weights: Sequence[float], output: Path
) -> list[str]:
    """Merge single-file checkpoints with sd-mecha; the first is the base."""
    script = str(SCRIPTS / "benchmarking" / "merge_with_sd_mecha.py")
    files = [str(path / "model.safetensors") for path in checkpoints]
    command = [str(venv / "bin" / "python"), script, method, str(output / "model.safetensors")]
    return [*command, *files, "--weights", *map(str, weights)]


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder; empty where the system does not say."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    for line in mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []:
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0]
    return ""


def machine_facts(work: Path) -> dict[str, str]:
    """What the numbers depend on, apart from the peers."""
    lazymerge = run_plain(
        [sys.executable, "-c", "from lazymerge.version import __version__ as v; print(v)"],
        lazymerge_environment(),
        capture=True,
    ).strip()
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes / 2**30:.1f} GiB",
        "load": f"{os.getloadavg()[0]:.2f} before the first run",  # others at work slow all
        "system": f"{platform.system()} {platform.release()}, files on {file_system(work) or '?'}",
        "lazymerge": f"{lazymerge} (python {platform.python_version()}, "
        f"torch {importlib.metadata.version('torch')}, "
        f"safetensors {importlib.metadata.version('safetensors')})",
    }


def peer_facts(peer: Peer, venv: Path) -> str:
    """The versions of a peer and of what it runs on."""
    versions_of = (
        "import importlib.metadata as m, sys; print(sys.version.split()[0], "
        f"m.version('torch'), m.version('safetensors'), m.version('{peer.name}'))"
    )
    command = [str(venv / "bin" / "python"), "-c", versions_of]
    python, torch, safetensors, version = run_plain(command, capture=True).split()
    return f"{version} (python {python}, torch {torch}, safetensors {safetensors})"
