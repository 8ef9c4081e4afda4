"""The one settings model: what a run may be told, with its ranges and defaults.

Values come from the command line or from Python; every class checks itself when it is built.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from turbomoe.errors import SettingsError
from turbomoe.kv_types import AUTO, kv_type

MOE_POLICIES = ("adaptive", "frozen", "lru")


def state_dir() -> Path:
    """The one folder for everything turbomoe keeps between runs (``TURBOMOE_HOME``, else the user's cache folder)."""
    if home := os.environ.get("TURBOMOE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbomoe"


def require(ok: bool, what: str, fix: str = "") -> None:
    """Raise ``SettingsError`` unless ``ok``."""
    if not ok:
        raise SettingsError(what, fix=fix)


@dataclass(frozen=True)
class KVSettings:
    """How the past is stored. Types are names that ``kv_types`` knows; ``sink`` and ``recent`` count tokens.

    A type may be ``auto`` until ``insight.kv_auto`` has chosen one whose mean KL stays within ``budget`` nats a token
    (None: as much as 1.5 times what q8_0 costs, and 0.02 in any case).
    """

    type_k: str = "bf16"
    type_v: str = "bf16"
    sink: int = 64
    recent: int = 256
    means: bool = True
    budget: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type_k", kv_type(self.type_k))
        object.__setattr__(self, "type_v", kv_type(self.type_v))
        require(0 <= self.sink <= 1 << 20, f"--kv-sink must be between 0 and 1048576, not {self.sink}")
        require(0 <= self.recent <= 1 << 20, f"--kv-recent must be between 0 and 1048576, not {self.recent}")
        fine = self.budget is None or 0 < self.budget < inf
        require(fine, f"--kv-budget must be a positive number of nats, not {self.budget}")

    @property
    def is_auto(self) -> bool:
        """Whether a type is still to be chosen."""
        return AUTO in (self.type_k, self.type_v)


@dataclass(frozen=True)
class KVChoice:
    """What ``auto`` chose and why, for people and for ``--json``.

    ``why`` says why nothing was measured, or why the keys stay wide; KL in nats a token over ``tokens`` positions.
    ``tried`` and ``skipped`` list what was measured, and the types that this model's heads do not fit.
    """

    type_k: str
    type_v: str
    why: str = ""
    mean_kl: float | None = None
    budget: float | None = None
    q8_0: float | None = None
    tokens: int = 0
    tried: tuple[Mapping[str, Any], ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for a person."""
        sizes = (("KL", self.mean_kl), ("budget", self.budget), ("q8_0", self.q8_0))
        figures = ", ".join(f"{name} {_nats(size)}" for name, size in sizes if size is not None)
        measured = f" ({figures})" if figures else ""
        return f"KV cache: keys {self.type_k}, values {self.type_v}{measured}{f'; {self.why}' if self.why else ''}"


def _nats(size: float) -> str:
    return f"{size:.3f}" if size >= 0.01 else f"{size:.2g}"


@dataclass(frozen=True)
class ExpertSettings:
    """The expert cache. ``cache`` is ``off``, ``auto``, or a size in bytes that slots may take on the device."""

    cache: str | int = "off"
    hysteresis: float = 1.3
    half_life: float = 32.0
    min_sightings: int = 2
    swaps_per_layer_step: int = 1
    bytes_per_step: int = 1 << 30
    policy: str = "adaptive"

    def __post_init__(self) -> None:
        known = isinstance(self.cache, int) or self.cache in ("off", "auto")
        require(known, f"--moe-cache must be auto, off or a size, not {self.cache!r}")
        require(self.hysteresis >= 1.0, f"--moe-hysteresis must be at least 1, not {self.hysteresis}")
        require(self.half_life > 0, f"--moe-half-life must be positive, not {self.half_life}")
        for name, low, high in (
            ("min_sightings", 1, 1 << 20),
            ("swaps_per_layer_step", 0, 1 << 14),
            ("bytes_per_step", 0, 1 << 50),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and low <= value <= high
            require(whole, f"{name} must be a whole number between {low} and {high}, not {value!r}")
        require(self.policy in MOE_POLICIES, f"--moe-policy must be {', '.join(MOE_POLICIES)}, not {self.policy!r}")


@dataclass(frozen=True)
class EngineSettings:
    """Everything an engine is built from. ``ctx_size`` 0 means the model's own limit, capped by memory.

    ``body`` ``auto`` runs decoder layers by our own code where a family has it, ``stock`` always by transformers'.
    ``kv_choice`` tells why ``kv`` has its types where they were left to ``auto``.
    """

    ctx_size: int = 4096
    parallel: int = 1
    prefill_chunk: int = 512
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 0
    body: str = "auto"
    kv: KVSettings = field(default_factory=KVSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    kv_choice: KVChoice | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require(0 <= self.ctx_size <= 1 << 24, f"--ctx-size must be between 0 and 16777216, not {self.ctx_size}")
        require(1 <= self.parallel <= 1024, f"--parallel must be between 1 and 1024, not {self.parallel}")
        require(1 <= self.prefill_chunk <= 1 << 16, f"the prefill chunk must be 1..65536, not {self.prefill_chunk}")
        require(0 <= self.threads <= 4096, f"--threads must be between 0 and 4096, not {self.threads}")
        known = self.dtype in ("auto", "float32", "bfloat16", "float16")
        require(known, f"--dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")
        require(self.body in ("auto", "stock"), f"the body must be auto or stock, not {self.body!r}")
