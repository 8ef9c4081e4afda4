"""The vocabulary that a GGUF file declares under ``tokenizer.*``, checked before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite
from os import PathLike, fspath
from typing import Any, TypeVar, cast

from turbomoe.errors import ModelFileError

T = TypeVar("T")
GGML = "tokenizer.ggml."
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}


class TokenType(IntEnum):
    """GGUF's token types (``tokenizer.ggml.token_type``)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Token ids are positions in ``tokens``; ``types`` and ``scores`` are as long. ``None``: the file does not say.

    ``model`` is GGUF's algorithm name (``gpt2`` byte-level BPE, ``llama`` SentencePiece BPE), ``pre`` its
    pre-tokenizer, ``roles`` maps bos, eos, eot, eom, unk and pad to ids.
    """

    path: str
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    roles: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    chat_template: str | None

    def token(self, role: str) -> str | None:
        """The text of a special token, or ``None`` where the file names none."""
        return self.tokens[self.roles[role]] if role in self.roles else None


def read_vocabulary(metadata: Mapping[str, Any], path: str | PathLike[str]) -> Vocabulary:
    """Check and collect ``tokenizer.*`` of ``metadata``; ``path`` is only named in errors.

    Raises ``ModelFileError`` for a missing or mistyped field, arrays of unequal length, ids out of range, a byte token
    that is not ``<0x00>``..``<0xFF>``, text that is not Unicode.
    """
    fields = _Fields(metadata, fspath(path))
    tokens = fields.array("tokens", str)
    if not tokens:
        raise fields.error("tokens", "the vocabulary is missing or empty")
    types = fields.per_token("token_type", int, len(tokens)) or [int(TokenType.NORMAL)] * len(tokens)
    _check_tokens(fields, tokens, types)
    return Vocabulary(
        path=fields.path,
        model=fields.scalar("model", str) or "",
        pre=fields.scalar("pre", str) or "",
        tokens=tokens,
        types=types,
        scores=_finite(fields, fields.per_token("scores", float, len(tokens))) or [0.0] * len(tokens),
        merges=_pairs(fields, fields.array("merges", str)),
        roles=_roles(fields, len(tokens)),
        add_bos=fields.scalar("add_bos_token", bool),
        add_eos=fields.scalar("add_eos_token", bool),
        add_space_prefix=fields.scalar("add_space_prefix", bool),
        chat_template=fields.scalar("chat_template", str, prefix="tokenizer."),
    )


@dataclass(frozen=True)
class _Fields:
    """Typed access to ``tokenizer.ggml.*``; every complaint names the file and the field."""

    metadata: Mapping[str, Any]
    path: str

    def error(self, name: str, reason: str, prefix: str = GGML) -> ModelFileError:
        return ModelFileError(self.path, reason, field=prefix + name)

    def scalar(self, name: str, kind: type[T], prefix: str = GGML) -> T | None:
        value = self.metadata.get(prefix + name)
        if value is None or type(value) is kind:
            return value
        raise self.error(name, f"expected {kind.__name__}, found {type(value).__name__}", prefix)

    def array(self, name: str, kind: type[T]) -> list[T]:
        """The elements of an array, each exactly a ``kind``; empty where the field is missing."""
        value = self.metadata.get(GGML + name)
        if value is None:
            return []
        if not hasattr(value, "__len__") or isinstance(value, (str, bytes, Mapping)):
            raise self.error(name, f"expected an array, found {type(value).__name__}")
        elements = value.tolist() if hasattr(value, "tolist") else list(value)
        if wrong := set(map(type, elements)) - {kind}:
            raise self.error(name, f"expected elements of type {kind.__name__}, found {wrong.pop().__name__}")
        return elements

    def per_token(self, name: str, kind: type[T], count: int) -> list[T]:
        """An array that must be as long as the vocabulary, or empty where the field is missing."""
        elements = self.array(name, kind)
        if GGML + name in self.metadata and len(elements) != count:
            raise self.error(name, f"{len(elements)} entries for {count} tokens")
        return elements


def _check_tokens(fields: _Fields, tokens: list[str], types: list[int]) -> None:
    if wrong := set(types) - set(TokenType):
        raise fields.error("token_type", f"{wrong.pop()} is not a token type")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise fields.error("tokens", "a token is not valid Unicode text") from error
    for index, kind in enumerate(types):
        if kind == TokenType.BYTE and not BYTE_TOKEN.fullmatch(tokens[index]):
            raise fields.error("tokens", f"token {index} is marked as a byte but reads {tokens[index][:40]!r}")


def _finite(fields: _Fields, scores: list[float]) -> list[float]:
    if all(map(isfinite, scores)):
        return scores
    raise fields.error("scores", "a score is not a finite number")


def _pairs(fields: _Fields, merges: list[str]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or not all(pair):
            raise fields.error("merges", f"merge {index} is not two tokens and one space: {merges[index][:80]!r}")
    return cast(list[tuple[str, str]], pairs)


def _roles(fields: _Fields, count: int) -> dict[str, int]:
    roles = {}
    for role, name in SPECIAL_ROLES.items():
        token_id = fields.scalar(name, int)
        if token_id is None:
            continue
        if not 0 <= token_id < count:
            raise fields.error(name, f"token {token_id} does not exist, the vocabulary has {count}")
        roles[role] = token_id
    return roles
