"""A ``tokenizers.Tokenizer`` from a GGUF vocabulary: byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``)."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from turbomoe.errors import ModelError, ModelFileError
from turbomoe.files.pretokenizers import PRE_TOKENIZERS, PreScheme
from turbomoe.files.vocabulary import TokenType, Vocabulary
from turbomoe.notices import Notice, board

SPACE = "\u2581"  # SentencePiece writes a space as this sign


def build_backend(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer without its post-processor (BOS and EOS are the wrapper's business).

    Control tokens become special added tokens: matched whole, skipped by ``decode(skip_special_tokens=True)``.
    User-defined ones are matched whole but stay text. Raises ``ModelError`` for an algorithm or pre-tokenizer that is
    not supported, ``ModelFileError`` for merges that name unknown tokens.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary.model not in builders:
        raise ModelError(
            f"{vocabulary.path} has a tokenizer of kind {vocabulary.model!r}, which turbomoe does not know",
            fix=f"Supported: {', '.join(builders)}",
        )
    _note_duplicates(vocabulary)
    backend = builders[vocabulary.model](vocabulary)
    backend.add_tokens(list(_added_tokens(vocabulary)))
    return backend


def _note_duplicates(vocabulary: Vocabulary) -> None:
    doubled = len(vocabulary.tokens) - len(set(vocabulary.tokens))
    if doubled:
        why = f"{vocabulary.path} lists {doubled} token texts more than once"
        board.post(Notice("tokens left out", why, cost="only the last token of each text is read or written"))


def default_add_bos(vocabulary: Vocabulary) -> bool:
    """Whether a prompt starts with BOS: as the file says, else as its kind of vocabulary is used."""
    if vocabulary.add_bos is not None:
        return vocabulary.add_bos
    return vocabulary.model == "llama" or _scheme(vocabulary).add_bos


def _added_tokens(vocabulary: Vocabulary) -> Iterator[AddedToken]:
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if text and kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            yield AddedToken(text, normalized=False, special=kind == TokenType.CONTROL)


def _scheme(vocabulary: Vocabulary) -> PreScheme:
    scheme = PRE_TOKENIZERS.get(vocabulary.pre)
    if scheme:
        return scheme
    raise ModelError(
        f"{vocabulary.path} names the pre-tokenizer {vocabulary.pre!r}, which turbomoe does not know",
        why="Another one would cut words differently and feed the model tokens it never saw",
        fix=f"Supported: {', '.join(PRE_TOKENIZERS)}",
    )


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    scheme = _scheme(vocabulary)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        model = models.BPE(vocab=ids, merges=vocabulary.merges, ignore_merges=scheme.whole_words)
    except Exception as error:
        raise _bad_merge(vocabulary, ids, error) from error
    backend = Tokenizer(model)
    if scheme.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = scheme.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _bad_merge(vocabulary: Vocabulary, ids: dict[str, int], error: Exception) -> ModelFileError:
    """Find the merge that the library refused."""
    for index, (left, right) in enumerate(vocabulary.merges):
        unknown = [text for text in (left, right, left + right) if text not in ids]
        if unknown:
            reason = f"merge {index} names {unknown[0][:80]!r}, which is not in the vocabulary"
            return ModelFileError(vocabulary.path, reason, field="tokenizer.ggml.merges")
    return ModelFileError(vocabulary.path, str(error), field="tokenizer.ggml.merges")


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges, unknown = _derived_merges(vocabulary, ids), _unknown_token(vocabulary)
    model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    prefix = vocabulary.add_space_prefix is not False
    escape = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _unknown_token(vocabulary: Vocabulary) -> str | None:
    """What stands for text that the vocabulary cannot spell; not needed where it has every byte."""
    named = vocabulary.token("unk")
    if named is None and TokenType.UNKNOWN in vocabulary.types:
        named = vocabulary.tokens[vocabulary.types.index(TokenType.UNKNOWN)]
    if named is None and vocabulary.types.count(TokenType.BYTE) < 256:
        reason = "there is neither a token for every byte nor one for unknown text"
        raise ModelFileError(vocabulary.path, reason, field="tokenizer.ggml.token_type")
    return named


def _derived_merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins neighbours whose union is a token, best score first, as from a merge list sorted by score."""
    joinable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    best_first = sorted(ids.values(), key=lambda index: (-vocabulary.scores[index], index))
    unions = [vocabulary.tokens[index] for index in best_first if vocabulary.types[index] in joinable]
    return [
        (left, right)
        for union in unions
        for cut in range(1, len(union))
        if (left := union[:cut]) in ids and (right := union[cut:]) in ids
    ]
