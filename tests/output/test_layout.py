"""Layout: headers that the safetensors library reads, places without gaps, shards within limits."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.checkpoint import DTYPES
from lazymerge.output.layout import OutputTensor, Shard, index_json, lay_out, shard_header
from safetensors import safe_open

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.lists(
    st.builds(OutputTensor, names, st.sampled_from(sorted(DTYPES)), shapes),
    min_size=1,
    max_size=12,
    unique_by=lambda tensor: tensor.name,
)


def write_zeros(folder: Path, shard: Shard) -> Path:
    path = folder / shard.file
    header = shard_header(shard)
    path.write_bytes(header + bytes(shard.size_bytes - len(header)))
    return path


@given(tensors, st.integers(0, 300))
def test_the_library_reads_every_shard_as_laid_out(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[OutputTensor], maximum: int
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    found = {}
    for shard in lay_out(tensors, maximum):
        with safe_open(write_zeros(folder, shard), framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without
            for name in opened.keys():  # noqa: SIM118 (the handle is no mapping)
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    assert found == {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


@given(tensors, st.integers(0, 300))
def test_places(tensors: list[OutputTensor], maximum: int) -> None:
    shards = lay_out(tensors, maximum)
    for shard in shards:
        assert len(shard_header(shard)) == shard.header_bytes
        assert shard.header_bytes % 8 == 0
        position = shard.header_bytes
        for place in shard.tensors:
            assert place.start == position  # neither gap nor overlap
            assert place.start % DTYPES[place.dtype].item_bytes == 0
            position = place.stop_exclusive
            assert place.size_bytes == prod(place.shape) * DTYPES[place.dtype].item_bytes
        assert shard.size_bytes == position
    assert sorted(p.name for shard in shards for p in shard.tensors) == sorted(
        tensor.name for tensor in tensors
    )


@given(tensors, st.integers(0, 300))
def test_shards_hold_consecutive_tensors_up_to_the_maximum(
    tensors: list[OutputTensor], maximum: int
) -> None:
    given_order = iter(tensors)
    shards = lay_out(tensors, maximum)
    sizes = []
    for shard in shards:
        assert shard.tensors
        part = [next(given_order) for _ in shard.tensors]
        assert {t.name for t in part} == {p.name for p in shard.tensors}
        sizes.append(sum(t.size_bytes for t in part))
        assert sizes[-1] <= maximum or len([t for t in part if t.size_bytes]) == 1
        # within a shard the order is the given one, but for the element size
        expected = sorted(part, key=lambda t: -DTYPES[t.dtype].item_bytes)
        assert [p.name for p in shard.tensors] == [t.name for t in expected]
    assert next(given_order, None) is None
    for shard, following in zip(sizes, shards[1:], strict=False):
        first = next(t for t in tensors if t.name in {p.name for p in following.tensors})
        assert shard + first.size_bytes > maximum  # no shard ends before it must


def test_file_names() -> None:
    one = OutputTensor("a", "F32", (2,))
    two = OutputTensor("b", "F32", (2,))
    assert [shard.file for shard in lay_out([one, two], 16)] == ["model.safetensors"]
    assert [shard.file for shard in lay_out([one, two], 15)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_tensor_above_the_maximum_has_a_shard_of_its_own() -> None:
    sizes = {"small": 10, "large": 500, "after": 10, "last": 10}
    shards = lay_out([OutputTensor(name, "U8", (size,)) for name, size in sizes.items()], 100)
    assert [[p.name for p in s.tensors] for s in shards] == [
        ["small"],
        ["large"],
        ["after", "last"],
    ]


def test_index_is_what_transformers_reads() -> None:
    shards = lay_out([OutputTensor(f"t{n}", "BF16", (n, 3)) for n in range(1, 6)], 40)
    index = json.loads(index_json(shards))
    assert index == {
        "metadata": {"total_size": 2 * 3 * (1 + 2 + 3 + 4 + 5)},
        "weight_map": {p.name: s.file for s in shards for p in s.tensors},
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])
