"""Tokenizers from GGUF metadata against independent ones, and metadata that must be refused."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from tests import real_models
from tests.files.vocabularies import CONTROL, GOLDENS, TEXTS, byte_level, sentencepiece, trained
from turbomoe.errors import ModelError, ModelFileError, TurbomoeError
from turbomoe.files.gguf import GgufFile
from turbomoe.files.pretokenizers import PRE_TOKENIZERS
from turbomoe.files.tokenizer import build_backend, default_add_bos
from turbomoe.files.vocabulary import read_vocabulary

# The patterns as the families' own tokenizer.json spell them; None is GPT-2's, built into the library.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    TEKKEN.replace(r"]+|[^\r", r"]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r", 1)
    .replace(r"]*|\p{N}|", r"]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|", 1)
)  # fmt: skip
REFERENCE: dict[str, str | None] = {
    "gpt-2": None,
    "llama-bpe": LLAMA3,
    "glm4": LLAMA3,
    "qwen2": QWEN2,
    "qwen35": QWEN35,
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "llama4": "gpt-4o",
    "starcoder": "smollm",
    "refact": "smollm",
}
# Pieces whose borders the patterns disagree about.
PIECES = [*"aZé中ǅꓘ 1٣½_-'/\n\r\t\u0301\u0903\u00a0😀", "'s", "'LL", "don't", "12345", "  ", "\r\n", "Ab", "camelCase"]
PLAIN = [text for text in TEXTS if not any(control in text for control in CONTROL)]
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text("aB1 -/\n'\u0301", max_size=12),
    st.sampled_from(PLAIN),
    st.text(),
)


def backend_of(metadata: dict[str, Any]) -> Tokenizer:
    return build_backend(read_vocabulary(metadata, "model.gguf"))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@cache
def metadata_of(path: Path) -> dict[str, Any]:
    return dict(GgufFile.open(path).metadata)


@cache
def pair(pre: str) -> tuple[Tokenizer, Tokenizer]:
    """(reference, ours) for a pre-tokenizer: the same vocabulary, trained with the reference's cut."""
    pattern = REFERENCE.get(pre)
    byte_cut = ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = Sequence([Split(Regex(pattern), "isolated"), byte_cut]) if pattern else byte_cut
    reference = trained(Sequence([Digits(individual_digits=True), cut]) if pre == "smollm" else cut)
    if pre.startswith("qwen"):
        reference.normalizer = NFC()
    return reference, backend_of(byte_level(reference, pre))


@pytest.mark.parametrize("pre", [*REFERENCE, "smollm"])
def test_every_pre_tokenizer_cuts_as_its_family_does(pre: str) -> None:
    reference, ours = pair(pre)

    @settings(max_examples=300)
    @given(texts)
    def same(text: str) -> None:
        assert ids_of(ours, text) == ids_of(reference, text)
        assert ours.pre_tokenizer.pre_tokenize_str(text) == reference.pre_tokenizer.pre_tokenize_str(text)

    same()


def test_the_patterns_differ_where_the_families_do() -> None:
    cuts = {pre: tuple(str(pair(pre)[1].pre_tokenizer.pre_tokenize_str(text)) for text in TEXTS) for pre in REFERENCE}
    assert cuts.pop("glm4") == cuts["llama-bpe"]
    assert len(set(cuts.values())) == len(cuts)


def test_every_name_is_tested() -> None:
    assert set(PRE_TOKENIZERS) == {*REFERENCE, *ALIASES, "smollm", "default"}
    for alias, name in ALIASES.items():
        assert PRE_TOKENIZERS[alias] == PRE_TOKENIZERS[name]


def test_the_default_cut() -> None:
    cut = PRE_TOKENIZERS["default"].build()
    words = [word for word, _ in cut.pre_tokenize_str("it's 12345, a+b")]
    assert words == ["it", "'", "s", "Ġ", "123", "45", ",", "Ġa", "+", "b"]


def test_whole_words_are_taken_unmerged_only_where_the_family_does() -> None:
    for pre, expected in (("llama-bpe", 1), ("gpt-4o", 1), ("tekken", 1), ("qwen2", 3), ("gpt-2", 3)):
        metadata = byte_level(pair(pre)[0], pre)
        metadata["tokenizer.ggml.tokens"][-1] = "xqz"
        assert len(ids_of(backend_of(metadata), "xqz")) == expected


@pytest.mark.parametrize(
    ("model", "locate"),
    [
        ("smollm2", real_models.smollm2),
        pytest.param("qwen2", real_models.qwen25_coder_05b, marks=pytest.mark.slow),
        pytest.param("gemma3", real_models.gemma3_270m, marks=pytest.mark.slow),
    ],
)
def test_real_vocabularies_give_the_ids_of_other_implementations(model: str, locate: Callable[[], Path]) -> None:
    tokenizer = backend_of(metadata_of(locate()))
    assert len(TEXTS) == len(GOLDENS[model]) > 60
    for text, ids in zip(TEXTS, GOLDENS[model], strict=True):
        assert ids_of(tokenizer, text) == ids, text


