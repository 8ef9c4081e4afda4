"""Text comes out as soon as it is final, and all of it is the whole decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerBase

from tests.files.vocabularies import TEXTS, byte_level, sentencepiece, trained
from turbomoe.engine.detokenizer import Detokenizer
from turbomoe.files.tokenizer import build_backend
from turbomoe.files.vocabulary import read_vocabulary

PIECES = ["▁", "▁▁", "a", "▁a", "▁the", "é", "日", "本", "\ufffd", "\n"]


def metaspace() -> Tokenizer:
    """A tokenizer as folders carry it: the space belongs to the word, the first one is dropped in decoding."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(PIECES)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    return build_backend(read_vocabulary(metadata, "model.gguf"))


KINDS = {
    "byte-level": lambda: from_metadata(byte_level(trained(ByteLevel(add_prefix_space=False)), "gpt-2")),
    "sentencepiece": lambda: from_metadata(sentencepiece(PIECES)),
    "sentencepiece without prefix": lambda: from_metadata(sentencepiece(PIECES, add_space_prefix=False)),
    "metaspace": metaspace,
}


@cache
def backend(kind: str) -> Tokenizer:
    return KINDS[kind]()


def detokenizer(tokenizer: Any) -> Detokenizer:
    return Detokenizer(cast(PreTrainedTokenizerBase, SimpleNamespace(backend_tokenizer=tokenizer)))


def parts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    pieces = detokenizer(tokenizer)
    return [*map(pieces.push, ids), pieces.finish()]


def ids_of(kind: str, text: str) -> list[int]:
    return backend(kind).encode(text, add_special_tokens=False).ids


@st.composite
def sequences(draw: st.DrawFn, kind: str) -> list[int]:
    """Texts, single bytes, special tokens and ids that no token has, in any order."""
    tokenizer = backend(kind)
    size = tokenizer.get_vocab_size()
    encode = partial(ids_of, kind)
    some_bytes = [index for index in range(size) if len(tokenizer.id_to_token(index) or "") in (1, 6)]
    parts = st.one_of(
        st.lists(st.sampled_from(some_bytes), max_size=8),
        st.lists(st.integers(0, size + 2), max_size=4),
        st.one_of(st.sampled_from(TEXTS), st.text(max_size=8), st.text("é日😀", max_size=3)).map(encode),
    )
    return list(chain.from_iterable(draw(st.lists(parts, max_size=6))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_whole_decode(kind: str) -> None:
    @settings(max_examples=400)
    @given(sequences(kind))
    def same(ids: list[int]) -> None:
        assert "".join(parts_of(backend(kind), ids)) == backend(kind).decode(ids, skip_special_tokens=True)

    same()


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_complete_character_does_not_wait(kind: str) -> None:
    for text in TEXTS:
        pieces, seen, ids = detokenizer(backend(kind)), "", ids_of(kind, text)
        for count, token in enumerate(ids, 1):
            seen += pieces.push(token)
            in_bytes = (backend(kind).id_to_token(token) or "").startswith("<0x")
            so_far = backend(kind).decode(ids[:count], skip_special_tokens=True)
            assert so_far.startswith(seen)
            assert in_bytes or seen == so_far.removesuffix("\ufffd")


def test_an_emoji_comes_whole_with_its_last_byte() -> None:
    tokenizer = backend("byte-level")
    alphabet = [tokenizer.token_to_id(sign) for sign in "ðŁĺĢ"]
    assert parts_of(tokenizer, alphabet) == ["", "", "", "😀", ""]
    assert parts_of(tokenizer, alphabet[:3]) == ["", "", "", "\ufffd"]
    between = tokenizer.token_to_id("<|im_start|>")
    assert parts_of(tokenizer, [*alphabet[:2], between, *alphabet[2:]]) == ["", "", "", "", "😀", ""]


def test_a_run_of_byte_tokens_waits_for_its_end() -> None:
    tokenizer = backend("sentencepiece")
    run = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    word, bad = tokenizer.token_to_id("▁a"), tokenizer.token_to_id("<0xFF>")
    assert parts_of(tokenizer, [word, *run, word]) == ["a", "", "", "", "", "😀 a", ""]
    assert parts_of(tokenizer, [word, *run, bad, word]) == ["a", "", "", "", "", "", "\ufffd" * 5 + " a", ""]


def test_only_the_first_space_is_dropped() -> None:
    tokenizer = backend("sentencepiece")
    space, word = tokenizer.token_to_id("▁"), tokenizer.token_to_id("▁a")
    assert parts_of(tokenizer, [word, word]) == ["a", " a", ""]
    assert parts_of(tokenizer, [space, word]) == ["", " a", ""]
    assert parts_of(tokenizer, [tokenizer.token_to_id("<s>"), space, space, word]) == ["", "", " ", " a", ""]


def test_after_finish_a_new_text_begins() -> None:
    pieces = detokenizer(backend("sentencepiece"))
    word = backend("sentencepiece").token_to_id("▁a")
    assert [pieces.push(word), pieces.push(word), pieces.finish(), pieces.push(word)] == ["a", " a", "", "a"]


@dataclass
class Counting:
    """A backend that counts the tokens it is asked to decode."""

    inner: Tokenizer
    decoded: int = 0

    def id_to_token(self, index: int) -> str | None:
        return self.inner.id_to_token(index)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    ("kind", "token"), [("byte-level", "ÿ"), ("byte-level", "a"), ("sentencepiece", "<0xE6>"), ("sentencepiece", "a")]
)
def test_the_work_per_token_does_not_grow(kind: str, token: str) -> None:
    counting = Counting(backend(kind))
    pieces = detokenizer(counting)
    text = "".join(pieces.push(backend(kind).token_to_id(token)) for _ in range(5000)) + pieces.finish()
    assert len(text) == 5000
    assert counting.decoded <= 12 * 5000
