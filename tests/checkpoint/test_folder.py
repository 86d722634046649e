"""open_checkpoint: what makes up a model on disk, and every way in which it can be broken."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from lazymerge.checkpoint import checkpoint_file_path, open_checkpoint
from lazymerge.checkpoint.folder import INDEX_NAME
from lazymerge.errors import InputError
from safetensors_bytes import with_prefix, write_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": FIRST, "b": FIRST, "c": SECOND}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_sharded(folder: Path, weight_map: Mapping[str, object] = WEIGHT_MAP) -> Path:
    """A model of three tensors in two shards; the index as given."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FIRST, {"b": ("F32", [2]), "a": ("U8", [3])})
    write_file(folder / SECOND, {"c": ("BF16", [2, 2])})
    write_index(folder, weight_map)
    return folder


REMEDY = re.compile(
    "[Dd]ownload|Correct|Save|Name |Replace|Rename|Give the|Convert|Merge it|in its place|"
    "Do not use|is one of them meant|readable"
)


def refused(reference: Path | str) -> str:
    """The message open_checkpoint refuses a reference with: one line."""
    with pytest.raises(InputError) as error:
        open_checkpoint(str(reference))
    message = str(error.value)
    assert "\n" not in message
    assert REMEDY.search(message), message
    assert len(message) < 5000, message
    return message


# What makes up a model


def test_sharded_model(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.reference == str(folder)
    assert checkpoint.folder == str(folder)
    assert [file.path for file in checkpoint.files] == [FIRST, SECOND]
    assert list(checkpoint.tensors) == ["b", "a", "c"]
    assert checkpoint.tensors["c"].file == SECOND
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.size_bytes == 8 + 3 + 8
    assert checkpoint.parameter_count == 2 + 3 + 4


def test_bytes_read_are_counted_truly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    read = 0
    real_read = os.read

    def counting_read(descriptor: int, count: int) -> bytes:
        nonlocal read
        part = real_read(descriptor, count)
        read += len(part)
        return part

    monkeypatch.setattr(os, "read", counting_read)
    checkpoint = open_checkpoint(str(folder))
    headers = [
        min(t.start for t in checkpoint.tensors.values() if t.file == f) for f in (FIRST, SECOND)
    ]
    sidecars = sum((folder / name).stat().st_size for name in (INDEX_NAME, "config.json"))
    assert checkpoint.header_bytes_read == read == sum(headers) + sidecars


def test_single_file_model(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"a": ("U8", [1])})
    write_file(tmp_path / "other.safetensors", {"a": ("U8", [9])})  # not part of the model
    checkpoint = open_checkpoint(str(tmp_path))
    assert [file.path for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.config is None


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_file(tmp_path / "vision.safetensors", {"v": ("U8", [1])})
    write_file(tmp_path / "text.safetensors", {"t": ("U8", [1])})
    (tmp_path / "._text.safetensors").write_bytes(b"macOS")
    (tmp_path / "readme.md").write_text("x")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["t", "v"]


def test_a_file_by_its_path(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path / SECOND))
    assert list(checkpoint.tensors) == ["c"]
    assert checkpoint.folder == str(tmp_path)
    assert checkpoint.config == {}


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "model.safetensors", {"a": ("U8", [1])})
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    for reference in (f"~/{tmp_path.name}", ".", f"../{tmp_path.name}/", "model.safetensors"):
        checkpoint = open_checkpoint(reference)
        assert checkpoint.folder == str(tmp_path)
        assert checkpoint.reference == reference


def test_file_paths(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_sharded(tmp_path)))
    for tensor in checkpoint.tensors.values():
        path = checkpoint_file_path(checkpoint, tensor.file)
        assert path.stat().st_size >= tensor.stop_exclusive
    for hostile in ("../x.safetensors", "/etc/passwd", "", "..", "a/b", "a\0b"):
        with pytest.raises(InputError, match="not a plain file name"):
            checkpoint_file_path(checkpoint, hostile)


