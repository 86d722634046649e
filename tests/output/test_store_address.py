"""Which outputs are addresses, and which addresses are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from lazymerge.errors import InputError
from lazymerge.output.store.address import StoreAddress, is_address, local_place, place_of


@pytest.mark.parametrize("text", ["out", "/tmp/out", "./s3/x", "a:b/c", "s3", "", "C:\\out"])
def test_folders(text: str) -> None:
    assert not is_address(text)
    assert place_of(text) == local_place(text) == Path(text)


def test_an_address() -> None:
    address = place_of("s3://my.bucket-1/models/a b+c%20/")
    assert address == StoreAddress("my.bucket-1", "models/a b+c%20")
    assert str(address) == "s3://my.bucket-1/models/a b+c%20"
    assert address.name == "a b+c%20"
    assert address.key("x.json") == "models/a b+c%20/x.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket", "is a whole bucket"),
        ("s3://bucket/", "is a whole bucket"),
        ("gs://bucket/x", "to folders and to s3://bucket/prefix only"),
        ("https://host/x", "to folders and to s3://bucket/prefix only"),
        ("S3://bucket/x", "to folders and to s3://bucket/prefix only"),
        ("s3://KEY:SECRET@bucket/x", "holds a name or password"),
        ("s3://KEY@bucket/x", "holds a name or password"),
        ("s3://bucket/x?X-Amz-Signature=SECRET", r"holds a \? or #"),
        ("s3://bucket/x#SECRET", r"holds a \? or #"),
        ("s3:/bucket/x", "is no plain address"),
        ("s3:///x", "is no plain address"),
        ("s3://Bucket_/x", "is no plain address"),
        ("s3://[::1/x", "is no address"),
        ("s3://bucket/x\x1b[2J", "is no plain address"),
        ("s3://bucket/ä", "is no plain address"),
        ("s3://bucket/a/../b", r"holds //, \. or \.\."),
        ("s3://bucket/a//b", r"holds //, \. or \.\."),
        ("s3://bucket/" + "x" * 600, "longer than 512"),
        (Path("s3://bucket/x"), "given as text, and not as a Path"),
    ],
)
def test_what_is_refused(text: str | Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        place_of(text)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(InputError):
        local_place(text)