def test_the_vocabulary_of_smollm2_builds_fast_enough_to_open_it_in_three_seconds() -> None:
    metadata = metadata_of(real_models.smollm2())
    started = time.process_time()
    backend_of(metadata)
    assert time.process_time() - started < 0.6


# SentencePiece


def naive_sentencepiece(text: str, ids: dict[str, int], scores: dict[str, float]) -> list[int]:
    """Join the neighbours with the best union, the leftmost of equals, while there is one; bytes for what is left."""
    symbols = list(text)
    while True:
        unions = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(symbols))
                  if a in ids and b in ids and a + b in scores]  # fmt: skip
        if not unions:
            break
        at = -max(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    spelled = ([s] if s in ids else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols)
    return [ids[token] for tokens in spelled for token in tokens]


@st.composite
def piece_lists(draw: st.DrawFn) -> list[str]:
    """Single signs, then unions of earlier pieces, as SentencePiece training makes them."""
    pieces = ["▁", "a", "b", "c"]
    for _ in range(draw(st.integers(0, 12))):
        union = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        if union not in pieces:
            pieces.append(union)
    return pieces


@settings(max_examples=400)
@given(piece_lists(), st.text("abc é😀", max_size=24), st.booleans(), st.data())
def test_sentencepiece_joins_best_scores_first(pieces: list[str], text: str, prefix: bool, data: st.DataObject) -> None:
    scores = [-float(rank) for rank in data.draw(st.permutations(range(len(pieces))))]
    metadata = sentencepiece(pieces, scores=scores, add_space_prefix=prefix)
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    escaped = ("▁" if prefix and text else "") + text.replace(" ", "▁")
    tokenizer = backend_of(metadata)
    assert ids_of(tokenizer, text) == naive_sentencepiece(escaped, ids, dict(zip(pieces, scores, strict=True)))
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_sentencepiece_puts_a_space_in_front_unless_told_not_to() -> None:
    for setting, expected in ((None, ["▁", "a"]), (True, ["▁", "a"]), (False, ["a"])):
        metadata = sentencepiece(["▁", "a"], **({} if setting is None else {"add_space_prefix": setting}))
        tokenizer = backend_of(metadata)
        assert tokenizer.encode("a", add_special_tokens=False).tokens == expected
        assert tokenizer.decode(ids_of(tokenizer, " a")) == " a"


def test_text_that_no_token_spells_becomes_the_unknown_token() -> None:
    metadata = sentencepiece(["▁", "a"], add_space_prefix=False)
    metadata["tokenizer.ggml.token_type"] = [2, 3, 3, *[5] * 256, 1, 1]
    metadata["tokenizer.ggml.tokens"][3:259] = [f"unused{n}" for n in range(256)]
    assert backend_of(metadata).encode("aé", add_special_tokens=False).tokens == ["a", "<unk>"]
    del metadata["tokenizer.ggml.unknown_token_id"]
    assert backend_of(metadata).encode("aé", add_special_tokens=False).tokens == ["a", "<unk>"]
    metadata["tokenizer.ggml.token_type"][0] = 1
    with pytest.raises(ModelFileError, match="neither a token for every byte"):
        backend_of(metadata)


# Special tokens, BOS


def test_control_tokens_are_matched_whole_and_skipped_in_decoding() -> None:
    tokenizer = pair("qwen2")[1]
    ids = {text: tokenizer.token_to_id(text) for text in [*CONTROL, "<think>"]}
    encoded = ids_of(tokenizer, "<|im_start|>a<think>b<|im_end|>")
    whole = [ids["<|im_start|>"], ids["<think>"], ids["<|im_end|>"]]
    assert [index for index in encoded if index in ids.values()] == whole
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.decode(encoded, skip_special_tokens=False) == "<|im_start|>a<think>b<|im_end|>"
    assert tokenizer.get_vocab_size() == len(ids) + 1 + pair("qwen2")[0].get_vocab_size()


def test_a_text_listed_twice_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = backend_of(sentencepiece(["▁", "a", "a"], add_space_prefix=False))
    assert ids_of(tokenizer, "a") == [261]
    assert "model.gguf lists 1 token texts more than once" in capsys.readouterr().err


@given(st.text())
def test_text_never_gives_an_unused_token(text: str) -> None:
    tokenizer = pair("llama-bpe")[1]
    assert tokenizer.token_to_id("[PAD]") not in ids_of(tokenizer, text + "[PAD]" + text)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "qwen2"}, False),
        ({"pre": "smollm"}, False),
        ({"pre": "gpt-4o"}, False),
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
    ],
)
def test_bos_follows_the_file_then_the_family(metadata: dict[str, Any], expected: bool) -> None:
    base = {"model": "gpt2", "tokens": ["a"], **metadata}
    vocabulary = read_vocabulary({f"tokenizer.ggml.{name}": value for name, value in base.items()}, "model.gguf")
    assert default_add_bos(vocabulary) is expected


