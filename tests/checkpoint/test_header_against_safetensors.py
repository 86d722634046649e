"""read_header and the safetensors library agree on which files are sound.

Where we are stricter on purpose, the test says so and checks that it is for that reason:

- a key twice (the library takes the last of two tensors of one name);
- an element type that lazymerge does not merge;
- a header that does not begin with `{`;
- an entry written as a list, a dtype written as a mapping: accidents of the library's parser.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy
import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from lazymerge.checkpoint.header import read_header
from lazymerge.checkpoint.tensor import DTYPES
from lazymerge.errors import InputError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors_bytes import entries_for, with_prefix

STRICTER_ON_PURPOSE = ("twice, so it does not say", "is not known to this version")


def library_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Dtype and shape by name, as the library reads them; None where it refuses the file."""
    try:
        with safe_open(path, framework="numpy") as opened:
            return {
                name: (
                    opened.get_slice(name).get_dtype(),
                    tuple(opened.get_slice(name).get_shape()),
                )
                for name in opened.keys()  # noqa: SIM118 (the library's own method)
            }
    except SafetensorError:
        return None


def check_agreement(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        theirs = library_tensors(path)
        try:
            ours = {
                tensor.name: (tensor.dtype, tensor.shape) for tensor in read_header(path).tensors
            }
        except InputError as error:
            if any(reason in str(error) for reason in STRICTER_ON_PURPOSE):
                return
            ours = None
            note(str(error))
        assert ours == theirs


names = st.sampled_from(["a", "b", "c", "layers.0.w", "é", ""])
numbers = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
    st.sampled_from([1.0, 2.5, True, False, None, "1", [], {}]),
)
dtypes = st.one_of(
    st.sampled_from([*DTYPES, "F4", "F8_E8M0", "C64", "f32", "", "Q8"]),
    st.sampled_from([None, 1, []]),
)
sound_headers = st.dictionaries(
    names,
    st.tuples(
        st.sampled_from(["F64", "F32", "BF16", "I64", "U8", "BOOL"]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=4,
).map(entries_for)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A sound file with up to three things changed, in the mapping, the text or the bytes."""
    entries, data_bytes = draw(sound_headers)
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.integers(0, 6))
        if kind == 0:
            entries["__metadata__"] = draw(
                st.sampled_from([{}, {"a": "b"}, {"a": 1}, {"a": None}, None, [], "x", 3])
            )
        if not entries:
            continue
        name = draw(st.sampled_from(sorted(entries)))
        changed = entries[name]
        if not isinstance(changed, dict) or "shape" not in changed:
            continue
        if kind == 1:
            changed["dtype"] = draw(dtypes)
        elif kind == 2:
            changed["shape"] = draw(st.one_of(st.lists(numbers, max_size=4), numbers))
        elif kind == 3:
            changed["data_offsets"] = draw(st.one_of(st.lists(numbers, max_size=3), numbers))
        elif kind == 4:
            del changed[draw(st.sampled_from(sorted(changed)))]
        elif kind == 5:
            changed["more"] = draw(numbers)
        elif kind == 6:
            entries[name] = draw(numbers)
    text = json.dumps(entries, ensure_ascii=draw(st.booleans())).encode()
    text += b" " * draw(st.integers(0, 3))
    if draw(st.integers(0, 3)) == 0:
        position = draw(st.integers(0, len(text)))
        removed = draw(st.integers(0, 3))
        # No leading space: the library lets it pass, the format and we do not.
        inserted = draw(
            st.sampled_from([b"", b"0", b"1", b"9", b",", b'"', b"}", b"\xff", b"\x00"])
        )
        text = text[:position] + inserted + text[position + removed :]
    data_bytes = max(0, data_bytes + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 8])))
    content = with_prefix(text, bytes(data_bytes))
    if draw(st.integers(0, 7)) == 0:
        length = draw(st.sampled_from([0, 1, 7, 8, 9, len(content) - 8, len(content), 2**63]))
        content = struct.pack("<Q", length) + content[8:]
    return content


@settings(max_examples=500, deadline=None)
@given(mutated_files())
@example(with_prefix(b"{}"))
@example(with_prefix(b'{"__metadata__": null}'))
@example(with_prefix(b'{"__metadata__": {"a": "b"}}\n\t\r '))
@example(
    with_prefix(
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4, 0],"data_offsets": [0, 0]}}'
    )
)
@example(
    with_prefix(
        b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904, 4],"data_offsets": [0, 0]}}'
    )
)
def test_agrees_with_the_library_on_mutated_files(content: bytes) -> None:
    check_agreement(content)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_agrees_with_the_library_on_any_bytes(content: bytes, prefix: bool) -> None:
    check_agreement(with_prefix(b"{" + content) if prefix else content)


STRICTER = {
    "does not begin": b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "the key 'a' twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "entry is a list": b'{"a":["U8",[1],[0,1]]}',
    "dtype is a mapping": b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
}


@pytest.mark.parametrize("reason", STRICTER)
def test_stricter_than_the_library_on_purpose(reason: str, tmp_path: Path) -> None:
    """If the library becomes as strict, this fails and the exception can go."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_prefix(STRICTER[reason], b"x"))
    assert library_tensors(path) == {"a": ("U8", (1,))}
    with pytest.raises(InputError, match=reason):
        read_header(path)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    arrays = {
        "weight": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        "step": numpy.array(7, dtype=numpy.int64),
        "none": numpy.zeros((0, 3), dtype=numpy.float16),
        "flags": numpy.array([True, False, True]),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    content = path.read_bytes()
    assert {tensor.name for tensor in header.tensors} == set(arrays)
    for tensor in header.tensors:
        assert tensor.shape == arrays[tensor.name].shape
        assert content[tensor.start : tensor.stop_exclusive] == arrays[tensor.name].tobytes()
