"""Files of torch.save: what torch.load(weights_only=True) gives, from byte ranges alone."""

from __future__ import annotations

import io
import os
import re
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint import torch_file, zip_directory
from lazymerge.checkpoint.broken_file import BrokenFileError
from lazymerge.checkpoint.header import Header
from lazymerge.checkpoint.scattered import FetchedBytes
from lazymerge.checkpoint.tensor import DTYPES
from lazymerge.checkpoint.torch_file import parse_torch_file, read_torch_file
from lazymerge.errors import InputError
from torch_bytes import DATA, mapping, pickled, storage, tensor, text, write, zipped
from torch_bytes import torch_file as made


def read(path: Path) -> Header:
    """From the local disk; and the same, or the same error, by requests to somewhere else."""
    fetched = fetched_header(path)
    if isinstance(fetched, str):
        with pytest.raises(InputError) as error:
            read_torch_file(path, path.name)
        assert str(error.value) == f"{path}: {fetched}"
        raise error.value
    header = read_torch_file(path, path.name)
    assert replace(header, file=replace(header.file, modified_ns=None)) == fetched
    return header


def fetched_header(path: Path, requests: list[tuple[int, int]] | None = None) -> Header | str:
    """What a file says when it is fetched piece by piece, or what is wrong with it.

    requests: the ranges that were asked for are added to them.
    """
    size = path.stat().st_size

    def fetch(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= size
        if requests is not None:
            requests.append((start, stop))
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    with ThreadPoolExecutor(2) as pool:
        source = FetchedBytes(fetch(0, min(size, 200)) if size else b"", size, fetch, pool)
        try:
            return parse_torch_file(source, path.name)
        except BrokenFileError as error:
            return str(error)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by their byte ranges."""
    data = path.read_bytes()
    return {
        t.name: torch.frombuffer(
            bytearray(data[t.start : t.stop_exclusive]),
            dtype=getattr(torch, DTYPES[t.dtype].torch_name),
        ).reshape(t.shape)
        if t.size_bytes
        else torch.empty(t.shape, dtype=getattr(torch, DTYPES[t.dtype].torch_name))
        for t in read(path).tensors
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    contents = [t.contiguous().flatten().view(torch.uint8) for t in (left, right)]
    return torch.equal(*contents)


def agrees_with_torch(path: Path) -> None:
    expected = torch.load(path, weights_only=True)
    found = loaded(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(found[name], value), name


SHAPES = st.lists(st.integers(0, 5), max_size=4)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES, st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_every_dtype_and_shape(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int], bool]],
    seed: int,
    ordered: bool,
) -> None:
    random = np.random.default_rng(seed)
    made: dict[str, torch.Tensor] = OrderedDict() if ordered else {}
    for name, (dtype, shape, is_parameter) in tensors.items():
        kind = getattr(torch, DTYPES[dtype].torch_name)
        count = int(np.prod(shape)) * DTYPES[dtype].item_bytes
        content = torch.from_numpy(random.integers(0, 2, count, dtype=np.uint8))
        value = content.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)
        is_real = DTYPES[dtype].is_float
        made[name] = torch.nn.Parameter(value, is_real) if is_parameter else value
    path = tmp_path_factory.mktemp("file") / "model.bin"
    torch.save(made, path)
    agrees_with_torch(path)


def test_views_that_share_a_storage(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "whole": whole,
        "tied": whole,
        "row": whole[2],
        "rows": whole[1:3],
        "last": whole[3, 5],
        "none": whole[2:2],
        "thin": whole[1:2, :],
        "of one": whole[1, 2:3].expand(1, 1),
        "reshaped": whole.view(2, 12),
    }
    path = tmp_path / "model.pt"
    torch.save(state, path)
    agrees_with_torch(path)
    ranges = {t.name: (t.start, t.stop_exclusive) for t in read(path).tensors}
    assert ranges["whole"] == ranges["tied"] == ranges["reshaped"]
    assert ranges["row"][0] == ranges["whole"][0] + 48


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, 1:],
        lambda t: t[::2],
        lambda t: t[:1].expand(3, 6),
    ],
    ids=["transposed", "columns", "every other row", "expanded"],
)
def test_elements_out_of_order(
    view: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"good": torch.ones(2), "w": view(torch.ones(4, 6))}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"tensor 'w': its elements do not lie in order") as error:
        read(tmp_path / "m.pt")
    assert ".contiguous()" in str(error.value)


def test_the_remedy_for_elements_out_of_order_works(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "FILE")
    with pytest.raises(InputError) as error:
        read(tmp_path / "FILE")
    command = re.search(r"in Python: (.*)\.$", str(error.value))
    assert command is not None
    names = {"FILE": tmp_path / "FILE", "NEW_FILE": tmp_path / "NEW", "torch": torch}
    eval(command[1], names)
    agrees_with_torch(tmp_path / "NEW")


WEIGHTS = {"w": torch.ones(2, 3), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        ({"state_dict": WEIGHTS}, "state_dict"),
        ({"state_dict": WEIGHTS, "epoch": 3, "optimizer_states": [{"state": {0: WEIGHTS}}]},
         "state_dict"),
        ({"model": WEIGHTS, "optimizer": {"state": {0: WEIGHTS}, "param_groups": []}}, "model"),
        ({"ema": {"w": torch.ones(7)}, "model": WEIGHTS}, "model"),
        ({"model": {"w": torch.ones(7)}, "state_dict": WEIGHTS}, "state_dict"),
        ({"params_ema": WEIGHTS}, "params_ema"),
        ({"generator": WEIGHTS, "config": {"layers": 3}, "version": "v2"}, "generator"),
    ],
)  # fmt: skip
def test_mappings_in_mappings(saved: dict[str, object], key: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "m.ckpt")
    header = read(tmp_path / "m.ckpt")
    assert {t.name: t.shape for t in header.tensors} == {"w": (2, 3), "b": (3,)}
    (notice,) = header.notices
    assert notice.startswith(f"m.ckpt: what it holds under {key!r} is taken for the model")
    for other in saved.keys() - {key}:
        assert repr(other) in notice


def test_values_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "epoch": 3, "name": "x", "nothing": None}, tmp_path / "m.pt")
    header = read(tmp_path / "m.pt")
    assert len(header.tensors) == 2
    assert header.notices == (
        "m.pt: entries that are no tensors are left out: 'epoch', 'name', 'nothing'",
    )


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (torch.ones(2), "holds a single tensor, not a mapping"),
        ([torch.ones(2)], "holds a list, not a mapping"),
        ("x", "holds a str, not a mapping"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "holds no tensors"),
        ({"a": WEIGHTS, "b": WEIGHTS}, "mappings of tensors under 'a', 'b'"),
        ({"w": torch.ones(2), "more": WEIGHTS}, "and further mappings of tensors under 'more'"),
        ({"w": torch.ones(2), "more": [torch.ones(2)]}, "holds a list under 'more'"),
        ({"model": {"w": torch.ones(2), "more": WEIGHTS}}, "holds a dict under 'more'"),
        ({3: torch.ones(2)}, "holds a tensor called '3'"),
        ({"__metadata__": torch.ones(2)}, "holds a tensor called '__metadata__'"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
        ({"w": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"w": np.ones(2)}, "_reconstruct"),
        ({"w": torch.conj(torch.ones(2, dtype=torch.complex64))}, "'torch.ComplexFloatStorage'"),
        (torch.nn.Linear(1, 1), "'torch.nn.modules.linear.Linear'"),
    ],
)  # fmt: skip
def test_what_is_not_taken(saved: object, expected: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(InputError) as error:
        read(tmp_path / "m.pt")
    assert str(error.value).startswith(f"{tmp_path / 'm.pt'}: ")
    assert expected in str(error.value)


def test_files_of_before_torch_1_6(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "FILE", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before version 1\.6") as error:
        read(tmp_path / "FILE")
    command = re.search(r"in Python: (.*)\.$", str(error.value))
    assert command is not None
    names = {"FILE": tmp_path / "FILE", "NEW_FILE": tmp_path / "NEW", "torch": torch}
    eval(command[1], names)
    agrees_with_torch(tmp_path / "NEW")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        read(tmp_path / "m.pt")


def test_other_protocols(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        torch.save(WEIGHTS, tmp_path / "m.pt", pickle_protocol=protocol)
        assert {name: t.sum().item() for name, t in loaded(tmp_path / "m.pt").items()} == {
            "w": 6.0,
            "b": 0.0,
        }


# Files made by hand


ONE = pickled(mapping({"w": tensor()}))


def refused(path: Path, content: bytes) -> str:
    with pytest.raises(InputError) as error:
        read(write(path, content))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_a_file_made_by_hand_is_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", made(ONE))
    agrees_with_torch(path)
    header = read(path)
    assert len(header.tensors) == 1
    write(path, made(ONE, order=None))  # of torch before 2.1
    agrees_with_torch(path)


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a file that torch.save writes"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "bare pickle": (b"\x80\x02cposix\nsystem\n.", "before version 1.6"),
    "big-endian": (made(ONE, order=b"big"), "byte order b'big'"),
    "other order": (made(ONE, order=b"little\n"), "byte order b'little\\n'"),
    "long order": (made(ONE, order=bytes(17)), "at most 16"),
    "no pickle": (zipped({"x/data/0": DATA}), "0 entries NAME/data.pkl"),
    "two pickles": (zipped({"x/data.pkl": ONE, "y/data.pkl": ONE}), "2 entries NAME/data.pkl"),
    "pickle at the top": (zipped({"data.pkl": ONE, "data/0": DATA}), "0 entries NAME/data.pkl"),
    "no storage": (made(ONE, {}), "its storage '0' is not in the file"),
    "storage of another folder": (
        made(pickled(mapping({"w": tensor(stored=storage("../version"))}))), "'../version' is not"),
    "short storage": (made(ONE, {"0": DATA[:-1]}), "holds 23 bytes, the pickle says 24"),
    "long storage": (made(ONE, {"0": DATA + b"\0"}), "holds 25 bytes, the pickle says 24"),
    "beyond": (made(pickled(mapping({"w": tensor(offset=1)}))), "beyond its storage of 24 bytes"),
    "too large": (made(pickled(mapping({"w": tensor((3, 3))}))), "beyond its storage"),
    "huge": (made(pickled(mapping({"w": tensor((2**62,) * 64, tuple(2 ** (62 * n) % 2**62 for n in
             range(64)))}))), "do not lie in order"),
    "far": (made(pickled(mapping({"w": tensor(offset=2**62)}))), "beyond its storage"),
    "expanded": (made(pickled(mapping({"w": tensor((2**62, 3), (0, 1))}))), "do not lie in order"),
    "code": (made(pickled(b"cposix\nsystem\n" + text("touch pwned") + b"\x85R")), "'posix.system'"),
    "code beside": (made(pickled(mapping({"w": tensor(), "x": b"cbuiltins\neval\n"}))),
                    "'builtins.eval', which is no part of a tensor; it is not imported"),
    "steers the terminal": (made(pickled(mapping({"\x1b[2J\n": tensor((3, 3))}))),
                            "tensor '\\x1b[2J\\n'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    assert expected in refused(tmp_path / "m.pt", content)


def test_an_empty_tensor_may_begin_anywhere(tmp_path: Path) -> None:
    empty = tensor((0, 3), (3, 1), offset=2**40)
    header = read(write(tmp_path / "m.pt", made(pickled(mapping({"w": empty})))))
    assert header.tensors[0].size_bytes == 0
    assert header.tensors[0].stop_exclusive < len(made(ONE))


def test_pickles_are_bounded_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "PICKLE_LIMIT_BYTES", len(ONE) - 1)
    assert "bytes; at most" in refused(tmp_path / "m.pt", made(ONE))


# The digest


def test_the_digest_shows_every_change_but_of_data(tmp_path: Path) -> None:
    content = made(ONE)
    path = write(tmp_path / "m.pt", content)
    header = read(path)
    (found,) = header.tensors
    for at in range(len(content)):
        altered = bytearray(content)
        altered[at] ^= 1
        write(path, bytes(altered))
        try:
            digest = read(path).file.header_digest
        except InputError:
            continue
        is_data = found.start <= at < found.stop_exclusive
        is_version = content[at : at + 2] == b"3\n" or content[at - 1 : at + 1] == b"3\n"
        assert (digest == header.file.header_digest) == (is_data or is_version), at


# Zip files


def test_compressed(tmp_path: Path) -> None:
    entries = {"x/data.pkl": ONE, "x/data/0": DATA}
    content = zipped(entries, zipfile.ZIP_DEFLATED)
    assert "'x/data.pkl' is compressed" in refused(tmp_path / "m.pt", content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_twice_the_same_entry(tmp_path: Path) -> None:
    content = bytearray(made(ONE, {"0": DATA, "1": DATA}))
    altered = bytes(content).replace(b"x/data/1", b"x/data/0")
    assert "holds the entry 'x/data/0' twice" in refused(tmp_path / "m.pt", altered)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "x/../../evil", "x\\evil", "x/.."])
def test_names_of_entries(name: str, tmp_path: Path) -> None:
    content = zipped({"x/data.pkl": ONE, "x/data/0": DATA, name: b"evil"})
    assert "named like a path out of a folder" in refused(tmp_path / "m.pt", content)


def central(content: bytes, number: int) -> int:
    """Where the central record of an entry begins."""
    position = struct.unpack("<L", content[-6:-2])[0]
    for _ in range(number):
        lengths = struct.unpack_from("<HHH", content, position + 28)
        position += 46 + sum(lengths)
    return int(position)


def altered(number: int, at: int, kind: str, value: int, content: bytes | None = None) -> bytes:
    """A file with a field of an entry's central record changed."""
    data = bytearray(made(ONE) if content is None else content)
    struct.pack_into(f"<{kind}", data, central(bytes(data), number) + at, value)
    return bytes(data)


def ended(at: int, kind: str, value: int) -> bytes:
    """A file with a field of its end changed."""
    data = bytearray(made(ONE))
    struct.pack_into(f"<{kind}", data, len(data) - 22 + at, value)
    return bytes(data)


SOUND = made(ONE)
FIRST_CONTENT = 30 + len("x/data.pkl")
ZIPS: dict[str, tuple[bytes, str]] = {
    "cut": (SOUND[:-1], "does not end as a zip file does"),
    "followed": (SOUND + b"x", "does not end as a zip file does"),
    "half": (SOUND[: len(SOUND) // 2], "does not end as a zip file does"),
    "short": (SOUND[:10], "too few for a zip file"),
    "preceded": (b"PK\x03\x04" + SOUND, "does not end where the end of the file begins"),
    "commented": (ended(20, "H", 1), "has a comment"),
    "of two disks": (ended(4, "H", 1), "is part of a zip file"),
    "more entries": (ended(8, "HH"[0], 5), "is part of a zip file"),
    "directory elsewhere": (ended(16, "L", 3), "does not end where"),
    "directory too short": (ended(12, "L", 3), "does not end where"),
    "encrypted": (altered(0, 8, "H", 1), "is encrypted"),
    "method": (altered(2, 10, "H", 8), "is compressed"),
    "other size": (altered(2, 24, "L", 20), "is compressed"),
    "other sizes": (altered(2, 24, "L", 20, altered(2, 20, "L", 20)), "is not what the directory"),
    "another's place": (altered(2, 42, "L", 0), "overlaps"),
    "within another": (altered(2, 42, "L", FIRST_CONTENT), "overlaps"),
    "far away": (altered(2, 42, "L", len(SOUND)), "lies beyond the entries"),
    "sizes unknown": (altered(2, 24, "L", 0xFFFFFFFF), "has no size or place"),
    "not first": (altered(0, 42, "L", 1), "bytes before its first entry"),
    "version": (altered(1, 6, "H", 46), "needs version 46 of the zip format"),
    "another disk": (altered(0, 34, "H", 1), "part of another file"),
    "no record": (altered(1, 0, "L", 0), "entry 1 of its directory is not one"),
    "long name": (altered(1, 28, "H", 60_000), "entry 1 of its directory is not one"),
    "long comment": (altered(3, 32, "H", 60_000), "entry 3 of its directory is not one"),
    "local name": (SOUND.replace(b"x/data/0", b"x/data/9", 1), "is not what the directory says"),
    "local method": (SOUND[:8] + b"\x08" + SOUND[9:], "is not what the directory says"),
    "local flags": (SOUND[:6] + b"\x01" + SOUND[7:], "is not what the directory says"),
    "local extra": (SOUND[:28] + b"\xff\xff" + SOUND[30:], "reaches into the directory"),
    "not UTF-8": (SOUND.replace(b"x/version", b"x/\xff\xffrsion"), "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_zip_tricks(name: str, tmp_path: Path) -> None:
    content, expected = ZIPS[name]
    assert expected in refused(tmp_path / "m.pt", content)


def test_fewer_entries_than_the_directory_holds(tmp_path: Path) -> None:
    data = bytearray(SOUND)
    struct.pack_into("<HH", data, len(data) - 14, 3, 3)
    assert "bytes after its 3 entries" in refused(tmp_path / "m.pt", bytes(data))
    struct.pack_into("<HH", data, len(data) - 14, 5, 5)
    assert "ends at entry 4" in refused(tmp_path / "m.pt", bytes(data))


def test_sizes_are_bounded_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_directory, "ENTRY_LIMIT", 3)
    assert "at most" in refused(tmp_path / "m.pt", SOUND)
    monkeypatch.setattr(zip_directory, "ENTRY_LIMIT", 4)
    read(tmp_path / "m.pt")
    monkeypatch.setattr(zip_directory, "DIRECTORY_LIMIT_BYTES", 10)
    assert "at most" in refused(tmp_path / "m.pt", SOUND)


def zip64(path: Path) -> bytearray:
    """A file of torch's, which has both ends."""
    torch.save({"w": torch.arange(6.0)}, path)
    return bytearray(path.read_bytes())


def test_fields_of_entries_that_are_cut(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        entry = zipfile.ZipInfo("x/data.pkl")
        entry.extra = struct.pack("<HH", 0x4246, 3) + b"..."  # as torch pads
        archive.writestr(entry, ONE)
        archive.writestr("x/data/0", DATA)
    content = stream.getvalue()
    read(write(tmp_path / "m.pt", content))
    place = content.rindex(struct.pack("<HH", 0x4246, 3))
    cut = content[: place + 2] + b"\x04" + content[place + 3 :]
    assert "has a field that is cut" in refused(tmp_path / "m.pt", cut)


def test_both_ends_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    content = zip64(path)
    for at, kind, value, expected in [
        (-22 + 8, "HH", (1, 1), "two ends that disagree"),
        (-22 + 12, "L", (1,), "two ends that disagree"),
        (-22 + 16, "L", (1,), "two ends that disagree"),
        (-42 + 8, "Q", (0,), "not where it must be"),
        (-42 + 4, "L", (1,), "not where it must be"),
        (-98, "L", (0,), "zip64 end that is not one"),
        (-98 + 48, "Q", (2**63,), "two ends that disagree"),
        (-98 + 16, "L", (1,), "is part of a zip file"),
    ]:
        data = bytearray(content)
        struct.pack_into(f"<{kind}", data, len(data) + at, *value)
        assert expected in refused(path, bytes(data)), at
    for at, kind, values in [
        (-22 + 8, "HH", (0xFFFF, 0xFFFF)),
        (-22 + 12, "LL", (0xFFFFFFFF, 0xFFFFFFFF)),
    ]:
        struct.pack_into(f"<{kind}", content, len(content) + at, *values)
    read(write(path, bytes(content)))  # as where numbers are large
    struct.pack_into("<Q", content, len(content) - 98 + 48, 2**63)
    assert "does not end where" in refused(path, bytes(content))


def test_sizes_of_more_than_32_bits(tmp_path: Path) -> None:
    """An entry of 4 GiB, most of it a hole in the file."""
    path = tmp_path / "m.pt"
    count = 2**32 + 4
    first = pickled(
        mapping(
            {
                "large": tensor((count // 4,), (1,), stored=storage("0", count // 4)),
                "small": tensor(stored=storage("1")),
            }
        )
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", first)
    with path.open("r+b") as stream:
        directory = zipfile.ZipFile(path).start_dir
        stream.truncate(directory)
        places = []
        for name, size in (("x/data/0", count), ("x/data/1", 24)):
            stream.seek(0, os.SEEK_END)
            places.append(stream.tell())
            extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= 2**32 else b""
            short = min(size, 0xFFFFFFFF)
            header = struct.pack(
                "<4sHHHHHLLLHH", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, short, short, 8, len(extra)
            )
            stream.write(header + name.encode() + extra)
            if size == 24:
                stream.write(DATA)
            else:
                stream.truncate(stream.tell() + size)
        stream.seek(0, os.SEEK_END)
        start = stream.tell()
        for name, offset, size in (
            ("x/data.pkl", 0, len(first)),
            ("x/data/0", places[0], count),
            ("x/data/1", places[1], 24),
        ):
            numbers = [n for n in (size, size, offset) if n >= 2**32]
            extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
            short = min(size, 0xFFFFFFFF)
            at = min(offset, 0xFFFFFFFF)
            fields = (45, 45, 0, 0, 0, 0, 0, short, short, len(name), len(extra), 0, 0, 0, 0, at)
            stream.write(struct.pack("<4sHHHHHHLLLHHHHHLL", b"PK\x01\x02", *fields))
            stream.write(name.encode() + extra)
        length = stream.tell() - start
        stream.write(struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, length, start))
        stream.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, start + length, 1))
        ends = (0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        stream.write(struct.pack("<4sHHHHLLH", b"PK\x05\x06", *ends))
    assert [i.file_size for i in zipfile.ZipFile(path).infolist()] == [len(first), count, 24]
    tensors = {t.name: t for t in read(path).tensors}
    assert tensors["large"].size_bytes == count
    assert tensors["small"].start > 2**32
    with path.open("rb") as stream:
        stream.seek(tensors["small"].start)
        assert stream.read(24) == DATA


def test_one_mapping_under_many_keys_is_looked_through_once(tmp_path: Path) -> None:
    import pickle

    large = {str(number): 1 for number in range(20_000)}
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        saved = {f"k{number}": large for number in range(20_000)}
        archive.writestr("x/data.pkl", pickle.dumps(saved, protocol=2))
    began = time.process_time()
    with pytest.raises(InputError, match="holds no tensors"):
        read_torch_file(tmp_path / "x.bin", "x.bin")
    assert time.process_time() - began < 2


def test_few_requests_of_little(tmp_path: Path) -> None:
    """The start, the end, and what lies before every entry that is large."""
    path = tmp_path / "m.bin"
    layers = {f"layers.{n}.{kind}": torch.zeros(size) for n in range(20) for kind, size in
              (("up", 30_000), ("norm", 50), ("bias", 50))}  # fmt: skip
    torch.save(layers, path)
    requests: list[tuple[int, int]] = []
    header = fetched_header(path, requests)
    assert isinstance(header, Header)
    assert len(header.tensors) == 60
    assert len(requests) <= 20 + 4
    assert sum(stop - start for start, stop in requests) < 90_000 < path.stat().st_size / 25
