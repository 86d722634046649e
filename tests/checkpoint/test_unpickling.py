"""The pickle machine: what torch.save needs, nothing else, and no way to make it suffer."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint import unpickling
from lazymerge.checkpoint.broken_file import BrokenFileError
from lazymerge.checkpoint.unpickling import StoredTensor, unpickle
from torch_bytes import mapping, name, number, pickled, storage, tensor, text, tuple_of

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
        | st.dictionaries(st.text("abc"), inner).map(OrderedDict)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_are_read_as_pickle_reads_them(value: object) -> None:
    assert unpickle(pickle.dumps(value, protocol=2)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol: int) -> None:
    value = {"a": [1, (2.5, None)], "b": {"c": True}, "d": "a" * 100, "e": ["a" * 100] * 300}
    assert unpickle(pickle.dumps(value, protocol)) == value


def test_tensors_stand_for_what_they_would_be() -> None:
    found = unpickle(pickled(mapping({"w": tensor(offset=2, stride=(7, 1))})))
    assert isinstance(found, dict)
    assert isinstance(found["w"], StoredTensor)
    assert (found["w"].key, found["w"].storage_bytes) == ("0", 24)
    assert (found["w"].offset, found["w"].shape, found["w"].stride) == (2, (2, 3), (7, 1))
    assert not found["w"].is_contiguous


@given(st.lists(st.integers(0, 4), max_size=5), st.data())
def test_contiguous_is_what_torch_calls_so(shape: list[int], data: st.DataObject) -> None:
    stride = data.draw(st.lists(st.integers(0, 6), min_size=len(shape), max_size=len(shape)))
    if data.draw(st.booleans()):
        stride = list(torch.empty(shape).stride())
    made = torch.empty(2000).as_strided(shape, stride)
    found = unpickle(pickled(tensor(tuple(shape), tuple(stride))))
    assert isinstance(found, StoredTensor)
    assert found.is_contiguous == made.is_contiguous()


class Evil:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (Evil(os.system, "touch pwned"), "system"),
        (Evil(builtins.eval, "open('pwned', 'w')"), "eval"),
        (Evil(builtins.exec, "open('pwned', 'w')"), "exec"),
        (Evil(builtins.__import__, "antigravity"), "__import__"),
        (Evil(builtins.getattr, "a", "b"), "getattr"),
        (Evil(pickle.loads, "cos\nsystem\n(S'touch pwned'\ntR."), "loads"),
        (Evil(torch.load, "x"), "load"),
        (Evil(io.open, "pwned", "w"), "open"),
        (Evil(type), "type"),
        (Evil, "Evil"),
        (torch.device("cpu"), "device"),
    ],
)
def test_code_is_neither_imported_nor_called(
    evil: object, named: str, protocol: int, nested: bool
) -> None:
    data = pickle.dumps({"state_dict": {"w": evil}} if nested else evil, protocol)
    with pytest.raises(BrokenFileError) as refused:
        unpickle(data)
    assert not os.path.exists("pwned")
    message = str(refused.value)
    if protocol >= 2 and b"_codecs" not in data:
        assert named in message
    assert "not imported" in message or "not carried out" in message
    assert "If you trust" in message


def test_dtypes_that_are_unknown_are_named() -> None:
    for kind in ("ComplexFloatStorage", "QInt8Storage"):
        with pytest.raises(BrokenFileError, match=f"torch.{kind}.* a kind of tensor that is not"):
            unpickle(pickled(tensor(stored=storage(kind=kind))))


BROKEN = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "two values": b"NN.",
    "nothing": b".",
    "a mark": b"(N.",
    "more behind": b"N.N",
    "pop": b"\x85.",
    "tuple without mark": b"t.",
    "append to nothing": b"Na.",
    "append to a mapping": b"}Na.",
    "set in a list": b"]NNs.",
    "odd items": b"}(Nu.",
    "key twice": b"}(" + (text("a") + b"N") * 2 + b"u.",
    "a mapping for a key": b"}(]Nu.",
    "a tuple for a key": b"}()Nu.",
    "a tensor for a key": b"}(" + tensor() + b"Nu.",
    "no memo": b"h\x00.",
    "string beyond the end": b"X\xff\xff\xff\xffa.",
    "not UTF-8": b"X\x02\x00\x00\x00\xed\xa0.",
    "surrogate": text("\ud800") + b".",
    "number beyond the end": b"\x8a\xff\x01.",
    "frame beyond the end": b"\x95\x01",
    "name without an end": b"c" + b"a" * 10_000_000,
    "called with a list": name("collections", "OrderedDict") + b"]R.",
    "OrderedDict of something": name("collections", "OrderedDict") + b"N\x85R.",
    "called a string": text("os.system") + b")R.",
    "called a tensor": tensor() + b")R.",
    "called a storage": name("torch", "FloatStorage") + b")R.",
    "called a dtype": name("torch", "float32") + b")R.",
    "state of a mapping": b"}}b.",
    "state of a tensor": tensor() + b"}b.",
    "no storage": b")Q.",
    "storage of six": tuple_of(*[b"N"] * 6) + b"Q.",
    "storage of another word": tuple_of(text("x"), *[b"N"] * 4) + b"Q.",
    "storage of a negative length": storage(count=-1) + b".",
    "storage of a huge length": storage(count=2**63) + b".",
    "storage of a truth": tuple_of(text("storage"), name("torch", "FloatStorage"), text("0"),
                                   text("cpu"), b"\x88") + b"Q.",
    "tensor of a dtype": tensor(stored=name("torch", "float32")) + b".",
    "tensor of bytes": tensor(stored=tuple_of(text("storage"), name("torch.storage",
                       "UntypedStorage"), text("0"), text("cpu"), number(6)) + b"Q") + b".",
    "negative extent": tensor((-2, -3)) + b".",
    "huge extent": tensor((2**63, 3)) + b".",
    "negative stride": tensor(stride=(-3, 1)) + b".",
    "negative offset": tensor(offset=-1) + b".",
    "other stride": tensor(stride=(1,)) + b".",
    "many dimensions": tensor((1,) * 65, (1,) * 65) + b".",
    "conjugated": tensor(metadata=mapping({"conj": b"\x88"})) + b".",
    "parameter of a string": name("torch._utils", "_rebuild_parameter") + text("x") + b"NN\x87R.",
    "parameter of two": name("torch._utils", "_rebuild_parameter") + tensor() + b"N\x86R.",
    "persistent id as text": b"P0\n.",
    "extension": b"\x82\x01.",
    "object": name("collections", "OrderedDict") + b")\x81.",
    "next buffer": b"\x97.",
    "no instruction": b"\xff.",
    "long of gigabytes": b"\x8b\xff\xff\xff\x7f.",
    "bytes of exabytes": b"\x8e" + b"\xff" * 8 + b".",
    "string of exabytes": b"\x8d" + b"\xff" * 8 + b".",
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_pickles(broken: str) -> None:
    tracemalloc.start()
    with pytest.raises(BrokenFileError) as refused:
        unpickle(BROKEN[broken])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(str(refused.value)) < 600
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_pickles_that_are_cut(cut: float) -> None:
    data = pickled(mapping({f"w{n}": tensor() for n in range(100)}))
    with pytest.raises(BrokenFileError):
        unpickle(data[: round(len(data) * cut)])


def test_memo_of_any_number_takes_no_room() -> None:
    """Python's unpickler makes a table up to the largest number: 32 GB."""
    tracemalloc.start()
    assert unpickle(b"]r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.") == ([], [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_nesting_without_end() -> None:
    deep = unpickle(b"]" * 300_000 + b"a" * 299_999 + b".")
    assert isinstance(deep, list)
    wide = unpickle(b")" + b"q\x00h\x00\x86" * 100_000 + b".")  # 2^100,000 leaves
    assert isinstance(wide, tuple)
    itself = unpickle(b"]q\x00h\x00a.")
    assert isinstance(itself, list)
    assert itself[0] is itself


def test_keys_that_take_forever_to_hash() -> None:
    with pytest.raises(BrokenFileError, match="neither a string nor a number"):
        unpickle(b"})" + b"q\x00h\x00\x86" * 100 + b"Ns.")


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "INSTRUCTION_LIMIT", 1000)
    with pytest.raises(BrokenFileError, match="more than 1,000 instructions"):
        unpickle(b"]" * 1001 + b".")


def test_the_most_instructions_end_in_time() -> None:
    began = time.process_time()
    with pytest.raises(BrokenFileError):
        unpickle(b"N" * 1_000_000)
    assert time.process_time() - began < 5


def test_keys_that_have_all_the_same_hash() -> None:
    """A mapping of 30,000 such keys takes Python ten seconds."""
    saved = {n * (2**61 - 1): 1 for n in range(1, 3)}
    with pytest.raises(BrokenFileError, match="holds a key that is larger than any number"):
        unpickle(pickle.dumps(saved, protocol=2))
    saved = {2**60 - 1: 1, -(2**60) + 1: 2}
    assert unpickle(pickle.dumps(saved, protocol=2)) == saved
