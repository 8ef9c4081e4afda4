"""The engine with a scripted model: queueing, stopping, streaming, cancelling, reuse of memory, limits."""

import pytest
import torch

from tests.engine.scripted import scripted_model, smollm2_tokenizer
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.engine import Engine
from turbomoe.engine.request import Event, Finish, Request, SamplingParams
from turbomoe.errors import RequestError

EXACT = KVSettings("f32", "f32")
CODES = KVSettings("tq3", "tq3", 4, 8)


def engine_for(script=None, *, kv=EXACT, ctx=64, parallel=1, chunk=8, **model) -> Engine:
    settings = EngineSettings(ctx_size=ctx, parallel=parallel, prefill_chunk=chunk, kv=kv)
    return Engine(scripted_model(script, **model), settings)


def run(engine: Engine, *requests: Request) -> dict[int, list[Event]]:
    ids = [engine.submit(request) for request in requests]
    events: dict[int, list[Event]] = {i: [] for i in ids}
    for _ in range(10_000):
        if engine.idle:
            break
        for event in engine.step():
            events[event.request_id].append(event)
    assert engine.idle, "the engine did not finish"
    engine.runner.memory.check_integrity()
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [e.token for e in events if e.token is not None]


def script_after(prompt: list[int], answer: list[int]) -> list[int]:
    """A script whose answer starts behind ``prompt``."""
    return [0] * (len(prompt) - 1) + answer


def test_prefill_runs_in_chunks_and_the_answer_follows_token_by_token():
    prompt = list(range(100, 120))
    engine = engine_for(script_after(prompt, [7, 8, 9]))
    events = run(engine, Request(tuple(prompt), max_tokens=3))[1]
    assert tokens_of(events) == [7, 8, 9]
    assert [e.finish for e in events] == [None, None, Finish.LENGTH]
    fed = [ids for ids, _ in engine.model.shell.calls]
    assert fed == [prompt[:8], prompt[8:16], prompt[16:], [7], [8]]
    assert [p for _, positions in engine.model.shell.calls for p in positions] == list(range(22))


def test_end_token_stops_and_is_not_shown():
    engine = engine_for(script_after([5], [7, 2, 9]), stop_ids=[2])
    events = run(engine, Request((5,)))[1]
    assert tokens_of(events) == [7]
    assert events[-1].finish is Finish.STOP and events[-1].token is None


def test_ignore_eos_goes_on_to_the_limit():
    engine = engine_for([2], stop_ids=[2])
    assert tokens_of(run(engine, Request((5,), max_tokens=5, ignore_eos=True))[1]) == [2] * 5


@pytest.mark.parametrize("stop,want", [("brown fox", "The quick "), ("quick", "The "), ("zebra", None), ("T", "")])
def test_stop_strings_cut_the_text_and_never_leak(stop, want):
    text = "The quick brown fox jumps"
    answer = smollm2_tokenizer()(text)["input_ids"]
    engine = engine_for(script_after([5], answer))
    events = run(engine, Request((5,), max_tokens=len(answer), stop=(stop,)))[1]
    assert "".join(e.text for e in events) == (text if want is None else want)
    assert events[-1].finish is (Finish.LENGTH if want is None else Finish.STOP)


def test_text_of_many_byte_characters_is_never_broken():
    text = "Ünïcödé 你好 🙂 done"
    answer = smollm2_tokenizer()(text)["input_ids"]
    engine = engine_for(script_after([5], answer))
    events = run(engine, Request((5,), max_tokens=len(answer)))[1]
    assert "".join(e.text for e in events) == text
    assert all("\ufffd" not in e.text for e in events)


def test_context_limit_ends_the_answer_and_says_so():
    engine = engine_for([7], ctx=16)
    events = run(engine, Request(tuple(range(10))))[1]
    assert events[-1].finish is Finish.CONTEXT
    assert len(tokens_of(events)) == 6


@pytest.mark.parametrize("kv", [EXACT, CODES])
@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_longer_than_the_context_is_refused_with_numbers(kv, length):
    engine = engine_for(kv=kv)
    with pytest.raises(RequestError, match=f"{length} tokens and the context holds 64"):
        engine.submit(Request(tuple([1] * length)))
    assert engine.idle


@pytest.mark.parametrize("token", [-1, 49152, 1 << 40])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine_for().submit(Request((1, token)))


