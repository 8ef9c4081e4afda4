"""Sessions of every family go on as if nothing had happened; what does not fit is refused and changes nothing."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.scripted import smollm2_tokenizer
from tests.engine.test_conversation import IM_END, conversation_for, encode, fed, hear, said
from tests.kv.test_snapshot import same, snapshot
from tests.tiny_models import FAMILIES, VOCAB, tiny_model, tokens, write_gguf
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.calibrate import calibrate, needs_means
from turbomoe.engine.conversation import Conversation
from turbomoe.engine.engine import Engine
from turbomoe.engine.plain_text import PlainText
from turbomoe.engine.request import Request, SamplingParams
from turbomoe.engine.session import (
    KIND,
    LARGEST,
    VERSION,
    check_session_model,
    load_session,
    save_session,
    session_nbytes,
)
from turbomoe.errors import RequestError
from turbomoe.files.array_file import RecordError, load_arrays, save_arrays
from turbomoe.files.atomic import WriteError
from turbomoe.models import load_model
from turbomoe.models.base import LoadedModel

KINDS = [
    KVSettings("bf16", "bf16"),
    KVSettings("q8_0", "q8_0", 4, 16),
    KVSettings("tq4", "tq3", 4, 16),
    KVSettings("tq2", "tq2", 0, 0),
    KVSettings("tq3", "bf16", 4, 16),
]
CODES = KVSettings("tq3", "tq2", 4, 16)
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by family, with their means."""

    @cache
    def made(family: str):
        path = write_gguf(tiny_model(family), tmp_path_factory.mktemp("models") / f"{family}.gguf")
        model = load_model(path, EngineSettings(dtype="float32"))
        return model, calibrate(model)

    return made


def engine_for(made, kv: KVSettings, *, ctx: int = 256, parallel: int = 1) -> Engine:
    model, means = made
    settings = EngineSettings(ctx_size=ctx, parallel=parallel, prefill_chunk=32, kv=kv)
    return Engine(model, settings, means if needs_means(model, kv) else None)


def answer(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], int]:
    """Greedy tokens after ``prompt``, and how many of its tokens were reused."""
    request_id = engine.submit(Request(tuple(prompt), count, ignore_eos=True))
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += [event.token for event in engine.step()]
    return drawn, engine.usage[request_id].reused


def state_of(engine: Engine) -> list[Any]:
    memory = engine.runner.memory
    return [
        (memory.host_lengths[slot], engine.slots.known(slot), snapshot(memory, slot)) for slot in engine.slots._idle
    ]


def unchanged(before: list[Any], engine: Engine) -> bool:
    now = state_of(engine)
    return len(before) == len(now) and all(
        a[:2] == b[:2] and same(a[2], b[2]) for a, b in zip(before, now, strict=True)
    )


# Going on


@pytest.mark.parametrize("kv", KINDS, ids=lambda kv: f"{kv.type_k}-{kv.type_v}")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_session_is_the_uninterrupted_run(models, tmp_path, family, kv):
    made, prompt = models(family), tokens(75)[0].tolist()
    if kv.type_k == "q8_0" and made[0].layers[-1].head_dim % 32:
        pytest.skip("q8_0 wants heads of a multiple of 32 values")
    whole, _ = answer(engine_for(made, kv), prompt, 40)
    first = engine_for(made, kv)
    begun, _ = answer(first, prompt, 12)
    assert begun == whole[:12]
    save_session(first, 0, tmp_path / "s")

    second = engine_for(made, kv, ctx=700, parallel=3)
    for slot in range(3):  # pages dealt out in another order, and other sequences around
        answer(second, tokens(50 + slot, seed=slot)[0].tolist(), 5)
    load_session(second, 1, tmp_path / "s")
    known = [*prompt, *begun[:-1]]
    assert second.slots.known(1) == known
    assert same(snapshot(second.runner.memory, 1), snapshot(first.runner.memory, 0))
    rest, reused = answer(second, [*prompt, *begun], 28)
    assert rest == whole[12:] and reused == len(known)
    assert answer(first, [*prompt, *begun], 28) == (rest, reused)
    assert same(snapshot(second.runner.memory, 1), snapshot(first.runner.memory, 0))
    second.runner.memory.check_integrity()


