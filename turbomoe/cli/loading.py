"""From flags to a running engine, telling a person what happens: the memory table, the bar, the notes."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from turbomoe.cli.options import engine_settings, model_reference
from turbomoe.config import EngineSettings

if TYPE_CHECKING:
    from turbomoe.engine.engine import Engine
    from turbomoe.models.base import Forecast, LoadedModel


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on standard error, only where a person watches."""

    def __init__(self, what: str, unit: str = "B") -> None:
        from tqdm import tqdm

        hidden = not sys.stderr.isatty()
        self._bar: Any = tqdm(
            desc=what, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False, file=sys.stderr
        )

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def load(args: argparse.Namespace) -> tuple[LoadedModel, EngineSettings]:
    """Resolve, check and load the model that ``args`` name; the memory table goes to standard error first."""
    settings = engine_settings(args)
    quiet_transformers()
    import torch

    from turbomoe.files.reference import resolve
    from turbomoe.models import load_model

    if settings.threads:
        torch.set_num_threads(settings.threads)
    path = resolve(model_reference(args))
    with Bar("loading") as bar:
        model = load_model(path, settings, bar, before=lambda forecast: announce(forecast, settings))
    return model, settings


def announce(forecast: Forecast, settings: EngineSettings) -> None:
    """Print what the run will take; raise ``OutOfMemoryError`` when it does not fit."""
    from turbomoe.engine.forecast import context_size, memory_use
    from turbomoe.hardware.memory import memory_table

    context_size(settings, forecast.context_length)
    table = memory_table({settings.device: memory_use(forecast, settings)})
    print(table.render(), file=sys.stderr)
    table.check_fits()


def make_engine(model: LoadedModel, settings: EngineSettings) -> Engine:
    """The engine for a loaded model, with its means calibrated if these settings want them."""
    from turbomoe.engine.calibrate import is_calibrated, means_for
    from turbomoe.engine.engine import Engine

    if not is_calibrated(model, settings.kv):
        print("calibrating key and value means, once for this model...", file=sys.stderr)
    return Engine(model, settings, means_for(model, settings.kv))


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


def statistics(engine: Engine, usage: Any, watch: Stopwatch) -> dict[str, Any]:
    """The figures of one answer."""
    memory = engine.runner.memory
    figures = {
        "prompt_tokens": usage.prompt,
        "reused_tokens": usage.reused,
        "generated_tokens": usage.generated,
        **watch.to_json(),
        "kv_type_k": memory.settings.type_k,
        "kv_type_v": memory.settings.type_v,
        "kv_bytes": memory.nbytes(),
        "kv_bits_per_value": round(memory.bits_per_value(), 3),
    }
    if engine.model.experts is not None:
        figures["experts"] = engine.model.experts.describe()
    return figures


def statistics_line(figures: dict[str, Any]) -> str:
    """The same for a person, in one line."""
    rate, first = figures["tokens_per_s"], figures["first_token_s"]
    parts = [
        f"{figures['prompt_tokens']} prompt tokens ({figures['reused_tokens']} reused)",
        f"{figures['generated_tokens']} generated",
        *([f"first after {first:.2f} s"] if first is not None else []),
        *([f"{rate:.1f} tokens/s"] if rate is not None else []),
    ]
    return "[" + ", ".join(parts) + "]"
