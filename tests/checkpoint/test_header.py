"""read_header: what it says of sound files, and one clear error for every broken invariant."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import xxhash
from lazymerge.checkpoint.header import read_header
from lazymerge.checkpoint.tensor import DTYPES, TensorInfo
from lazymerge.errors import InputError
from safetensors_bytes import entries_for, entry, with_prefix, write_file

from open_files import open_files

REMEDY = re.compile(
    "[Dd]ownload it again|Write the file again|Convert the model|git lfs pull|Spread"
)

SOUND, DATA_BYTES = entries_for({"a": ("F32", [2, 3]), "b": ("BF16", [4])})


def as_json(document: object) -> bytes:
    return json.dumps(document).encode()


def broken_file(tmp_path: Path, content: bytes) -> str:
    """The error's message, which must name the file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_header(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(REMEDY.findall(message)) == 1, message
    assert len(message) < 1000
    return message.removeprefix(f"{path}: ")


def test_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data_start = write_file(path, {"b": ("BF16", [4]), "a": ("F32", [2, 3])}, {"format": "pt"})
    header = read_header(path)
    assert header.tensors == (
        TensorInfo("b", "BF16", (4,), "x.safetensors", data_start, data_start + 8),
        TensorInfo("a", "F32", (2, 3), "x.safetensors", data_start + 8, data_start + 32),
    )
    assert header.metadata == {"format": "pt"}
    assert header.bytes_read == data_start
    assert header.file.path == "x.safetensors"
    assert header.file.size_bytes == path.stat().st_size == data_start + 32
    assert header.file.modified_ns == path.stat().st_mtime_ns
    content = path.read_bytes()[:data_start]
    assert header.file.header_digest == xxhash.xxh3_128_hexdigest(content)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    document = {
        "late": entry("U8", [3], 2, 5),
        "early": entry("U8", [2], 0, 2),
        "last": entry("U8", [1], 5, 6),
    }
    path.write_bytes(with_prefix(as_json(document), bytes(6)))
    assert [tensor.name for tensor in read_header(path).tensors] == ["early", "late", "last"]


def test_empty_and_scalar_tensors_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    document = {
        "full": entry("U8", [2], 0, 2),
        "empty first": entry("F32", [0], 0, 0),
        "scalar": entry("F64", [], 2, 10),
        "empty middle": entry("F32", [3, 0, 5], 2, 2),
        "empty last": entry("I64", [0, 7], 10, 10),
    }
    path.write_bytes(with_prefix(as_json(document), bytes(10)))
    header = read_header(path)
    assert [tensor.name for tensor in header.tensors] == [
        "empty first",
        "full",
        "empty middle",
        "scalar",
        "empty last",
    ]
    assert [tensor.element_count for tensor in header.tensors] == [0, 2, 0, 1, 0]


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_prefix(b"{}"))
    assert read_header(path).tensors == ()


def test_padding_after_the_json_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_prefix(as_json(SOUND) + b" " * 7, bytes(DATA_BYTES)))
    header = read_header(path)
    assert header.bytes_read == 8 + len(as_json(SOUND)) + 7
    assert header.tensors[0].start == header.bytes_read


def test_names_keep_every_character(tmp_path: Path) -> None:
    names = ["", "a\nb", "\u0000", "é", "\U0001f600", 'quote"back\\slash', "../../etc/passwd"]
    path = tmp_path / "x.safetensors"
    for ensure_ascii in (True, False):
        document = {name: entry("U8", [], i, i + 1) for i, name in enumerate(names)}
        text = json.dumps(document, ensure_ascii=ensure_ascii).encode()
        path.write_bytes(with_prefix(text, bytes(len(names))))
        assert [tensor.name for tensor in read_header(path).tensors] == names


def test_every_known_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for dtype in DTYPES.values():
        document = {"t": entry(dtype.name, [3], 0, 3 * dtype.item_bytes)}
        path.write_bytes(with_prefix(as_json(document), bytes(3 * dtype.item_bytes)))
        assert read_header(path).tensors[0].dtype == dtype.name


def test_unknown_fields_of_an_entry_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    document = {"t": {**entry("U8", [1], 0, 1), "note": {"x": [1.5]}}}
    path.write_bytes(with_prefix(as_json(document), bytes(1)))
    assert read_header(path).tensors[0].shape == (1,)


ONE = entry("F32", [2], 0, 8)