def test_a_saved_session_saved_again_is_the_same_file(models, tmp_path):
    first, second = engine_for(models("qwen35"), CODES), engine_for(models("qwen35"), CODES, ctx=300, parallel=2)
    answer(first, tokens(75)[0].tolist(), 12)
    save_session(first, 0, tmp_path / "a")
    load_session(second, 1, tmp_path / "a")
    save_session(second, 1, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kv", ["bf16", "tq3"])
def test_a_chat_goes_on_and_pays_only_for_what_is_new(tmp_path, kv):
    talk, other = conversation_for(kv), conversation_for(kv, ctx=200)
    hear(talk, "One?", "First answer.")
    save_session(talk.engine, talk, tmp_path / "s")
    load_session(other.engine, other, tmp_path / "s")
    assert other.transcript() == talk.transcript() and said(other) == ["One?", "First answer."]
    fed(talk)
    for each in (talk, other):
        assert hear(each, "Two?", "Second.") == "Second."
    assert other.usage == talk.usage and other.usage.reused > len(encode("First answer."))
    assert fed(other) == fed(talk)
    assert other.transcript() == talk.transcript()


@pytest.mark.parametrize("kv", ["bf16", "tq3"])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_chat_whose_last_answer_was_cut(tmp_path, kv, cut):
    """Before its first token the turn is not kept, but the memory has its question already."""
    talk, other = conversation_for(kv, chunk=8), conversation_for(kv)
    hear(talk, "One?", "First answer.")
    events = talk.ask("A question of some length, which is read in pieces?", GREEDY)
    for _ in range(cut):
        next(events)
    if not cut:
        talk.engine.step()
        talk.engine.step()
    events.close()
    if not cut:  # closing a generator that never ran does not run it
        talk._close(talk._open)
    save_session(talk.engine, talk, tmp_path / "s")
    load_session(other.engine, other, tmp_path / "s")
    assert len(said(other)) == (4 if cut else 2)
    for each in (talk, other):
        hear(each, "Two?", "Second.")
    assert other.usage == talk.usage


def test_what_a_chat_has_forgotten_is_not_in_its_file(tmp_path):
    talk, other = conversation_for(system="Be brief."), conversation_for()
    hear(talk, "A secret?", "Yes.")
    talk.clear()
    save_session(talk.engine, talk, tmp_path / "s")
    header, arrays = load_arrays(tmp_path / "s", KIND, VERSION, 1 << 30)
    assert b"secret" not in (tmp_path / "s").read_bytes()
    assert set(arrays) == {"ids", "seen_ids"} and all(array.size == 0 for array in arrays.values())
    load_session(other.engine, other, tmp_path / "s")
    assert said(other) == ["Be brief."] and header["messages"] == talk.messages
    assert session_nbytes(talk.engine, talk) == 0


def test_what_another_conversation_said_is_not_in_the_file(tmp_path):
    """Two chats under one system message; the memory of the first is gone when it is saved."""
    model = conversation_for().engine.model
    engine = Engine(model, EngineSettings(ctx_size=256, parallel=2, prefill_chunk=64, kv=CODES))
    first, second, third = (Conversation(engine, system=system) for system in ("Be brief.", "Be brief.", "Sing."))
    hear(first, "One?", "First.")
    hear(second, "A secret?", "Yes.")
    save_session(engine, first, tmp_path / "s")
    hear(third, "Two?", "Second.")  # in the slot of the first, which is the older
    for talk, kept in ((first, False), (second, True)):
        save_session(engine, talk, tmp_path / "s")
        _, arrays = load_arrays(tmp_path / "s", KIND, VERSION, 1 << 30)
        text = model.tokenizer.decode(arrays["ids"].tolist())
        assert ("secret" in text) is kept and bool(text) is kept


def test_thinking_is_kept_unless_it_is_set_anew(tmp_path):
    talk = conversation_for(thinking=False)
    save_session(talk.engine, talk, tmp_path / "s")
    for wish, want in ((None, False), (True, True)):
        other = conversation_for(thinking=wish)
        load_session(other.engine, other, tmp_path / "s")
        assert other.thinking is want


def test_a_chat_takes_the_slot_with_the_least_to_lose(tmp_path):
    talk = conversation_for()
    hear(talk, "One?", "First.")
    save_session(talk.engine, talk, tmp_path / "s")
    ids = talk.engine.slots.known(0)
    engine = Engine(talk.engine.model, EngineSettings(ctx_size=256, parallel=3, kv=KVSettings("bf16", "bf16")))
    for prompt in ((5, 6, 7), (8, 9)):
        answer(engine, list(prompt), 2)
    left = []
    for _ in range(3):
        load_session(engine, Conversation(engine), tmp_path / "s")
        left.append([known[0] for slot in range(3) if (known := engine.slots.known(slot)) != ids])
    assert left == [[5, 8], [8], []]  # the empty slot, then the oldest, then the next


def test_plain_text_goes_on_token_by_token(tmp_path):
    talk, other = (PlainText(conversation_for("tq3").engine) for _ in range(2))

    def write(text: PlainText, more: str, answer: str) -> list[int]:
        events = text.ask(more, GREEDY)
        prompt = list(text.engine.waiting[0].ids)
        text.engine.model.shell.script = [0] * (len(prompt) - 1) + [*encode(answer), IM_END]
        assert "".join(event.text for event in events) == answer
        return prompt

    first = write(talk, "Once upon a", " time there was")
    save_session(talk.engine, talk, tmp_path / "s")
    load_session(other.engine, other, tmp_path / "s")
    second = write(other, " an <|im_end|> end", ".")
    seen = [*first, *encode(" time there was")]
    assert second[: len(seen)] == seen and other.usage.reused == len(seen)
    assert IM_END not in second and smollm2_tokenizer().decode(second[len(seen) :]) == " an <|im_end|> end"
    assert other.messages == [] and other.transcript().seen_text == "Once upon a time there was an <|im_end|> end."


# Refusing


@pytest.fixture
def saved(models, tmp_path) -> Path:
    engine = engine_for(models("qwen35"), CODES)
    answer(engine, tokens(75)[0].tolist(), 12)
    save_session(engine, 0, tmp_path / "s")
    return tmp_path / "s"


def refused(engine: Engine, path: Path, match: str, into: Any = 0) -> RecordError:
    """Loading is refused in words for people, and nothing has changed."""
    before = state_of(engine)
    with pytest.raises(RecordError, match=match) as caught:
        load_session(engine, into, path)
    text = str(caught.value)
    assert str(path) in text and len(text) < 600 and "\n" not in text and caught.value.fix
    assert unchanged(before, engine)
    engine.runner.memory.check_integrity()
    return caught.value


@pytest.mark.parametrize(
    "change,match",
    [
        ({"type_k": "tq4"}, "stored as tq3 and tq2, and this run stores them as tq4 and tq2. Use -ctk tq3 -ctv tq2"),
        ({"type_v": "tq4"}, "Use -ctk tq3 -ctv tq2"),
        ({"sink": 5}, "exact tokens are 4 and 16, and this run's are 5 and 16. Use --kv-sink 4 --kv-recent 16"),
        ({"recent": 17}, "Use --kv-sink 4 --kv-recent 16"),
        ({"type_k": "bf16", "type_v": "bf16"}, "Use -ctk tq3 -ctv tq2"),
    ],
)
def test_other_settings_are_refused(models, saved, change, match):
    engine = engine_for(models("qwen35"), replace(CODES, **change))
    answer(engine, tokens(20, seed=5)[0].tolist(), 3)
    refused(engine, saved, match)


def test_other_models_means_states_and_signs_are_refused(models, saved, monkeypatch):
    model, means = models("qwen35")
    other = engine_for((replace(model, identity="other"), replace(means, identity="other")), CODES)
    refused(other, saved, "belongs to another model, qwen35")
    moved = replace(means, keys={layer: mean + 1 for layer, mean in means.keys.items()})
    refused(engine_for((model, moved), CODES), saved, "other key and value means")
    refused(Engine(model, EngineSettings(ctx_size=256, kv=CODES)), saved, "other key and value means")
    half = engine_for((replace(model, dtype=torch.bfloat16), means), CODES)
    refused(half, saved, "recurrent states are float32, and this run's are bfloat16")
    engine = engine_for((model, means), CODES)
    monkeypatch.setattr("turbomoe.kv.hadamard.SIGN_SEED", "others")
    refused(engine, saved, "its rotation differ")
    monkeypatch.undo()
    monkeypatch.setattr("turbomoe.kv.codecs.lloydmax.LloydMaxCodec.version", 3)
    refused(engine, saved, r"codes are those of another version of turbomoe \(.*tq3 2.*; here .*tq3 3")


@pytest.mark.parametrize("ctx,fits", [(80, False), (85, False), (86, True), (87, True)])
def test_a_context_too_small_is_refused_with_the_size_that_would_do(models, saved, ctx, fits):
    engine = engine_for(models("qwen35"), CODES, ctx=ctx)
    if fits:
        load_session(engine, 0, saved)
        assert engine.runner.memory.host_lengths == [86]
    else:
        refused(engine, saved, f"holds 86 tokens, and this context {ctx}. Use -c 87 or more")


def test_what_is_no_session_is_refused_and_never_replaced(models, tmp_path, monkeypatch):
    engine = engine_for(models("llama"), CODES)
    thesis, pipe, link = tmp_path / "thesis", tmp_path / "pipe", tmp_path / "link"
    thesis.write_bytes(b"Chapter 1" * 100)
    os.mkfifo(pipe)
    link.symlink_to(thesis)
    other = tmp_path / "other"
    save_arrays(other, "turbomoe-profile", 1, {}, {})
    refused(engine, tmp_path / "nothing", "it is not there")
    for path, match in (
        (thesis, "another kind of file"),
        (link, "another kind of file"),
        (pipe, "regular"),
        (tmp_path, "regular"),
        (other, "kind"),
    ):
        refused(engine, path, match)
        with pytest.raises(RecordError, match=f"{path} as session: what is there is no session. Choose another name"):
            save_session(engine, 0, path)
    assert thesis.read_bytes() == b"Chapter 1" * 100 and link.is_symlink() and pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "other", "pipe", "thesis"]


