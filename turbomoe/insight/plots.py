"""Pictures of profiles and simulations, as PNG. They need matplotlib (the extra ``plots``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbomoe.errors import SettingsError
from turbomoe.files.atomic import write_bytes
from turbomoe.insight.profile import LAGS, Profile
from turbomoe.insight.profile_figures import chance_reuse, counts_of, coverage, reuse, transfer
from turbomoe.insight.simulate import BOUNDS, WARM_TOKENS, Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANINGS = {
    "lru": "every miss is copied in the background, over the least recently used",
    "lfu": "whoever was used more often in all",
    "adaptive": "decayed counts with hysteresis, the default",
    "seeded": "adaptive, started from a profile",
    "static": "a profile's hottest, never changed",
    "lru-wait": "lru that loads every miss before it computes",
    "oracle": "the best fixed placement for this very text",
    "belady": "knows the future; nothing hits more often",
}
PANELS = 4  # heat maps in one picture
TRANSFER_SHARE = 0.25


def require_matplotlib() -> None:
    """Raise ``SettingsError`` if matplotlib is missing: asked before the work, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError("Plots need matplotlib", fix="Run: pip install -c constraints.txt '.[plots]'") from error


def profile_plots(profile: Profile, folder: Path) -> list[Path]:
    """Heat map, coverage, reuse and, with two domains or more, transfer: the files written into ``folder``."""
    made = {"heat-map": heat_map(profile), "coverage": coverage_curve(profile), "reuse": reuse_curve(profile)}
    if len(profile.domains) > 1:
        made["transfer"] = transfer_matrix(profile)
    return [_save(figure, folder / f"{name}.png") for name, figure in made.items()]


def simulation_plots(outcomes: Sequence[Outcome], title: str, folder: Path) -> list[Path]:
    """Hit rate and uploads against slots: the files written into ``folder``."""
    return [_save(slots_curves(outcomes, title), folder / "simulation.png")]


def heat_map(profile: Profile) -> Figure:
    """How often each expert is used, layer by layer; experts in the order of the first domain, so that shifts show."""
    domains = list(profile.domains.items())[:PANELS]
    order = np.argsort(-counts_of(domains[0][1]), axis=1, kind="stable")
    figure = _figure(9, 1.2 + 2.2 * len(domains))
    axes = figure.subplots(len(domains), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, stats) in zip(axes, domains, strict=True):
        counts = np.take_along_axis(counts_of(stats), order, axis=1).astype(float)
        times = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * counts.shape[1]
        image = axis.imshow(times, aspect="auto", cmap="viridis", vmin=0, vmax=4, interpolation="nearest")
        axis.set_title(f"Routing on {name}", fontsize=10)
        axis.set_ylabel("layer")
        axis.set_yticks(range(len(profile.model.layers)), [str(layer) for layer in profile.model.layers])
    axes[-1].set_xlabel(f"experts of the layer, most used on {domains[0][0]} first")
    figure.colorbar(image, ax=list(axes), label="use, times the average expert (4 and more: yellow)")
    figure.suptitle(f"{profile.model.name}: which experts are used")
    return figure


def coverage_curve(profile: Profile) -> Figure:
    """What share of the routing the hottest experts take."""
    figure = _figure(7, 5)
    axis = figure.subplots()
    width = profile.model.shape[1]
    shares = np.arange(width + 1) / width * 100
    for name, stats in profile.domains.items():
        counts = counts_of(stats)
        taken = [0.0] + [coverage(counts, counts, n).mean() * 100 for n in range(1, width + 1)]
        axis.plot(shares, taken, label=name, linewidth=2)
    axis.plot([0, 100], [0, 100], "k--", linewidth=1, label="if all were used equally")
    _label(axis, "hottest experts of a layer, % of all", "share of the routing, %, mean over layers")
    axis.set_title(f"{profile.model.name}: how concentrated the routing is")
    return figure


def reuse_curve(profile: Profile) -> Figure:
    """How likely an expert used now was used some tokens ago."""
    figure = _figure(7, 5)
    axis = figure.subplots()
    lags = np.arange(1, LAGS + 1)
    for name, stats in profile.domains.items():
        (line,) = axis.plot(lags, reuse(stats) * 100, marker=".", label=name)
        chance = chance_reuse(stats) * 100
        axis.plot(lags, [chance] * LAGS, ":", color=line.get_color(), label=f"{name}, if tokens were shuffled")
    axis.set_ylim(bottom=0)
    _label(axis, "tokens ago", "routed experts that were routed then too, %")
    axis.set_title(f"{profile.model.name}: reuse of experts in decoding")
    return figure


def transfer_matrix(profile: Profile) -> Figure:
    """What a profile of one text is worth on another."""
    shares = transfer(profile, TRANSFER_SHARE) * 100
    names = list(profile.domains)
    figure = _figure(2.5 + 1.2 * len(names), 2.2 + 1.0 * len(names))
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(shares):
        axis.text(column, row, f"{value:.0f}%", ha="center", va="center", color="white" if value < 60 else "black")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("text that is run")
    axis.set_ylabel("text the profile is of")
    what = f"Routing that falls on the profile's hottest {TRANSFER_SHARE:.0%} of experts"
    axis.set_title(f"{what}\n{profile.model.name}", fontsize=10)
    figure.colorbar(image, label="share of the routing, %")
    return figure


def slots_curves(outcomes: Sequence[Outcome], title: str) -> Figure:
    """Hit rate and uploads of each policy against slots. Dashed: what no cache in the background can do."""
    figure = _figure(12, 6)
    hits, uploads = figure.subplots(1, 2)
    policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    for rank, policy in enumerate(policies):
        of = sorted((o for o in outcomes if o.policy == policy), key=lambda o: o.slots)
        slots = [o.slots for o in of]
        rates = [100 * (o.hit_rate if o.steady_hit_rate is None else o.steady_hit_rate) for o in of]
        copies = [o.uploads if o.steady_uploads is None else o.steady_uploads for o in of]
        look = _look(policy, rank, len(policies))
        hits.plot(slots, rates, label=f"{policy}: {MEANINGS[policy]}", **look)
        if any(copies):
            uploads.plot(slots, copies, **look)
    _axes(hits, "slots per layer", "routed experts found in a slot, %")
    _axes(uploads, "slots per layer", "experts copied per layer and token (log scale)")
    uploads.set_yscale("log")
    steady = outcomes[0].steady_hit_rate is not None
    figure.suptitle(title + (f", without the first {WARM_TOKENS} tokens" if steady else ""))
    hits.set_title("Hit rate", fontsize=10)
    uploads.set_title("Uploads (a policy that copies nothing is not shown)", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _look(policy: str, rank: int, count: int) -> dict[str, Any]:
    """Curves that coincide stay visible: the earlier ones are wider, and each has its own mark."""
    style = "--" if policy in BOUNDS else "-"
    width = 1.2 + (count - rank) / 2
    return {"linestyle": style, "marker": "osD^vPX*h"[rank % 9], "color": f"C{rank}", "linewidth": width}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _label(axis: Any, across: str, up: str) -> None:
    _axes(axis, across, up)
    axis.legend(fontsize=8)


def _axes(axis: Any, across: str, up: str) -> None:
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
    return path