BROKEN_HEADERS = {
    # id: (header, bytes of data, what the message must say)
    "no json": (b"{]", 0, "not JSON .* byte 9 of the file"),
    "empty": (b"", 0, "does not begin with '{'"),
    "list": (b"[]", 0, "does not begin with '{'"),
    "space first": (b" {}", 0, "does not begin with '{'"),
    "byte order mark": (b"\xef\xbb\xbf{}", 0, "does not begin with '{'"),
    "trailing text": (b"{} {}", 0, "not JSON"),
    "not utf-8": (b'{"\xff": 1}', 0, r"not UTF-8 \(byte 10 of the file\)"),
    "control character": (b'{"\x01": 1}', 0, "not JSON"),
    "unpaired surrogate": (
        b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        1,
        "unpaired surrogate",
    ),
    "deep": (b'{"a":' + b"[" * 100_000, 0, "nested too deeply"),
    "deep and closed": (
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        0,
        "nested too deeply",
    ),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", 0, "number of thousands of digits"),
    "nan": (b'{"a": NaN}', 0, "holds NaN"),
    "infinity": (b'{"a": -Infinity}', 0, "holds -Infinity"),
    "tensor twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "the key 'a' twice",
    ),
    "tensor twice by escape": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "the key 'a' twice",
    ),
    "field twice": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "the key 'dtype' twice",
    ),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__' twice"),
    "metadata a list": (as_json({"__metadata__": []}), 0, "`__metadata__` .*not a mapping"),
    "metadata a tensor": (as_json({"__metadata__": ONE}), 8, "`__metadata__` .*'shape' is a list"),
    "metadata number": (as_json({"__metadata__": {"a": 1}}), 0, "'a' is a number, not a string"),
    "metadata nested": (as_json({"__metadata__": {"a": {}}}), 0, "'a' is a mapping"),
    "entry null": (as_json({"a": None}), 0, "tensor 'a': its entry is null"),
    "entry list": (as_json({"a": ["F32", [2], [0, 8]]}), 8, "tensor 'a': its entry is a list"),
    "no dtype": (as_json({"a": {"shape": [], "data_offsets": [0, 0]}}), 0, "no field 'dtype'"),
    "no shape": (as_json({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), 0, "no field 'shape'"),
    "no offsets": (as_json({"a": {"dtype": "U8", "shape": [0]}}), 0, "no field 'data_offsets'"),
    "nested in a further field": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + b"[" * 99 + b"]" * 99 + b"}}",
        0,
        "tensor 'a': its entry is nested more than 64 deep",
    ),
    "surrogate in a further field": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":["\\uDFFF"]}}',
        0,
        "unpaired surrogate",
    ),
    "dtype unknown": (as_json({"a": entry("Q4_K", [2], 0, 8)}), 8, "tensor 'a': .*\"Q4_K\""),
    "dtype lower case": (as_json({"a": entry("f32", [2], 0, 8)}), 8, '"f32" is not known'),
    "dtype number": (as_json({"a": entry(32, [2], 0, 8)}), 8, "dtype is a number"),
    "dtype list": (as_json({"a": entry(["F32"], [2], 0, 8)}), 8, "dtype is a list"),
    "shape null": (as_json({"a": entry("F32", None, 0, 8)}), 8, "shape is null"),
    "shape number": (as_json({"a": entry("F32", 2, 0, 8)}), 8, "shape is a number"),
    "shape negative": (as_json({"a": entry("F32", [-1, -2], 0, 8)}), 8, "shape holds -1"),
    "shape fraction": (as_json({"a": entry("F32", [2.0], 0, 8)}), 8, "shape holds 2.0"),
    "shape boolean": (as_json({"a": entry("F32", [2, True], 0, 8)}), 8, "shape holds true"),
    "shape string": (as_json({"a": entry("F32", ["2"], 0, 8)}), 8, 'shape holds "2"'),
    "shape nested": (as_json({"a": entry("F32", [[2]], 0, 8)}), 8, r"shape holds \[2\]"),
    "shape past 64 bits": (as_json({"a": entry("F32", [2**64], 0, 8)}), 8, "shape holds 184467"),
    "shape overflows": (
        # 2^62 · 4 elements wrap around to 0 in 64 bits.
        as_json({"a": entry("F32", [2**62, 4], 0, 0)}),
        0,
        r"more than 2\^64 elements",
    ),
    "shape overflows, then zero": (
        as_json({"a": entry("F32", [2**62, 4, 0], 0, 0)}),
        0,
        r"more than 2\^64 elements",
    ),
    "size overflows": (as_json({"a": entry("F32", [2**62], 0, 0)}), 0, "takes 18,446"),
    "offsets null": (as_json({"a": {**ONE, "data_offsets": None}}), 8, "not a list of two"),
    "offsets of one": (as_json({"a": {**ONE, "data_offsets": [0]}}), 8, "not a list of two"),
    "offsets of three": (as_json({"a": {**ONE, "data_offsets": [0, 8, 9]}}), 8, "list of two"),
    "offsets negative": (as_json({"a": entry("F32", [2], -8, 0)}), 8, "hold -8 and 0"),
    "offsets past 64 bits": (as_json({"a": entry("F32", [0], 2**64, 2**64)}), 8, "hold 184467"),
    "offsets of thousands of digits": (
        # Added to the header's length this would be a number that Python does not print.
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[%s,%s]}}' % ((b"9" * 4300,) * 2),
        0,
        "data_offsets hold 99999",
    ),
    "offsets fraction": (as_json({"a": entry("F32", [2], 0, 8.0)}), 8, "hold 0 and 8.0"),
    "offsets boolean": (as_json({"a": entry("U8", [1], False, True)}), 1, "hold false and true"),
    "offsets out of order": (as_json({"a": entry("F32", [2], 8, 0)}), 8, "out of order"),
    "size too small": (as_json({"a": entry("F32", [2], 0, 7)}), 7, "takes 8 bytes.* hold 7"),
    "size too large": (as_json({"a": entry("F32", [2], 0, 9)}), 9, "takes 8 bytes.* hold 9"),
    "scalar of no bytes": (as_json({"a": entry("F32", [], 0, 0)}), 0, "takes 4 bytes.* hold 0"),
    "gap at the start": (
        as_json({"a": entry("U8", [2], 1, 3)}),
        3,
        "tensor 'a': 1 bytes between where the data section begins",
    ),
    "gap": (
        as_json({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 5, 7)}),
        7,
        "tensor 'b': 3 bytes between where 'a' ends",
    ),
    "overlap": (
        as_json({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}),
        7,
        "tensor 'b': it overlaps 'a' by 1 bytes",
    ),
    "same range": (
        as_json({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}),
        4,
        "'b': it overlaps 'a' by 4 bytes",
    ),
    "empty inside another": (
        as_json({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}),
        4,
        "tensor 'b': it overlaps 'a'",
    ),
    "trailing bytes": (as_json({"a": ONE}), 13, "5 bytes after its last tensor"),
    "trailing bytes, no tensor": (b"{}", 5, "5 bytes after its last tensor"),
    "truncated": (as_json({"a": ONE}), 5, r"truncated: 3 bytes are missing .*'a' .*download it"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_header(case: str, tmp_path: Path) -> None:
    header, data_bytes, expected = BROKEN_HEADERS[case]
    message = broken_file(tmp_path, with_prefix(header, bytes(data_bytes)))
    assert re.search(expected, message), message
    assert len(message) < 500


ATTACKS = {
    # https://github.com/huggingface/safetensors/tree/main/attacks, the three on this format
    "abuse 1, a length beyond the file": (struct.pack("<Q", 1000) + bytes(100), "truncated inside"),
    "abuse 2, a header of gigabytes": (
        struct.pack("<Q", 1_000_000_000) + b"{" * 9,
        "claims a head",
    ),
    "abuse 3, 100,000 tensors in one place": (
        with_prefix(
            as_json({f"w{i}": entry("F32", [4], 0, 16) for i in range(100_000)}), bytes(16)
        ),
        "'w1': it overlaps 'w0' by 16 bytes",
    ),
    # what takes long, or much memory, with a header that fits
    "numbers of megabytes": (
        with_prefix(as_json({"a": entry("U8", [2**63] * 200_000, 0, 1)}), b"x"),
        r"more than 2\^64 elements",
    ),
    "numbers of megabytes, and a zero": (
        with_prefix(as_json({"a": entry("U8", [2**63] * 200_000 + [0], 0, 0)})),
        r"more than 2\^64 elements",
    ),
    "lists": (with_prefix(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"), "more than 4,000,000 values"),
    "mappings": (
        with_prefix(b'{"a":[' + b"{}," * 2_000_000 + b"{}]}"),
        "more than 4,000,000 values",
    ),
    "ones": (
        with_prefix(as_json({"a": entry("U8", [1] * 4_000_000, 0, 1)}), b"x"),
        "more than 4,000,000 values",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_end_soon_and_in_little_memory(attack: str, tmp_path: Path) -> None:
    content, expected = ATTACKS[attack]
    start = time.process_time()
    message = broken_file(tmp_path, content)
    elapsed = time.process_time() - start
    assert re.search(expected, message), message
    if sys.gettrace() is None:
        assert elapsed < 2.0
    tracemalloc.start()  # makes everything slower
    broken_file(tmp_path, content)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * len(content) + 150_000_000


LONG = "n" * 1_000_000
LONG_NAMES = {
    "entry": {LONG: None},
    "dtype": {LONG: entry(LONG, [2], 0, 8)},
    "metadata": {"__metadata__": {LONG: 1}},
    "overlap": {LONG: entry("U8", [2], 0, 2), f"{LONG}2": entry("U8", [2], 1, 3)},
    "gap": {LONG: entry("U8", [2], 0, 2), f"{LONG}2": entry("U8", [2], 5, 7)},
    "cut": {LONG: entry("U8", [2], 0, 2)},
}


@pytest.mark.parametrize("case", LONG_NAMES)
def test_long_names_are_cut_in_messages(case: str, tmp_path: Path) -> None:
    assert f"'{LONG[:197]}..." in broken_file(tmp_path, with_prefix(as_json(LONG_NAMES[case])))
    twice = b'{"%s":1,"%s":1}' % (LONG.encode(), LONG.encode())
    assert f"'{LONG[:197]}...' twice" in broken_file(tmp_path, with_prefix(twice))


@pytest.mark.parametrize("size", range(8))
def test_file_shorter_than_the_length_prefix(size: int, tmp_path: Path) -> None:
    assert f"holds {size} bytes" in broken_file(tmp_path, bytes(size))


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Cut at any byte, the file is refused and the missing bytes are counted."""
    content = with_prefix(as_json(SOUND), bytes(DATA_BYTES))
    data_start = len(content) - DATA_BYTES
    for size in range(8, len(content)):
        message = broken_file(tmp_path, content[:size])
        expected = len(content) if size >= data_start else data_start
        assert f"{expected - size:,} bytes" in message
        assert f"({expected:,} expected, {size:,} present)" in message
        assert "download it again" in message


def test_truncation_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    content = with_prefix(as_json(SOUND), bytes(DATA_BYTES))
    assert "'b' is the first tensor that is cut" in broken_file(tmp_path, content[:-1])
    assert "'a' is the first tensor that is cut" in broken_file(tmp_path, content[:-9])


def test_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)  # sparse
    with pytest.raises(InputError, match="claims a header of 100,000,001 bytes"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**64 - 8])
def test_absurd_header_length(length: int, tmp_path: Path) -> None:
    assert "claims a header of" in broken_file(tmp_path, struct.pack("<Q", length) + b"{}")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    message = broken_file(tmp_path, pointer)
    assert "Git LFS pointer" in message
    assert "git lfs pull" in message


def test_other_formats_are_named_as_no_safetensors(tmp_path: Path) -> None:
    for content in (
        b"PK\x03\x04\x00\x00\x08\x08" + bytes(60),
        b"<!DOCTYPE html><html></html>",
        b"GGUF" * 8,
    ):
        assert "not a safetensors file" in broken_file(tmp_path, content)


def test_things_that_are_no_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)  # must not wait for a writer
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            read_header(path)
    with pytest.raises(InputError, match="No such file"):
        read_header(tmp_path / "absent.safetensors")


def test_descriptors_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    before = open_files(tmp_path)
    for content in (with_prefix(b"{}"), with_prefix(b"{]"), b"", with_prefix(b"{}", b"x")):
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            read_header(path)
        with pytest.raises(InputError):
            read_header(tmp_path)
    assert open_files(tmp_path) == before


def test_the_collector_is_on_again_after_an_error(tmp_path: Path) -> None:
    assert gc.isenabled()
    broken_file(tmp_path, with_prefix(b"{]"))
    assert gc.isenabled()


def test_only_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    data_start = write_file(path, {"a": ("F32", [1000, 1000])})
    read = 0
    real_read = os.read

    def counting_read(descriptor: int, count: int) -> bytes:
        nonlocal read
        part = real_read(descriptor, count)
        read += len(part)
        return part

    monkeypatch.setattr(os, "read", counting_read)
    assert read_header(path).bytes_read == read == data_start


def test_many_tensors_are_fast(tmp_path: Path) -> None:
    """90,000 tensors: about half a second of CPU time; the bound leaves room for slow machines."""
    path = tmp_path / "x.safetensors"
    write_file(path, {f"model.layers.{i}.mlp.experts.w": ("U8", []) for i in range(90_000)})
    start = time.process_time()
    header = read_header(path)
    elapsed = time.process_time() - start
    assert len(header.tensors) == 90_000
    if sys.gettrace() is None:
        assert elapsed < 4.0