def test_a_newer_version_is_refused(models, saved):
    header, arrays = load_arrays(saved, KIND, VERSION, 1 << 30)
    save_arrays(saved, KIND, VERSION + 1, header, arrays)
    refused(engine_for(models("qwen35"), CODES), saved, f"version is '{VERSION + 1}'.* reads {VERSION}")


def test_chats_and_texts_do_not_mix(tmp_path):
    chat, other = conversation_for(), conversation_for()
    text = PlainText(other.engine)
    hear(chat, "One?", "First.")
    save_session(chat.engine, chat, tmp_path / "chat")
    save_session(chat.engine, 0, tmp_path / "slot")
    save_session(text.engine, text, tmp_path / "text")
    refused(other.engine, tmp_path / "chat", "holds a chat, not plain text", text)
    refused(other.engine, tmp_path / "text", "holds plain text, not a chat", other)
    refused(other.engine, tmp_path / "slot", "bare memory of a slot, not a chat", other)
    load_session(other.engine, 0, tmp_path / "chat")
    assert other.engine.slots.known(0) == chat.engine.slots.known(0)


def test_what_is_at_work_is_neither_saved_nor_replaced(tmp_path):
    talk = conversation_for()
    hear(talk, "One?", "First.")
    save_session(talk.engine, talk, tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    events = talk.ask("Two?", GREEDY)
    next(events)
    for what in (talk, 0, 7):
        for call in (save_session, load_session):
            with pytest.raises(RequestError):
                call(talk.engine, what, tmp_path / "s")
    other = Conversation(talk.engine)
    with pytest.raises(RequestError, match="Every sequence slot"):
        load_session(talk.engine, other, tmp_path / "s")
    events.close()
    assert (tmp_path / "s").read_bytes() == before


def test_a_disk_that_fails_leaves_the_old_session(models, saved, monkeypatch):
    engine, before = engine_for(models("qwen35"), CODES), saved.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(WriteError, match="no space"):
        save_session(engine, 0, saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["s"]


def test_a_load_that_breaks_off_leaves_an_empty_slot_that_says_so(models, saved, monkeypatch):
    """The memory is gone then; a prompt that the slot knew must be computed again."""
    engine, prompt = engine_for(models("qwen35"), CODES), tokens(20, seed=5)[0].tolist()
    answer(engine, prompt, 3)
    known = engine.slots.known(0)

    def broken(array, dtype):
        raise KeyboardInterrupt

    monkeypatch.setattr("turbomoe.engine.session.to_tensor", broken)
    with pytest.raises(KeyboardInterrupt):
        load_session(engine, 0, saved)
    assert engine.slots.known(0) == [] and engine.runner.memory.host_lengths == [0]
    anew = engine_for(models("qwen35"), CODES)
    assert answer(engine, [*known, 1], 3) == answer(anew, [*known, 1], 3)


@pytest.mark.parametrize("text", ["a\nb\x1b[2J", "\u202e\x07"])
def test_what_a_file_says_cannot_steer_a_terminal(models, saved, text):
    header, arrays = load_arrays(saved, KIND, VERSION, LARGEST)
    header["model"] = {"name": text, "identity": "another"}
    save_arrays(saved, KIND, VERSION, header, arrays)
    error = refused(engine_for(models("qwen35"), CODES), saved, "belongs to another model")
    assert str(error).isprintable()


def test_the_model_is_checked_early_and_nothing_else(models, saved):
    """Whatever else may be wrong with a file is told when it is loaded, by its true name."""
    identity = models("qwen35")[0].identity
    check_session_model(saved, identity)
    with pytest.raises(RecordError, match=f"{saved} as session: it belongs to another model, qwen35"):
        check_session_model(saved, "another")
    data = saved.read_bytes()
    for changed, why in (
        (data.replace(identity[:8].encode(), b"00000000"), "it is damaged .its contents"),
        (data.replace(b'"version": "1"', b'"version": "2"').replace(identity[:8].encode(), b"00000000"), "version"),
    ):
        assert changed != data and len(changed) == len(data)
        saved.write_bytes(changed)
        with pytest.raises(RecordError, match=why):
            check_session_model(saved, identity)
    for harmless in (data[:-1], data[:200], b"", b"Chapter 1" * 99):
        saved.write_bytes(harmless)
        check_session_model(saved, identity)
    check_session_model(saved.parent / "none", identity)


# Damaged and forged files


def mutants(data: bytes, count: int) -> list[bytes]:
    """One flipped bit, a cut tail, a cut middle, a doubled or an overwritten stretch."""
    dice, made = random.Random(11), []
    for number in range(count):
        at, size = dice.randrange(len(data)), dice.randrange(1, 40)
        flipped = bytes([data[at] ^ 1 << dice.randrange(8)])
        middle = [flipped + data[at + 1 :], b"", data[at + size :], data[at : at + size] + data[at:]]
        middle.append(dice.randbytes(size) + data[at + size :])
        made.append(data[:at] + middle[number % 5])
    return made


def test_four_hundred_mutants_are_refused(models, saved):
    engine, original = engine_for(models("qwen35"), CODES), saved.read_bytes()
    answer(engine, tokens(20, seed=5)[0].tolist(), 3)
    before = state_of(engine)
    for number, mutant in enumerate(mutants(original, 400)):
        saved.write_bytes(mutant)
        with pytest.raises(RecordError):
            load_session(engine, 0, saved)
            pytest.fail(f"mutant {number} was taken")
    assert unchanged(before, engine)
    saved.write_bytes(original)
    load_session(engine, 0, saved)


HEADERS: list[tuple[str, Any]] = [
    ("model", None), ("model", []), ("model", {"name": "x"}), ("depends_on", None), ("depends_on", {}),
    ("kind", "poem"), ("kind", None), ("kind", []), ("messages", None), ("messages", [1]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": 3}]), ("seen_text", None), ("messages", {"role": "user"}),
    ("thinking", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("field,value", HEADERS)
def test_forged_headers_are_refused(models, saved, field, value):
    header, arrays = load_arrays(saved, KIND, VERSION, 1 << 30)
    save_arrays(saved, KIND, VERSION, header | {field: value}, arrays)
    refused(engine_for(models("qwen35"), CODES), saved, "Cannot use")


def test_a_dependency_that_this_version_does_not_know_is_refused(models, saved):
    header, arrays = load_arrays(saved, KIND, VERSION, 1 << 30)
    header["depends_on"]["map"] = "0123"
    save_arrays(saved, KIND, VERSION, header, arrays)
    refused(engine_for(models("qwen35"), CODES), saved, "its map differ")


def test_forged_arrays_are_refused(models, saved):
    header, arrays = load_arrays(saved, KIND, VERSION, 1 << 30)
    ids, codes = arrays["ids"], arrays["layers.3.keys.codes"]
    forged = [
        arrays | {"ids": ids[:-1]},
        arrays | {"ids": ids[:0]},
        arrays | {"ids": np.full_like(ids, VOCAB)},
        arrays | {"ids": -ids - 1},
        arrays | {"ids": ids.astype(np.int64)},
        arrays | {"ids": ids[None]},
        arrays | {"ids": np.zeros(1 << 20, np.int32)},
        arrays | {"seen_ids": np.full(3, VOCAB, np.int32)},
        arrays | {"layers.3.keys.codes": codes[:-1]},
        arrays | {"layers.3.keys.codes": codes.view(np.int8)},
        arrays | {"layers.3.keys.codes": codes[..., None]},
        arrays | {"layers.9.keys.codes": codes},
        *({name: array for name, array in arrays.items() if name != gone} for gone in arrays),
    ]
    engine = engine_for(models("qwen35"), CODES)
    for changed in forged:
        save_arrays(saved, KIND, VERSION, header, changed)
        refused(engine, saved, "Cannot use")
    save_arrays(saved, KIND, VERSION, header, arrays)
    load_session(engine, 0, saved)


def test_bits_of_types_that_numpy_lacks(models, tmp_path):
    """Exact windows in bf16 are uint16 in the file, and its header says so."""
    engine = engine_for(models("llama"), CODES)
    answer(engine, tokens(75)[0].tolist(), 2)
    save_session(engine, 0, tmp_path / "s")
    header, arrays = load_arrays(tmp_path / "s", KIND, VERSION, 1 << 30)
    window = arrays["layers.0.keys.recent"]
    assert window.dtype == np.uint16 and header["bits"]["bfloat16"] == "uint16"
    stored = snapshot(engine.runner.memory, 0)["layers.0.keys.recent"]
    assert np.array_equal((window.astype(np.uint32) << 16).view(np.float32), stored.float().numpy())


def test_identity_is_what_tells_models_apart(models):
    model: LoadedModel = models("llama")[0]
    assert model.identity != models("qwen2")[0].identity
