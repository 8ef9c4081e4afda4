"""Text out of tokens while they arrive: what is handed out is final, and all of it together is the whole decode."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CONTEXT = 4  # tokens: an unfinished UTF-8 sequence has at most 3 bytes, and every token has at least one


class Detokenizer:
    """Incremental decoder of one sequence, constant work per token. Special tokens give no text.

    The concatenation of all ``push`` results and ``finish`` equals ``tokenizer.decode(ids, skip_special_tokens=True,
    clean_up_tokenization_spaces=False)``. A character that is not complete yet waits; a run of SentencePiece byte
    tokens waits for its end, because one bad byte in it turns the whole run into U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._context: list[int] = []  # the last tokens whose text was handed out
        self._pending: list[int] = []  # tokens since
        self._withheld = 0  # characters of the context's text not handed out: 0 or 1

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often empty."""
        token = self._backend.id_to_token(token_id)
        if not token or self._is_special(token_id):
            return ""
        self._pending.append(token_id)
        return "" if BYTE_TOKEN.fullmatch(token) else self._advance(final=False)

    def finish(self) -> str:
        """What was still waiting; an incomplete character comes out as U+FFFD. The next ``push`` starts afresh."""
        text = self._advance(final=True)
        self._context = []
        return text

    def _is_special(self, token_id: int) -> bool:
        return not self._decode([token_id]) and bool(self._backend.decode([token_id], skip_special_tokens=False))

    def _advance(self, *, final: bool) -> str:
        window = self._context + self._pending
        start = len(self._decode(self._context)) - self._withheld
        text = self._decode(window)
        self._withheld = int(not final and text.endswith(BROKEN))
        self._context, self._pending = window[-CONTEXT:], []
        return text[start : len(text) - self._withheld]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text
