"""Amounts as people write them."""

import pytest

from hydragrad.amounts import bytes_of, in_words
from hydragrad.errors import UnsupportedError

KNOWN = [("2 GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kb", 1500), (" 7 B ", 7), ("1 TiB", 2**40), (12, 12)]


@pytest.mark.parametrize(("given", "expected"), KNOWN)
def test_bytes(given: int | str, expected: int) -> None:
    assert bytes_of(given, "memory") == expected


@pytest.mark.parametrize("given", [1e9, True, "GB", "2", "2 G", "1 IB", "-1 GB", "1,5 GB", None, 0, -3, "0.1 B"])
def test_what_is_no_amount_is_refused(given: object) -> None:
    with pytest.raises(UnsupportedError, match="memory"):
        bytes_of(given, "memory")


def test_words() -> None:
    found = [in_words(size) for size in (999, 1000, 1_234_567, 2 * 10**9)]
    assert found == ["999 bytes", "1 kB", "1.23 MB", "2 GB"]
