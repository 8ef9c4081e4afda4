"""Tokenizers as ``transformers`` objects: from a GGUF file by our own code, from a folder by ``AutoTokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from turbomoe.errors import ModelError
from turbomoe.files.base import ModelSource
from turbomoe.files.tokenizer import build_backend, default_add_bos
from turbomoe.files.vocabulary import Vocabulary, read_vocabulary

# Control tokens that end a turn or a document, in whatever model they occur. Many files name only one of theirs.
END_TOKENS = (
    "<|endoftext|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
    "<|end|>", "<|return|>", "<|call|>", "<|user|>", "<|observation|>",
)  # fmt: skip


class GgufTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer around a backend of ours; the stock constructor would copy it through JSON (0.3 s and more)."""

    def __init__(self, backend: Tokenizer, **settings: Any) -> None:
        self._tokenizer = backend
        super().__init__(**settings)  # type: ignore[no-untyped-call]


def build_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of an opened model, with its special tokens, chat template and BOS rule. Never runs model code.

    Raises ``ModelFileError`` or ``ModelError``, see ``files.vocabulary`` and ``files.tokenizer``.
    """
    if source.kind == "gguf":
        return wrap(read_vocabulary(source.metadata, source.path))
    return _from_folder(source.path)


def _from_folder(path: Path) -> PreTrainedTokenizerBase:
    fix = "Put the model's tokenizer.json and tokenizer_config.json into the folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what is in the files is a stranger's, and the libraries raise anything
        why = str(error).strip().split("\n")[0].rstrip(": ") or type(error).__name__
        raise ModelError(f"No tokenizer could be loaded from {path}", why=why, fix=fix) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"The tokenizer in {path} is not one of the tokenizers library", fix=fix)
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json files carry limits of their training
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def wrap(vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """A GGUF vocabulary as a ``transformers`` tokenizer."""
    roles: dict[str, str | None] = {f"{role}_token": vocabulary.token(role) for role in ("bos", "eos", "unk", "pad")}
    tokenizer = GgufTokenizer(
        build_backend(vocabulary),
        add_bos_token=default_add_bos(vocabulary) and "bos" in vocabulary.roles,
        add_eos_token=bool(vocabulary.add_eos),
        chat_template=vocabulary.chat_template,
        **roles,
    )
    tokenizer.name_or_path = vocabulary.path  # after construction: given a name, the constructor asks the hub about it
    return tokenizer


def stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that end generation: those the model's files name, and the usual control tokens it has."""
    return frozenset(_named_ends(source)) | frozenset(_known_ends(tokenizer))


def _named_ends(source: ModelSource) -> set[int]:
    if source.kind == "gguf":
        roles = (source.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))
        return {role for role in roles if isinstance(role, int)}
    ends: set[int] = set()
    for stem in ("generation_config", "config"):
        section = source.metadata.get(stem)
        value = section.get("eos_token_id") if isinstance(section, Mapping) else None
        ends |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return ends


def _known_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    control = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {control[text] for text in END_TOKENS if text in control}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if "<|return|>" in control:  # in gpt-oss <|end|> only ends one message of an answer
        ends.discard(control.get("<|end|>", -1))
    return ends
