"""Where the benchmarks run: folders, checkpoints, installed peers, contestants ready to start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.inputs import (
    ROLES,
    make_checkpoints,
    recipe_document,
    recipe_inputs,
    tensor_bytes,
    warm_page_cache,
    write_recipe,
)
from benchmarking.processes import (
    BenchError,
    delete,
    lazymerge_environment,
    offline_environment,
)
from benchmarking.programs import (
    PEERS,
    lazymerge_command,
    make_venv,
    mergekit_command,
    mergekitty_command,
    peer_facts,
    sd_mecha_command,
)
from benchmarking.turns import Contest, Contestant, Rounds, take_turns


@dataclass(frozen=True, slots=True)
class Merge:
    """A recipe on disk.

    inputs: the checkpoints it names, the base first.
    """

    method: str
    recipe: Path
    document: dict[str, Any]
    inputs: list[Path]

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs."""
        return tensor_bytes(*self.inputs)

    @property
    def moved_bytes(self) -> int:
        """Bytes of all inputs and of the output (as large as one of them), each once."""
        return self.input_bytes + tensor_bytes(self.inputs[0])


@dataclass
class Workplace:
    """What all benchmarks share.

    work: the folder for everything. size, large, small: names of SIZES.
    memory: the --memory of every lazymerge. workers: counts to compare. models: counts to compare.
    venvs: environments of peers that exist already, by name; others are made in work.
    made: checkpoints that this call made. peers: versions of the peers that took part.
    """

    work: Path
    size: str = "1.1b"
    large: str = "3b"
    small: str = "0.1b"
    memory: str = "400MiB"
    rounds: Rounds = field(default_factory=Rounds)
    workers: Sequence[int] = (1, 2)
    models: Sequence[int] = (2, 4, 8, 16)
    venvs: dict[str, Path] = field(default_factory=dict)
    made: list[Path] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
    mergekit_contests: dict[str, Contest] = field(default_factory=dict)
    """Of the section against mergekit by method: its peaks are shown again with others."""

    def venv(self, name: str) -> Path:
        """The environment of a peer. Raises BenchError when it cannot be installed."""
        peer = PEERS[name]
        folder = self.venvs.get(name)
        if folder is None:
            folder = self.work / f"{name}-venv"
            make_venv(folder, peer)
        if not (folder / "bin" / peer.executable).exists():
            raise BenchError(f"{folder / 'bin' / peer.executable}: not there")
        if name not in self.peers:
            self.peers[name] = peer_facts(peer, folder)
        return folder

    def checkpoints(self, size: str, roles: Sequence[str] = ROLES) -> list[Path]:
        """Checkpoints of a size, the base first, made where they are missing."""
        paths, made = make_checkpoints(self.work, size, roles)
        self.made += made
        return list(paths.values())

    def forget(self, checkpoints: Sequence[Path]) -> None:
        """Delete those of the checkpoints that this call made."""
        delete([path for path in checkpoints if path in self.made])
        self.made = [path for path in self.made if path not in checkpoints]

    def merge(self, method: str, checkpoints: Sequence[Path], label: str) -> Merge:
        """A recipe of the method for the checkpoints; label distinguishes its file."""
        document = recipe_document(method, checkpoints)
        recipe = self.work / f"{label}-{method}.yml"
        write_recipe(recipe, document)
        return Merge(method, recipe, document, recipe_inputs(document))

    def lazymerge(
        self,
        merge: Merge,
        *options: str,
        name: str = "lazymerge",
        prepare: Callable[[Sequence[Path]], None] = warm_page_cache,
    ) -> Contestant:
        """lazymerge at the memory limit of this benchmark."""
        output = self.work / "out-lazymerge"
        command = lazymerge_command(merge.recipe, output, "--json", "--memory", self.memory)
        environment = lazymerge_environment()
        return Contestant(name, [*command, *options], environment, merge.inputs, output, prepare)

    def mergekit(self, merge: Merge, *options: str, name: str = "mergekit") -> Contestant:
        """mergekit, if it can be installed."""
        output = self.work / "out-mergekit"
        command = mergekit_command(self.venv("mergekit"), merge.recipe, output, *options)
        return self._peer(name, command, merge, output)

    def mergekitty(self, merge: Merge, *options: str) -> Contestant:
        """mergekitty, if it can be installed."""
        output = self.work / "out-mergekitty"
        command = mergekitty_command(self.venv("mergekitty"), merge.recipe, output, *options)
        return self._peer("mergekitty", command, merge, output)

    def sd_mecha(self, merge: Merge) -> Contestant:
        """sd-mecha with the parameters of the recipe, if it can be installed."""
        for path in merge.inputs:
            if not (path / "model.safetensors").exists():
                raise BenchError(f"{path} is not a single file, as sd-mecha wants it")
        weights = (
            [merge.document["parameters"]["t"]]
            if merge.method == "slerp"
            else [entry["parameters"]["weight"] for entry in merge.document["models"]]
        )
        output = self.work / "out-sd-mecha"
        venv = self.venv("sd-mecha")
        command = sd_mecha_command(venv, merge.method, merge.inputs, weights, output)
        return self._peer("sd-mecha", command, merge, output)

    def take_turns(self, contestants: Sequence[Contestant], label: str) -> Contest:
        """Run the contestants against each other."""
        return take_turns(contestants, self.rounds, self.work, label)

    def _peer(self, name: str, command: Sequence[str], merge: Merge, output: Path) -> Contestant:
        environment = offline_environment()
        return Contestant(name, command, environment, merge.inputs, output, may_fail=True)
