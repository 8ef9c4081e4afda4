"""Sampling flags: what the user says, over what the model's makers say, over llama.cpp's defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbomoe.engine.request import SamplingParams

FALLBACK = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn and when to stop."""
    group = parser.add_argument_group("sampling (defaults come from the model, else from llama.cpp)")
    group.add_argument("--temp", dest="temperature", type=float, metavar="T", help="temperature, 0 for greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens, 0 for all")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens of total probability P")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    group.add_argument("--repeat-penalty", dest="repetition_penalty", type=float, metavar="X", help="1 is off")
    group.add_argument("-s", "--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument(
        "-n", "--predict", type=int, metavar="N", default=0, help="tokens at most, 0 until the context is full"
    )


def sampling_params(args: argparse.Namespace, model_defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request. Raises ``RequestError`` for values out of range."""
    from turbomoe.engine.request import SamplingParams

    chosen: dict[str, Any] = {**FALLBACK, **model_defaults} if model_defaults else dict(FALLBACK)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    chosen |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return SamplingParams(**{name: value for name, value in chosen.items() if name in names})
