"""Sizes in and out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.errors import SettingsError
from turbomoe.units import format_bytes, parse_size

GOOD = {
    "0": 0,
    "1k": 1024,
    "512M": 512 << 20,
    "2G": 2 << 30,
    "2g": 2 << 30,
    "2GiB": 2 << 30,
    "2GB": 2_000_000_000,
    "1.5G": 3 << 29,
    " 3 T ": 3 << 40,
    "0.5KB": 500,
}
BAD = [
    "",
    " ",
    "2",
    "G",
    "-1G",
    "1e3M",
    "2X",
    "2GG",
    "two G",
    "nan",
    "infG",
    "1,5G",
    "1.G",
    "0x1G",
    "9" * 5000 + "G",
    "٣G",
]


@pytest.mark.parametrize(("text", "size"), GOOD.items())
def test_sizes_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_size_gets_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match="as in 512M, 2G"):
        parse_size(text)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_settings_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except SettingsError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")],
)
def test_sizes_people_read(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_negative_size_keeps_its_sign() -> None:
    assert format_bytes(-(3 << 29)) == "-1.5 GiB"


@given(st.integers(1, 1 << 49))
def test_what_is_written_can_be_read_back(count: int) -> None:
    text = format_bytes(count)
    if not text.endswith(" B"):
        assert abs(parse_size(text) - count) <= 0.051 * 1024 ** ("KMGT".index(text[-3]) + 1)
