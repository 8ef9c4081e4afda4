"""The demo model's real routing: the simulator against the engine, seeding across domains, LRU as the one to beat.

Prose is Moby-Dick, code the source of a standard module: both come with what is installed.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.insight.routing import run_cache
from turbomoe.config import EngineSettings, ExpertSettings, KVSettings
from turbomoe.engine.engine import Engine
from turbomoe.engine.request import Request
from turbomoe.experts.arena import TAIL
from turbomoe.experts.base import Phase
from turbomoe.experts.module import StoreExperts
from turbomoe.experts.runtime import ExpertRuntime
from turbomoe.files.demo import locate_demo
from turbomoe.insight.profile import Profile
from turbomoe.insight.profile_figures import counts_of, coverage, effective_experts, transfer
from turbomoe.insight.profile_run import make_profiler, run_texts
from turbomoe.insight.simulate import WARM_TOKENS, policy_settings, replay, simulate
from turbomoe.insight.texts import judgement_text
from turbomoe.insight.trace import NOTHING, Trace
from turbomoe.models import bind, load_model
from turbomoe.models.base import LoadedModel
from turbomoe.upstream.prompts import encode_text

SLOTS = (8, 16, 24, 32)  # of 64
POLICIES = ("adaptive", "lru", "static")
DOMAINS = {"prose": judgement_text, "code": lambda: inspect.getsource(argparse)}


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(locate_demo("moe"), EngineSettings())


@pytest.fixture(scope="module")
def texts(demo: LoadedModel) -> dict[str, list[int]]:
    return {name: encode_text(demo.tokenizer, text()) for name, text in DOMAINS.items()}


@pytest.fixture(scope="module")
def priors(demo: LoadedModel, texts: dict[str, list[int]]) -> Iterator[dict[str, Profile]]:
    """Profiles of a later part of each text, from prefill alone: quick, and of other words than those simulated."""
    made = {}
    for name, ids in texts.items():
        profiler = make_profiler(demo, 32.0)
        use(demo, ExpertSettings()).observer = profiler
        runner = Engine(demo, EngineSettings(ctx_size=512)).runner
        runner.forward([0], torch.tensor([ids[8000:8500]]), Phase.PREFILL)
        made[name] = Profile(profiler.model, 32.0, {name: profiler.finish()})
    yield made


def use(demo: LoadedModel, settings: ExpertSettings) -> ExpertRuntime:
    """Let the model compute through a new runtime over the same store."""
    assert demo.experts is not None
    runtime = ExpertRuntime(demo.experts.store, settings, "cpu", demo.experts.top_k)
    bind((m for m in demo.shell.modules() if isinstance(m, StoreExperts)), runtime)
    demo.experts = runtime
    return runtime


def serve(
    demo: LoadedModel, ids: list[int], settings: ExpertSettings, slots: int, prior: np.ndarray | None, tokens: int
) -> tuple[ExpertRuntime, Trace]:
    """Two requests through the engine with so many slots; the runtime and what it was routed."""
    assert demo.experts is not None
    sizes = [layout.blob_bytes for layout in demo.experts.store.layouts]
    runtime = use(demo, replace(settings, cache=slots * sum(sizes) + TAIL * len(set(sizes))))
    if prior is not None:
        runtime.seed_prior(prior)
    profiler = make_profiler(demo, 32.0, trace=True)
    runtime.observer = profiler
    engine = Engine(demo, EngineSettings(ctx_size=256, prefill_chunk=40))
    for start in (0, 500):
        for _ in engine.stream(Request(tuple(ids[start : start + 70]), max_tokens=tokens, ignore_eos=True)):
            pass
    profiler.finish()
    assert profiler.trace is not None
    return runtime, profiler.trace.finish("served")


def check(demo: LoadedModel, ids: list[int], policy: str, slots: int, prior: np.ndarray, tokens: int) -> float:
    """Serve and simulate: the same hits, misses and uploads. Returns the hit rate of decode."""
    settings = policy_settings(policy, ExpertSettings(), 4)
    seed = prior if policy == "static" else None
    runtime, trace = serve(demo, ids, settings, slots, seed, tokens)
    assert runtime.cache is not None
    counters = runtime.cache.counters
    (found,) = simulate(trace, [policy], [slots], ExpertSettings(), prior)
    assert abs(found.hit_rate - counters.hit_rate(Phase.DECODE)) <= 0.01
    assert (found.hits, found.misses) == (counters.hits[1].sum(), counters.misses[1].sum())
    assert (found.upload_count, found.prompt_uploads) == tuple(counters.uploads[::-1].sum(axis=1))
    assert trace.decode_rows == 2 * (tokens - 1)
    runtime.check_integrity()
    return found.hit_rate


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulator_is_right_about_the_engine(
    demo: LoadedModel, texts: dict[str, list[int]], priors: dict[str, Profile], policy: str
) -> None:
    assert 0.2 < check(demo, texts["code"], policy, 16, priors["code"].prior(), 14) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", SLOTS)
def test_the_simulator_is_right_about_the_engine_everywhere(
    demo: LoadedModel, texts: dict[str, list[int]], priors: dict[str, Profile], domain: str, policy: str, slots: int
) -> None:
    check(demo, texts[domain], policy, slots, priors["prose"].prior(), 60)


@pytest.fixture(scope="module")
def short(demo: LoadedModel, texts: dict[str, list[int]]) -> dict[str, Trace]:
    """A prompt and some decode steps of each domain."""
    return {name: record(demo, [ids[:80]]) for name, ids in texts.items()}


def record(demo: LoadedModel, texts: list[list[int]]) -> Trace:
    profiler = make_profiler(demo, 32.0, trace=True)
    use(demo, ExpertSettings()).observer = profiler
    run_texts(demo, texts, 1024, KVSettings())
    profiler.finish()
    assert profiler.trace is not None
    return profiler.trace.finish("text")


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulator_is_the_engine_s_cache_on_real_routing(
    short: dict[str, Trace], priors: dict[str, Profile], domain: str, policy: str
) -> None:
    trace, settings = short[domain], policy_settings(policy, ExpertSettings(), 4)
    seed = priors["prose"].prior() if policy == "static" else None
    for slots in SLOTS:
        counters = run_cache(trace, settings, slots, seed).counters
        tally = replay(trace, settings, [slots], seed)
        assert np.sum(tally.hits) == counters.hits[1].sum() > 0
        assert np.sum(tally.uploads) == counters.uploads[1].sum()
        assert tally.prompt_uploads.sum() == counters.uploads[0].sum()


def test_routing_is_neither_uniform_nor_collapsed_and_differs_by_domain(priors: dict[str, Profile]) -> None:
    for name, profile in priors.items():
        counts = counts_of(profile.domains[name])
        assert (effective_experts(counts) > 15).all() and (effective_experts(counts) < 60).all()
        assert 0.45 < coverage(counts, counts, 16).mean() < 0.85
    table = transfer(priors["prose"].merged(priors["code"]), 0.25)
    assert (np.diag(table) > 0.5).all() and max(table[0, 1], table[1, 0]) < 0.35


# -- what the documents claim, on longer traces --------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(demo: LoadedModel, texts: dict[str, list[int]]) -> dict[str, Trace]:
    return {name: record(demo, [ids[:2048]]) for name, ids in texts.items()}


def without_prompts(trace: Trace) -> Trace:
    """The decode steps alone: a cache that starts cold, where a prior matters most."""
    steps = trace.phases == 1
    kept = np.repeat(steps, trace.rows)
    rest = {"rows": trace.rows[steps], "phases": trace.phases[steps], "after": np.full(steps.sum(), NOTHING, np.uint8)}
    return replace(trace, ids=trace.ids[kept], weights=trace.weights[kept], **rest)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [True, False])
def test_after_256_tokens_no_profile_costs_more_than_a_point(
    long: dict[str, Trace], priors: dict[str, Profile], prompts: bool
) -> None:
    for name, trace in long.items():
        run = trace if prompts else without_prompts(trace)
        plain = simulate(run, ["adaptive"], SLOTS, ExpertSettings())
        for profile in priors.values():
            seeded = simulate(run, ["seeded"], SLOTS, ExpertSettings(), profile.prior())
            for a, b in zip(plain, seeded, strict=True):
                assert a.steady_hit_rate is not None and b.steady_hit_rate is not None
                assert b.steady_hit_rate > a.steady_hit_rate - 0.01, (name, a.slots)


@pytest.mark.slow
def test_the_right_profile_warms_a_cold_cache(long: dict[str, Trace], priors: dict[str, Profile]) -> None:
    for name, trace in long.items():
        run, own = without_prompts(trace), ExpertSettings()
        plain, seeded = (np.array(replay(run, own, SLOTS, p).hits)[:64].sum(0) for p in (None, priors[name].prior()))
        assert (seeded > plain + 0.01 * 64 * 8 * 4).all()


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_decayed_counts_reach_lru_with_a_fraction_of_its_uploads(long: dict[str, Trace], domain: str) -> None:
    assert long[domain].decode_rows > 4 * WARM_TOKENS
    for rival in ("lru", "lru-wait"):
        found = simulate(long[domain], ["adaptive", rival], SLOTS, ExpertSettings())
        for mine, theirs in zip(found[: len(SLOTS)], found[len(SLOTS) :], strict=True):
            assert mine.steady_hit_rate is not None and theirs.steady_hit_rate is not None
            assert mine.steady_uploads is not None and theirs.steady_uploads is not None
            assert mine.steady_hit_rate > theirs.steady_hit_rate - 0.02
            # At half of the experts LRU itself needs few uploads; docs/log.md has the numbers.
            most = 0.2 if mine.slots < 32 else 0.4
            assert mine.steady_uploads < most * theirs.steady_uploads, (domain, mine.slots)