@pytest.mark.parametrize(
    "field,value",
    [("temperature", -1.0), ("temperature", 1e-40), ("temperature", float("nan")), ("temperature", 1e308),
     ("top_k", -1), ("top_p", 1.5),
     ("top_p", -0.1), ("min_p", 2.0), ("repetition_penalty", 0.0), ("seed", -1), ("seed", 1 << 63)],
)  # fmt: skip
def test_sampling_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("bad", [{"prompt": ()}, {"max_tokens": -1}, {"stop": ("",)}, {"stop": ("x",) * 17}])
def test_bad_requests_are_refused(bad):
    with pytest.raises(RequestError):
        Request(**({"prompt": (1,)} | bad))


def test_more_requests_than_slots_wait_and_all_finish():
    engine = engine_for([7], parallel=2)
    events = run(engine, *[Request((i, i + 1), max_tokens=i) for i in range(1, 8)])
    assert {i: len(tokens_of(e)) for i, e in events.items()} == {i: i for i in range(1, 8)}
    assert len(engine.slots) == 2


def test_prefill_and_decode_take_turns():
    engine = engine_for([7], parallel=2, ctx=256)
    engine.submit(Request((1, 2), max_tokens=30))
    engine.step()
    engine.submit(Request(tuple(range(80)), max_tokens=1))
    decoded = [any(e.request_id == 1 for e in engine.step()) for _ in range(12)]
    assert decoded.count(True) == 6, decoded


def test_cancelled_requests_free_their_slot_and_tell_once():
    engine = engine_for([7], parallel=1, ctx=256)
    first, second = engine.submit(Request((1, 2, 3))), engine.submit(Request((4, 5), max_tokens=2))
    for _ in range(5):
        engine.step()
    assert [e.finish for e in engine.cancel(first)] == [Finish.CANCELLED]
    assert engine.cancel(first) == []
    done = []
    while not engine.idle:
        done += engine.step()
    assert {e.request_id for e in done} == {second}
    assert engine.cancel(999) == []


def test_a_waiting_request_can_be_cancelled():
    engine = engine_for([7])
    engine.submit(Request((1,), max_tokens=3))
    waiting = engine.submit(Request((2,), max_tokens=3))
    engine.step()
    assert [e.finish for e in engine.cancel(waiting)] == [Finish.CANCELLED]
    while not engine.idle:
        assert all(e.request_id != waiting for e in engine.step())


def test_closing_a_stream_early_cancels():
    engine = engine_for([7], ctx=256)
    for n, event in enumerate(engine.stream(Request((1, 2)))):
        assert event.token == 7
        if n == 3:
            break
    assert engine.idle and len(engine.slots) == 1


def test_a_failed_prefill_ends_its_own_sequence_only():
    engine = engine_for([7], parallel=2)
    engine.model.shell.fail_at = 3  # prefill of the first, its decode, prefill of the second
    first = engine.submit(Request((1, 2, 3), max_tokens=4))
    second = engine.submit(Request((4, 5), max_tokens=2))
    engine.step()
    engine.step()
    (lost,) = engine.step()
    assert (lost.request_id, lost.finish, str(lost.error)) == (second, Finish.ERROR, "out of memory, say")
    done = []
    while not engine.idle:
        done += engine.step()
    assert {e.request_id for e in done} == {first} and done[-1].finish is Finish.LENGTH
    assert len(engine.slots) == 2
    engine.runner.memory.check_integrity()
    assert len(tokens_of(run(engine, Request((1, 2, 3), max_tokens=4))[3])) == 4


def test_a_failed_decode_batch_tells_each_of_its_sequences():
    engine = engine_for([7], parallel=2)
    ids = [engine.submit(Request((1, 2), max_tokens=9)), engine.submit(Request((4, 5), max_tokens=9))]
    for _ in range(4):
        engine.step()
    engine.model.shell.fail_at = len(engine.model.shell.calls) + 1
    events = engine.step()
    assert [(e.request_id, e.finish) for e in events] == [(i, Finish.ERROR) for i in ids]
    assert engine.idle and len(engine.slots) == 2


def test_numbers_gone_wrong_end_one_row_and_leave_the_others():
    engine = engine_for([7], parallel=3)
    ids = [engine.submit(Request((n, n), max_tokens=6)) for n in (1, 2, 3)]
    while any(s.prefilling for s in (*engine.waiting, *engine.running)):
        engine.step()
    real = engine.runner.forward

    def poisoned(*args):
        logits = real(*args).clone()
        logits[1] = float("nan")
        return logits

    engine.runner.forward = poisoned
    events = engine.step()
    engine.runner.forward = real
    assert [e.finish for e in events] == [None, Finish.ERROR, None]
    assert "not finite" in str(events[1].error)
    rest = []
    while not engine.idle:
        rest += engine.step()
    assert {e.request_id for e in rest} == {ids[0], ids[2]}
    assert len(engine.slots) == 3


