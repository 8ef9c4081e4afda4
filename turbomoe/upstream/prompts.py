"""Prompts: plain text and chats to token ids, with control tokens only where the template, not the user, wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from turbomoe.errors import ModelError, RequestError
from turbomoe.files.control_tokens import ControlTokens
from turbomoe.notices import Notice, board

Message = Mapping[str, Any]
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own addition to the grammar
THINKING_SWITCHES = ("enable_thinking", "thinking")  # variables that the families' templates read


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, allow_special: bool = False) -> list[int]:
    """Token ids of a prompt, BOS in front where the model family wants it.

    Special tokens written in ``text`` are ordinary text unless ``allow_special``; then a BOS that the text already
    starts with is not doubled. Raises ``RequestError`` for text that is not Unicode (lone surrogates).
    """
    _check_unicode(text)
    if not allow_special:
        return _control(tokenizer).encode_plain(text)
    ids: list[int] = tokenizer.backend_tokenizer.encode(text).ids
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_more(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text that goes on where a prompt ended: no BOS. Raises as ``encode_text``."""
    _check_unicode(text)
    return _control(tokenizer).encode_more(text)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The chat as the model's own template writes it, in a sandbox. ``thinking`` None leaves the template's default.

    Raises ``RequestError`` where the template refuses these messages, ``ModelError`` where the template itself is at
    fault or missing; both name the model.
    """
    name = tokenizer.name_or_path or "this model"
    if not tokenizer.chat_template:
        raise ModelError(f"{name} has no chat template", fix="Send it plain text instead, as for a base model")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **_thinking_argument(tokenizer, thinking),
        )
    except (TemplateSyntaxError, SecurityError) as error:
        raise ModelError(f"The chat template of {name} cannot be used", why=str(error)) from error
    except TemplateError as error:
        raise RequestError(f"The chat template of {name} refuses these messages", why=str(error)) from error
    except Exception as error:  # a template is a program of strangers: it can raise anything
        why = f"{type(error).__name__}: {error}"
        raise RequestError(f"The chat template of {name} failed on these messages", why=why) from error
    return str(text)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of ``render_chat``, where control tokens that stand in messages or tools are ordinary text.

    Errors as in ``render_chat``, and ``RequestError`` where a template transforms such a text beyond recognition.
    """

    def render(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        return render_chat(
            tokenizer, messages, add_generation_prompt=add_generation_prompt, thinking=thinking, tools=tools
        )

    said = json.dumps([list(map(dict, messages)), tools], ensure_ascii=False, default=str)
    _check_unicode(said)
    mark = next(sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in said)
    control = _control(tokenizer)
    marked = render(control.hide(messages, mark), control.hide(tools, mark))
    if mark in marked and marked.replace(mark, "") != render(messages, tools):
        raise RequestError(
            "These messages hold control tokens of the model, and its chat template would change them",
            fix="Take texts like <|im_end|> out of the messages",
        )
    return control.encode_marked(marked, mark)


def supports_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a switch for thinking that ``render_chat`` can set."""
    return _thinking_switch(tokenizer) is not None


def _thinking_switch(tokenizer: PreTrainedTokenizerBase) -> str | None:
    variables = _variables(str(tokenizer.chat_template or ""))
    return next((name for name in THINKING_SWITCHES if name in variables), None)


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """What a template reads from outside; nothing for one that cannot be parsed (rendering says why)."""
    grammar = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(find_undeclared_variables(grammar.parse(GENERATION_TAG.sub("", template))))
    except TemplateSyntaxError:
        return frozenset()


def _thinking_argument(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> dict[str, Any]:
    switch = _thinking_switch(tokenizer)
    if thinking is not None and switch is None:
        wish = "on" if thinking else "off"
        board.post(Notice(f"thinking {wish} has no effect", "the model's chat template has no switch for it"))
    return {} if thinking is None or switch is None else {switch: thinking}


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = f"Character {error.start} is half of a surrogate pair"
        raise RequestError("The text is not valid Unicode", why=why) from error


_CONTROL: WeakKeyDictionary[PreTrainedTokenizerBase, ControlTokens] = WeakKeyDictionary()


def _control(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Made when first needed and kept as long as the tokenizer."""
    if tokenizer not in _CONTROL:
        _CONTROL[tokenizer] = ControlTokens.of(tokenizer.backend_tokenizer)
    return _CONTROL[tokenizer]
