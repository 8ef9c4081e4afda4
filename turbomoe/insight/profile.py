"""What a model's routing looked like on some texts: sums by layer and expert, per domain, that can be added up.

Everything stored is a sum, so that profiles of different texts and days merge by addition; shares, entropies and
curves are computed from them (``profile_figures.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from turbomoe.errors import SettingsError
from turbomoe.files.array_file import RecordError, load_arrays, save_arrays
from turbomoe.insight.profile_model import RoutedModel, read_model

KIND, VERSION = "turbomoe-expert-profile", 1
LARGEST_FILE = 1 << 30
LAGS = 32
DOMAIN = re.compile(r"[\w.+-]{1,64}")
MOST_DOMAINS = 1000

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class RoutingStats:
    """Sums over the tokens of one domain. Phases are (prefill, decode); L layers, E experts.

    ``tokens`` [2]; ``counts`` [2, L, E]; ``recent`` [L, E] decode counts halved every half-life; ``reuse_hits`` of
    ``reuse_pairs`` [L, 32]: routed experts of a decode step that the step 1..32 before had routed as well. Of all of
    prefill and one decode step in eight: ``mass`` [2, L, E] gate weights; ``recall_hits`` of ``recall_pairs`` [2, L]:
    routed experts that the layer's own gate names when it is applied to the input of the layer before.
    """

    tokens: Ints
    counts: Ints
    mass: Floats
    recent: Floats
    reuse_hits: Ints
    reuse_pairs: Ints
    recall_hits: Ints
    recall_pairs: Ints

    @classmethod
    def zeros(cls, layers: int, experts: int) -> RoutingStats:
        """Nothing seen yet."""
        return cls(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in _forms(layers, experts).items()})

    def __add__(self, other: RoutingStats) -> RoutingStats:
        return RoutingStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The sums by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Profile:
    """Sums of one model by domain tag. ``half_life`` (in decode steps) is that of ``recent``."""

    model: RoutedModel
    half_life: float
    domains: Mapping[str, RoutingStats]

    def merged(self, other: Profile) -> Profile:
        """Both together: domains of one name add up. Raises ``RecordError`` if they do not belong together."""
        other.model.check_same(self.model.identity, "profile")
        if other.model.shape != self.model.shape or other.half_life != self.half_life:
            raise RecordError("The profiles differ in shape or in their half-life", fix="Take one of them again")
        joint = dict(self.domains)
        for name, stats in other.domains.items():
            joint[name] = joint[name] + stats if name in joint else stats
        return Profile(self.model, self.half_life, joint)

    def total(self) -> RoutingStats:
        """All domains as one."""
        return sum(self.domains.values(), RoutingStats.zeros(*self.model.shape))

    def prior(self) -> Floats:
        """How often each expert was routed, [layers, experts], every domain weighing the same: what seeds a cache."""
        prior = np.zeros(self.model.shape)
        for stats in self.domains.values():
            counts = stats.counts.sum(axis=0).astype(np.float64)
            prior += counts / max(counts.sum(), 1.0)
        return prior

    def save(self, path: str | PathLike[str]) -> None:
        """Write to ``path``, whole or not at all. Raises ``files.atomic.WriteError``."""
        header = {"model": self.model.to_json(), "half_life": self.half_life, "domains": list(self.domains)}
        numbered = enumerate(self.domains.values())
        arrays = {f"{i}.{name}": array for i, stats in numbered for name, array in stats.arrays().items()}
        save_arrays(path, KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | PathLike[str], identity: str | None = None) -> Profile:
        """Read the profile of the model ``identity`` (None: of any).

        Raises ``RecordError`` for a missing, foreign, damaged or newer file, and for one of another model.
        """
        header, arrays = load_arrays(path, KIND, VERSION, LARGEST_FILE)
        try:
            profile = _read(header, arrays)
        except RecordError as error:
            raise RecordError(f"Cannot use {path} as expert profile: {error.what}") from error
        if identity is not None:
            profile.model.check_same(identity, f"profile {path}")
        return profile


def check_domain(name: str) -> str:
    """``name`` if it can tag a domain; raises ``SettingsError`` otherwise."""
    if not DOMAIN.fullmatch(name):
        raise SettingsError(f"{name!r} cannot tag a domain", fix="Use up to 64 letters, digits and any of . _ + -")
    return name


def _forms(layers: int, experts: int) -> dict[str, tuple[tuple[int, ...], type]]:
    by_expert = (2, layers, experts)
    return {
        "tokens": ((2,), np.int64),
        "counts": (by_expert, np.int64),
        "mass": (by_expert, np.float64),
        "recent": (by_expert[1:], np.float64),
        "reuse_hits": ((layers, LAGS), np.int64),
        "reuse_pairs": ((layers, LAGS), np.int64),
        "recall_hits": ((2, layers), np.int64),
        "recall_pairs": ((2, layers), np.int64),
    }


def _read(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Profile:
    model, names, half_life = read_model(header.get("model")), header.get("domains"), header.get("half_life")
    if not isinstance(names, list) or len(names) > MOST_DOMAINS or len({str(name) for name in names}) != len(names):
        raise RecordError("its list of domains is not one")
    if not all(isinstance(name, str) and DOMAIN.fullmatch(name) for name in names):
        raise RecordError("a domain of it has no proper name")
    if not isinstance(half_life, float) or not 0 < half_life < float("inf"):
        raise RecordError("its half-life is not a positive number")
    forms = _forms(*model.shape)
    if set(arrays) != {f"{i}.{name}" for i in range(len(names)) for name in forms}:
        raise RecordError("its arrays are not those of its domains")
    stats = [_stats({name: arrays[f"{i}.{name}"] for name in forms}, model) for i in range(len(names))]
    return Profile(model, half_life, dict(zip(names, stats, strict=True)))


def _stats(arrays: dict[str, npt.NDArray[Any]], model: RoutedModel) -> RoutingStats:
    for name, (shape, dtype) in _forms(*model.shape).items():
        array = arrays[name]
        if array.shape != shape or array.dtype != dtype:
            raise RecordError(f"its array {name} has another shape or type than its model")
        if not (np.isfinite(array).all() and (array >= 0).all() and (array < 1 << 62).all()):
            raise RecordError(f"its array {name} holds something else than sums")
    stats = RoutingStats(**arrays)
    exists = np.arange(model.shape[1]) < np.array(model.experts)[:, None]
    if stats.counts[:, ~exists].any() or stats.mass[:, ~exists].any() or stats.recent[~exists].any():
        raise RecordError("it counts experts that its model does not have")
    if (stats.reuse_hits > stats.reuse_pairs).any() or (stats.recall_hits > stats.recall_pairs).any():
        raise RecordError("it has more hits than pairs")
    return stats
