"""Flags that several verbs share, under the names people know from llama.cpp, and the settings they become."""

from __future__ import annotations

import argparse

from turbomoe.config import MOE_POLICIES, EngineSettings, ExpertSettings, KVSettings
from turbomoe.kv_types import AUTO, SCALAR, TRELLIS, kv_type
from turbomoe.notices import Notice, board
from turbomoe.units import parse_size

KV_TYPES_HELP = (
    f"auto (checked once for a model), bf16 (exact), {', '.join(SCALAR)}, or by trellis {', '.join(TRELLIS)}"
)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb."""
    group = parser.add_argument_group("general")
    group.add_argument("--json", action="store_true", help="report as JSON on standard output")
    group.add_argument("--strict", action="store_true", help="make every note (something refused or shrunk) an error")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model to run; ``model_reference`` reads it."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "-m",
        "--model",
        metavar="REF",
        help="a .gguf file, a safetensors folder, hf:user/repo[:quant], demo:moe, or demo:smollm2 (from make demo)",
    )
    group.add_argument("-hf", "--hf-repo", metavar="REPO", help="user/repo[:quant] on the hub, same as -m hf:REPO")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Everything an engine is built from; ``engine_settings`` reads it."""
    defaults = EngineSettings()
    group = parser.add_argument_group("engine")
    group.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        metavar="N",
        help=f"tokens of context, 0 for the model's own limit (default {defaults.ctx_size}, or that limit if less)",
    )
    group.add_argument(
        "-np",
        "--parallel",
        type=int,
        metavar="N",
        default=defaults.parallel,
        help="sequences at the same time (default %(default)s)",
    )
    group.add_argument(
        "-t",
        "--threads",
        type=int,
        metavar="N",
        default=defaults.threads,
        help="CPU threads, 0 for all usable cores but one (both of two)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=defaults.dtype,
        help="arithmetic of the model (default %(default)s)",
    )
    _add_kv(parser, defaults.kv)
    _add_experts(parser, defaults.experts)
    _add_placement(parser)


def _add_kv(parser: argparse.ArgumentParser, defaults: KVSettings) -> None:
    group = parser.add_argument_group("KV cache")
    for letter, name in (("k", "keys"), ("v", "values")):
        group.add_argument(
            f"-ct{letter}",
            f"--cache-type-{letter}",
            metavar="TYPE",
            type=kv_type,
            default=AUTO,
            help=f"how {name} of the past are stored: {KV_TYPES_HELP} (default %(default)s)",
        )
    group.add_argument(
        "--kv-budget",
        type=float,
        metavar="KL",
        help="mean KL that auto may cost, nats a token (default: 0.02, or 1.5 times what q8_0 costs if that is more)",
    )
    group.add_argument(
        "--kv-sink", type=int, metavar="N", default=defaults.sink, help="first tokens kept exact (default %(default)s)"
    )
    group.add_argument(
        "--kv-recent",
        type=int,
        metavar="N",
        default=defaults.recent,
        help="last tokens kept exact (default %(default)s)",
    )


def _add_experts(parser: argparse.ArgumentParser, defaults: ExpertSettings) -> None:
    group = parser.add_argument_group("expert cache")
    group.add_argument(
        "--moe-cache",
        metavar="SIZE",
        default=defaults.cache,
        help="room for copies of hot (often used) experts: off, auto, or a size such as 2G (default %(default)s)",
    )
    group.add_argument(
        "--moe-policy",
        choices=MOE_POLICIES,
        default=defaults.policy,
        help="follow the routing with few copies, keep the first placement, or copy every miss (default %(default)s)",
    )
    add_moe_tuning(group, defaults)
    group.add_argument(
        "--moe-profile", metavar="FILE", help="start from a profile of this model (turbomoe profile -o FILE)"
    )
    group.add_argument(
        "--moe-profile-save", metavar="FILE", help="at exit, add this run's routing to the profile in FILE"
    )


def add_moe_tuning(group: argparse._ArgumentGroup, defaults: ExpertSettings) -> None:
    """The two numbers of the adaptive policy."""
    group.add_argument(
        "--moe-hysteresis",
        type=float,
        metavar="X",
        default=defaults.hysteresis,
        help="hysteresis: how many times hotter (more used of late) a newcomer must be than the expert whose copy it "
        "evicts; more means fewer copies made (default %(default)s)",
    )
    group.add_argument(
        "--moe-half-life",
        type=float,
        metavar="TOKENS",
        default=defaults.half_life,
        help="tokens after which a sighting (one use of an expert) counts half: less follows changes faster "
        "(default %(default)s)",
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    """llama.cpp's placement flags: taken so that a known command line runs, and answered with a note."""
    parser.add_argument("-ngl", "--n-gpu-layers", metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("-ncmoe", "--n-cpu-moe", metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--cpu-moe", action="store_true", default=None, help=argparse.SUPPRESS)


def model_reference(args: argparse.Namespace) -> str:
    """The reference that ``-m`` or ``-hf`` names."""
    if args.model is not None:
        return str(args.model)
    return str(args.hf_repo) if args.hf_repo.startswith("hf:") else f"hf:{args.hf_repo}"


def moe_cache(text: str) -> str | int:
    """``off``, ``auto``, or bytes. Raises ``SettingsError`` for anything else."""
    return text if text in ("off", "auto") else parse_size(text)


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """The settings that the flags of ``add_engine`` ask for; raises ``SettingsError`` for values out of range."""
    _note_placement(args)
    _note_budget(args)
    return EngineSettings(
        ctx_size=EngineSettings.ctx_size if args.ctx_size is None else args.ctx_size,
        parallel=args.parallel,
        threads=args.threads,
        dtype=args.dtype,
        kv=KVSettings(args.cache_type_k, args.cache_type_v, args.kv_sink, args.kv_recent, budget=args.kv_budget),
        experts=ExpertSettings(
            cache=moe_cache(args.moe_cache),
            hysteresis=args.moe_hysteresis,
            half_life=args.moe_half_life,
            policy=args.moe_policy,
        ),
    )


def _note_placement(args: argparse.Namespace) -> None:
    flags = {"-ngl": args.n_gpu_layers, "-ncmoe": args.n_cpu_moe, "--cpu-moe": args.cpu_moe}
    for flag, value in flags.items():
        if value not in (None, "0"):
            why = "this version computes every layer and every expert on the CPU"
            board.post(Notice(f"{flag} has no effect", why, avoid=f"leave {flag} out"))


def _note_budget(args: argparse.Namespace) -> None:
    if args.kv_budget is not None and AUTO not in (args.cache_type_k, args.cache_type_v):
        why = "both KV types are given, and a budget is for choosing one"
        board.post(Notice("--kv-budget has no effect", why, avoid="leave it out, or -ctk or -ctv"))
