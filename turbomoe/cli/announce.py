"""What a run will take, told before anything is loaded, and what is settled by it: context and KV types."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from turbomoe.config import EngineSettings
from turbomoe.units import format_bytes

if TYPE_CHECKING:
    from turbomoe.hardware.memory import DeviceMemory, MemoryTable, MemoryUse
    from turbomoe.models.base import Forecast

    Use = Callable[[Forecast, EngineSettings], MemoryUse]


@dataclass(frozen=True)
class Plan:
    """``wish`` as it was asked for, ``settings`` as they will run; their KV types may still be ``auto``.

    ``found`` is the memory that was there before loading.
    """

    wish: EngineSettings
    settings: EngineSettings
    forecast: Forecast
    asked: bool
    use: Use
    found: list[DeviceMemory]

    def settled(self, wish: EngineSettings) -> EngineSettings:
        """``wish`` with the tokens of context that it gets."""
        from turbomoe.engine.forecast import settle_context

        room = next((memory.available for memory in self.found if memory.device == wish.device), 0)
        return settle_context(self.forecast, wish, asked=self.asked, room=room)

    def table(self, settings: EngineSettings, check: int = 0) -> MemoryTable:
        """What ``settings`` take, where a check of KV types, over before the run begins, takes ``check`` bytes."""
        from turbomoe.hardware.memory import memory_table

        use = self.use(self.forecast, settings)
        use = replace(use, workspace=max(use.workspace, check - use.kv))
        return memory_table({settings.device: use}, self.found)

    def with_types(self, chosen: EngineSettings) -> EngineSettings:
        """The settings to run with once KV types are chosen; raises ``OutOfMemoryError`` when they do not fit."""
        settled = self.settled(replace(self.wish, kv=chosen.kv, kv_choice=chosen.kv_choice))
        self.table(settled).check_fits()
        return settled


def announce(forecast: Forecast, wish: EngineSettings, *, asked: bool = True, use: Use | None = None) -> Plan:
    """Print the memory table; raise ``OutOfMemoryError`` when the run does not fit.

    KV types that are ``auto`` and that this model was not checked for yet are counted as the widest they can become;
    the run is refused only when the narrowest do not fit either.
    """
    from turbomoe.engine.forecast import memory_use
    from turbomoe.hardware.memory import devices

    plan = Plan(wish, wish, forecast, asked, use or memory_use, devices())
    known = _known(plan)
    if known is None:
        return _announce_range(plan)
    settled = plan.settled(known)
    _print_and_check(plan.table(settled))
    return replace(plan, settings=settled)


def _known(plan: Plan) -> EngineSettings | None:
    """The wish with its KV types, where they are given or on disk."""
    if not plan.wish.kv.is_auto:
        return plan.wish
    from turbomoe.insight.kv_auto import known_kv_types

    trained, size = plan.forecast.context_length, plan.wish.ctx_size
    known = known_kv_types(plan.forecast, replace(plan.wish, ctx_size=size if plan.asked else min(size, trained)))
    return None if known is None else replace(known, ctx_size=size)


def _announce_range(plan: Plan) -> Plan:
    from turbomoe.insight.kv_check import check_bytes
    from turbomoe.insight.kv_ladder import candidates, rounds

    wish = plan.wish
    ends = [replace(wish, kv=kv) for kv in candidates(plan.forecast, wish.kv)]
    ends.sort(key=lambda settings: plan.use(plan.forecast, settings).kv)
    size = plan.settled(ends[0]).ctx_size
    least, most = (replace(end, ctx_size=size) for end in (ends[0], ends[-1]))
    check = max(check_bytes(plan.forecast, wish, arms) for arms in rounds(plan.forecast, wish.kv))
    print(plan.table(most, check).render(), file=sys.stderr)
    narrow = format_bytes(plan.use(plan.forecast, least).kv)
    print(f"kv is at most that, and {narrow} if the narrowest types will do", file=sys.stderr, flush=True)
    plan.table(least, check).check_fits()
    return replace(plan, settings=replace(wish, ctx_size=size))


def _print_and_check(table: MemoryTable) -> None:
    print(table.render(), file=sys.stderr, flush=True)
    table.check_fits()
