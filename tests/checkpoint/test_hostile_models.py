"""The real command on hostile models and recipes: exit code 2, one message, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch_bytes
from lazymerge.checkpoint import open_checkpoint
from lazymerge.errors import InputError
from numpy import float32, zeros
from safetensors.numpy import save_file
from safetensors_bytes import entries_for, entry, with_prefix, write_file

REPOSITORY = Path(__file__).parents[2]
SECONDS = 20
"""Starting Python included, on a machine that does other things; a hang would take minutes."""

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
RECIPE = """\
merge_method: linear
models:
  - {model: good, parameters: {weight: 0.5}}
  - {model: evil, parameters: {weight: 0.5}}
"""


def write_model(folder: Path) -> None:
    folder.mkdir()
    write_file(folder / FIRST, {"model.embed.weight": ("F32", [4, 2])})
    write_file(folder / SECOND, {"model.norm.weight": ("F32", [2])})
    write_index(folder, {})
    (folder / "config.json").write_text('{"model_type": "llama"}')


def write_index(folder: Path, changes: dict[str, object]) -> None:
    weight_map = {"model.embed.weight": FIRST, "model.norm.weight": SECOND, **changes}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the models `good` and `evil`, equal until one is attacked, and a recipe."""
    for name in ("good", "evil"):
        write_model(tmp_path / name)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def files_under(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path.lstat() for path in sorted(folder.rglob("*"))]
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    return {n: (s.st_size, s.st_mtime_ns) for n, s in zip(names, found, strict=True)}


