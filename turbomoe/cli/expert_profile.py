"""``--moe-profile`` and ``--moe-profile-save``: what a run knows of the routing beforehand, and what it has learnt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turbomoe.notices import Notice, board

if TYPE_CHECKING:
    from turbomoe.insight.profile_collect import RoutingProfiler
    from turbomoe.models.base import LoadedModel

DOMAIN = "served"  # the tag under which a run's own routing is saved


def use_profiles(args: argparse.Namespace, model: LoadedModel) -> None:
    """Seed the cache of ``model`` and watch its routing, as the flags ask; a profile is saved by ``args.at_exit``.

    Raises ``RecordError`` for a profile of another model or a damaged one, before anything has run, and
    ``ModelError`` for a dense model.
    """
    if args.moe_profile:
        _seed(args.moe_profile, model)
    if args.moe_profile_save:
        _watch(args.moe_profile_save, model, args)


def _seed(path: str, model: LoadedModel) -> None:
    from turbomoe.insight.profile import Profile
    from turbomoe.insight.profile_model import routed_model

    routed_model(model)
    profile = Profile.load(path, model.identity)
    assert model.experts is not None
    if model.experts.cache is None:
        board.post(Notice("--moe-profile has no effect", "the expert cache is off", avoid="give --moe-cache SIZE"))
        return
    model.experts.seed_prior(profile.prior())


def _watch(path: str, model: LoadedModel, args: argparse.Namespace) -> None:
    from turbomoe.config import ExpertSettings
    from turbomoe.insight.profile import Profile
    from turbomoe.insight.profile_run import make_profiler

    profiler = make_profiler(model, ExpertSettings.half_life)
    if Path(path).exists():
        Profile.load(path, model.identity)  # refused now, or the run would be for nothing
    assert model.experts is not None
    model.experts.observer = profiler
    args.at_exit.append(lambda: save_learnt(path, profiler))


def save_learnt(path: str, profiler: RoutingProfiler) -> None:
    """Add what was seen to the profile at ``path`` (or begin one), whole or not at all; nothing if nothing was seen."""
    from turbomoe.config import ExpertSettings
    from turbomoe.insight.profile import Profile

    stats = profiler.finish()
    if not stats.tokens.any():
        return
    seen = Profile(profiler.model, ExpertSettings.half_life, {DOMAIN: stats})
    older = Profile.load(path, profiler.model.identity) if Path(path).exists() else None
    (seen if older is None else older.merged(seen)).save(path)