# What must be refused


def good() -> dict[str, Any]:
    return copy.deepcopy(byte_level(pair("qwen2")[0], "qwen2"))


def test_an_unknown_kind_or_pre_tokenizer_is_named_beside_the_known() -> None:
    for field, value in (("model", "rwkv"), ("pre", "brand-new"), ("pre", "")):
        with pytest.raises(ModelError, match=f"(?s){value!r}.*Supported: .*(gpt2|qwen2)"):
            backend_of(good() | {f"tokenizer.ggml.{field}": value})


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("tokens", None, "missing or empty"),
        ("tokens", [], "missing or empty"),
        ("tokens", "abc", "expected an array"),
        ("tokens", 7, "expected an array"),
        ("tokens", {"a": 1}, "expected an array"),
        ("tokens", [1, 2], "expected elements of type str, found int"),
        ("tokens", ["a", b"b"], "expected elements of type str, found bytes"),
        ("token_type", [1, 1], "2 entries for"),
        ("token_type", [], "0 entries for"),
        ("token_type", ["1"], "expected elements of type int"),
        ("token_type", [True], "expected elements of type int, found bool"),
        ("scores", [0.0], "1 entries for"),
        ("scores", [1], "expected elements of type float"),
        ("merges", ["a"], "merge 0 is not two tokens"),
        ("merges", ["a b", "a b c"], "merge 1 is not two tokens"),
        ("merges", ["a "], "merge 0 is not two tokens"),
        ("merges", ["a b", "q \u4e00"], "which is not in the vocabulary"),
        ("merges", [["a", "b"]], "expected elements of type str"),
        ("bos_token_id", 10**6, "token 1000000 does not exist"),
        ("eos_token_id", -1, "token -1 does not exist"),
        ("unknown_token_id", 1.0, "expected int, found float"),
        ("padding_token_id", True, "expected int, found bool"),
        ("add_bos_token", 1, "expected bool, found int"),
        ("add_space_prefix", "yes", "expected bool, found str"),
        ("model", 3, "expected str, found int"),
        ("pre", ["qwen2"], "expected str, found list"),
    ],
)
def test_bad_metadata_names_the_file_the_field_and_the_reason(field: str, value: Any, reason: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        backend_of(good() | {f"tokenizer.ggml.{field}": value})
    assert caught.value.field == f"tokenizer.ggml.{field}"
    assert reason in caught.value.reason and "model.gguf" in str(caught.value)


def test_tokens_must_be_unicode() -> None:
    metadata = good()
    metadata["tokenizer.ggml.tokens"][5] = "\ud800"
    with pytest.raises(ModelFileError, match=r"in tokenizer\.ggml\.tokens: a token is not valid Unicode"):
        backend_of(metadata)


@pytest.mark.parametrize("kind", [7, -1, 10**9])
def test_an_unknown_token_type_is_refused(kind: int) -> None:
    metadata = good()
    metadata["tokenizer.ggml.token_type"][5] = kind
    with pytest.raises(ModelFileError, match=f"{kind} is not a token type"):
        backend_of(metadata)


@pytest.mark.parametrize("text", ["<0x-1>", "<0x1>", "<0x100>", "<0xGG>", "<0xab>", "byte", "", "<0x0A>\n"])
def test_a_byte_token_must_be_a_byte(text: str) -> None:
    metadata = sentencepiece(["a"])
    metadata["tokenizer.ggml.tokens"][13] = text
    with pytest.raises(ModelFileError, match="token 13 is marked as a byte"):
        backend_of(metadata)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_must_be_numbers(score: float) -> None:
    metadata = sentencepiece(["a"])
    metadata["tokenizer.ggml.scores"][-1] = score
    with pytest.raises(ModelFileError, match="not a finite number"):
        backend_of(metadata)


junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=3), st.floats()), max_size=5),
)  # fmt: skip
SMALL = {
    "spm": sentencepiece(["▁", "a", "b", "ab"]),
    "bpe": byte_level(trained(ByteLevel(use_regex=False), 260), "gpt-2"),
}


@settings(max_examples=1500)
@given(st.sampled_from(["spm", "bpe"]), st.data())
def test_mutated_metadata_builds_or_is_refused_in_one_way(kind: str, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(SMALL[kind])))
    value = SMALL[kind][field]
    if isinstance(value, list) and data.draw(st.booleans()):
        at, until = data.draw(st.integers(0, len(value))), data.draw(st.integers(0, 2 * len(value)))
        mutated: Any = [*value[:at], data.draw(junk), *value[at + 1 : until]]
    else:
        mutated = data.draw(junk)
    try:
        tokenizer = backend_of(SMALL[kind] | {field: mutated})
    except TurbomoeError as error:
        assert "model.gguf" in str(error)
        return
    assert isinstance(ids_of(tokenizer, "a b <|im_end|> é"), list)