def test_an_interrupt_leaves_no_sequence_half_fed(monkeypatch):
    engine = engine_for([7], parallel=2)
    engine.submit(Request((1, 2), max_tokens=9))
    engine.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.running[0].sampler, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.idle and len(engine.slots) == 2
    assert engine.runner.memory.host_lengths == [0, 0]


def test_streams_side_by_side_get_their_own_events_and_all_of_them():
    engine = engine_for([7], parallel=2, ctx=128)
    long, short = (engine.stream(Request((n,), max_tokens=n)) for n in (20, 3))
    first = [next(long), next(short)]
    rest = tokens_of(list(long)), tokens_of(list(short))
    assert (len(rest[0]), len(rest[1])) == (19, 2)
    assert all(e.token == 7 for e in first)
    assert engine.idle and not engine._mail


def test_polling_a_request_that_is_gone_is_an_error():
    engine = engine_for([7])
    request_id = engine.submit(Request((1,), max_tokens=1))
    assert engine.poll(request_id)[-1].finish is Finish.LENGTH
    with pytest.raises(RequestError, match="not running"):
        engine.poll(request_id)


def test_a_stream_raises_what_ended_it():
    engine = engine_for([7])
    engine.model.shell.fail_at = 3
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(engine.stream(Request((1, 2), max_tokens=9)))
    assert engine.idle and len(engine.slots) == 1


def test_too_many_waiting_requests_are_refused(monkeypatch):
    monkeypatch.setattr("turbomoe.engine.engine.MAX_WAITING", 2)
    engine = engine_for([7])
    for n in (1, 2):
        engine.submit(Request((n,)))
    with pytest.raises(RequestError, match="2 requests are waiting"):
        engine.submit(Request((3,)))


def test_usage_is_kept_for_recent_requests_only(monkeypatch):
    monkeypatch.setattr("turbomoe.engine.engine.MAX_WAITING", 2)
    engine = engine_for([7])
    for n in range(8):
        run(engine, Request((n,), max_tokens=1))
    assert list(engine.usage) == [5, 6, 7, 8]


@pytest.mark.parametrize("kv", [EXACT, CODES])
def test_a_longer_prompt_reuses_the_memory_of_the_conversation(kv):
    engine = engine_for([7], kv=kv)
    run(engine, Request((1, 2, 3), max_tokens=4))
    engine.model.shell.calls.clear()
    known = [1, 2, 3, 7, 7, 7]
    run(engine, Request((*known, 7, 50, 51), max_tokens=1))
    assert engine.model.shell.calls == [([7, 50, 51], [6, 7, 8])]
    assert (engine.usage[2].reused, engine.usage[2].prompt) == (6, 9)


def test_a_changed_prompt_is_cut_back_where_memory_can_and_rerun_where_it_cannot():
    for kv, reused in ((EXACT, 4), (CODES, 0)):
        engine = engine_for([7], kv=kv)
        run(engine, Request((1, 2, 3, 4, 5, 6), max_tokens=2))
        run(engine, Request((1, 2, 3, 4, 9, 9, 9), max_tokens=2))
        assert engine.usage[2].reused == reused


def test_the_same_prompt_again_still_runs_its_last_token():
    engine = engine_for([7])
    run(engine, Request((1, 2, 3), max_tokens=1))
    events = run(engine, Request((1, 2, 3), max_tokens=1))[2]
    assert engine.usage[2].reused == 2
    assert tokens_of(events) == [7]


def test_a_seed_gives_the_same_tokens_whoever_else_runs():
    request = Request((1, 2), max_tokens=12, sampling=SamplingParams(temperature=1.0, seed=11))
    other = Request((3,), max_tokens=20, sampling=SamplingParams(temperature=1.0, seed=5))
    alone = tokens_of(run(engine_for(parallel=1, vocab=50), request)[1])
    together = run(engine_for(parallel=3, vocab=50), other, request, other)
    assert tokens_of(together[2]) == alone
    assert len(set(alone)) > 3
    reseeded = Request((1, 2), max_tokens=12, sampling=SamplingParams(temperature=1.0, seed=12))
    assert tokens_of(run(engine_for(vocab=50), reseeded)[1]) != alone


def test_processors_come_from_the_parameters():
    from turbomoe.engine.sampling import processors

    assert len(processors(SamplingParams())) == 0
    full = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    names = [type(p).__name__ for p in processors(full)]
    assert names == [
        "RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]  # fmt: skip
    logits = torch.zeros(1, 20).index_fill(1, torch.tensor([3]), 9.0)
    kept = processors(SamplingParams(temperature=1.0, top_k=1))(torch.tensor([[1]]), logits)
    assert kept.isfinite().sum() == 1