def test_file_info_follows_the_file(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    before = open_checkpoint(str(folder)).files
    assert open_checkpoint(str(folder)).files == before
    os.utime(folder / FIRST, ns=(1, 1))
    touched = open_checkpoint(str(folder)).files
    assert touched[0].modified_ns == 1
    assert touched[0].header_digest == before[0].header_digest
    write_file(folder / SECOND, {"c": ("F16", [2, 2])})
    assert open_checkpoint(str(folder)).files[1].header_digest != before[1].header_digest


# Links


def test_a_linked_model_folder(tmp_path: Path) -> None:
    write_sharded(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert open_checkpoint(str(tmp_path / "link")).folder == str(tmp_path / "real")


def test_a_linked_file_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_file(tmp_path / "elsewhere" / "blob", {"a": ("U8", [1])})
    (tmp_path / "mine.safetensors").symlink_to(tmp_path / "elsewhere" / "blob")
    checkpoint = open_checkpoint(str(tmp_path / "mine.safetensors"))
    assert checkpoint_file_path(checkpoint, "mine.safetensors").exists()


def hub_cache(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: links into the blobs of the same model."""
    written = write_sharded(tmp_path / "written")
    (written / "config.json").write_text("{}")
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(written.iterdir())):
        blob = repository / "blobs" / f"blob{number}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


def test_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert list(open_checkpoint(str(snapshot)).tensors) == ["b", "a", "c"]
    (tmp_path / "link").symlink_to(snapshot)
    assert list(open_checkpoint(str(tmp_path / "link")).tensors) == ["b", "a", "c"]


def test_hub_cache_does_not_open_another_model(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "hub" / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    write_file(other / "blob", {"c": ("BF16", [2, 2])})
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to(other / "blob")
    assert "outside the model's folder" in refused(snapshot)


def share_blobs(snapshot: Path, name: str) -> None:
    """Moves a model's blobs to the cache's own, as Xet downloads are kept."""
    cache = snapshot.parents[2]
    blob = snapshot.parents[1] / "blobs" / "blob0"
    shared = cache / "blobs" / name
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)


def test_blobs_that_the_models_of_a_hub_cache_share(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    share_blobs(snapshot, "ab/ab" + "0" * 62)
    assert list(open_checkpoint(str(snapshot)).tensors) == ["b", "a", "c"]


@pytest.mark.parametrize("name", ["secret", "ab/secret", "ab/cd" + "0" * 62, "ab/ab" + "0" * 61])
def test_other_files_beside_shared_blobs(tmp_path: Path, name: str) -> None:
    snapshot = hub_cache(tmp_path)
    share_blobs(snapshot, name)
    assert "outside the model's folder" in refused(snapshot)


def test_a_folder_called_snapshots_is_not_yet_a_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    repository = tmp_path / "hub" / "models--org--name"
    renamed = repository.rename(repository.with_name("backups"))
    message = refused(renamed / "snapshots" / snapshot.name)
    assert "outside the model's folder" in message


@pytest.mark.parametrize("name", [FIRST, INDEX_NAME, "config.json"])
def test_links_out_of_the_model(name: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    message = refused(folder)
    assert str(folder / name) in message
    assert f"link to {tmp_path / 'secret'}, outside the model's folder" in message


def test_links_within_the_model(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / "parts").mkdir()
    (folder / FIRST).rename(folder / "parts" / "1")
    (folder / FIRST).symlink_to("parts/1")
    assert len(open_checkpoint(str(folder)).tensors) == 3
    (folder / "parts" / "1").unlink()
    assert "which is absent" in refused(folder)


def test_a_link_to_itself(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)
    assert FIRST in refused(folder)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in refused(tmp_path / "loop")


# The index


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "..",
        ".",
        "",
        "a\0.safetensors",
    ],
)
def test_index_names_must_be_plain(file: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_file(tmp_path / "sub" / "x.safetensors", {"evil": ("U8", [1])})
    folder = write_sharded(tmp_path / "model", {**WEIGHT_MAP, "evil": file})
    message = refused(folder)
    assert message.startswith(f"{folder / INDEX_NAME}: tensor 'evil': ")
    assert "not a plain file name" in message


INDEX_PROBLEMS: dict[str, tuple[object, str]] = {
    "absent file": ({**WEIGHT_MAP, "d": "model-x.safetensors"}, "'model-x.safetensors', absent"),
    "other format": ({**WEIGHT_MAP, "d": "pytorch_model.bin"}, "not a .safetensors file"),
    "unheld tensor": ({**WEIGHT_MAP, "d": FIRST}, f"lists tensor 'd' in '{FIRST}', which does not"),
    "wrong file": ({**WEIGHT_MAP, "a": SECOND}, f"'a' in '{SECOND}', but it is in '{FIRST}'"),
    "unlisted tensor": ({"a": FIRST, "c": SECOND}, f"does not list 'b', held by '{FIRST}'"),
    "file a number": ({**WEIGHT_MAP, "a": 1}, "tensor 'a': its file is not a string"),
    "file null": ({**WEIGHT_MAP, "a": None}, "tensor 'a': its file is not a string"),
    "a list": ([], "no mapping `weight_map`"),
    "null": (None, "no mapping `weight_map`"),
    "empty": ({}, "holds no tensor"),
}


@pytest.mark.parametrize("case", INDEX_PROBLEMS)
def test_index_problems(case: str, tmp_path: Path) -> None:
    weight_map, expected = INDEX_PROBLEMS[case]
    folder = write_sharded(tmp_path)
    write_index(folder, weight_map)
    assert expected in refused(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ":1:1: is not valid JSON"),
        (b'{\n  "weight_map": {\n    oops', ":3:5: is not valid JSON"),
        (b"[1]", "not a JSON mapping"),
        (b'{\n"a": "\xff"}', ":2: is not UTF-8"),
        (b'{"weight_map": ' + b"[" * 50_000, "nested more than"),
        (b'{"weight_map": ' + b"[" * 80 + b"]" * 80 + b"}", "nested more than"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' twice"),
        (b'{"weight_map": {"\\ud800": "x"}}', "unpaired surrogate"),
        (b'{"weight_map": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_index_that_cannot_be_read(content: bytes, expected: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / INDEX_NAME).write_bytes(content)
    message = refused(folder)
    assert message.startswith(str(folder / INDEX_NAME))
    assert expected in message


def test_index_above_the_limit(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    os.truncate(folder / INDEX_NAME, 200_000_001)  # sparse
    assert "holds 200,000,001 bytes" in refused(folder)


def test_an_index_of_too_many_values_is_not_parsed(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / INDEX_NAME).write_bytes(b'{"a":[' + b"[]," * 500_000 + b"[]]}")
    assert "holds more than 1,000,000 values" in refused(folder)


def test_long_names_of_an_index_are_cut_in_messages(tmp_path: Path) -> None:
    long = "n" * 1_000_000
    folder = write_sharded(tmp_path)
    for weight_map in (
        {long: 1},
        {long: f"../{long}"},
        {long: long},
        {long: f"{long}.safetensors"},
        {**WEIGHT_MAP, long: FIRST},
    ):
        write_index(folder, weight_map)
        assert f"'{long[:190]}" in refused(folder) or f"'../{long[:190]}" in refused(folder)
    (folder / INDEX_NAME).write_text(f'{{"{long}": 1, "{long}": 1}}')
    assert "twice" in refused(folder)


def test_an_index_of_many_files_in_a_folder_of_many(tmp_path: Path) -> None:
    """100,000 names are looked up among 1,000, not compared with each."""
    folder = write_sharded(tmp_path)
    for number in range(1000):
        (folder / f"m{number}.txt").touch()
    write_index(folder, {f"t{n}": f"f{n}.safetensors" for n in range(100_000)})
    start = time.process_time()
    assert "(100000 of 100000 files)" in refused(folder)
    assert time.process_time() - start < 2.0


def test_stale_index_beside_a_single_file(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    write_file(folder / "model.safetensors", {"a": ("U8", [1])})
    message = refused(folder)
    assert f"'{FIRST}', '{SECOND}', absent" in message
    assert "delete the index if model.safetensors is the whole model" in message


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"x": ("U8", [1]), "y": ("U8", [1])})
    write_file(tmp_path / "b.safetensors", {"y": ("U8", [1])})
    assert "tensor 'y' is in both 'a.safetensors' and 'b.safetensors'" in refused(tmp_path)


def test_one_tensor_in_two_shards_of_an_index(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    write_file(folder / SECOND, {"c": ("BF16", [2, 2]), "a": ("U8", [3])})
    assert "tensor 'a' is in both" in refused(folder)


def test_missing_shards_without_an_index(tmp_path: Path) -> None:
    write_file(tmp_path / "model-00002-of-00003.safetensors", {"x": ("U8", [1])})
    message = refused(tmp_path)
    assert (
        "'model-00001-of-00003.safetensors', 'model-00003-of-00003.safetensors' absent" in message
    )
    assert "2 of 3 shards" in message


def test_shard_count_of_a_hostile_name(tmp_path: Path) -> None:
    """99,999 missing shards are counted, not listed."""
    write_file(tmp_path / "model-00001-of-99999.safetensors", {"x": ("U8", [1])})
    message = refused(tmp_path)
    assert "and 99993 more" in message
    assert len(message) < 600


# The config


def test_config_values_that_python_writes(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"a": ("U8", [1])})
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    config = open_checkpoint(str(tmp_path)).config
    assert config == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{\n"a": 1,\n}', ":3:1: is not valid JSON"),
        (b"[]", "not a JSON mapping"),
        (b"\xef\xbb\xbf{}", "is not valid JSON: Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', ":1: is not UTF-8"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than"),
        (b'{"a": "\\udc00"}', "unpaired surrogate"),
        (b" " * 10_000_001, "at most 10,000,000 are read"),
    ],
)
def test_config_that_cannot_be_read(content: bytes, expected: str, tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"a": ("U8", [1])})
    (tmp_path / "config.json").write_bytes(content)
    message = refused(tmp_path)
    assert message.startswith(str(tmp_path / "config.json"))
    assert expected in message


def test_a_config_of_too_many_values_is_not_parsed(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"a": ("U8", [1])})
    (tmp_path / "config.json").write_bytes(b'{"a":[' + b"[]," * 500_000 + b"[]]}")
    assert "config.json: holds more than 1,000,000 values" in refused(tmp_path)


# Names


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """No plan or manifest could hold them."""
    folder = os.fsencode(tmp_path / "model")
    os.mkdir(folder)
    write_file(tmp_path / "model" / "a.safetensors", {"a": ("U8", [1])})
    os.rename(folder + b"/a.safetensors", folder + b"/\xff.safetensors")
    for reference in (folder, folder + b"/\xff.safetensors"):
        message = refused(os.fsdecode(reference))
        assert "the name '\\udcff.safetensors' is not UTF-8. Rename" in message
    os.rename(folder + b"/\xff.safetensors", folder + b"/a.safetensors")
    os.rename(folder, folder + b"\xff")
    (tmp_path / "link").symlink_to(os.fsdecode(folder + b"\xff"))
    assert "is not UTF-8. Rename" in refused(tmp_path / "link")


def test_names_with_other_characters_are_read(tmp_path: Path) -> None:
    for name in ("ä\n\u202e.safetensors", "$(x) '\".safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        write_file(folder / name, {"a": ("U8", [1])})
        assert open_checkpoint(str(folder)).files[0].path == name


# References that lead nowhere


def test_absent_model_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "Llama-3-8B").mkdir()
    message = refused(tmp_path / "Llama-3-8b")
    assert f"'{tmp_path / 'Llama-3-8b'}'" in message
    assert "'Llama-3-8B': is one of them meant?" in message


def test_absent_model_in_a_folder_of_many(tmp_path: Path) -> None:
    for number in range(20_000):
        (tmp_path / f"name-{number}").touch()
    start = time.process_time()
    assert "not found" in refused(tmp_path / "name-x")
    assert time.process_time() - start < 0.2


def test_absent_model_shows_the_resolved_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"'../nothing': not found (resolved to {tmp_path.parent / 'nothing'})" in refused(
        "../nothing"
    )


@pytest.mark.parametrize(
    "reference",
    ["./a/b", "/a/b", "a/b/c", "a", "~/a", "../a", "a/b.safetensors", "a/b+c/d", "a/b@", "a/../b"],
)
def test_paths_are_not_taken_for_hub_ids(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(reference)
    assert "not found" in message
    assert "Hub" not in message


@pytest.mark.parametrize("reference", ["", "a\0b", "~nobody-of-this-name/x", "x" * 5000, "\ud800"])
def test_references_that_are_no_paths(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(reference).startswith("model ")


def empty(folder: Path) -> None:
    pass


def pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def adapter(folder: Path) -> None:
    write_file(folder / "adapter_model.safetensors", {"a": ("U8", [1])})


def other_files(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"x")


def tensorless(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(with_prefix(b"{}"))


def subfolder(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (empty, "the folder is empty"),
        (pickles, "is not a file that torch.save writes (it begins b'x')"),
        (adapter, "holds a LoRA adapter"),
        (other_files, "of a model (it holds 'model.gguf')"),
        (tensorless, "holds no tensor"),
        (subfolder, "not a regular file"),
    ],
)
def test_folders_without_a_model(
    fill: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    fill(tmp_path)
    message = refused(tmp_path)
    assert message.startswith(str(tmp_path))
    assert expected in message


def test_files_of_other_formats(tmp_path: Path) -> None:
    for name, expected in (("a.pt", "convert it"), ("a.gguf", "neither a .safetensors file nor")):
        (tmp_path / name).write_bytes(b"x")
        assert expected in refused(tmp_path / name)


def test_pipes_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refused(tmp_path)
    assert "neither a folder nor a regular file" in refused(tmp_path / "model.safetensors")
