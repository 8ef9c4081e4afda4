"""From flags to a running engine, telling a person what happens: the memory table, the bar, the notes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turbomoe.cli.announce import Plan, announce
from turbomoe.cli.options import engine_settings, model_reference
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.notices import Notice, board
from turbomoe.units import format_bytes

if TYPE_CHECKING:
    from turbomoe.cli.announce import Use
    from turbomoe.engine.engine import Engine
    from turbomoe.engine.request import Usage
    from turbomoe.kv.means import KVMeans
    from turbomoe.models.base import Forecast, LoadedModel


BETWEEN_LINES = 20.0  # seconds


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on standard error, from the first report on; where nobody watches, a line now and then."""

    def __init__(self, what: str, unit: str = "B") -> None:
        self._what, self._unit = what, unit
        self._bar: Any = None
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            self._tell(done, total)
            return
        self._bar = self._bar or self._open(total)
        self._bar.update(done - self._bar.n)

    def _tell(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._told < BETWEEN_LINES:
            return
        self._told = time.monotonic()
        if self._unit == "B":
            far = f"{format_bytes(done)} of {format_bytes(total)}"
        else:
            far = f"{done} of {total} {self._unit}s"
        print(f"{self._what}: {far}", file=sys.stderr, flush=True)

    def _open(self, total: int) -> Any:
        from tqdm import tqdm

        scale = self._unit == "B"
        return tqdm(
            desc=self._what, total=total, unit=self._unit, unit_scale=scale, unit_divisor=1024 if scale else 1000,
            leave=False, file=sys.stderr,
        )  # fmt: skip

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


class PassLines(AbstractContextManager["PassLines"]):
    """The same for a log, where nobody watches: one line on standard error whenever a pass has ended."""

    def __init__(self, what: str) -> None:
        self._what, self._passes = what, 0

    def __call__(self, done: int, total: int) -> None:
        if done == total:
            self._passes += 1
            print(f"{self._what}: pass {self._passes} over {total} tokens is done", file=sys.stderr, flush=True)

    def __exit__(self, *exc: object) -> None:
        pass


CHECKING = (
    "checking which KV types this model bears, once for these settings, in a minute or more "
    "(-ctk tcq4 -ctv tcq4 needs no check)"
)

NO_CHECK = (
    "KV types are not checked: this takes at most {} tokens, and {} are exact under any type; the first that may be "
    "longer checks them"
)


def load(
    args: argparse.Namespace, use: Use | None = None, asked: bool | None = None,
    needed: Callable[[LoadedModel], int] | None = None, check: Callable[[str], None] | None = None,
) -> tuple[LoadedModel, EngineSettings]:  # fmt: skip
    """Resolve, check and load the model that ``args`` name; the memory table goes to standard error first.

    ``use`` tells what the verb will take; by default one engine's memory. ``asked`` tells whether the size of
    context is the user's wish; by default whether there was a -c. ``needed`` tells how many tokens the run takes at
    most, 0 where that is not known. ``check`` hears the model's identity before it is read, and may raise. The settings
    come back with the size settled on, and with the KV types that ``auto`` became.
    """
    wished = args.ctx_size is not None if asked is None else asked
    settings = engine_settings(args)
    quiet_transformers()
    import torch

    from turbomoe.files.reference import resolve
    from turbomoe.models import load_model

    if settings.threads:
        torch.set_num_threads(settings.threads)
    path = resolve(model_reference(args))
    plans: list[Plan] = []

    def before(forecast: Forecast) -> None:
        if check is not None:
            check(forecast.identity)
        plans.append(announce(forecast, settings, asked=wished, use=use))

    with Bar("loading") as bar:
        model = load_model(path, settings, bar, before=before)
    if model.experts is None and settings.experts.cache not in ("off", "auto"):
        board.post(Notice("--moe-cache has nothing to hold", "this model has no routed experts", avoid="leave it out"))
    if args.moe_profile or args.moe_profile_save:
        from turbomoe.cli.expert_profile import use_profiles

        use_profiles(args, model)
    return model, settle_types(model, plans[0], needed)


def settle_types(
    model: LoadedModel, plan: Plan, needed: Callable[[LoadedModel], int] | None = None
) -> EngineSettings:  # fmt: skip
    """The settings to run with: KV types chosen if they are still ``auto``, told, and checked against memory.

    Where there was nothing to choose, nobody needs to hear of it.
    """
    settings = plan.settings
    if settings.kv.is_auto:
        short = needed and within_windows(model, settings, needed)
        settings = short or plan.with_types(choose_types(model, settings))
    if settings.kv_choice is not None and settings.kv_choice.tried:
        print(settings.kv_choice.line(), file=sys.stderr, flush=True)
    return settings


def within_windows(
    model: LoadedModel, settings: EngineSettings, needed: Callable[[LoadedModel], int]
) -> EngineSettings | None:
    """Settings for a run so short that no code would ever be read: a context of just that length, bf16, no check.

    None where the run may be longer, or where there is nothing to check anyway. Nothing of this is kept.
    """
    from turbomoe.insight.kv_auto import nothing_to_check, resolve_kv_types

    windows = settings.kv.sink + settings.kv.recent
    if nothing_to_check(model, settings) or not 0 < (tokens := needed(model)) <= windows:
        return None
    print(NO_CHECK.format(tokens, windows), file=sys.stderr, flush=True)
    return resolve_kv_types(model, replace(settings, ctx_size=tokens))


def choose_types(model: LoadedModel, settings: EngineSettings) -> EngineSettings:
    """Types in place of ``auto``, telling a person that the model is checked first."""
    from turbomoe.insight.kv_auto import nothing_to_check, resolve_kv_types
    from turbomoe.insight.kv_ladder import widest_need

    if not nothing_to_check(model, settings):
        means(model, widest_need(model, settings.kv))
        print(f"{CHECKING}...", file=sys.stderr, flush=True)
        if not sys.stderr.isatty():
            print(check_estimate(model, settings.kv), file=sys.stderr, flush=True)
    with Bar("checking", unit="token") if sys.stderr.isatty() else PassLines("checking") as progress:
        return resolve_kv_types(model, settings, progress)


def check_estimate(model: LoadedModel, kv: KVSettings) -> str:
    """What a check of KV types will do at most, for somebody who reads a log and sees no bar."""
    from turbomoe.insight.kv_check import check_ids
    from turbomoe.insight.kv_ladder import most_pairs
    from turbomoe.insight.kv_search import MOST_PASSES

    tokens, pairs = len(check_ids(model, kv)), most_pairs(model, kv)
    return f"checking: {tokens} tokens under bf16 and at most {pairs} pairs of types, in at most {MOST_PASSES} passes"


def make_engine(model: LoadedModel, settings: EngineSettings) -> Engine:
    """The engine for a loaded model, with its means calibrated if these settings want them."""
    from turbomoe.engine.engine import Engine

    return Engine(model, settings, means(model, settings.kv))


def means(model: LoadedModel, kv: KVSettings) -> KVMeans | None:
    """The model's means for ``kv``, telling a person when they have to be calibrated first."""
    from turbomoe.engine.calibrate import is_calibrated, means_for

    if not is_calibrated(model, kv):
        print("calibrating key and value means, once for this model...", file=sys.stderr, flush=True)
    with Bar("calibrating", unit="token") as bar:
        return means_for(model, kv, bar)


def quiet_transformers() -> None:
    """Keep transformers' own log lines off the terminal: ours say what a user can act on."""
    from transformers.utils import logging

    logging.set_verbosity_error()


class Stopwatch:
    """Counts a stream's tokens and seconds: up to the first token, and from there on."""

    def __init__(self) -> None:
        self.started, self.first, self.last, self.tokens = time.perf_counter(), 0.0, 0.0, 0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    def to_json(self) -> dict[str, float | None]:
        """Seconds to the first token, and tokens a second after it."""
        rate = (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else None
        return {"first_token_s": self.first - self.started if self.tokens else None, "tokens_per_s": rate}


def statistics(engine: Engine, usage: Usage, watch: Stopwatch) -> dict[str, Any]:
    """The figures of one answer."""
    memory = engine.runner.memory
    figures: dict[str, Any] = {
        "prompt_tokens": usage.prompt,
        "reused_tokens": usage.reused,
        "generated_tokens": usage.generated,
        **watch.to_json(),
        "kv_type_k": memory.settings.type_k,
        "kv_type_v": memory.settings.type_v,
        "kv_bytes": memory.nbytes(),
        "kv_bits_per_value": round(memory.bits_per_value(), 3),
    }
    if (choice := engine.settings.kv_choice) is not None:
        figures["kv_auto"] = choice.to_json()
    if engine.model.experts is not None:
        figures["experts"] = engine.model.experts.describe()
    return figures


ENDINGS = {"length": "cut at the limit", "cancelled": "stopped", "context": "the context is full"}


def statistics_line(figures: dict[str, Any], finish: str = "") -> str:
    """The same for a person, in one line; ``finish`` is told unless the model itself came to its end."""
    rate, first = figures["tokens_per_s"], figures["first_token_s"]
    parts = [
        f"{figures['prompt_tokens']} prompt tokens ({figures['reused_tokens']} reused)",
        f"{figures['generated_tokens']} generated",
        *([f"first after {first:.2f} s"] if first is not None else []),
        *([f"{rate:.1f} tokens/s"] if rate is not None else []),
        *([ENDINGS[finish]] if finish in ENDINGS else []),
    ]
    return "[" + ", ".join(parts) + "]"
