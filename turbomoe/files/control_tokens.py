"""Control tokens that a user only writes about: hidden with a mark while a template renders, then encoded as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace


@dataclass(frozen=True)
class ControlTokens:
    """The special tokens of ``backend`` (text to id), and two twins of it that do not know them.

    ``at_start`` encodes a whole text, ``inside`` a text that continues a prompt. ``beginnings`` are all proper
    prefixes of the control tokens.
    """

    backend: Tokenizer
    at_start: Tokenizer
    inside: Tokenizer
    ids: Mapping[str, int]
    beginnings: frozenset[str]

    @classmethod
    def of(cls, backend: Tokenizer) -> ControlTokens:
        added = backend.get_added_tokens_decoder()
        ids = {token.content: index for index, token in added.items() if token.special}
        beginnings = frozenset(text[:size] for text in ids for size in range(1, len(text)))
        return cls(backend, _plain_twin(backend), _plain_twin(backend, at_start=False), ids, beginnings)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of ``text`` with what the model family puts around a prompt (BOS), no other special token."""
        return list(self.at_start.encode(text).ids)

    def encode_more(self, text: str) -> list[int]:
        """Ids of ``text`` that goes on where a prompt ended, without special tokens."""
        return list(self.inside.encode(text, add_special_tokens=False).ids)

    def hide(self, value: Any, mark: str) -> Any:
        """A copy of nested messages with ``mark`` after the first sign of every control token.

        A beginning at the end of a text counts too: joined with the text that follows it could become a token.
        """
        if isinstance(value, str):
            return self._hide_in_text(value, mark)
        if isinstance(value, Mapping):
            return {self.hide(key, mark): self.hide(item, mark) for key, item in value.items()}
        return [self.hide(item, mark) for item in value] if isinstance(value, (list, tuple)) else value

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered prompt: control tokens that ``mark`` does not break are tokens, all the rest is text."""
        whole = self.backend.encode(text, add_special_tokens=False)
        if mark not in text:
            return list(whole.ids)
        control, ids, done = set(self.ids.values()), [], 0
        for token, (start, end) in zip(whole.ids, whole.offsets, strict=True):
            if token in control:
                ids += [*self._encode_between(text, done, start, mark), token]
                done = end
        return ids + self._encode_between(text, done, len(text), mark)

    def _encode_between(self, text: str, start: int, end: int, mark: str) -> list[int]:
        twin = self.inside if start else self.at_start
        return list(twin.encode(text[start:end].replace(mark, ""), add_special_tokens=False).ids)

    def _hide_in_text(self, text: str, mark: str) -> str:
        sizes = set(map(len, self.ids))
        longest, end = max(sizes, default=0), len(text.rstrip())

        def broken(sign: re.Match[str]) -> str:
            at = sign.start()
            whole = any(text[at : at + size] in self.ids for size in sizes)
            begun = end - at < longest and text[at:end] in self.beginnings
            return sign[0] + mark if whole or begun else sign[0]

        signs = "".join({re.escape(token[0]) for token in self.ids})
        return re.sub(f"[{signs}]", broken, text) if signs else text


def _plain_twin(backend: Tokenizer, *, at_start: bool = True) -> Tokenizer:
    """The tokenizer with its special tokens cut like any other text. Shares the vocabulary.

    User-defined tokens are still matched whole, as the reference implementations do.
    """
    twin = Tokenizer(backend.model)
    twin.normalizer = backend.normalizer
    twin.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    twin.pre_tokenizer, twin.post_processor = backend.pre_tokenizer, backend.post_processor
    cut = twin.pre_tokenizer
    if not at_start and isinstance(cut, Metaspace) and cut.prepend_scheme == "first":
        twin.pre_tokenizer = Metaspace(cut.replacement, prepend_scheme="never", split=cut.split)
    twin.encode_special_tokens = True
    return twin
