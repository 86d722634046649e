"""The files copied beside the weights: data of the model alone, never code, never a link."""

from __future__ import annotations

import os
from pathlib import Path

from lazymerge.output.sidecars import MAX_SIDECAR_BYTES, copy_sidecars, sidecar_files

DATA = [
    "1_Pooling/config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v11",
    "tokenizer.model.v3",
    "tokenizer.model.v7m1",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
OTHER = [
    "config.json",  # written anew
    "README.md",
    "lazymerge.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "modeling_evil.py",
    "tokenization_evil.py",
    "configuration_evil.py",
    "setup.sh",
    "evil.so",
    "training_args.bin",
    "optimizer.pt",
    "2_Dense/config.json",
    "1_Pooling/model.safetensors",
    "1_Pooling/run.py",
    "deeper/tokenizer.json",
    "tokenizer.model.py",
    "tokenizer.model.so",
    "tokenizer.model.v3.py",
    "tokenizer.model.partial",
    "a\nb.tiktoken",
    "\u202e.tiktoken",
    os.fsdecode(b"\xff.tiktoken"),
]


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(f"content of {name}"))
    return folder


def test_what_is_copied(tmp_path: Path) -> None:
    model = fill(tmp_path / "model", DATA + OTHER)
    found = sidecar_files(str(model))
    assert list(found) == DATA
    out = tmp_path / "out"
    out.mkdir()
    copy_sidecars(str(model), found, out, fsync=True)
    copied = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert copied == DATA
    assert all((out / name).read_text() == f"content of {name}" for name in DATA)


def test_nothing_is_executable_whatever_it_was(tmp_path: Path) -> None:
    model = fill(tmp_path / "model", ["tokenizer.json"])
    (model / "tokenizer.json").chmod(0o777)
    copy_sidecars(str(model), sidecar_files(str(model)), tmp_path, fsync=True)
    assert not (tmp_path / "tokenizer.json").stat().st_mode & 0o111


def test_links_within_the_model_are_copied_as_content(tmp_path: Path) -> None:
    model = fill(tmp_path / "model", ["real"])
    (model / "vocab.txt").symlink_to("real")
    copy_sidecars(str(model), sidecar_files(str(model)), tmp_path, fsync=True)
    assert not (tmp_path / "vocab.txt").is_symlink()
    assert (tmp_path / "vocab.txt").read_text() == "content of real"


def test_links_of_a_hub_cache_are_copied_as_content(tmp_path: Path) -> None:
    cache = fill(tmp_path / "models--org--name", ["blobs/123", "snapshots/rev/vocab.txt"])
    model = cache / "snapshots" / "rev"
    (model / "tokenizer.json").symlink_to("../../blobs/123")
    assert sidecar_files(str(model)) == ("tokenizer.json", "vocab.txt")
    out = tmp_path / "out"
    out.mkdir()
    copy_sidecars(str(model), ["tokenizer.json"], out, fsync=True)
    assert (out / "tokenizer.json").read_text() == "content of blobs/123"


def test_nothing_from_outside_the_model(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    elsewhere = fill(tmp_path / "elsewhere", ["config.json"])
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").symlink_to(secret)
    (model / "vocab.txt").symlink_to("../secret")
    (model / "merges.txt").symlink_to("nowhere")
    (model / "1_Pooling").symlink_to(elsewhere)
    assert sidecar_files(str(model)) == ()


def test_neither_pipes_nor_folders_nor_huge_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").mkdir()
    for name, size in (("merges.txt", MAX_SIDECAR_BYTES + 1), ("vocab.json", MAX_SIDECAR_BYTES)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)  # sparse
    assert sidecar_files(str(tmp_path)) == ("vocab.json",)
