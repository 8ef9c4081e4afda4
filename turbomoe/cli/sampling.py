"""Sampling flags: what the user says, over what the model's makers say, over llama.cpp's defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from turbomoe.errors import RequestError, SettingsError

if TYPE_CHECKING:
    from turbomoe.engine.request import SamplingParams

FALLBACK = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
FLAGS = {
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
    "seed": "--seed",
}


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


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ``SettingsError`` for flags out of range: before a model is loaded, not after."""
    from turbomoe.engine.request import Request, SamplingParams

    for name, flag in FLAGS.items():
        if (value := getattr(args, name)) is not None:
            _try(flag, partial(SamplingParams, **{name: value}))
    if args.predict < 0:
        raise SettingsError(f"--predict is out of range: 0 (until the context is full) or more, not {args.predict}")
    _try("--predict", partial(Request, (0,), max_tokens=args.predict))
    _try("--stop", partial(Request, (0,), stop=tuple(getattr(args, "stop", ()))))


def _try(flag: str, build: Callable[[], object]) -> None:
    try:
        build()
    except RequestError as error:
        raise SettingsError(f"{flag} is out of range: {error.what}") from error


def sampling_params(args: argparse.Namespace, model_defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request. Raises ``RequestError`` where the model's own are out of range."""
    from turbomoe.engine.request import SamplingParams

    said = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    known = {name: value for name, value in model_defaults.items() if name in FLAGS}
    return SamplingParams(**{**FALLBACK, **known, **said})