def lazymerge(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lazymerge", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


COMMANDS = {
    "inspect": ["inspect", "evil"],
    "plan": ["plan", "recipe.yml", "--dry-run"],
    "run": ["run", "recipe.yml", "-o", "out", "-q"],
}


def refuse(place: Path, command: str) -> str:
    """Runs a command that must refuse; returns its message without the program's name."""
    before = files_under(place)
    done = lazymerge(place, *COMMANDS[command])
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert len(done.stderr) < 1000
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("lazymerge: ")
    assert files_under(place) == before
    return done.stderr.removeprefix("lazymerge: ")


def overlapping_tensors(folder: Path) -> str:
    tensors = {"model.norm.weight": entry("F32", [2], 0, 8), "x": entry("F32", [2], 4, 12)}
    (folder / SECOND).write_bytes(with_prefix(json.dumps(tensors).encode(), bytes(12)))
    return f"{folder / SECOND}: tensor 'x': it overlaps 'model.norm.weight' by 4 bytes"


def length_of_gigabytes(folder: Path) -> str:
    (folder / SECOND).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    return f"{folder / SECOND}: claims a header of 1,099,511,627,776 bytes"


def shape_of_megabytes(folder: Path) -> str:
    tensors = {"model.norm.weight": entry("F32", [2**63] * 200_000, 0, 8)}
    (folder / SECOND).write_bytes(with_prefix(json.dumps(tensors).encode(), bytes(8)))
    return f"{folder / SECOND}: tensor 'model.norm.weight': its shape [92233"


def not_a_number(folder: Path) -> str:
    tensors, data_bytes = entries_for({"model.norm.weight": ("F32", [2])})
    tensors["x"] = float("nan")
    (folder / SECOND).write_bytes(with_prefix(json.dumps(tensors).encode(), bytes(data_bytes)))
    return f"{folder / SECOND}: has a header that holds NaN"


def deep_header(folder: Path) -> str:
    (folder / SECOND).write_bytes(with_prefix(b'{"a":' * 100_000))
    return f"{folder / SECOND}: has a header nested too deeply"


def path_out_of_the_folder(folder: Path) -> str:
    write_index(folder, {"x": f"../good/{SECOND}"})
    return f"{folder / INDEX}: tensor 'x': its file '../good/{SECOND}' is not a plain file name"


def absolute_path(folder: Path) -> str:
    write_index(folder, {"x": "/etc/passwd"})
    return f"{folder / INDEX}: tensor 'x': its file '/etc/passwd' is not a plain file name"


def shard_that_is_absent(folder: Path) -> str:
    write_index(folder, {"x": "model-00003-of-00003.safetensors"})
    return f"{folder / INDEX}: lists 'model-00003-of-00003.safetensors', absent from the folder"


def link_out_of_the_model(folder: Path) -> str:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(Path("..") / "good" / SECOND)
    return f"{folder / SECOND}: is a link to {folder.parent / 'good' / SECOND}, outside"


def deep_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    return f"{folder / 'config.json'}: is nested more than 64 deep"


def pipe_for_a_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return f"{folder / 'config.json'}: is not a regular file"


def name_that_steers_the_terminal(folder: Path) -> str:
    (folder / SECOND).write_bytes(with_prefix(json.dumps({"\x1b[2J\n": 1}).encode()))
    return f"{folder / SECOND}: tensor '\\x1b[2J\\n': its entry is a number"


def torch_model(folder: Path, content: bytes) -> Path:
    """The model as one torch file, which is returned."""
    for file in (FIRST, SECOND, INDEX):
        (folder / file).unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(content)
    return path


def pickle_with_code(folder: Path) -> str:
    code = b"cposix\nsystem\n" + torch_bytes.text("touch pwned") + b"\x85R"
    path = torch_model(folder, torch_bytes.torch_file(torch_bytes.pickled(code)))
    return f"{path}: has a pickle that names 'posix.system', which is no part of a tensor"


def bare_pickle_with_code(folder: Path) -> str:
    path = torch_model(folder, b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00touch pwned\x85R.")
    return f"{path}: is in the format that torch wrote before version 1.6"


def tensor_beyond_its_storage(folder: Path) -> str:
    tensors = torch_bytes.mapping({"w": torch_bytes.tensor(offset=2**40)})
    path = torch_model(folder, torch_bytes.torch_file(torch_bytes.pickled(tensors)))
    return f"{path}: tensor 'w': shape [2, 3] of F32 from element 1,099,511,627,776 reaches beyond"


def compressed_storages(folder: Path) -> str:
    tensors = torch_bytes.pickled(torch_bytes.mapping({"w": torch_bytes.tensor()}))
    entries = {"x/data.pkl": tensors, "x/data/0": bytes(10**8)}
    path = torch_model(folder, torch_bytes.zipped(entries, zipfile.ZIP_DEFLATED))
    return f"{path}: its entry 'x/data.pkl' is compressed"


def memo_of_gigabytes(folder: Path) -> str:
    pickle = torch_bytes.pickled(b"]r\xff\xff\xff\xff")
    path = torch_model(folder, torch_bytes.torch_file(pickle))
    return f"{path}: holds a list, not a mapping of names to tensors"


def nested_keys(folder: Path) -> str:
    pickle = torch_bytes.pickled(b"})" + b"q\x00h\x00\x86" * 200 + b"Ns")
    path = torch_model(folder, torch_bytes.torch_file(pickle))
    return f"{path}: has a pickle that holds a key that is neither a string nor a number"


ATTACKS: list[Callable[[Path], str]] = [
    overlapping_tensors,
    length_of_gigabytes,
    shape_of_megabytes,
    not_a_number,
    deep_header,
    path_out_of_the_folder,
    absolute_path,
    shard_that_is_absent,
    link_out_of_the_model,
    deep_config,
    pipe_for_a_config,
    name_that_steers_the_terminal,
    pickle_with_code,
    bare_pickle_with_code,
    tensor_beyond_its_storage,
    compressed_storages,
    memo_of_gigabytes,
    nested_keys,
]
"""Each changes a sound model, and returns how the message must begin."""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_models(place: Path, attack: Callable[[Path], str], command: str) -> None:
    begins = attack(place / "evil")
    assert refuse(place, command).startswith(begins)


RECIPES = {
    "bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "recipe.yml:6:8: more than 100,000 values, counting what each alias repeats",
    ),
    "code": (
        RECIPE.replace("0.5", "!!python/object/apply:os.system ['touch pwned']", 1),
        "recipe.yml:3:40: the tag '!!python/object/apply:os.system' is not allowed",
    ),
    "key twice": (RECIPE + "models: []\n", "recipe.yml:5:1: the key 'models' stands in this"),
    "directives": (
        "".join(f"%TAG !{n}! tag:x,2000:x\n" for n in range(200_000)) + "---\n" + RECIPE,
        "recipe.yml:11:1: more than 10 directives",
    ),
    "size": ("#" * 10_000_001, "recipe.yml: larger than a recipe may be"),
    "list": ("models: [" + "a, " * 200_000 + "a]", "recipe.yml:1:300001: more than 100,000 values"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_hostile_recipes(place: Path, recipe: str, command: str) -> None:
    text, begins = RECIPES[recipe]
    (place / "recipe.yml").write_text(text)
    assert refuse(place, command).startswith(begins)


def test_code_beside_a_model_is_neither_run_nor_copied(place: Path) -> None:
    """Whatever names it: auto_map of the config and of the tokenizer, names that Python imports."""
    folder = place / "good"
    code = f"open({str(place / 'pwned')!r}, 'w')\n"
    modules = ["modeling_evil", "tokenization_evil", "sitecustomize", "conftest", "torch", "numpy"]
    for module in modules:
        (folder / f"{module}.py").write_text(code)
    (folder / "__init__.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    auto_map = {"AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.E", None]}
    config = {"model_type": "evil", "auto_map": auto_map, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(config) + "\x00 not JSON")
    for command in COMMANDS.values():
        done = lazymerge(place, *command)
        assert done.returncode == 0, done
    assert not (place / "pwned").exists()
    written = sorted(path.name for path in (place / "out").iterdir())
    assert written == [
        "README.md",
        "config.json",
        "generation_config.json",
        "lazymerge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (place / "out" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("line_break", ["\n", "\r", "\u2028"])
def test_a_name_does_not_pass_for_a_message(tmp_path: Path, line_break: str) -> None:
    name = f"w{line_break}done: everything is fine"
    (tmp_path / "model").mkdir()
    save_file({name: zeros(3, dtype=float32)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match="has a line break in its name") as caught:
        open_checkpoint(str(tmp_path / "model"))
    assert line_break not in str(caught.value)
