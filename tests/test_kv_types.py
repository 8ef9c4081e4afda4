"""Names of KV types: what is understood, and what somebody who guessed is told."""

from __future__ import annotations

import pytest

from turbomoe.config import KVSettings
from turbomoe.errors import SettingsError
from turbomoe.kv_types import ALIASES, AUTO, KV_TYPES, kv_type


@pytest.mark.parametrize("name", [AUTO, *KV_TYPES])
def test_case_does_not_matter(name: str) -> None:
    assert kv_type(name) == kv_type(name.upper()) == kv_type(name.title()) == name


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(alias: str, name: str) -> None:
    assert kv_type(alias) == kv_type(alias.upper()) == name


HINTS = {
    "q4_0": "tq4 is about the same size, ",
    "Q4_1": "tq4 is about the same size, ",
    "iq4_nl": "tq4 is about the same size, ",
    "int4": "tq4 is about the same size, ",
    "q1_0": "The fewest bits are those of tq2 and tcq2.",
    "q5_0": "The nearest sizes are tcq4, a bit a value less, and q8_0.",
    "q5_1": "The nearest sizes are tcq4, a bit a value less, and q8_0.",
    "q8_1": "q8_0 is the same size.",
    "q3_K": "tq3 and tcq3 are about the same size.",
    "tq33": "The nearest name is tq3.",
    "tq1": "The nearest name is tq2.",
    "tcq5": "The nearest name is tcq4.",
    "tcq2.4": "The nearest name is tcq2.5.",
    "tcq2_5": "The nearest name is tcq2.5.",
    "fp16": "The nearest name is f16.",
    "bfloat16": "The nearest name is bf16.",
    "Turbo3_tcp": "The nearest name is turbo3_tcq.",
    "autom": "The nearest name is auto.",
}


@pytest.mark.parametrize(("name", "hint"), HINTS.items())
def test_the_nearest_type_is_suggested(name: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        kv_type(name)
    said = str(caught.value)
    assert said.startswith(f"There is no KV cache type {name!r}. {hint}")
    assert f"Choose auto (for -ctk and -ctv), or one of {KV_TYPES[0]}, " in said


@pytest.mark.parametrize("name", ["", "🦊", "zip"])
def test_where_nothing_is_near_nothing_is_suggested(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        kv_type(name)
    assert str(caught.value).startswith(f"There is no KV cache type {name!r}. Choose auto ")


@pytest.mark.parametrize("types", [("tq9", "tq3"), ("tq3", "tq9")])
def test_settings_refuse_them_too(types: tuple[str, str]) -> None:
    with pytest.raises(SettingsError, match="There is no KV cache type 'tq9'"):
        KVSettings(*types)
