"""Sizes as people write them."""

from __future__ import annotations

import pytest

from sterna.runtime.sizes import format_given, format_size, parse_share, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10B", 10),
        ("700MiB", 700 << 20),
        ("700 mib", 700 << 20),
        ("3GiB", 3 << 30),
        ("1.5G", 3 << 29),
        ("2k", 2048),
        ("1GB", 10**9),
        ("0.1KiB", 102),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1e9", "1.G", "3 GiBs", "3PiB", "1,5G", "nan", "9" * 30, "2000000T"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


def test_shares() -> None:
    assert [parse_share(text) for text in ("25%", "0.5 %", "100%", "0%")] == [0.25, 0.005, 1.0, 0.0]
    for text in ("25", "101%", "-1%", "%", "a%"):
        with pytest.raises(ValueError, match="share"):
            parse_share(text)


def test_formatted() -> None:
    sizes = [0, 1023, 1024, 700 << 20, 3 << 29, (1 << 40) * 5000]
    assert [format_size(size) for size in sizes] == [
        "0 B", "1023 B", "1 KiB", "700 MiB", "1.5 GiB", "5000 TiB",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["10 MB", "9.5 MiB", "1.5 GiB", "2 GB", "700 MiB", "0 B", "999 B", "1 KiB"])
def test_a_size_is_told_as_it_was_given(text: str) -> None:
    assert format_given(parse_size(text)) == text


def test_a_size_that_nobody_gave_is_told_in_binary_units() -> None:
    assert format_given(219_938_169) == format_size(219_938_169) == "210 MiB"
